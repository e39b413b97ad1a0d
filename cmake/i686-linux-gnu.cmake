# A build for 32-bit x86 Linux on an x86-64 one, which runs it (tests/machines.cmake):
#
#   apt-get install gcc-i686-linux-gnu libc6-dev-i386-cross
#   .ci/sysroot i386
#   cmake -S . -B build/i386 -G Ninja --toolchain cmake/i686-linux-gnu.cmake
set(CMAKE_SYSTEM_PROCESSOR i686)
set(triplet i686-linux-gnu)
set(libraries i386-linux-gnu)
set(architecture i386)
# The dynamic loader is not where the programs look for it.
set(emulator /usr/i686-linux-gnu/lib/ld-linux.so.2 --library-path /usr/i686-linux-gnu/lib)
include(${CMAKE_CURRENT_LIST_DIR}/KvtileSysroot.cmake)
