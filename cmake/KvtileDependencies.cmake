# What the library is linked with: SLEEF, Zstandard, xxHash and, where it has what needs them,
# libsodium, hiredis and OpenSSL.
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
  kvtile_name_hiredis_header()
endmacro()

# In hiredis's own sources, which the project around may have taken in, the header is in no folder of
# that name.
function(kvtile_name_hiredis_header)
  if(TARGET hiredis::hiredis)
    get_target_property(real hiredis::hiredis ALIASED_TARGET)
    if(real)
      get_target_property(folder ${real} SOURCE_DIR)
      if(EXISTS "${folder}/hiredis.h")
        set_property(TARGET kvtile::hiredis PROPERTY INTERFACE_COMPILE_DEFINITIONS KVT_HIREDIS_FLAT)
      endif()
    endif()
  endif()
endfunction()

# kvtile_find_ssl(MISSING): kvtile::ssl and kvtile::crypto, of OpenSSL 1.1.1 or newer.
# kvtile_ssl_why: that an older one was found.
function(kvtile_find_ssl missing)
  set(kvtile_ssl_why "" PARENT_SCOPE)
  set(none)
  kvtile_find_library(none crypto openssl/crypto.h crypto libcrypto OpenSSL::Crypto)
  # Where several architectures share a system, each has a folder of what differs: 32 bits, 64 bits.
  find_path(KVTILE_OPENSSLCONF_INCLUDE_DIR openssl/opensslconf.h
    HINTS ${KVTILE_CRYPTO_INCLUDE_DIR} ${KVTILE_PC_CRYPTO_INCLUDE_DIRS})
  mark_as_advanced(KVTILE_OPENSSLCONF_INCLUDE_DIR)
  if(NOT none AND KVTILE_CRYPTO_INCLUDE_DIR) # else it is of the project around
    # 0x1010100fL; from 3.0 on parts of it alone
    file(STRINGS ${KVTILE_CRYPTO_INCLUDE_DIR}/openssl/opensslv.h version
      REGEX "define +OPENSSL_VERSION_(NUMBER +0x|MAJOR +)[0-9]")
    if(NOT version MATCHES "MAJOR +[3-9]|0x([2-9]|1010[1-9]|101[1-9]|1[1-9])")
      set(none old)
      set(kvtile_ssl_why "\n${KVTILE_CRYPTO_INCLUDE_DIR} has an OpenSSL that is older than 1.1.1."
        PARENT_SCOPE)
    endif()
  endif()
  if(NOT none)
    kvtile_find_library(none ssl openssl/ssl.h ssl libssl OpenSSL::SSL)
  endif()
  if(none)
    set(${missing} ${${missing}} libssl-dev PARENT_SCOPE)
  elseif(KVTILE_OPENSSLCONF_INCLUDE_DIR)
    foreach(target kvtile::crypto kvtile::ssl)
      get_target_property(type ${target} TYPE)
      if(NOT type STREQUAL "INTERFACE_LIBRARY") # that is the project's around, with headers of its own
        set_property(TARGET ${target} APPEND PROPERTY INTERFACE_INCLUDE_DIRECTORIES
          ${KVTILE_OPENSSLCONF_INCLUDE_DIR})
      endif()
    endforeach()
  endif()
endfunction()

# kvtile_find_dependencies(MISSING CRYPT REDIS OPENSSL): the needed ones, libsodium where CRYPT is
# true, hiredis where REDIS is, OpenSSL where OPENSSL is; MISSING: Debian's packages that lack.
macro(kvtile_find_dependencies missing crypt redis openssl)
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
  if(${openssl})
    kvtile_find_ssl(${missing})
  endif()
endmacro()
