# Fuzzing of the snapshot code (tests/fuzz/fuzz.h); included by tests/CMakeLists.txt.
#
# Everywhere: a program that replays inputs, and a test that gives it the golden files and the
# corpus. With -DKVTILE_FUZZ=ON and clang: fuzz_load, fuzz_map, fuzz_chain, fuzz_convert, fuzz_crypt,
# fuzz_store and fuzz_model, with libFuzzer and the sanitizers for addresses and undefined behaviour:
#
#   cmake -B build/fuzz -G Ninja -DCMAKE_C_COMPILER=clang -DCMAKE_BUILD_TYPE=RelWithDebInfo \
#     -DKVTILE_FUZZ=ON
#   ninja -C build/fuzz fuzzers
#   build/fuzz/tests/fuzz_load -max_len=300000 CORPUS tests/corpus/snapshot
#
# or .ci/fuzz SECONDS, which does all of it. -DKVTILE_FUZZ=UNCHECKED leaves checksums and digests
# unverified (KVT_FUZZING), for what the mutator cannot mend.
set(corpus ${CMAKE_CURRENT_SOURCE_DIR}/corpus)
set(fuzz_sources fuzz/input.c fuzz/properties.c fuzz/target_load.c fuzz/target_map.c
  fuzz/target_chain.c fuzz/target_convert.c fuzz/edges.c)
set(fuzz_libraries kvtile_static kvtile_warnings m)
if(kvtile_crypt)
  set(fuzz_crypt fuzz/target_crypt.c fuzz/target_store.c)
endif()

function(kvtile_fuzz_program name)
  add_executable(${name} ${ARGN})
  target_include_directories(${name} PRIVATE ${PROJECT_SOURCE_DIR}
    ${PROJECT_SOURCE_DIR}/examples/tinylm)
  target_link_libraries(${name} PRIVATE ${fuzz_libraries} kvtile::xxhash)
  if(KVTILE_FUZZ STREQUAL "UNCHECKED")
    target_compile_definitions(${name} PRIVATE KVT_FUZZING)
  endif()
endfunction()

set(model_sources fuzz/target_model.c)
foreach(file forward kv_kvtile matmul model tokenizer work)
  list(APPEND model_sources ${PROJECT_SOURCE_DIR}/examples/tinylm/${file}.c)
endforeach()

if(NOT WIN32)
  kvtile_fuzz_program(fuzz_replay fuzz/replay.c ${fuzz_sources} ${fuzz_crypt} ${model_sources})
  target_link_libraries(fuzz_replay PRIVATE Threads::Threads)
  if(kvtile_crypt)
    target_compile_definitions(fuzz_replay PRIVATE FUZZ_CRYPT)
    add_test(NAME fuzz_store_replay COMMAND fuzz_replay --store ${corpus}/store)
  endif()
  add_test(NAME fuzz_snapshot_replay COMMAND fuzz_replay ${golden_files} ${golden}/encrypted.kvx
    ${corpus}/snapshot)
  add_test(NAME fuzz_model_replay COMMAND fuzz_replay --model ${corpus}/model)

  # Writes the first corpus; run by hand.
  kvtile_fuzz_program(fuzz_make_seeds fuzz/make_seeds.c fuzz/properties.c fuzz/input.c)
  set_target_properties(fuzz_make_seeds PROPERTIES EXCLUDE_FROM_ALL ON)
endif()

if(KVTILE_FUZZ)
  add_library(fuzz_common STATIC EXCLUDE_FROM_ALL fuzz/input.c fuzz/properties.c)
  add_library(fuzz_mutator OBJECT EXCLUDE_FROM_ALL fuzz/mutate.c fuzz/file.c)
  foreach(part common mutator)
    target_include_directories(fuzz_${part} PRIVATE ${PROJECT_SOURCE_DIR})
    target_link_libraries(fuzz_${part} PRIVATE ${fuzz_libraries} kvtile::xxhash kvtile::zstd)
  endforeach()
  add_custom_target(fuzzers)
  foreach(target load map chain convert crypt store model)
    set(sources fuzz/target_${target}.c $<TARGET_OBJECTS:fuzz_mutator>)
    if(target STREQUAL "model")
      set(sources ${model_sources} fuzz/mutate_model.c)
    elseif(target MATCHES "^(crypt|store)$" AND NOT kvtile_crypt)
      continue()
    elseif(target STREQUAL "store")
      set(sources fuzz/target_store.c)
    endif()
    kvtile_fuzz_program(fuzz_${target} fuzz/entry.c ${sources})
    target_compile_definitions(fuzz_${target} PRIVATE KVT_FUZZ_TARGET=fuzz_${target})
    target_link_libraries(fuzz_${target} PRIVATE fuzz_common kvtile_static kvtile::zstd
      Threads::Threads)
    target_link_options(fuzz_${target} PRIVATE -fsanitize=fuzzer)
    set_target_properties(fuzz_${target} PROPERTIES EXCLUDE_FROM_ALL ON)
    if(target STREQUAL "model") # what is to be covered is among its own sources
      target_compile_options(fuzz_model PRIVATE -fsanitize=fuzzer-no-link)
    endif()
    add_dependencies(fuzzers fuzz_${target})
  endforeach()
endif()
