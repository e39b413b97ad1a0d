# `cpack -G TGZ`: two archives. The first alone runs the programs; both together, unpacked into any
# folder, are found by find_package, and a program is built with each library and run.
cmake_minimum_required(VERSION 3.25)
set(here ${CMAKE_CURRENT_LIST_DIR}/../package)
file(REMOVE_RECURSE ${WORK})
file(MAKE_DIRECTORY ${WORK}/packed ${WORK}/runtime ${WORK}/both)
foreach(variable CFLAGS LDFLAGS DESTDIR CMAKE_PREFIX_PATH PKG_CONFIG_PATH LD_LIBRARY_PATH)
  unset(ENV{${variable}})
endforeach()

function(check)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${WORK} RESULT_VARIABLE result
    OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\n${output}\n=> ${result}")
  endif()
endfunction()

check(${CPACK} -G TGZ --config ${BUILD}/CPackConfig.cmake -C "${CONFIG}" -B ${WORK}/packed)
file(GLOB archives RELATIVE ${WORK}/packed ${WORK}/packed/*.tar.gz)
set(system "-[0-9.]+-[a-z]+-[a-z0-9_]+")
if(NOT "${archives}" MATCHES "^kvtile${system}\\.tar\\.gz;kvtile-dev${system}\\.tar\\.gz$" AND
   NOT "${archives}" MATCHES "^kvtile-dev${system}\\.tar\\.gz;kvtile${system}\\.tar\\.gz$")
  message(FATAL_ERROR "archives: ${archives}")
endif()
foreach(archive IN LISTS archives)
  # Both have what they hold in one folder.
  check(tar -xzf ${WORK}/packed/${archive} -C ${WORK}/both --strip-components=1)
  if(NOT archive MATCHES "^kvtile-dev")
    check(tar -xzf ${WORK}/packed/${archive} -C ${WORK}/runtime --strip-components=1)
  endif()
endforeach()

file(GLOB_RECURSE files RELATIVE ${WORK}/runtime ${WORK}/runtime/*)
if(files MATCHES "\\.(a|h|hpp|cmake|pc)(;|$)" OR NOT files MATCHES "libkvtile\\.so\\.[0-9]")
  message(FATAL_ERROR "in the archive of the shared library and programs: ${files}")
endif()
if(NOT EXISTS ${WORK}/runtime/share/doc/kvtile/LICENSE)
  message(FATAL_ERROR "no licence: ${files}")
endif()
if(TOOL)
  check(${WORK}/runtime/bin/kvtile verify ${here}/../golden/i8.kvt)
endif()

foreach(kind shared static)
  set(build ${WORK}/use-${kind})
  check(${CMAKE_COMMAND} -S ${here}/installed -B ${build} -G ${GENERATOR}
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_C_COMPILER=${C_COMPILER} -DLANGUAGE=C
    -DKIND=${kind} -DPROGRAM=use.c -DVERSION=${VERSION} -DCMAKE_BUILD_TYPE=Debug -DCMAKE_PREFIX_PATH=${WORK}/both
    --no-warn-unused-cli)
  file(STRINGS ${build}/CMakeCache.txt found REGEX "^kvtile_DIR:")
  if(NOT found MATCHES "${WORK}/both/")
    message(FATAL_ERROR "found elsewhere: ${found}")
  endif()
  check(${CMAKE_COMMAND} --build ${build} --config Debug)
  set(program ${build}/use)
  if(NOT EXISTS ${program})
    set(program ${build}/Debug/use)
  endif()
  check(${program})
endforeach()
