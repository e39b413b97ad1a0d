# Machines of other kinds: 32-bit ARM under QEMU and 32-bit x86 natively, both with the scalar kernels;
# the library compiled for RISC-V, and against musl; big-endian machines and other systems refused.
# Each is a build of its own below the build tree. Included by tests/CMakeLists.txt;
# cmake/*-linux-gnu*.cmake list the packages to install.
if(CMAKE_CROSSCOMPILING OR KVTILE_SANITIZE OR NOT CMAKE_HOST_SYSTEM_NAME STREQUAL "Linux")
  return()
endif()
set(machines ${CMAKE_CURRENT_BINARY_DIR}/machines)
set(sysroot ${PROJECT_SOURCE_DIR}/build/sysroot)
set(minimal -DCMAKE_BUILD_TYPE=Release -DKVTILE_TESTS=OFF -DKVTILE_TOOLS=OFF -DKVTILE_EXAMPLES=OFF
  -DKVTILE_BENCH=OFF -DKVTILE_INSTALL=OFF)

# kvtile_find_tools(MISSING NAMES ...): the programs that are not here.
function(kvtile_find_tools missing)
  set(found)
  foreach(tool IN LISTS ARGN)
    string(MAKE_C_IDENTIFIER KVTILE_TOOL_${tool} variable)
    find_program(${variable} ${tool})
    mark_as_advanced(${variable})
    if(NOT ${variable})
      list(APPEND found ${tool})
    endif()
  endforeach()
  set(${missing} ${found} PARENT_SCOPE)
endfunction()

# ---- 32 bits ----

# kvtile_machine(NAME TOOLCHAIN TOOLS ...): configure and build; OFF where something is missing.
function(kvtile_machine name toolchain)
  string(TOUPPER ${name} upper)
  kvtile_find_tools(missing ${ARGN})
  if(NOT EXISTS ${sysroot}/${name}/complete)
    list(APPEND missing "libraries (.ci/sysroot ${name})")
  endif()
  set(default ON)
  if(missing)
    set(default OFF)
  endif()
  option(KVTILE_TEST_${upper} "Build for ${name} as well, and test that" ${default})
  if(NOT KVTILE_TEST_${upper})
    list(JOIN missing ", " missing)
    message(STATUS "No tests of ${name}: not found: ${missing}")
    return()
  endif()
  add_test(NAME ${name}_configure COMMAND ${CMAKE_COMMAND} -S ${PROJECT_SOURCE_DIR}
    -B ${machines}/${name} -G ${CMAKE_GENERATOR}
    --toolchain ${PROJECT_SOURCE_DIR}/cmake/${toolchain}.cmake -DCMAKE_BUILD_TYPE=Release
    -DKVTILE_WERROR=${KVTILE_WERROR} -DKVTILE_SYSROOT=${sysroot} -DKVTILE_EXAMPLES=OFF
    -DKVTILE_BENCH=OFF)
  add_test(NAME ${name}_build COMMAND ${CMAKE_COMMAND} --build ${machines}/${name} --target
    check_kernels test_api test_snapshot_golden test_snapshot_damage test_window kvtile_tool)
  set_tests_properties(${name}_configure PROPERTIES FIXTURES_SETUP ${name}_configured COST 800)
  set_tests_properties(${name}_build PROPERTIES FIXTURES_REQUIRED ${name}_configured
    FIXTURES_SETUP ${name}_built TIMEOUT 1200 COST 800)
endfunction()

# kvtile_machine_test(MACHINE NAME PROGRAM ARGUMENTS ...)
function(kvtile_machine_test machine name program)
  if(TEST ${machine}_build)
    add_test(NAME ${machine}_${name} COMMAND ${emulator} ${machines}/${machine}/${program} ${ARGN})
    set_tests_properties(${machine}_${name} PROPERTIES FIXTURES_REQUIRED ${machine}_built
      TIMEOUT 1200 ENVIRONMENT KVT_TEST_QUICK=1)
  endif()
endfunction()

set(loader /usr/i686-linux-gnu/lib/ld-linux.so.2)
kvtile_machine(armhf arm-linux-gnueabihf arm-linux-gnueabihf-gcc qemu-arm)
kvtile_machine(i386 i686-linux-gnu i686-linux-gnu-gcc ${loader})

