# The tests of report and compare. report needs gnuplot, the look at its page Chromium, both python3;
# where one is missing the test is skipped.
add_test(NAME bench_compare COMMAND ${CMAKE_COMMAND} -DBENCH=$<TARGET_FILE:kvt-bench>
  -DDIR=${CMAKE_CURRENT_BINARY_DIR}/compare -P ${CMAKE_CURRENT_SOURCE_DIR}/check_compare.cmake)

find_package(Python3 COMPONENTS Interpreter)
if(Python3_FOUND)
  set(check ${Python3_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/check_report.py)
  set(page ${CMAKE_CURRENT_BINARY_DIR}/report)
  set(report_model)
  if(on_model)
    set(report_model ${model} ${tokenizer})
  endif()
  add_test(NAME bench_report COMMAND ${check} page $<TARGET_FILE:kvt-bench> ${page} ${report_model})
  # Every figure of snapshot is there, and a missed bar is the exit code with --bars alone.
  add_test(NAME bench_snapshot_bars
    COMMAND ${Python3_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/check_snapshot.py
      $<TARGET_FILE:kvt-bench> ${CMAKE_CURRENT_BINARY_DIR} ${report_model})
  set(stores)
  if(kvtile_crypt)
    set(stores store)
  endif()
  if(has_redis)
    list(APPEND stores redis)
  endif()
  if(NOT KVTILE_SANITIZE)
    add_test(NAME bench_signals
      COMMAND ${Python3_EXECUTABLE} -B ${CMAKE_CURRENT_SOURCE_DIR}/check_signals.py
        $<TARGET_FILE:kvt-bench> ${CMAKE_CURRENT_BINARY_DIR} ${stores})
  endif()
  add_test(NAME bench_report_screen COMMAND ${check} screen ${page})
  set_tests_properties(bench_report PROPERTIES FIXTURES_SETUP bench_report_page)
  set_tests_properties(bench_report_screen PROPERTIES FIXTURES_REQUIRED bench_report_page)
  set_tests_properties(bench_report bench_report_screen PROPERTIES SKIP_RETURN_CODE 77 TIMEOUT 600)
else()
  add_test(NAME bench_report_needs_python3 COMMAND ${CMAKE_COMMAND} -E true)
  set_tests_properties(bench_report_needs_python3 PROPERTIES DISABLED TRUE)
endif()
