# A build for 32-bit ARM Linux (hard float) on another machine; runs under QEMU
# (tests/machines.cmake):
#
#   apt-get install gcc-arm-linux-gnueabihf libc6-dev-armhf-cross qemu-user
#   .ci/sysroot armhf
#   cmake -S . -B build/armhf -G Ninja --toolchain cmake/arm-linux-gnueabihf.cmake
set(CMAKE_SYSTEM_PROCESSOR armv7l)
set(triplet arm-linux-gnueabihf)
set(libraries arm-linux-gnueabihf)
set(architecture armhf)
set(emulator qemu-arm -L /usr/arm-linux-gnueabihf)
include(${CMAKE_CURRENT_LIST_DIR}/KvtileSysroot.cmake)