set(emulator ${KVTILE_TOOL_qemu_arm} -L /usr/arm-linux-gnueabihf)
kvtile_machine_test(armhf api tests/test_api)
kvtile_machine_test(armhf snapshot_golden tests/test_snapshot_golden ${golden})
kvtile_machine_test(armhf window tests/test_window)
foreach(kernels seal_v_i4 gain_k softmax) # whose names have that
  kvtile_machine_test(armhf check_${kernels} tests/check_kernels --isa scalar --seed 1 --kernel
    ${kernels})
endforeach()

# A kernel for x86-64 need not run programs of i386: then QEMU does, or nobody.
set(i386_runs)
if(TEST i386_build)
  execute_process(COMMAND ${loader} --version RESULT_VARIABLE code OUTPUT_QUIET ERROR_QUIET)
  if(NOT code EQUAL 0)
    find_program(KVTILE_TOOL_qemu_i386 qemu-i386)
    mark_as_advanced(KVTILE_TOOL_qemu_i386)
    set(i386_runs ${KVTILE_TOOL_qemu_i386})
  endif()
endif()
set(emulator ${i386_runs} ${loader} --library-path /usr/i686-linux-gnu/lib)
foreach(kernels put_ seal_v_i4 gain_k mean_k pack_q) # which x87's wider registers would change
  kvtile_machine_test(i386 check_${kernels} tests/check_kernels --isa scalar --seed 1 --kernel
    ${kernels})
endforeach()
kvtile_machine_test(i386 api tests/test_api)
kvtile_machine_test(i386 snapshot_golden tests/test_snapshot_golden ${golden})
kvtile_machine_test(i386 snapshot_damage tests/test_snapshot_damage)
kvtile_machine_test(i386 window tests/test_window)
if(i386_runs)
  set_tests_properties(i386_snapshot_damage PROPERTIES ENVIRONMENT KVT_TEST_QUICK=2)
endif()
if(TEST i386_build) # a sparse file of 3 GiB is opened, read and found to be no snapshot
  add_test(NAME i386_large_file COMMAND sh -c "truncate -s 3G \"$2/large\" || exit 77
    ${i386_runs} ${loader} --library-path /usr/i686-linux-gnu/lib \"$1\" verify \"$2/large\"
    code=$?; rm -f \"$2/large\"; exit $((code != 1))"
    - ${machines}/i386/tools/kvtile ${machines}/i386)
  set_tests_properties(i386_large_file PROPERTIES FIXTURES_REQUIRED i386_built SKIP_RETURN_CODE 77
    PASS_REGULAR_EXPRESSION "not a kvtile snapshot" FAIL_REGULAR_EXPRESSION "cannot")
endif()

# ---- compiled only ----

set(compile_headers ${KVTILE_SLEEF_INCLUDE_DIR}/sleef.h ${KVTILE_ZSTD_INCLUDE_DIR}/zstd.h
  ${KVTILE_ZSTD_INCLUDE_DIR}/zstd_errors.h ${KVTILE_XXHASH_INCLUDE_DIR}/xxhash.h)
set(compile_crypt OFF)
if(KVTILE_SODIUM_INCLUDE_DIR)
  list(APPEND compile_headers ${KVTILE_SODIUM_INCLUDE_DIR}/sodium.h ${KVTILE_SODIUM_INCLUDE_DIR}/sodium)
  set(compile_crypt ON)
endif()
set(compile_redis OFF)
if(KVTILE_HIREDIS_INCLUDE_DIR)
  list(APPEND compile_headers ${KVTILE_HIREDIS_INCLUDE_DIR}/hiredis)
  set(compile_redis ON)
endif()
set(compile_tls OFF)
set(compile_cipher OFF)
if(KVTILE_SSL_INCLUDE_DIR AND KVTILE_OPENSSLCONF_INCLUDE_DIR)
  list(APPEND compile_headers ${KVTILE_SSL_INCLUDE_DIR}/openssl)
  set(compile_tls ${compile_redis})
  set(compile_cipher ${compile_crypt})
endif()

# kvtile_compile_test(NAME COMPILER PROCESSOR ARGUMENTS ...): the static library, with warnings as
# errors. The libraries' headers are this machine's: they do not differ.
function(kvtile_compile_test name compiler processor)
  kvtile_find_tools(missing ${compiler})
  if(missing)
    message(STATUS "No test compile_${name}: not found: ${missing}")
    return()
  endif()
  add_test(NAME compile_${name} COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR}
    -DBUILD=${machines}/${name} -DGENERATOR=${CMAKE_GENERATOR} -DCOMPILER=${compiler}
    -DPROCESSOR=${processor} -DNM=${CMAKE_NM} "-DOPTIONS=${minimal};-DKVTILE_CRYPT=${compile_crypt};-DKVTILE_REDIS=${compile_redis};-DKVTILE_TLS=${compile_tls};-DKVTILE_CIPHER=${compile_cipher}"
    "-DHEADERS=${compile_headers}" "-DOPENSSLCONF=${KVTILE_OPENSSLCONF_INCLUDE_DIR}/openssl"
    ${ARGN} -P ${CMAKE_CURRENT_SOURCE_DIR}/machines/compile.cmake)
  set_tests_properties(compile_${name} PROPERTIES TIMEOUT 1200 COST 300)
