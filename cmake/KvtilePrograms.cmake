# What is installed of the programs beside themselves: manual pages, shell completion. And the
# archives that `cpack -G TGZ` makes in the build folder: kvtile-VERSION-SYSTEM-PROCESSOR.tar.gz with
# the shared library and the programs, kvtile-dev-VERSION-... with what programs are built with.
# Included after the programs' folders.
if(TARGET kvtile_tool)
  install(FILES docs/man/kvtile.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1
    COMPONENT kvtile_runtime)
  install(FILES tools/kvtile.bash RENAME kvtile
    DESTINATION ${CMAKE_INSTALL_DATADIR}/bash-completion/completions COMPONENT kvtile_runtime)
endif()
if(TARGET kvt-bench)
  kvtile_install_rpath(kvt-bench)
  install(TARGETS kvt-bench RUNTIME DESTINATION ${CMAKE_INSTALL_BINDIR} COMPONENT kvtile_runtime)
  install(FILES docs/man/kvt-bench.1 DESTINATION ${CMAKE_INSTALL_MANDIR}/man1
    COMPONENT kvtile_runtime)
endif()

if(PROJECT_IS_TOP_LEVEL)
  set(CPACK_PACKAGE_NAME kvtile)
  set(CPACK_PACKAGE_VENDOR "The kvtile authors")
  set(CPACK_PACKAGE_DESCRIPTION_SUMMARY "${PROJECT_DESCRIPTION}")
  set(CPACK_RESOURCE_FILE_LICENSE ${CMAKE_CURRENT_SOURCE_DIR}/LICENSE)
  set(CPACK_GENERATOR TGZ)
  set(CPACK_STRIP_FILES ON)
  set(CPACK_ARCHIVE_COMPONENT_INSTALL ON)
  set(CPACK_COMPONENT_INCLUDE_TOPLEVEL_DIRECTORY ON) # one folder for both
  set(CPACK_COMPONENTS_ALL kvtile_runtime kvtile_dev)
  string(TOLOWER "${PROJECT_VERSION}-${CMAKE_SYSTEM_NAME}-${kvtile_processor}" suffix)
  set(CPACK_ARCHIVE_KVTILE_RUNTIME_FILE_NAME kvtile-${suffix})
  set(CPACK_ARCHIVE_KVTILE_DEV_FILE_NAME kvtile-dev-${suffix})
  set(CPACK_PACKAGE_FILE_NAME kvtile-${suffix})
  foreach(component runtime dev) # a licence goes with each
    install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DATADIR}/doc/kvtile
      COMPONENT kvtile_${component})
  endforeach()
  include(CPack)
endif()
