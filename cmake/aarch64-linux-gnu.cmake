# A build for 64-bit ARM Linux on another machine, with Debian's cross compiler and multiarch
# libraries; what it builds runs under QEMU (tests/arm64.cmake):
#
#   dpkg --add-architecture arm64 && apt-get update
#   apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user libsleef-dev:arm64 \
#     libzstd-dev:arm64 libxxhash-dev:arm64 libcmocka-dev:arm64 libsodium-dev:arm64 \
#     libhiredis-dev:arm64 libssl-dev:arm64
#   cmake -S . -B build/arm64 -G Ninja --toolchain cmake/aarch64-linux-gnu.cmake
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
if(NOT CMAKE_C_COMPILER)
  set(CMAKE_C_COMPILER aarch64-linux-gnu-gcc)
endif()
set(CMAKE_C_COMPILER_TARGET aarch64-linux-gnu) # for clang, which is every target's compiler

# Multiarch: headers that all architectures share, libraries in a folder of each. Without these,
# the host's are found first.
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(ENV{PKG_CONFIG_LIBDIR} /usr/lib/aarch64-linux-gnu/pkgconfig:/usr/share/pkgconfig)
set(CMAKE_IGNORE_PATH /usr/lib/${CMAKE_HOST_SYSTEM_PROCESSOR}-linux-gnu
  /usr/include/${CMAKE_HOST_SYSTEM_PROCESSOR}-linux-gnu)

# Its newest processor; tests that want an older one name it.
find_program(KVTILE_QEMU_ARM64 qemu-aarch64)
mark_as_advanced(KVTILE_QEMU_ARM64)
if(KVTILE_QEMU_ARM64)
  set(CMAKE_CROSSCOMPILING_EMULATOR ${KVTILE_QEMU_ARM64} -cpu max)
endif()
