# kvt-bench without ggml says so, and what to do.
execute_process(COMMAND ${BENCH} decode --peer ggml --quick
  RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
if(NOT code EQUAL 2 OR NOT out STREQUAL "" OR
   NOT err MATCHES "^kvt-bench: --peer: [^\n]*without ggml[^\n]*CMAKE_PREFIX_PATH[^\n]*\n$")
  message(SEND_ERROR "kvt-bench decode --peer ggml: exit code ${code}, output '${out}', error '${err}'")
endif()