endfunction()

if(KVTILE_SLEEF_INCLUDE_DIR AND KVTILE_ZSTD_INCLUDE_DIR AND KVTILE_XXHASH_INCLUDE_DIR)
  kvtile_compile_test(riscv64 riscv64-linux-gnu-gcc riscv64)
  # As a system of 32 bits on a kernel of 64 configures it.
  kvtile_compile_test(armhf_on_arm64 arm-linux-gnueabihf-gcc aarch64)
  if(CMAKE_SYSTEM_PROCESSOR STREQUAL "x86_64") # the kernels of x86-64 have no system calls
    kvtile_compile_test(musl musl-gcc generic -DLIBC=/usr/lib/x86_64-linux-musl/libc.a)
  endif()
endif()

# ---- what is refused ----

add_test(NAME other_system_refused COMMAND ${CMAKE_COMMAND} --fresh -S ${PROJECT_SOURCE_DIR}
  -B ${machines}/other-system -G ${CMAKE_GENERATOR} -DCMAKE_SYSTEM_NAME=FreeBSD
  -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY ${minimal})
set_tests_properties(other_system_refused PROPERTIES PASS_REGULAR_EXPRESSION "kvtile is for Linux")
foreach(option CRYPT CIPHER REDIS TLS FUZZ) # neither a boolean nor the option's own word
  string(TOLOWER ${option} name)
  add_test(NAME option_${name}_refused COMMAND ${CMAKE_COMMAND} --fresh -S ${PROJECT_SOURCE_DIR}
    -B ${machines}/option-${name} -G ${CMAKE_GENERATOR} -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER}
    -DKVTILE_${option}=banana)
  set_tests_properties(option_${name}_refused PROPERTIES
    PASS_REGULAR_EXPRESSION "KVTILE_${option} is BANANA: it has to be")
endforeach()
add_test(NAME option_in_lower_case COMMAND ${CMAKE_COMMAND} --fresh -S ${PROJECT_SOURCE_DIR}
  -B ${machines}/option-lower -G ${CMAKE_GENERATOR} -DCMAKE_C_COMPILER=${CMAKE_C_COMPILER} ${minimal}
  -DKVTILE_CRYPT=auto -DKVTILE_CIPHER=auto -DKVTILE_REDIS=off -DKVTILE_TLS=auto
  -DKVTILE_FUZZ=off)
set_tests_properties(option_in_lower_case PROPERTIES
  PASS_REGULAR_EXPRESSION "KVTILE_REDIS, hiredis\\): OFF.*KVTILE_TLS, OpenSSL\\): OFF")

# Any compiler that knows such a target will do: nothing is linked.
kvtile_find_tools(missing aarch64-linux-gnu-gcc arm-linux-gnueabihf-gcc clang)
foreach(compiler aarch64-linux-gnu-gcc:-mbig-endian arm-linux-gnueabihf-gcc:-mbig-endian
    clang:--target=aarch64_be-linux-gnu)
  string(REPLACE ":" ";" compiler ${compiler})
  list(GET compiler 0 program)
  list(GET compiler 1 flag)
  if(program IN_LIST missing)
    continue()
  endif()
  add_test(NAME big_endian_refused COMMAND ${CMAKE_COMMAND} --fresh -S ${PROJECT_SOURCE_DIR}
    -B ${machines}/big-endian -G ${CMAKE_GENERATOR} -DCMAKE_SYSTEM_NAME=Linux
    -DCMAKE_SYSTEM_PROCESSOR=aarch64_be -DCMAKE_C_COMPILER=${program} -DCMAKE_C_FLAGS=${flag}
    -DCMAKE_TRY_COMPILE_TARGET_TYPE=STATIC_LIBRARY ${minimal})
  set_tests_properties(big_endian_refused PROPERTIES
    PASS_REGULAR_EXPRESSION "kvtile needs a little-endian machine")
  break()
endforeach()
