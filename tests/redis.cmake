# Tests of stores on Redis; included by tests/CMakeLists.txt. All but store_redis_link start servers of
# their own, on free ports of the loopback, and are skipped where there is no redis-server.
add_library(redis_support STATIC redis_fake.c redis_support.c redis_values.c)
target_link_libraries(redis_support PUBLIC test_support PRIVATE kvtile_warnings)

function(kvtile_redis_test name)
  add_executable(test_${name} test_${name}.c)
  target_link_libraries(test_${name} PRIVATE redis_support kvtile_warnings Threads::Threads)
  if(kvtile_redis)
    target_compile_definitions(test_${name} PRIVATE KVT_TEST_REDIS)
  endif()
  if(kvtile_tls)
    target_compile_definitions(test_${name} PRIVATE KVT_TEST_TLS)
  endif()
  add_test(NAME ${name} COMMAND test_${name})
  set_tests_properties(${name} PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77 LABELS "${ARGN}")
endfunction()

kvtile_redis_test(store_redis threads)
if(kvtile_redis AND kvtile_crypt)
  kvtile_redis_test(store_soak)
endif()
if(kvtile_redis)
  kvtile_redis_test(store_redis_faults)
  kvtile_redis_test(store_cluster)
  kvtile_test(store_redis_link)
  target_include_directories(test_store_redis_link PRIVATE ${PROJECT_SOURCE_DIR})
  target_compile_definitions(test_store_redis_link PRIVATE KVT_HAVE_REDIS)
  target_link_libraries(test_store_redis_link PRIVATE kvtile_static kvtile::hiredis)
  target_link_options(test_store_redis_link PRIVATE -Wl,--wrap=socket)
endif()

# The same by TLS, and what is of TLS alone. Skipped where there is no program openssl, which makes the
# certificates, or where redis-server has no TLS.
if(kvtile_tls)
  set(certificates ${CMAKE_CURRENT_SOURCE_DIR}/make_certificates.sh)
  foreach(name store_redis store_cluster)
    add_test(NAME ${name}_by_tls COMMAND test_${name} ${certificates})
    set_tests_properties(${name}_by_tls PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77)
  endforeach()
  set_tests_properties(store_redis_by_tls PROPERTIES LABELS threads ENVIRONMENT
    TSAN_OPTIONS=suppressions=${CMAKE_CURRENT_SOURCE_DIR}/thread_sanitizer.supp)
  add_executable(test_store_redis_tls test_store_redis_tls.c)
  target_link_libraries(test_store_redis_tls PRIVATE redis_support kvtile_warnings kvtile::ssl
    kvtile::crypto Threads::Threads) # it has servers of its own
  add_test(NAME store_redis_tls COMMAND test_store_redis_tls ${certificates})
  set_tests_properties(store_redis_tls PROPERTIES TIMEOUT 600 SKIP_RETURN_CODE 77)
endif()

if(kvtile_redis) # not a test: it measures
  add_executable(time_redis EXCLUDE_FROM_ALL time_redis.c)
  target_link_libraries(time_redis PRIVATE redis_support kvtile_warnings)
endif()
