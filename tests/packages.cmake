# Manual pages, shell completion, archives, and what debian/ repeats of other files. Included by
# tests/CMakeLists.txt. (.ci/deb builds the Debian packages and installs them.)
set(packages ${CMAKE_CURRENT_SOURCE_DIR}/packages)

find_program(KVTILE_MANDOC mandoc)
find_program(KVTILE_BASH bash)
mark_as_advanced(KVTILE_MANDOC KVTILE_BASH)
foreach(program kvtile:kvtile_tool kvt-bench:kvt-bench)
  string(REPLACE ":" ";" program ${program})
  list(GET program 0 name)
  list(GET program 1 target)
  if(TARGET ${target} AND NOT CMAKE_CROSSCOMPILING)
    add_test(NAME manual_${name} COMMAND ${CMAKE_COMMAND} -DPROGRAM=$<TARGET_FILE:${target}>
      -DMANUAL=${PROJECT_SOURCE_DIR}/docs/man/${name}.1 -DMANDOC=${KVTILE_MANDOC}
      -P ${packages}/check_manual.cmake)
  endif()
endforeach()
if(KVTILE_BASH AND TARGET kvtile_tool AND NOT CMAKE_CROSSCOMPILING)
  add_test(NAME completion COMMAND ${KVTILE_BASH} ${packages}/check_completion.bash
    ${PROJECT_SOURCE_DIR}/tools/kvtile.bash $<TARGET_FILE:kvtile_tool>
    ${CMAKE_CURRENT_BINARY_DIR}/completion)
endif()

# debian/ is left out of some copies of the sources.
if(EXISTS ${PROJECT_SOURCE_DIR}/debian/control)
  add_test(NAME debian_files COMMAND ${CMAKE_COMMAND} -DSOURCE=${PROJECT_SOURCE_DIR}
    -DVERSION=${PROJECT_VERSION} -DABI=${KVTILE_ABI} -P ${packages}/check_debian.cmake)
endif()

# The archives of cpack: needs the build's programs and libraries, and none of a sanitizer's flags.
if(KVTILE_INSTALL AND NOT KVTILE_SANITIZE AND NOT CMAKE_CROSSCOMPILING AND CMAKE_CPACK_COMMAND)
  add_test(NAME package_archives COMMAND ${CMAKE_COMMAND} -DCPACK=${CMAKE_CPACK_COMMAND}
    -DSOURCE=${PROJECT_SOURCE_DIR} -DBUILD=${PROJECT_BINARY_DIR} -DCONFIG=$<CONFIG>
    -DWORK=${CMAKE_CURRENT_BINARY_DIR}/archives -DLIBDIR=${CMAKE_INSTALL_LIBDIR}
    "-DGENERATOR=${CMAKE_GENERATOR}" -DMAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}
    -DC_COMPILER=${CMAKE_C_COMPILER} -DTOOL=$<TARGET_EXISTS:kvtile_tool> -DVERSION=${PROJECT_VERSION}
    -P ${packages}/check_archives.cmake)
  # cpack installs, and so writes the build tree's install_manifest_*.txt.
  set_tests_properties(package_archives PROPERTIES LABELS package TIMEOUT 600
    RESOURCE_LOCK package_manifest)
endif()
