# Write kvt_bench_commit.h into OUT when the commit of SOURCE differs from the one in it. Runs at
# every build, so that reported figures never name a commit that was not measured.
find_program(GIT git)
set(commit "unknown")
if(GIT)
  execute_process(
    COMMAND ${GIT} describe --always --dirty --abbrev=12
    WORKING_DIRECTORY ${SOURCE}
    OUTPUT_VARIABLE found OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET RESULT_VARIABLE failed)
  if(NOT failed AND found)
    set(commit "${found}")
  endif()
endif()
file(CONFIGURE OUTPUT ${OUT} CONTENT "#define KVT_BENCH_COMMIT \"${commit}\"\n")
