# Compile the static library with COMPILER for PROCESSOR, warnings being errors, in BUILD. HEADERS are
# those of the libraries that it uses, taken by themselves: the folder that they are in has another
# C library's as well. With LIBC, a static C library, everything that the library needs has to be in
# that, in the compiler's own library or in the libraries that it uses.
cmake_minimum_required(VERSION 3.25)
file(REMOVE_RECURSE ${BUILD})
file(COPY ${HEADERS} DESTINATION ${BUILD}/headers)
file(GLOB opensslconf ${OPENSSLCONF}/*conf*.h)
file(COPY ${opensslconf} DESTINATION ${BUILD}/headers/openssl)
set(libraries)
foreach(library SLEEF ZSTD XXHASH SODIUM HIREDIS SSL CRYPTO) # not linked
  list(APPEND libraries -DKVTILE_${library}_INCLUDE_DIR=${BUILD}/headers
    -DKVTILE_${library}_LIBRARY=/dev/null)
endforeach()
list(APPEND libraries -DKVTILE_OPENSSLCONF_INCLUDE_DIR=${BUILD}/headers)

function(check)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result OUTPUT_VARIABLE output
    ERROR_VARIABLE output)
  if(NOT result EQUAL 0)
    message(FATAL_ERROR "${output}\n=> ${result}")
  endif()
endfunction()

check(${CMAKE_COMMAND} -S ${SOURCE} -B ${BUILD} -G ${GENERATOR} -DCMAKE_SYSTEM_NAME=Linux
  -DCMAKE_SYSTEM_PROCESSOR=${PROCESSOR} -DCMAKE_C_COMPILER=${COMPILER} -DKVTILE_WERROR=ON
  ${OPTIONS} ${libraries})
check(${CMAKE_COMMAND} --build ${BUILD} --target kvtile_static)
if(NOT LIBC)
  return()
endif()

# names(LIST FLAG FILE): symbols that FILE defines or needs
function(names list flag file)
  execute_process(COMMAND ${NM} -P -g ${flag} ${file} OUTPUT_VARIABLE output ERROR_QUIET
    RESULT_VARIABLE result)
  string(REGEX MATCHALL "\n[A-Za-z_][A-Za-z0-9_]* " output "\n${output}")
  list(TRANSFORM output STRIP)
  list(REMOVE_DUPLICATES output)
  list(LENGTH output n)
  if(result OR n LESS 20)
    message(FATAL_ERROR "${NM} ${file}: ${result}, ${n} symbols")
  endif()
  set(${list} ${output} PARENT_SCOPE)
endfunction()
names(needed --undefined-only ${BUILD}/libkvtile.a)
names(own --defined-only ${BUILD}/libkvtile.a)
names(libc --defined-only ${LIBC})
foreach(name IN LISTS needed)
  if(NOT name IN_LIST own AND NOT name IN_LIST libc AND
     NOT name MATCHES "^(Sleef_|ZSTD_|XXH|crypto_|sodium_|randombytes_|redis[A-Z]|SSL_|TLS_|BIO_|ERR_|EVP_|X509_|OPENSSL_|freeReplyObject$|__[a-z]+[sdt]i[0-9]$|_GLOBAL_OFFSET_TABLE_$)")
    message(SEND_ERROR "${LIBC} does not have ${name}")
  endif()
endforeach()
