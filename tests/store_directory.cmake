# Tests of the directory store and of tiers; included by tests/CMakeLists.txt.
add_library(store_values STATIC store_values.c)
target_link_libraries(store_values PUBLIC test_support PRIVATE kvtile_warnings)

foreach(name directory shared tiers)
  add_executable(test_store_${name} test_store_${name}.c)
  target_link_libraries(test_store_${name} PRIVATE store_values kvtile_warnings Threads::Threads)
  add_test(NAME store_${name} COMMAND test_store_${name})
  set_tests_properties(store_${name} PROPERTIES TIMEOUT 1200 SKIP_RETURN_CODE 77)
endforeach()
set_tests_properties(store_shared PROPERTIES LABELS threads)

# Each system call of the directory store failing, or its process's last one; call_faults.c, with
# the list of calls in snapshot.cmake.
if(CMAKE_SIZEOF_VOID_P EQUAL 8)
  foreach(name faults crash)
    add_executable(test_store_${name} test_store_${name}.c call_faults.c)
    target_link_libraries(test_store_${name} PRIVATE kvtile_static store_values kvtile_warnings
      Threads::Threads)
    foreach(call IN LISTS taken_calls)
      target_link_options(test_store_${name} PRIVATE -Wl,--wrap=${call})
    endforeach()
    add_test(NAME store_${name} COMMAND test_store_${name})
    set_tests_properties(store_${name} PROPERTIES TIMEOUT 1200)
  endforeach()
  foreach(call nanosleep clock_gettime)
    target_link_options(test_store_faults PRIVATE -Wl,--wrap=${call})
  endforeach()
endif()
