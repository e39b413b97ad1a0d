# What is installed: the headers, both libraries, and what finds them for CMake (find_package) and
# for pkg-config. Nothing of it names a folder of this machine, so that the prefix can be moved.
# Two components, for archives of their own (KvtilePrograms.cmake): kvtile_runtime, what programs
# run with, and kvtile_dev, what they are built with.
include(GNUInstallDirs)
set(CMAKE_INSTALL_DEFAULT_COMPONENT_NAME kvtile_dev)
include(CMakePackageConfigHelpers)

# An export each: who wants the shared library need not have what the static one is linked with.
foreach(kind shared static)
  target_include_directories(kvtile_${kind}
    INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  install(TARGETS kvtile_${kind} EXPORT kvtile_${kind}
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT kvtile_runtime
    NAMELINK_COMPONENT kvtile_dev ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR}
    RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR})
  install(EXPORT kvtile_${kind} NAMESPACE kvtile:: FILE kvtile-${kind}-targets.cmake
    DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvtile)
endforeach()
install(FILES include/kvtile/kvtile.h include/kvtile/kvtile.hpp include/kvtile/store.h
  include/kvtile/store.hpp DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvtile)

set(package ${CMAKE_CURRENT_BINARY_DIR}/package)
configure_package_config_file(cmake/kvtile-config.cmake.in ${package}/kvtile-config.cmake
  INSTALL_DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvtile NO_SET_AND_CHECK_MACRO)
write_basic_package_version_file(${package}/kvtile-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${package}/kvtile-config.cmake ${package}/kvtile-config-version.cmake
  cmake/KvtileDependencies.cmake DESTINATION ${CMAKE_INSTALL_LIBDIR}/cmake/kvtile)

# The prefix as seen from where kvtile.pc lies, unless the folders are absolute ones.
if(IS_ABSOLUTE "${CMAKE_INSTALL_LIBDIR}")
  set(pc_prefix ${CMAKE_INSTALL_PREFIX})
else()
  file(RELATIVE_PATH pc_prefix /prefix/${CMAKE_INSTALL_LIBDIR}/pkgconfig /prefix)
  string(REGEX REPLACE "/$" "" pc_prefix "\${pcfiledir}/${pc_prefix}")
endif()
foreach(dir LIBDIR INCLUDEDIR)
  set(pc_${dir} ${CMAKE_INSTALL_${dir}})
  if(NOT IS_ABSOLUTE "${pc_${dir}}")
    set(pc_${dir} "\${prefix}/${pc_${dir}}")
  endif()
endforeach()
# What the static library needs, by names alone: pkg-config wants modules that are required to be there
# for users of the shared library, too, and gives them their flags. Where they lie elsewhere than the
# system looks, users of the static one say so (-L).
set(pc_libs sleef zstd xxhash)
if(kvtile_crypt)
  list(APPEND pc_libs sodium)
endif()
if(kvtile_redis)
  list(APPEND pc_libs hiredis)
endif()
if(kvtile_tls)
  list(APPEND pc_libs ssl crypto)
elseif(kvtile_cipher)
  list(APPEND pc_libs crypto)
endif()
if(kvtile_atomic)
  list(APPEND pc_libs atomic)
endif()
list(TRANSFORM pc_libs PREPEND " -l")
list(JOIN pc_libs "" pc_libs)
configure_file(cmake/kvtile.pc.in ${package}/kvtile.pc @ONLY)
install(FILES ${package}/kvtile.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)

if(PROJECT_IS_TOP_LEVEL)
  add_custom_target(uninstall VERBATIM COMMAND ${CMAKE_COMMAND}
    -DBUILD=${CMAKE_BINARY_DIR}
    -P ${CMAKE_CURRENT_SOURCE_DIR}/cmake/KvtileUninstall.cmake)
endif()
