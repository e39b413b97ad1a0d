# Tests of stores of prefixes; included by tests/CMakeLists.txt.
add_library(store_support STATIC memory_store.c store_scenes.c)
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
  kvtile_store_test(damage)
  kvtile_store_test(checkpoints)
  kvtile_store_test(faults)
  kvtile_store_test(liars)
endif()
