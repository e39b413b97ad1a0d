# What the library is linked with: SLEEF, Zstandard, xxHash and, where it has what needs them,
# libsodium and hiredis.
# Included by the build and, installed beside it, by the package config, for whoever links the
# static library. Targets, functions and cache variables have names of our own, so that they meet
# no finder of the project around.

# kvtile_find_library(MISSING NAME HEADER LIBRARY PACKAGE [TARGETS ...]): the target kvtile::NAME.
# TARGETS are names under which the project around may have the library already: two copies in one
# program would be one too many. PACKAGE is pkg-config's name, of which the folders are taken as a
# hint. Appends to MISSING what was not found.
function(kvtile_find_library missing name header library package)
  if(TARGET kvtile::${name})
    return()
  endif()
  foreach(target IN LISTS ARGN)
    if(TARGET ${target})
      add_library(kvtile::${name} INTERFACE IMPORTED)
      set_property(TARGET kvtile::${name} PROPERTY INTERFACE_LINK_LIBRARIES ${target})
      return()
    endif()
  endforeach()
  string(TOUPPER ${name} upper)
  find_package(PkgConfig QUIET)
  if(PKG_CONFIG_FOUND)
    pkg_check_modules(KVTILE_PC_${upper} QUIET ${package})
  endif()
  set(hints ${KVTILE_PC_${upper}_INCLUDE_DIRS})
  get_filename_component(folder ${header} DIRECTORY)
  if(folder) # which pkg-config's folder may be already: hiredis's
    list(TRANSFORM hints REPLACE "/${folder}/?$" "")
  endif()
  find_path(KVTILE_${upper}_INCLUDE_DIR ${header} HINTS ${hints})
  find_library(KVTILE_${upper}_LIBRARY ${library} HINTS ${KVTILE_PC_${upper}_LIBRARY_DIRS})
  mark_as_advanced(KVTILE_${upper}_INCLUDE_DIR KVTILE_${upper}_LIBRARY)
  if(KVTILE_${upper}_INCLUDE_DIR AND KVTILE_${upper}_LIBRARY)
    add_library(kvtile::${name} UNKNOWN IMPORTED)
    set_target_properties(kvtile::${name} PROPERTIES
      IMPORTED_LOCATION "${KVTILE_${upper}_LIBRARY}"
      INTERFACE_INCLUDE_DIRECTORIES "${KVTILE_${upper}_INCLUDE_DIR}")
  else()
    set(${missing} ${${missing}} "lib${library}-dev" PARENT_SCOPE)
  endif()
endfunction()

macro(kvtile_find_sodium missing)
  kvtile_find_library(${missing} sodium sodium.h sodium libsodium unofficial-sodium::sodium)
endmacro()

macro(kvtile_find_hiredis missing)
  kvtile_find_library(${missing} hiredis hiredis/hiredis.h hiredis hiredis hiredis::hiredis)
endmacro()

# kvtile_find_dependencies(MISSING CRYPT REDIS): the needed ones, libsodium where CRYPT is true and
# hiredis where REDIS is; MISSING: Debian's packages that lack.
macro(kvtile_find_dependencies missing crypt redis)
  set(${missing})
  kvtile_find_library(${missing} sleef sleef.h sleef sleef sleef::sleef)
  kvtile_find_library(${missing} zstd zstd.h zstd libzstd
    zstd::libzstd zstd::libzstd_shared zstd::libzstd_static)
  kvtile_find_library(${missing} xxhash xxhash.h xxhash libxxhash xxHash::xxhash)
  if(${crypt})
    kvtile_find_sodium(${missing})
  endif()
  if(${redis})
    kvtile_find_hiredis(${missing})
  endif()
endmacro()
