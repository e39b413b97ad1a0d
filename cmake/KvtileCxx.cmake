# KVTILE_HAS_CXX: whether examples in C++ can be built. The library needs C alone: a machine without
# a C++ compiler builds all else, and a project around gets no language that it has not enabled.
set(KVTILE_HAS_CXX OFF)
if(NOT KVTILE_EXAMPLES OR CMAKE_CROSSCOMPILING)
  return()
endif()
if(PROJECT_IS_TOP_LEVEL)
  include(CheckLanguage)
  check_language(CXX)
  if(CMAKE_CXX_COMPILER)
    enable_language(CXX)
  endif()
endif()
if(CMAKE_CXX_COMPILER_LOADED)
  set(KVTILE_HAS_CXX ON)
  if(KVTILE_SANITIZE AND NOT CMAKE_CXX_COMPILER_ID STREQUAL CMAKE_C_COMPILER_ID)
    set(KVTILE_HAS_CXX OFF) # whose runtime has to be the library's
  endif()
endif()
