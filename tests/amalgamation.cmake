# The library in one file (cmake/amalgamate.py), compiled by itself with each compiler that is here,
# without the build's flags. Included by tests/CMakeLists.txt.
if(NOT TARGET amalgamation OR CMAKE_CROSSCOMPILING OR KVTILE_SANITIZE)
  return()
endif()
set(amalgamation ${CMAKE_CURRENT_BINARY_DIR}/amalgamation)
add_test(NAME amalgamation_make COMMAND ${Python3_EXECUTABLE}
  ${PROJECT_SOURCE_DIR}/cmake/amalgamate.py ${PROJECT_SOURCE_DIR} ${amalgamation}/kvtile)
set_tests_properties(amalgamation_make PROPERTIES FIXTURES_SETUP amalgamation LABELS package)

# kvtile_amalgamation_test(NAME ISA COMPILER FLAGS ...): amalgamation/check_amalgamation.cmake says
# what it does. Skipped where the compiler, the processor or the libraries lack.
function(kvtile_amalgamation_test name isa compiler)
  string(MAKE_C_IDENTIFIER "KVTILE_AMALGAMATION_${compiler}" variable)
  find_program(${variable} ${compiler})
  mark_as_advanced(${variable})
  add_test(NAME amalgamation_${name} COMMAND ${CMAKE_COMMAND} -DSTEP=${name}
    -DCOMPILER=${${variable}} -DISA=${isa} "-DFLAGS=${ARGN}" -DSOURCE=${PROJECT_SOURCE_DIR}
    -DAMALGAMATION=${amalgamation} -DWORK=${amalgamation}/${name} -DNM=${CMAKE_NM}
    -DVERSION=${PROJECT_VERSION}
    -DDUMP=$<TARGET_FILE:dump_golden> -DQEMU=${KVTILE_ARM64_qemu_aarch64}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/amalgamation/check_amalgamation.cmake)
  set_tests_properties(amalgamation_${name} PROPERTIES FIXTURES_REQUIRED amalgamation TIMEOUT 600
    LABELS package SKIP_REGULAR_EXPRESSION "kvtile_amalgamation_test: skipped")
endfunction()

set(options) # those of gcc and clang alone: the others are without
if(kvtile_crypt)
  list(APPEND options -DKVT_CRYPT)
endif()
if(kvtile_cipher)
  list(APPEND options -DKVT_CIPHER)
endif()
if(kvtile_redis)
  list(APPEND options -DKVT_REDIS)
endif()
if(kvtile_tls)
  list(APPEND options -DKVT_TLS)
endif()
set(avx2 -mavx2 -mfma -mf16c)
kvtile_amalgamation_test(refusals none cc)
if(kvtile_processor MATCHES "^(x86_64|AMD64|amd64)$")
  kvtile_amalgamation_test(gcc scalar gcc -std=c11 -O0 ${options})
  kvtile_amalgamation_test(clang scalar clang -std=c11 -O0 ${options})
  # By default, in GNU's dialect, both fuse multiplications and additions where they compile for
  # FMA.
  kvtile_amalgamation_test(gcc_avx2 avx2 gcc -std=gnu11 -O2 ${avx2})
  kvtile_amalgamation_test(clang_avx2 avx2 clang -std=gnu11 -O2 ${avx2})
  kvtile_amalgamation_test(gcc_avx512vnni avx512vnni gcc -std=c11 -O1 ${avx2} -mavx512f -mavx512bw
    -mavx512dq -mavx512vl -mavx512vnni)
  kvtile_amalgamation_test(aarch64 neon aarch64-linux-gnu-gcc -std=gnu11 -O2)
  kvtile_amalgamation_test(aarch64_i8mm i8mm aarch64-linux-gnu-gcc -std=c11 -O1
    -march=armv8.2-a+dotprod+i8mm)
elseif(kvtile_processor MATCHES "^(aarch64|arm64|ARM64)$")
  kvtile_amalgamation_test(gcc neon gcc -std=gnu11 -O2 ${options})
  kvtile_amalgamation_test(clang neon clang -std=gnu11 -O2 ${options})
else()
  kvtile_amalgamation_test(gcc scalar gcc -std=c11 -O0 ${options})
  kvtile_amalgamation_test(clang scalar clang -std=c11 -O0 ${options})
endif()
