# Every wrong command line exits with code 2 and one line with the reason.
foreach(line
    "foo" "decode extra" "decode --k" "decode --k q8" "decode --k i5" "append --k i8,i5 --v i8" "decode --k i8,,f16" "decode --k i8 --k f16"
    "decode --heads 32" "decode --heads 32:5" "decode --heads 0:0" "decode --heads 2048:1"
    "decode --dim 0" "decode --dim 100" "decode --dim 2048" "decode --dim 64:" "decode --ctx 0"
    "decode --ctx -1" "decode --ctx 1.5" "decode --ctx 99999999999999999999" "decode --ctx 2kk"
    "decode --threads 0" "decode --isa mmx" "decode --runs 8" "decode --layers 0"
    "decode --seed -1" "decode --json=1" "decode --llc-mib 0" "decode --tokens 1"
    "decode --mode" "decode --mode exact" "decode --mode near,," "decode --queries 4"
    "step --steps 0" "step --count=1" "machine --heads 1:1" "machine --k i8" "machine --threads 0"
    "prefill --queries 0" "prefill --mode int" "decode --v-in-k=1"
    "decode --v-in-k --k i8 --v f16" "prefill --v-in-k --dim 64:128" "append --v-in-k"
    "decode --against i5" "decode --against q4" "decode --peer q8_0" "decode --peer ggml:q5" "decode --peer"
    "step --peer ggml" "decode --peer ggml --window 64" "decode --peer ggml --against i8"
    "decode --peer ggml --v-in-k" "decode --peer ggml --dim 72" "step --against i8" "seal --ctx 64" "seal --threads 2" "seal --k f16" "seal --k i4 --v f16"
    "append --mode near" "append --tokens 513" "append --dtype f8" "snapshot --dir"
    "snapshot --part memory --dir /nowhere/x" "store --dir /nowhere/x" "report --dir /nowhere/x"
    "store --dir /dev/null"
    "snapshot --part maps" "snapshot --part sweep,," "snapshot --bytes 1" "snapshot --bytes 1q"
    "snapshot --bytes 2000000g" "snapshot --map-bytes" "snapshot --bars=1" "decode --part map"
    "snapshot --model x" "snapshot --part redis" "store --part memory" "store --pipeline 0"
    "store --redis=" "store --redis :6379"
    "store --redis 127.0.0.1:" "store --redis 127.0.0.1:0" "store --redis 127.0.0.1:65536"
    "store --redis 127.0.0.1:63x9" "store --redis 127.0.0.1:+6379" "store --redis '127.0.0.1: 6379'"
    "store --redis 127.0.0.1:4294973675" "store --redis ::1:6379" "store --redis [::1"
    "store --redis [::1]6379" "store --redis [::1]:" "store --redis []:6379" "store --redis 'a;b:6379'"
    "store --redis -x:1" "decode --pipeline 4" "snapshot-reader" "fidelity --offset nan"
    "fidelity --model x" "fidelity --text x" "fidelity --model a --tokenizer b --dim 64"
    "fidelity --qkv" "fidelity --qkv /nowhere/x" "fidelity --qkv x --model a --tokenizer b"
    "fidelity --qkv x --dim 64" "fidelity --qkv x --ctx 64" "fidelity --qkv x --offset 1"
    "fidelity --qkv x --causal --full" "fidelity --full" "fidelity --causal=1 --qkv x"
    "fidelity --qkv x --scale 0" "fidelity --qkv x --scale nan" "fidelity --qkv x --scale 1e9"
    "fidelity --qkv x --scale 1x" "fidelity --qkv x --formats q5" "fidelity --qkv x --formats all,f16"
    "fidelity --qkv x --formats f16,none" "fidelity --qkv x --formats f16,," "fidelity --formats all"
    "fidelity --qkv x --queries 0" "fidelity --queries 5" "fidelity --per-layer" "fidelity --svg x"
    "fidelity --qkv x --threads 1,2" "fidelity --stories 2" "fidelity --qkv x --stories 2"
    "fidelity --qkv x --svg /nowhere/x" "decode --qkv x" "decode --svg x")
  separate_arguments(arguments UNIX_COMMAND "${line}")
  execute_process(COMMAND ${BENCH} ${arguments}
    RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
  if(NOT code EQUAL 2 OR NOT out STREQUAL "" OR NOT err MATCHES "^kvt-bench: [^\n]+\n$")
    message(SEND_ERROR "kvt-bench ${line}: exit code ${code}, output '${out}', error '${err}'")
  endif()
endforeach()
# A server that was named and does not answer is a failure; nothing listens on port 1.
if(STORE)
  foreach(server 127.0.0.1:1 [127.0.0.1]:00001)
    execute_process(COMMAND ${BENCH} store --quick --json --part redis --redis ${server}
      RESULT_VARIABLE code OUTPUT_VARIABLE out ERROR_VARIABLE err)
    if(NOT code EQUAL 1 OR NOT out STREQUAL "" OR NOT err MATCHES "^kvt-bench: store: [^\n]*127.0.0.1[^\n]*\n$")
      message(SEND_ERROR "store --redis ${server}: exit code ${code}, output '${out}', error '${err}'")
    endif()
  endforeach()
endif()
execute_process(COMMAND ${BENCH} --help RESULT_VARIABLE code OUTPUT_VARIABLE out)
if(NOT code EQUAL 0 OR NOT out MATCHES "decode")
  message(SEND_ERROR "kvt-bench --help: exit code ${code}")
endif()
execute_process(COMMAND ${BENCH} --version RESULT_VARIABLE code OUTPUT_VARIABLE out)
if(NOT code EQUAL 0 OR NOT out MATCHES "^kvt-bench [0-9]+\\.[0-9]+\\.[0-9]+\n$")
  message(SEND_ERROR "kvt-bench --version: exit code ${code}, output '${out}'")
endif()
if(EXISTS /dev/full)
  foreach(flag --help --version)
    execute_process(COMMAND ${BENCH} ${flag} RESULT_VARIABLE code OUTPUT_FILE /dev/full ERROR_VARIABLE err)
    if(NOT code EQUAL 1 OR NOT err MATCHES "^kvt-bench: stdout[^\n]*\n$")
      message(SEND_ERROR "kvt-bench ${flag} >/dev/full: exit code ${code}, error '${err}'")
    endif()
  endforeach()
endif()
