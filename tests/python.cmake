# bindings/python: its tests with this build's shared library, by whatever Python has NumPy. A test that
# finds nothing that it could do (no NumPy, no PyTorch, no venv) exits with 77 and is skipped. Included
# by tests/CMakeLists.txt. Not under a sanitizer, which the interpreter would have to be linked with.
if(NOT KVTILE_PYTHON OR KVTILE_SANITIZE OR CMAKE_CROSSCOMPILING)
  return()
endif()
set(python_dir ${PROJECT_SOURCE_DIR}/bindings/python)

add_executable(python_reference ${python_dir}/tests/reference.c)
target_link_libraries(python_reference PRIVATE kvtile::kvtile kvtile_warnings)
add_dependencies(python_reference kvtile_shared)

set(python_environment PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=${python_dir}/src
  KVTILE_LIBRARY=$<TARGET_FILE:kvtile_shared> KVTILE_REFERENCE=$<TARGET_FILE:python_reference>
  KVTILE_BUILD_DIR=${PROJECT_BINARY_DIR} KVTILE_CC=${CMAKE_C_COMPILER})
get_property(several_configurations GLOBAL PROPERTY GENERATOR_IS_MULTI_CONFIG)
if(several_configurations)
  list(APPEND python_environment KVTILE_BUILD_CONFIG=$<CONFIG>)
endif()
if(TARGET tinylm)
  list(APPEND python_environment KVTILE_TINYLM=$<TARGET_FILE:tinylm>
    KVTILE_TINYLM_DATA=${PROJECT_SOURCE_DIR}/examples/tinylm)
endif()
# Whether the library is what the wheel's own build gives.
if(CMAKE_BUILD_TYPE STREQUAL "Release" AND CMAKE_C_FLAGS_RELEASE STREQUAL "-O3 -DNDEBUG"
    AND KVTILE_POOL AND NOT CMAKE_C_FLAGS AND NOT CMAKE_SHARED_LINKER_FLAGS)
  list(APPEND python_environment KVTILE_SAME_FLAGS=1)
endif()

foreach(part arrays numbers package sequence signals snapshot store threads tinylm transformers)
  add_test(NAME python_${part}
    COMMAND ${KVTILE_PYTHON} ${python_dir}/tests/run.py test_${part})
  set_tests_properties(python_${part} PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1500 LABELS python
    ENVIRONMENT "${python_environment}")
endforeach()
set_tests_properties(python_package PROPERTIES COST 60) # it compiles the library
# The ratios of an interpreter's calls on a busy machine need some room: bench_overhead.py says more.
add_test(NAME python_overhead COMMAND ${KVTILE_PYTHON} ${python_dir}/bench_overhead.py
  --small 400 --pairs 40 --check 1.05)
set_tests_properties(python_overhead PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 1500 LABELS python
  RUN_SERIAL TRUE ENVIRONMENT "${python_environment}")
