# One test of tests/package.cmake: STEP says which.
#
#   install            the build into WORK/prefix: no file names a folder of this machine
#   find_shared, find_static, find_default
#                      find_package with a component, and without one by a project in C++
#   find_cxx           the same with kvtile.hpp
#   find_lacking       find_package where what the static library needs is not found
#   pkg_config, pkg_config_static, pkg_config_cxx
#                      kvtile.pc with the compiler alone
#   moved              all of these with a prefix that is not where it was configured to be
#   uninstall          removes what was installed, and that alone
#   add_subdirectory, FetchContent
#                      the sources, within another project; the second one installs them as well
cmake_minimum_required(VERSION 3.25)

set(here ${CMAKE_CURRENT_LIST_DIR})
set(folder ${WORK}/${STEP})
file(REMOVE_RECURSE ${folder})
file(MAKE_DIRECTORY ${folder})
foreach(variable CFLAGS CXXFLAGS LDFLAGS DESTDIR CMAKE_PREFIX_PATH PKG_CONFIG_PATH)
  unset(ENV{${variable}})
endforeach()

# check(COMMAND ...): fail with what it printed unless it succeeds.
function(check)
  execute_process(COMMAND ${ARGN} WORKING_DIRECTORY ${folder} RESULT_VARIABLE result
    OUTPUT_VARIABLE output ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}\n${output}\n=> ${result}")
  endif()
endfunction()

# install_to(PREFIX [COMPONENT...]): as a user does. The manifests of an installation of the user's own
# are kept meanwhile, and put back by restore_manifest.
function(install_to prefix)
  file(GLOB manifests ${BUILD}/install_manifest*.txt)
  file(REMOVE_RECURSE ${folder}/manifests)
  file(MAKE_DIRECTORY ${folder}/manifests)
  foreach(manifest IN LISTS manifests)
    get_filename_component(name ${manifest} NAME)
    file(RENAME ${manifest} ${folder}/manifests/${name})
  endforeach()
  if(NOT ARGN)
    check(${CMAKE_COMMAND} --install ${BUILD} --config "${CONFIG}" --prefix ${prefix})
  endif()
  foreach(component IN LISTS ARGN)
    check(${CMAKE_COMMAND} --install ${BUILD} --config "${CONFIG}" --prefix ${prefix}
      --component ${component})
  endforeach()
endfunction()

