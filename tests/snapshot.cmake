# Tests of snapshots and of the command line; included by tests/CMakeLists.txt.
add_library(snapshot_support STATIC snapshot_support.c snapshot_sign.c subject.c)
target_link_libraries(snapshot_support PUBLIC test_support PRIVATE kvtile_warnings kvtile::xxhash)

foreach(name snapshot snapshot_damage snapshot_flips snapshot_bounds snapshot_options snapshot_delta
    snapshot_map snapshot_ranges snapshot_convert snapshot_parts snapshot_files snapshot_rows
    snapshot_parents snapshot_state snapshot_overlap
    snapshot_working seal fork select remove
    checkpoint accounting operations 4bit)
  add_executable(test_${name} test_${name}.c)
  target_link_libraries(test_${name} PRIVATE snapshot_support kvtile_warnings)
  add_test(NAME ${name} COMMAND test_${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 1200)
endforeach()
target_link_libraries(test_snapshot_bounds PRIVATE kvtile::xxhash)
target_link_libraries(test_snapshot_parents PRIVATE kvtile::xxhash)
target_link_libraries(test_snapshot_overlap PRIVATE Threads::Threads)
set_tests_properties(snapshot_overlap PROPERTIES LABELS threads)
target_sources(test_operations PRIVATE operations_model.c operations_forms.c
  operations_attention.c operations_files.c operations_store.c operations_convert.c operations_late.c
  memory_store.c)
target_link_libraries(test_operations PRIVATE Threads::Threads m)
set_tests_properties(operations PROPERTIES LABELS threads)

# The system calls of a save, taken by the linker: in the static library, which is named first.
add_executable(test_snapshot_calls test_snapshot_calls.c)
target_link_libraries(test_snapshot_calls PRIVATE kvtile_static snapshot_support kvtile_warnings)
foreach(call open read pread write writev fsync close rename unlink ftruncate fchmod fchown
    fsetxattr flock fcntl getrandom)
  target_link_options(test_snapshot_calls PRIVATE -Wl,--wrap=${call})
endforeach()
add_test(NAME snapshot_calls COMMAND test_snapshot_calls)

# Each of its system calls and allocations failing, or its last one; call_faults.c. (Where pointers
# have 32 bits the calls have other names.)
set(taken_calls open openat read pread write pwrite writev fsync close rename renameat unlink unlinkat
  ftruncate fchmod fstat stat lstat fstatat mkdir mkdirat futimens flock fcntl getrandom mmap munmap
  opendir fdopendir readdir realpath malloc calloc realloc aligned_alloc)
if(CMAKE_SIZEOF_VOID_P EQUAL 8)
  foreach(name faults crash)
    add_executable(test_snapshot_${name} test_snapshot_${name}.c snapshot_scenes.c call_faults.c)
    target_link_libraries(test_snapshot_${name} PRIVATE kvtile_static snapshot_support
      kvtile::xxhash kvtile_warnings Threads::Threads)
    foreach(call IN LISTS taken_calls)
      target_link_options(test_snapshot_${name} PRIVATE -Wl,--wrap=${call})
    endforeach()
    add_test(NAME snapshot_${name} COMMAND test_snapshot_${name})
    set_tests_properties(snapshot_${name} PROPERTIES TIMEOUT 1200)
  endforeach()
endif()
foreach(name faults crash flips)
  if(TARGET test_snapshot_${name} AND kvtile_crypt)
    target_compile_definitions(test_snapshot_${name} PRIVATE KVT_TEST_CRYPT)
  endif()
endforeach()

# Unit tests of single files: they include internal headers.
foreach(name codec image digest)
  add_executable(test_snapshot_${name} test_snapshot_${name}.c)
  target_include_directories(test_snapshot_${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(test_snapshot_${name} PRIVATE test_support kvtile_warnings kvtile_static)
  add_test(NAME snapshot_${name} COMMAND test_snapshot_${name})
endforeach()
target_link_libraries(test_snapshot_digest PRIVATE kvtile::xxhash kvtile_flags)

# Likewise, of src/snapshot/crypt.c.
set(golden ${CMAKE_CURRENT_SOURCE_DIR}/golden)
set(crypt_tests crypt_none)
if(kvtile_crypt)
  set(crypt_tests crypt crypt_faults)
endif()
foreach(name IN LISTS crypt_tests)
  add_executable(test_snapshot_${name} test_snapshot_${name}.c)
  target_include_directories(test_snapshot_${name} PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(test_snapshot_${name} PRIVATE kvtile_static test_support kvtile_warnings)
  add_test(NAME snapshot_${name} COMMAND test_snapshot_${name} ${golden})
  set_tests_properties(snapshot_${name} PROPERTIES TIMEOUT 1200 LABELS threads)
  if(kvtile_crypt)
    target_sources(test_snapshot_${name} PRIVATE crypt_support.c)
    target_link_libraries(test_snapshot_${name} PRIVATE kvtile::sodium)
  endif()
endforeach()

# Likewise, of src/snapshot/cipher.c; once more where OpenSSL has no ciphers, as its FIPS provider has
# not all.
if(kvtile_crypt)
  add_executable(test_snapshot_cipher test_snapshot_cipher.c)
  target_include_directories(test_snapshot_cipher PRIVATE ${PROJECT_SOURCE_DIR})
  target_link_libraries(test_snapshot_cipher PRIVATE kvtile_static test_support kvtile_warnings
    kvtile::sodium)
  add_test(NAME snapshot_cipher COMMAND test_snapshot_cipher)
  if(kvtile_cipher)
    target_compile_definitions(test_snapshot_cipher PRIVATE KVT_TEST_CIPHER)
    target_link_libraries(test_snapshot_cipher PRIVATE kvtile::ssl kvtile::crypto)
    add_test(NAME snapshot_cipher_none COMMAND test_snapshot_cipher none)
    set_tests_properties(snapshot_cipher_none PROPERTIES SKIP_RETURN_CODE 77
      ENVIRONMENT "OPENSSL_CONF=${CMAKE_CURRENT_SOURCE_DIR}/openssl_no_ciphers.cnf")
  endif()
endif()

# Run by hand.
add_executable(time_crypt EXCLUDE_FROM_ALL time_crypt.c)
target_include_directories(time_crypt PRIVATE ${PROJECT_SOURCE_DIR})
target_link_libraries(time_crypt PRIVATE kvtile_static kvtile_warnings)

set(golden_files)
foreach(name i8 i8-plain i8-large i8-sink f16-f32 groups empty v-in-k window checkpoints tag moved
    i4 i4-i5 i4-i5-cut i8-i4 i4-checkpoints i8-native f16-f32-native v-in-k-native
    checkpoints-native i4-native i4-i5-native delta delta-again)
  list(APPEND golden_files ${golden}/${name}.kvt)
endforeach()
add_executable(test_snapshot_golden test_snapshot_golden.c)
target_link_libraries(test_snapshot_golden PRIVATE test_support kvtile_warnings)
add_test(NAME snapshot_golden COMMAND test_snapshot_golden ${golden})

# Writes the files in golden/; run by hand, once for each version of the format.
add_executable(make_golden EXCLUDE_FROM_ALL make_golden.c)
target_link_libraries(make_golden PRIVATE kvtile::kvtile kvtile_warnings)

# Snapshots from machine to machine; here to itself, in arm64.cmake to another kind and back.
set(exchange ${CMAKE_CURRENT_BINARY_DIR}/exchange)
file(MAKE_DIRECTORY ${exchange})
add_executable(snapshot_exchange snapshot_exchange.c)
target_link_libraries(snapshot_exchange PRIVATE kvtile::kvtile kvtile_warnings)
add_test(NAME snapshot_exchange_write COMMAND snapshot_exchange write ${exchange})
add_test(NAME snapshot_exchange_check COMMAND snapshot_exchange check ${exchange})
set_tests_properties(snapshot_exchange_write PROPERTIES FIXTURES_SETUP exchange)
set_tests_properties(snapshot_exchange_check PROPERTIES FIXTURES_REQUIRED exchange)

# An independent reader, written from docs/format.md alone.
add_executable(dump_golden dump_golden.c)
target_link_libraries(dump_golden PRIVATE kvtile::kvtile kvtile_warnings)
find_package(Python3 COMPONENTS Interpreter)
set(KVTILE_PYTHON ${Python3_EXECUTABLE})
foreach(candidate ${Python3_EXECUTABLE} /usr/bin/python3) # the first one may lack numpy
  execute_process(COMMAND ${candidate} -c "import numpy" RESULT_VARIABLE without OUTPUT_QUIET
    ERROR_QUIET)
  if(without EQUAL 0)
    set(KVTILE_PYTHON ${candidate})
    break()
  endif()
endforeach()
if(KVTILE_PYTHON)
  foreach(mode compare damage)
    if(mode STREQUAL "compare" AND CMAKE_CROSSCOMPILING) # scripts run programs by themselves
      continue()
    endif()
    set(program)
    if(mode STREQUAL "compare")
      set(program $<TARGET_FILE:dump_golden>)
    endif()
    add_test(NAME snapshot_second_reader_${mode} COMMAND ${KVTILE_PYTHON}
      ${CMAKE_CURRENT_SOURCE_DIR}/read_snapshot.py --${mode} ${program} ${golden_files})
    set_tests_properties(snapshot_second_reader_${mode} PROPERTIES SKIP_RETURN_CODE 77)
  endforeach()
  add_test(NAME snapshot_second_reader_encrypted COMMAND ${KVTILE_PYTHON}
    ${CMAKE_CURRENT_SOURCE_DIR}/read_encrypted.py --golden ${golden}/encrypted.kvx)
  add_test(NAME snapshot_example COMMAND ${KVTILE_PYTHON}
    ${CMAKE_CURRENT_SOURCE_DIR}/annotate_snapshot.py --check ${PROJECT_SOURCE_DIR}/docs/format.md
    ${golden}/example.kvt)
  set_tests_properties(snapshot_example PROPERTIES SKIP_RETURN_CODE 77)
else()
  add_test(NAME snapshot_second_reader_needs_python3 COMMAND ${CMAKE_COMMAND} -E true)
  set_tests_properties(snapshot_second_reader_needs_python3 PROPERTIES DISABLED TRUE)
endif()

if(TARGET kvtile_tool AND NOT CMAKE_CROSSCOMPILING)
  add_executable(make_snapshot make_snapshot.c)
  target_link_libraries(make_snapshot PRIVATE kvtile::kvtile kvtile_warnings)
  add_test(NAME tool COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/test_tool.sh
    $<TARGET_FILE:kvtile_tool> ${golden} ${CMAKE_CURRENT_BINARY_DIR}/test_tool
    $<TARGET_FILE:make_snapshot>)
  add_test(NAME tool_store COMMAND sh ${CMAKE_CURRENT_SOURCE_DIR}/test_tool_store.sh
    $<TARGET_FILE:kvtile_tool> ${CMAKE_CURRENT_BINARY_DIR}/test_tool_store
    $<TARGET_FILE:make_snapshot>)
  set_tests_properties(tool_store PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600)
  if(KVTILE_PYTHON)
    add_test(NAME tool_arrays COMMAND ${KVTILE_PYTHON} ${CMAKE_CURRENT_SOURCE_DIR}/test_tool_arrays.py
      $<TARGET_FILE:kvtile_tool> ${CMAKE_CURRENT_BINARY_DIR}/test_tool_arrays ${golden_files})
    set_tests_properties(tool_arrays PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600)
  endif()
endif()
