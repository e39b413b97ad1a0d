# The documentation: every code block of the pages is built and run (docs/blocks.py says how a page
# marks what is not), links lead somewhere, and the reference covers the header. Included by
# tests/CMakeLists.txt.
if(CMAKE_CROSSCOMPILING OR NOT KVTILE_INSTALL OR CMAKE_SIZEOF_VOID_P LESS 8) # pages print 64-bit sizes
  return()
endif()
find_package(Python3 3.9 COMPONENTS Interpreter)
if(NOT Python3_FOUND)
  return()
endif()

set(docs ${CMAKE_CURRENT_SOURCE_DIR}/docs)
file(GLOB_RECURSE pages CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/docs/*.md
  ${PROJECT_SOURCE_DIR}/examples/*.md ${PROJECT_SOURCE_DIR}/bindings/*.md)
list(PREPEND pages ${PROJECT_SOURCE_DIR}/README.md)

set(docs_options --include ${PROJECT_SOURCE_DIR}/include --library $<TARGET_FILE:kvtile_shared>
  --cc ${CMAKE_C_COMPILER} --generator ${CMAKE_GENERATOR} --make-program ${CMAKE_MAKE_PROGRAM})
if(KVTILE_CXX)
  list(APPEND docs_options --cxx ${KVTILE_CXX})
endif()
if(KVTILE_PYTHON) # which has NumPy
  list(APPEND docs_options --python ${KVTILE_PYTHON})
endif()
if(kvtile_crypt AND KVTILE_SODIUM_LIBRARY)
  list(APPEND docs_options --encryption ${KVTILE_SODIUM_LIBRARY})
endif()
foreach(flag ${sanitize_options})
  list(APPEND docs_options --flag=${flag})
endforeach()
foreach(program kvtile_tool tinylm kvt-bench)
  if(TARGET ${program} AND NOT KVTILE_SANITIZE) # a sanitizer makes models and benchmarks slow
    list(APPEND docs_options --path $<TARGET_FILE_DIR:${program}>)
  endif()
endforeach()
foreach(folder ${PROJECT_SOURCE_DIR}/bindings/python/src ${PROJECT_SOURCE_DIR}/bindings/python)
  if(EXISTS ${folder}/kvtile AND NOT KVTILE_SANITIZE) # whose runtime Python does not load
    list(APPEND docs_options --python-path ${folder})
  endif()
endforeach()

foreach(page ${pages})
  file(RELATIVE_PATH name ${PROJECT_SOURCE_DIR} ${page})
  string(REGEX REPLACE "^docs/|\\.md$" "" name ${name})
  string(REPLACE "/" "_" name ${name})
  set(prefix)
  if(TEST package_install) # consumers' CMake and pkg-config find what it has installed
    set(prefix --prefix ${CMAKE_CURRENT_BINARY_DIR}/package/prefix)
  endif()
  add_test(NAME docs_${name} COMMAND Python3::Interpreter ${docs}/check_blocks.py ${page}
    --work ${CMAKE_CURRENT_BINARY_DIR}/docs/${name} ${docs_options} ${prefix})
  set_tests_properties(docs_${name} PROPERTIES LABELS docs SKIP_RETURN_CODE 77 TIMEOUT 600)
  if(prefix)
    set_tests_properties(docs_${name} PROPERTIES FIXTURES_REQUIRED package_prefix)
  endif()
endforeach()

add_test(NAME docs_links COMMAND Python3::Interpreter ${docs}/check_links.py ${PROJECT_SOURCE_DIR}
  ${PROJECT_SOURCE_DIR}/CHANGELOG.md ${PROJECT_SOURCE_DIR}/CONTRIBUTING.md ${pages})
add_test(NAME docs_checks COMMAND Python3::Interpreter ${docs}/test_checks.py
  --work ${CMAKE_CURRENT_BINARY_DIR}/docs/checks ${docs_options})
add_test(NAME docs_reference COMMAND Python3::Interpreter ${docs}/check_reference.py doxygen
  ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_BINARY_DIR}/docs/reference)
add_test(NAME docs_reference_misses COMMAND Python3::Interpreter ${docs}/check_reference.py --self-test
  doxygen ${PROJECT_SOURCE_DIR} ${CMAKE_CURRENT_BINARY_DIR}/docs/reference_misses)
add_test(NAME docs_first_page COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/.ci/first-page --steps)
add_test(NAME docs_picture COMMAND Python3::Interpreter ${PROJECT_SOURCE_DIR}/docs/bits_kl.py --check)
set_tests_properties(docs_links docs_first_page docs_picture docs_checks docs_reference
  docs_reference_misses PROPERTIES LABELS docs SKIP_RETURN_CODE 77)
