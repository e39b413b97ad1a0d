# What is installed: the header and both libraries.
include(GNUInstallDirs)
install(TARGETS kvtile_shared kvtile_static
  LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES include/kvtile/kvtile.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}/kvtile)
