# One test of tests/amalgamation.cmake: STEP says which.
#
#   refusals  what would change stored bytes does not compile: -ffast-math, and parts of it
#   others    AMALGAMATION/kvtile/kvtile.c compiles with COMPILER and FLAGS without a warning, with
#             examples/first.c and package/use.c, which run; its widest instruction set is ISA, which
#             attends as scalar does (attend.c); the golden snapshots that this build makes have the
#             hashes of tests/golden, and those in there hold what the library reads from them,
#             byte for byte.
cmake_minimum_required(VERSION 3.25)

file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK})
set(golden ${SOURCE}/tests/golden)

function(skip why)
  message(STATUS "kvtile_amalgamation_test: skipped, ${why}")
endfunction()

# execute(RESULT COMMAND ...): what it printed; result is its exit status.
function(execute result)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${WORK} RESULT_VARIABLE status
    OUTPUT_VARIABLE output ERROR_VARIABLE errors)
  set(${result} "${output}" PARENT_SCOPE)
  set(errors "${errors}" PARENT_SCOPE)
  set(status "${status}" PARENT_SCOPE)
endfunction()

# check(RESULT COMMAND ...): likewise, but it has to succeed.
macro(check result)
  execute(${result} ${ARGN})
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "${ARGN}\n${${result}}${errors}\n=> ${status}")
  endif()
endmacro()

if(NOT COMPILER)
  skip("no such compiler")
  return()
endif()

if(STEP STREQUAL "refusals")
  set(options -std=c11 -fsyntax-only ${AMALGAMATION}/kvtile/kvtile.c)
  check(output ${COMPILER} ${options})
  foreach(flag -ffast-math -Ofast -ffinite-math-only)
    execute(output ${COMPILER} ${options} ${flag})
    if(status EQUAL 0 OR NOT errors MATCHES "needs exact floating point")
      message(SEND_ERROR "compiles with ${flag}, or fails for another reason:\n${errors}")
    endif()
  endforeach()
  return()
endif()

set(run)
if(STEP MATCHES "^aarch64")
  if(NOT QEMU OR NOT EXISTS /usr/lib/aarch64-linux-gnu/libsleef.so)
    skip("no QEMU, or no libraries for it")
    return()
  endif()
  set(run ${QEMU} -cpu cortex-a53)
  if(FLAGS MATCHES "i8mm")
    set(run ${QEMU} -cpu max)
  endif()
endif()

check(output ${COMPILER} ${FLAGS} -Wall -Wextra -Werror -fPIC -c
  ${AMALGAMATION}/kvtile/kvtile.c -o kvtile.o)
set(libraries -lsleef -lzstd -lxxhash -lm -lpthread)
foreach(optional CRYPT:sodium CIPHER:crypto REDIS:hiredis TLS:ssl TLS:crypto)
  string(REPLACE ":" ";" optional ${optional})
  list(GET optional 0 macro)
  list(GET optional 1 library)
  if(FLAGS MATCHES "-DKVT_${macro}")
    list(APPEND libraries -l${library})
  endif()
endforeach()
foreach(program examples/first.c tests/package/use.c tests/amalgamation/attend.c tests/make_golden.c
    tests/dump_golden.c)
  get_filename_component(name ${program} NAME_WE)
  check(output ${COMPILER} ${FLAGS} -D_POSIX_C_SOURCE=200809L "-DKVTILE_VERSION=\"${VERSION}\""
    -I${AMALGAMATION}
    ${SOURCE}/${program} kvtile.o ${libraries} -o ${name})
endforeach()

# What it exports is what the headers declare.
if(NM AND NOT run)
  check(output ${COMPILER} -shared kvtile.o ${libraries} -o libkvtile.so)
  check(output ${CMAKE_COMMAND} -DNM=${NM} -DLIBRARY=${WORK}/libkvtile.so
    -DINCLUDE=${AMALGAMATION}/kvtile -P ${SOURCE}/tests/check_symbols.cmake)
endif()

execute(output ${run} ./first)
if(NOT status EQUAL 0 AND FLAGS MATCHES "avx" AND status MATCHES "llegal")
  skip("not on this processor")
  return()
elseif(NOT output STREQUAL "saved: 100 tokens\n")
  message(FATAL_ERROR "first: ${output}${errors}\n=> ${status}")
endif()

check(output ${run} ./use)

# The kernels that the flags enable are there, and are right.
check(output ${run} ./attend ${ISA})

check(hashes ${run} ./make_golden .)
file(READ ${golden}/HASHES expected)
foreach(list hashes expected) # in any order
  string(STRIP "${${list}}" ${list})
  string(REPLACE "\n" ";" ${list} "${${list}}")
  list(SORT ${list})
endforeach()
if(NOT hashes STREQUAL expected)
  message(FATAL_ERROR "this build stores other bytes:\n${hashes}\nexpected:\n${expected}")
endif()

file(GLOB snapshots ${golden}/*.kvt)
list(FILTER snapshots EXCLUDE REGEX "/example\\.kvt$") # docs/format.md's, of another shape
if(NOT snapshots)
  message(FATAL_ERROR "no golden snapshots")
endif()
foreach(snapshot IN LISTS snapshots)
  execute_process(COMMAND ${run} ./dump_golden ${snapshot} WORKING_DIRECTORY ${WORK}
    OUTPUT_FILE ${WORK}/here RESULT_VARIABLE status)
  execute_process(COMMAND ${DUMP} ${snapshot} WORKING_DIRECTORY ${WORK}
    OUTPUT_FILE ${WORK}/library RESULT_VARIABLE library)
  file(SHA256 ${WORK}/here here_hash)
  file(SHA256 ${WORK}/library library_hash)
  if(NOT status EQUAL 0 OR NOT library EQUAL 0 OR NOT here_hash STREQUAL library_hash)
    message(SEND_ERROR "${snapshot}: ${status}, ${library}; what is read from it differs")
  endif()
endforeach()
