# Tests of stores of prefixes; included by tests/CMakeLists.txt.
add_library(store_support STATIC memory_store.c store_scenes.c prefix_scene.c)
target_link_libraries(store_support PUBLIC snapshot_support PRIVATE kvtile_warnings
  kvtile::xxhash)

# kvtile_store_test(NAME [LIBRARIES ...]): tests/test_store_NAME.c on the public headers.
function(kvtile_store_test name)
  add_executable(test_store_${name} test_store_${name}.c)
  target_link_libraries(test_store_${name} PRIVATE store_support kvtile_warnings Threads::Threads
    ${ARGN})
  add_test(NAME store_${name} COMMAND test_store_${name})
  set_tests_properties(store_${name} PROPERTIES TIMEOUT 1200 SKIP_RETURN_CODE 77)
endfunction()

if(kvtile_crypt) # keys are SHA-256, by libsodium
  kvtile_store_test(prefix)
  kvtile_store_test(keys)
  kvtile_store_test(damage)
  kvtile_store_test(checkpoints)
  kvtile_store_test(prefix_faults)
  kvtile_store_test(liars)
  kvtile_store_test(prefix_stores store_values)
  kvtile_store_test(prefix_threads store_values)
  set_tests_properties(store_prefix_threads PROPERTIES LABELS threads)
endif()

# An independent reader of stored values, written from docs/format.md: it makes the keys by itself.
if(kvtile_crypt AND KVTILE_PYTHON AND NOT CMAKE_CROSSCOMPILING)
  add_executable(dump_values dump_values.c)
  target_link_libraries(dump_values PRIVATE kvtile::kvtile kvtile_warnings)
  add_test(NAME store_reader COMMAND ${KVTILE_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/read_value.py
    --golden ${golden}/VALUES ${PROJECT_SOURCE_DIR}/docs/format.md $<TARGET_FILE:dump_values> ${CMAKE_CURRENT_BINARY_DIR}/store_reader)
  set_tests_properties(store_reader PROPERTIES SKIP_RETURN_CODE 77)
endif()
