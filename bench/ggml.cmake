# kvt-bench decode --peer ggml, where ggml was found (cmake/KvtileGgml.cmake).
if(kvtile_have_ggml)
  target_sources(kvt-bench PRIVATE bench_ggml.c)
  target_compile_definitions(kvt-bench PRIVATE KVT_BENCH_GGML="${ggml_VERSION}")
  target_link_libraries(kvt-bench PRIVATE ggml::ggml)
  set_target_properties(kvt-bench PROPERTIES LINKER_LANGUAGE CXX) # it may be a static library
endif()
if(KVTILE_TESTS AND kvtile_have_ggml)
  add_test(NAME bench_peer COMMAND kvt-bench decode --peer ggml,ggml:q8_0 --quick --json
    --k f16,i8,i4 --heads 4:4,7:1 --dim 128:64 --ctx 600 --threads 1,2)
elseif(KVTILE_TESTS AND NOT CMAKE_CROSSCOMPILING)
  add_test(NAME bench_peer_missing COMMAND ${CMAKE_COMMAND} -DBENCH=$<TARGET_FILE:kvt-bench>
    -P ${CMAKE_CURRENT_SOURCE_DIR}/check_peer.cmake)
endif()
