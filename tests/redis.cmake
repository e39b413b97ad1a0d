# Tests of stores on Redis; included by tests/CMakeLists.txt. They start servers of their own, on free
# ports of the loopback, and are skipped where there is no redis-server.
add_library(redis_support STATIC redis_support.c redis_values.c)
target_link_libraries(redis_support PUBLIC test_support PRIVATE kvtile_warnings)

function(kvtile_redis_test name)
  add_executable(test_${name} test_${name}.c)
  target_link_libraries(test_${name} PRIVATE redis_support kvtile_warnings Threads::Threads)
  if(kvtile_redis)
    target_compile_definitions(test_${name} PRIVATE KVT_TEST_REDIS)
  endif()
  add_test(NAME ${name} COMMAND test_${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77 LABELS "${ARGN}")
endfunction()

kvtile_redis_test(store_redis threads)
if(kvtile_redis AND kvtile_crypt)
  kvtile_redis_test(store_soak)
endif()
