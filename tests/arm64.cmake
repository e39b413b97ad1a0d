# The ARM64 kernels on a machine of another kind: a build of its own with the cross compiler, run
# under QEMU on processors with and without dot and matrix products. Included by
# tests/CMakeLists.txt; cmake/aarch64-linux-gnu.cmake lists the packages to install.
#
# Each kernel of an instruction set is checked on the oldest processor that has it, where instructions
# of a newer set are illegal; on newer processors in part.
set(missing)
foreach(tool aarch64-linux-gnu-gcc qemu-aarch64)
  string(MAKE_C_IDENTIFIER KVTILE_ARM64_${tool} variable)
  find_program(${variable} ${tool})
  mark_as_advanced(${variable})
  if(NOT ${variable})
    list(APPEND missing ${tool})
  endif()
endforeach()
foreach(library sleef zstd xxhash cmocka)
  if(NOT EXISTS /usr/lib/aarch64-linux-gnu/lib${library}.so)
    list(APPEND missing lib${library}:arm64)
  endif()
endforeach()

set(default ON)
if(missing OR CMAKE_CROSSCOMPILING OR KVTILE_SANITIZE OR NOT CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux"
   OR CMAKE_SYSTEM_PROCESSOR MATCHES "^(aarch64|arm64|ARM64)$")
  set(default OFF)
endif()
option(KVTILE_TEST_ARM64 "Build for ARM64 as well, and test that under QEMU" ${default})
if(NOT KVTILE_TEST_ARM64)
  if(missing AND NOT CMAKE_CROSSCOMPILING)
    list(JOIN missing ", " missing)
    message(STATUS "No tests of ARM64 under QEMU: not found: ${missing}")
  endif()
  return()
endif()

set(arm64 ${CMAKE_CURRENT_BINARY_DIR}/arm64)
set(arm64_programs check_kernels test_attention test_api test_numerics test_steps
  test_seal test_window test_threads test_snapshot_digest test_snapshot_golden snapshot_exchange)
set(arm64_compiler)
if(CMAKE_C_COMPILER_ID MATCHES "Clang") # which is every target's compiler
  set(arm64_compiler -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER})
endif()
add_test(NAME arm64_configure COMMAND ${CMAKE_COMMAND} -S ${PROJECT_SOURCE_DIR} -B ${arm64}
  -G ${CMAKE_GENERATOR} --toolchain ${PROJECT_SOURCE_DIR}/cmake/aarch64-linux-gnu.cmake
  -DCMAKE_BUILD_TYPE=Release -DKVTILE_WERROR=${KVTILE_WERROR}
  -DKVTILE_TOOLS=OFF -DKVTILE_EXAMPLES=OFF -DKVTILE_BENCH=OFF ${arm64_compiler})
add_test(NAME arm64_build COMMAND ${CMAKE_COMMAND} --build ${arm64} --target ${arm64_programs})
set_tests_properties(arm64_configure PROPERTIES FIXTURES_SETUP arm64_configured COST 1000)
set_tests_properties(arm64_build PROPERTIES FIXTURES_REQUIRED arm64_configured
  FIXTURES_SETUP arm64_built TIMEOUT 1200 COST 1000)

# kvtile_arm64_test(NAME CPU PROGRAM ARGUMENTS ...)
function(kvtile_arm64_test name cpu program)
  add_test(NAME arm64_${name} COMMAND ${KVTILE_ARM64_qemu_aarch64} -cpu ${cpu}
    ${arm64}/tests/${program} ${ARGN})
  set_tests_properties(arm64_${name} PROPERTIES FIXTURES_REQUIRED arm64_built TIMEOUT 1200
    ENVIRONMENT KVT_TEST_QUICK=1)
endfunction()

kvtile_arm64_test(check_kernels_neon cortex-a53 check_kernels --isa neon --seed 1)
kvtile_arm64_test(check_kernels_dotprod cortex-a76 check_kernels --isa dotprod --seed 1)
kvtile_arm64_test(check_kernels_i8mm max check_kernels --isa i8mm --seed 1)
kvtile_arm64_test(check_kernels_max max check_kernels --seed 2 --kernel qk_i8)
kvtile_arm64_test(numerics max test_numerics)
kvtile_arm64_test(steps max test_steps)
kvtile_arm64_test(seal max test_seal)
kvtile_arm64_test(snapshot_digest cortex-a53 test_snapshot_digest)
kvtile_arm64_test(snapshot_golden max test_snapshot_golden ${golden})
# Snapshots that are written here are read there, and back, to the same bytes.
kvtile_arm64_test(snapshot_exchange_check max snapshot_exchange check ${exchange})
set_tests_properties(arm64_snapshot_exchange_check PROPERTIES
  FIXTURES_REQUIRED "arm64_built;exchange")
file(MAKE_DIRECTORY ${exchange}-arm64)
kvtile_arm64_test(snapshot_exchange_write max snapshot_exchange write ${exchange}-arm64)
set_tests_properties(arm64_snapshot_exchange_write PROPERTIES FIXTURES_SETUP exchange_arm64)
add_test(NAME arm64_snapshot_exchange_back COMMAND snapshot_exchange check ${exchange}-arm64)
set_tests_properties(arm64_snapshot_exchange_back PROPERTIES FIXTURES_REQUIRED exchange_arm64)
kvtile_arm64_test(window max test_window)
kvtile_arm64_test(sticky_flags max test_threads sticky_flags_stay)
kvtile_arm64_test(attention max test_attention)
set_tests_properties(arm64_attention arm64_numerics arm64_seal PROPERTIES
  ENVIRONMENT KVT_TEST_QUICK=2)
foreach(long check_kernels_neon attention numerics seal steps) # minutes: not last, when nothing else is left to run
  set_tests_properties(arm64_${long} PROPERTIES COST 900)
endforeach()
# A cache uses the widest instruction set of the processor.
foreach(cpu cortex-a53 cortex-a76 max)
  kvtile_arm64_test(api_${cpu} ${cpu} test_api)
endforeach()
# An instruction set that the processor lacks is skipped by the checker.
foreach(lacking cortex-a53:dotprod cortex-a53:i8mm cortex-a76:i8mm)
  string(REPLACE ":" ";" lacking ${lacking})
  list(GET lacking 0 cpu)
  list(GET lacking 1 isa)
  kvtile_arm64_test(${cpu}_lacks_${isa} ${cpu} check_kernels --isa ${isa} --seed 1)
  set_tests_properties(arm64_${cpu}_lacks_${isa} PROPERTIES
    PASS_REGULAR_EXPRESSION "${isa}: skipped, not on this machine\n")
endforeach()
