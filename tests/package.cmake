# kvtile as others take it in: each test makes a small program in an empty folder below the build
# tree, with what `cmake --install` installs of this build, or with the sources. Included by
# tests/CMakeLists.txt. Not under a sanitizer, whose flags such a program would need as well.
if(NOT KVTILE_INSTALL OR KVTILE_SANITIZE OR CMAKE_CROSSCOMPILING)
  return()
endif()
find_program(KVTILE_PKG_CONFIG NAMES pkg-config pkgconf)
mark_as_advanced(KVTILE_PKG_CONFIG)

# kvtile_package_test(STEP): tests/package/check_package.cmake says what each one does.
function(kvtile_package_test step)
  add_test(NAME package_${step} COMMAND ${CMAKE_COMMAND} -DSTEP=${step}
    -DSOURCE=${PROJECT_SOURCE_DIR} -DBUILD=${PROJECT_BINARY_DIR} -DCONFIG=$<CONFIG>
    -DWORK=${CMAKE_CURRENT_BINARY_DIR}/package -DVERSION=${PROJECT_VERSION}
    -DDEFAULT=${kvtile_kind} -DLIBDIR=${CMAKE_INSTALL_LIBDIR} -DBINDIR=${CMAKE_INSTALL_BINDIR}
    "-DGENERATOR=${CMAKE_GENERATOR}" -DMAKE_PROGRAM=${CMAKE_MAKE_PROGRAM}
    -DC_COMPILER=${CMAKE_C_COMPILER} -DCXX_COMPILER=${KVTILE_CXX}
    -DPKG_CONFIG=${KVTILE_PKG_CONFIG}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/package/check_package.cmake)
  set_tests_properties(package_${step} PROPERTIES LABELS package TIMEOUT 600
    SKIP_REGULAR_EXPRESSION "kvtile_package_test: skipped")
endfunction()

kvtile_package_test(install)
foreach(step find_shared find_static find_default find_cxx find_lacking pkg_config pkg_config_static
    pkg_config_cxx)
  kvtile_package_test(${step})
  set_tests_properties(package_${step} PROPERTIES FIXTURES_REQUIRED package_prefix)
endforeach()
set_tests_properties(package_install PROPERTIES FIXTURES_SETUP package_prefix)
foreach(step moved uninstall add_subdirectory FetchContent)
  kvtile_package_test(${step})
endforeach()
set_tests_properties(package_add_subdirectory PROPERTIES COST 100) # it compiles for the longest time
# These write the build tree's install_manifest.txt.
set_tests_properties(package_install package_moved package_uninstall PROPERTIES
  RESOURCE_LOCK package_manifest)