function(restore_manifest)
  file(GLOB manifests ${BUILD}/install_manifest*.txt)
  if(manifests)
    file(REMOVE ${manifests})
  endif()
  file(GLOB manifests ${folder}/manifests/*.txt)
  foreach(manifest IN LISTS manifests)
    get_filename_component(name ${manifest} NAME)
    file(RENAME ${manifest} ${BUILD}/${name})
  endforeach()
endfunction()

# configure_and_use(NAME KIND LANGUAGE ARGUMENTS ...): build tests/package/NAME's program and run it;
# KIND tells whether it has to be linked with the shared library.
function(configure_and_use name kind language)
  set(compiler ${C_COMPILER})
  if(language STREQUAL "CXX")
    set(compiler ${CXX_COMPILER})
  endif()
  set(build ${folder}/${name}-${kind}-${language})
  check(${CMAKE_COMMAND} -S ${here}/${name} -B ${build} -G ${GENERATOR}
    -DCMAKE_MAKE_PROGRAM=${MAKE_PROGRAM} -DCMAKE_${language}_COMPILER=${compiler}
    -DCMAKE_C_COMPILER=${C_COMPILER} -DLANGUAGE=${language} -DCMAKE_BUILD_TYPE=Debug
    -DPROGRAM=use.c -DVERSION=${VERSION} -DDEFAULT=${DEFAULT} --no-warn-unused-cli ${ARGN})
  check(${CMAKE_COMMAND} --build ${build} --parallel 2 --config Debug)
  run(${build}/use ${kind})
endfunction()

# run(PROGRAM KIND)
function(run program kind)
  if(NOT EXISTS ${program}) # a generator of several configurations
    string(REGEX REPLACE "/use$" "/Debug/use" program ${program})
  endif()
  check(${program})
  file(STRINGS ${program} needed REGEX "libkvtile\\.so")
  if((kind STREQUAL "shared" AND NOT needed) OR (kind STREQUAL "static" AND needed))
    message(FATAL_ERROR "${program} should be linked with the ${kind} library")
  endif()
endfunction()

# pkg_config(PREFIX KIND OPTIONS ...): compile and link ${use} by ${compiler} as its users do.
set(compiler ${C_COMPILER})
set(use use.c)
function(pkg_config prefix kind)
  list(JOIN ARGN " " options)
  file(MAKE_DIRECTORY ${folder}/empty)
  check(sh -ec "flags=$(PKG_CONFIG_PATH='${prefix}/${LIBDIR}/pkgconfig' '${PKG_CONFIG}' --cflags --libs ${options} kvtile)
    version=$(PKG_CONFIG_PATH='${prefix}/${LIBDIR}/pkgconfig' '${PKG_CONFIG}' --modversion kvtile)
    cp '${here}/${use}' empty && cd empty
    '${compiler}' -DKVTILE_VERSION=\\\"$version\\\" ${use} $flags -o use")
  set(ENV{LD_LIBRARY_PATH} ${prefix}/${LIBDIR})
  run(${folder}/empty/use ${kind})
  unset(ENV{LD_LIBRARY_PATH})
endfunction()

if(STEP MATCHES "pkg_config" AND NOT PKG_CONFIG)
  message(STATUS "kvtile_package_test: skipped, there is no pkg-config")
  return()
endif()
if(STEP MATCHES "_cxx" AND NOT CXX_COMPILER)
  message(STATUS "kvtile_package_test: skipped, there is no C++ compiler")
  return()
endif()
set(cxx CXX)
if(NOT CXX_COMPILER)
  set(cxx C)
endif()

# Its tests have a copy of the prefix each.
set(prefix ${folder}/prefix)
if(STEP MATCHES "^(find|pkg_config)")
  file(COPY ${WORK}/prefix DESTINATION ${folder})
endif()

if(STEP STREQUAL "install")
  file(REMOVE_RECURSE ${WORK}/prefix)
  install_to(${WORK}/prefix)
  restore_manifest()
  file(GLOB_RECURSE files ${WORK}/prefix/*.cmake ${WORK}/prefix/*.pc)
  list(LENGTH files n)
  if(n LESS 8)
    message(FATAL_ERROR "only ${files}")
  endif()
  foreach(file IN LISTS files)
    file(STRINGS ${file} lines)
    foreach(line IN LISTS lines)
      foreach(path ${SOURCE} ${BUILD} ${WORK} /usr/lib /usr/include)
        string(FIND "${line}" "${path}" at)
        if(NOT at EQUAL -1 AND NOT line MATCHES "realpath|usr-move|symbolic link|^ *#")
          message(SEND_ERROR "${file}: ${line}")
        endif()
      endforeach()
    endforeach()
  endforeach()

elseif(STEP MATCHES "^find_(shared|static)$")
  configure_and_use(installed ${CMAKE_MATCH_1} C -DKIND=${CMAKE_MATCH_1}
    -DCMAKE_PREFIX_PATH=${prefix})
elseif(STEP STREQUAL "find_default")
  configure_and_use(installed ${DEFAULT} ${cxx} -DKIND=default -DCMAKE_PREFIX_PATH=${prefix})
elseif(STEP STREQUAL "find_cxx")
  configure_and_use(installed ${DEFAULT} CXX -DKIND=default -DPROGRAM=use.cpp
    -DCMAKE_PREFIX_PATH=${prefix})
elseif(STEP STREQUAL "find_lacking")
  configure_and_use(installed shared C -DKIND=shared -DLACKING=ON -DCMAKE_PREFIX_PATH=${prefix})

elseif(STEP STREQUAL "pkg_config")
  pkg_config(${prefix} shared)
elseif(STEP STREQUAL "pkg_config_cxx")
  set(compiler ${CXX_COMPILER})
  set(use use.cpp)
  pkg_config(${prefix} shared)
elseif(STEP STREQUAL "pkg_config_static")
  file(GLOB shared ${prefix}/${LIBDIR}/libkvtile.so*)
  file(REMOVE ${shared}) # the linker would take it
  pkg_config(${prefix} static --static)

elseif(STEP STREQUAL "moved")
  set(ENV{DESTDIR} ${folder}/destdir)
  install_to(/nowhere/kvtile)
  restore_manifest()
  unset(ENV{DESTDIR})
  file(RENAME ${folder}/destdir/nowhere/kvtile ${prefix})
  foreach(kind shared static)
    configure_and_use(installed ${kind} C -DKIND=${kind} -DCMAKE_PREFIX_PATH=${prefix})
  endforeach()
  if(PKG_CONFIG)
    pkg_config(${prefix} shared)
  endif()
  if(EXISTS ${prefix}/${BINDIR}/kvtile)
    check(${prefix}/${BINDIR}/kvtile info use.kvt)
  endif()

elseif(STEP STREQUAL "uninstall")
  foreach(destdir "" ${folder}/destdir)
    set(root ${destdir}${prefix})
    set(others ${root}/include/other.h ${root}/${LIBDIR}/cmake/other/other.cmake)
    if(destdir)
      list(APPEND others ${root}/include/kvtile/other.h)
    endif()
    foreach(other IN LISTS others)
      file(WRITE ${other} "")
    endforeach()
    file(GLOB_RECURSE before ${root}/*)
    set(ENV{DESTDIR} ${destdir})
    set(components)
    if(destdir)
      set(components kvtile_runtime kvtile_dev)
    endif()
    install_to(${prefix} ${components})
    file(GLOB_RECURSE installed ${root}/*)
    check(${CMAKE_COMMAND} --build ${BUILD} --config "${CONFIG}" --target uninstall)
    restore_manifest()
    file(GLOB_RECURSE after ${root}/*)
    file(GLOB_RECURSE folders LIST_DIRECTORIES TRUE ${root}/*)
    list(FILTER folders INCLUDE REGEX "/kvtile$")
    if(destdir)
      list(REMOVE_ITEM folders ${root}/include/kvtile) # somebody else's header is in it
    endif()
    if(NOT "${before}" STREQUAL "${after}" OR "${before}" STREQUAL "${installed}" OR folders)
      message(FATAL_ERROR "before: ${before}\nafter: ${after}\nfolders: ${folders}")
    endif()
  endforeach()

elseif(STEP STREQUAL "add_subdirectory")
  configure_and_use(subproject shared ${cxx} -DHOW=add_subdirectory -DKVTILE=${SOURCE})
elseif(STEP STREQUAL "FetchContent")
  set(only_scalar) # the other test compiles all; this one takes a compiler that knows no flags
  foreach(isa AVX2 AVXVNNI AVX512VNNI AMX NEON DOTPROD I8MM)
    list(APPEND only_scalar -DKVTILE_CAN_${isa}=OFF)
  endforeach()
  configure_and_use(subproject static C -DHOW=FetchContent -DFETCHCONTENT_FULLY_DISCONNECTED=ON
    -DFETCHCONTENT_SOURCE_DIR_KVTILE=${SOURCE} -DKVTILE_INSTALL=ON ${only_scalar})
else()
  message(FATAL_ERROR "no such step: ${STEP}")
endif()

if(STEP MATCHES "^(add_subdirectory|FetchContent)$")
  file(GLOB build ${folder}/subproject-*)
  check(${CMAKE_COMMAND} --install ${build} --config Debug --prefix ${prefix})
  file(GLOB_RECURSE installed ${prefix}/*)
  if(STEP STREQUAL "FetchContent") # which wants it
    configure_and_use(installed static ${cxx} -DKIND=static -DCMAKE_PREFIX_PATH=${prefix})
    configure_and_use(installed shared C -DKIND=shared -DCMAKE_PREFIX_PATH=${prefix})
  elseif(installed)
    message(FATAL_ERROR "kvtile was installed with the project around it: ${installed}")
  endif()
endif()
