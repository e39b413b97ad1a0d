# The common part of the toolchain files that use Debian's cross compilers and the libraries that
# .ci/sysroot unpacks into build/sysroot/ARCHITECTURE, or into KVTILE_SYSROOT/ARCHITECTURE. Set before:
#   triplet        of the compiler, of the C library under /usr and of the emulator's prefix
#   libraries      Debian's name of the folder of libraries
#   architecture   Debian's name of it
#   emulator       the command that runs its programs, or empty
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_LIBRARY_ARCHITECTURE ${libraries})
if(NOT CMAKE_C_COMPILER)
  set(CMAKE_C_COMPILER ${triplet}-gcc)
endif()

list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES KVTILE_SYSROOT)
if(NOT KVTILE_SYSROOT)
  get_filename_component(KVTILE_SYSROOT ${CMAKE_CURRENT_LIST_DIR}/../build/sysroot ABSOLUTE)
endif()
set(folder ${KVTILE_SYSROOT}/${architecture})
if(NOT EXISTS ${folder}/complete)
  message(FATAL_ERROR "No libraries of ${architecture} in ${folder}: run .ci/sysroot ${architecture}")
endif()
set(CMAKE_FIND_ROOT_PATH ${folder})
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
set(ENV{PKG_CONFIG_LIBDIR} ${folder}/usr/lib/${libraries}/pkgconfig)
set(ENV{PKG_CONFIG_SYSROOT_DIR} ${folder})
# Debian's libraries name no folder of theirs, and the linker looks for what they need.
string(APPEND CMAKE_EXE_LINKER_FLAGS_INIT " -Wl,-rpath-link,${folder}/usr/lib/${libraries}")
string(APPEND CMAKE_SHARED_LINKER_FLAGS_INIT " -Wl,-rpath-link,${folder}/usr/lib/${libraries}")
if(emulator)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${emulator})
endif()
