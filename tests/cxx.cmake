# kvtile.hpp and store.hpp with the C++ compilers that are here: as C++17 and C++20, with exceptions and without.
# Included by tests/CMakeLists.txt. The project itself is C alone: each test compiles its program.
if(CMAKE_CROSSCOMPILING)
  return()
endif()
foreach(compiler g++ clang++)
  string(MAKE_C_IDENTIFIER "KVTILE_${compiler}" variable)
  find_program(${variable} ${compiler})
  mark_as_advanced(${variable})
  set(path ${${variable}})
  if(KVTILE_SANITIZE) # whose runtime has to be the library's
    set(its g++)
    if(CMAKE_C_COMPILER_ID MATCHES "Clang")
      set(its clang++)
    endif()
    if(NOT compiler STREQUAL its)
      set(path)
    endif()
  endif()
  foreach(standard 17 20)
    foreach(exceptions "" -fno-exceptions)
      add_test(NAME cxx_${compiler}_${standard}${exceptions} COMMAND ${CMAKE_COMMAND}
        "-DCOMPILER=${path}" "-DFLAGS=-std=c++${standard};${exceptions};${sanitize_options}"
        -DSOURCE=${PROJECT_SOURCE_DIR} -DLIBRARY=$<TARGET_FILE:kvtile_shared>
        -DWORK=${CMAKE_CURRENT_BINARY_DIR}/cxx/${compiler}-${standard}${exceptions}
        -P ${CMAKE_CURRENT_SOURCE_DIR}/cxx/check_cxx.cmake)
      set_tests_properties(cxx_${compiler}_${standard}${exceptions} PROPERTIES TIMEOUT 600
        SKIP_REGULAR_EXPRESSION "kvtile_cxx_test: skipped")
    endforeach()
  endforeach()
endforeach()
