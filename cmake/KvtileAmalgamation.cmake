# The target `amalgamation`: the library as one kvtile.c, with its headers and licence, in
# amalgamation/kvtile of the build tree. Needs Python 3; without it there is no such target.
find_package(Python3 COMPONENTS Interpreter QUIET)
if(NOT Python3_Interpreter_FOUND)
  return()
endif()
add_custom_target(amalgamation VERBATIM
  COMMAND ${Python3_EXECUTABLE} ${CMAKE_CURRENT_LIST_DIR}/amalgamate.py ${PROJECT_SOURCE_DIR}
          ${PROJECT_BINARY_DIR}/amalgamation/kvtile
  COMMENT "Writing amalgamation/kvtile")
