# One test of tests/cxx.cmake: compile test_cxx.cpp and test_store.cpp with COMPILER and FLAGS, without a
# warning, and run them with the shared library.
if(NOT COMPILER)
  message(STATUS "kvtile_cxx_test: skipped, no such compiler, or not the one of the sanitizers")
  return()
endif()
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
get_filename_component(folder ${LIBRARY} DIRECTORY)
cmake_policy(VERSION 3.16)
list(REMOVE_ITEM FLAGS "")
foreach(program test_cxx test_store)
  execute_process(COMMAND ${COMPILER} ${FLAGS} -Wall -Wextra -Wconversion -Wshadow -Wold-style-cast
    -Wcast-qual -Wnon-virtual-dtor -Woverloaded-virtual -pedantic -Werror
    -I${SOURCE}/include ${SOURCE}/tests/cxx/${program}.cpp ${LIBRARY} -Wl,-rpath,${folder} -pthread
    -o ${WORK}/${program} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${COMPILER} ${FLAGS}: ${result}")
  endif()
  execute_process(COMMAND ${WORK}/${program} ${WORK} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${program}: ${result}")
  endif()
endforeach()
