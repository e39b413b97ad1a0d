# kvt-bench compare on files made here: -DBENCH=program -DDIR=folder.
file(MAKE_DIRECTORY ${DIR})
set(old ${DIR}/old.jsonl)
set(new ${DIR}/new.jsonl)

# line(VARIABLE VALUE P10 P90 [KEY VALUE]...): a line of decode; more keys replace its own.
function(line variable value p10 p90)
  set(bench "\"decode\"")
  set(ctx 8192)
  set(cpu "\"Test CPU\"")
  set(quick false)
  set(extra "")
  while(ARGN)
    list(POP_FRONT ARGN key text)
    if(key MATCHES "^extra$")
      set(extra ", ${text}")
    else()
      set(${key} "${text}")
    endif()
  endwhile()
  set(${variable} "{\"bench\": ${bench}, \"isa\": \"avx2\", \"k_type\": \"i8\", \"v_type\": \"i8\", \"q_heads\": 32, \"kv_heads\": 8, \"head_dim\": 128, \"v_dim\": 128, \"v_in_k\": false, \"ctx\": ${ctx}, \"threads\": 1, \"mode\": \"near\", \"window\": 0, \"ratio\": ${value}, \"ratio_p10\": ${p10}, \"ratio_p90\": ${p90}, \"quick\": ${quick}, \"llc_bytes\": 33554432, \"cpu\": ${cpu}, \"compiler\": \"gcc 12\"${extra}}\n" PARENT_SCOPE)
endfunction()

# compare(NAME CODE OUTPUT [ARGUMENT]...): OUTPUT is a regular expression for what it prints, on
# stderr where the code is 2.
function(compare name code output)
  execute_process(COMMAND ${BENCH} compare ${old} ${new} ${ARGN}
    RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE err)
  set(text "${out}")
  if(code EQUAL 2)
    set(text "${err}")
    if(NOT err MATCHES "^kvt-bench: [^\n]+\n$")
      message(SEND_ERROR "${name}: not one line of error: '${err}'")
    endif()
  endif()
  if(NOT result STREQUAL code OR NOT text MATCHES "${output}")
    message(SEND_ERROR "${name}: exit code ${result}, not ${code}; output '${out}'; error '${err}'")
  endif()
endfunction()

# A change of a fifth with tight ranges; both ways, and in any order of the lines.
line(a 0.80 0.79 0.81)
line(b 0.64 0.63 0.65)
line(other 0.5 0.49 0.51 ctx 32768)
file(WRITE ${old} "${a}${other}")
file(WRITE ${new} "${other}${b}")
compare(regression 1 "REGRESSION +decode avx2 i8/i8 32:8 dim 128 ctx 8192[^\n]* -20 *\nsame[^\n]*ctx 32768[^\n]*\n2 judged: 1 regressions, 0 improvements, 1 the same")
compare(json 1 "^{\"bench\": \"compare\", \"verdict\": \"REGRESSION\", [^\n]*\"old\": 0.8, [^\n]*\"new\": 0.64[^\n]*}\n{[^\n]*\"same\"[^\n]*}\n$" --json)
compare(wide_threshold 0 "0 regressions" --threshold 30)
file(WRITE ${old} "${b}")
file(WRITE ${new} "${a}")
compare(improvement 0 "improvement +decode[^\n]* 25 ")

# Within noise: ranges that overlap, or less than the threshold.
line(b 0.64 0.55 0.795)
file(WRITE ${old} "${a}")
file(WRITE ${new} "${b}")
compare(overlap 0 "1 judged: 0 regressions, 0 improvements, 1 the same")
line(b 0.776 0.771 0.781)
file(WRITE ${new} "${b}")
compare(small 0 "0 regressions")
compare(small_but_asked_for 1 "1 regressions" --threshold 2)

# Several lines of one configuration: as wide as all of them.
line(a 0.80 0.79 0.81)
line(a2 0.70 0.60 0.71)
line(b 0.64 0.63 0.65)
file(WRITE ${old} "${a}${a2}${a}")
file(WRITE ${new} "${b}")
compare(repeated 0 "1 judged: 0 regressions, 0 improvements, 1 the same")
file(WRITE ${old} "${a}${a}")
compare(repeated_tight 1 "1 regressions")

# Lower is better: times, and KL, which has no spread.
foreach(from_to "1.0 1.2 1" "1.2 1.0 0")
  separate_arguments(x UNIX_COMMAND "${from_to}")
  list(GET x 0 from)
  list(GET x 1 to)
  list(GET x 2 code)
  foreach(side from to)
    set(times "\"ms_median\": ${${side}}, \"ms_p10\": ${${side}}, \"ms_p90\": ${${side}}")
    line(step_${side} null null null bench "\"step\"" extra "${times}")
    line(kl_${side} null null null bench "\"fidelity\"" extra "\"kl\": ${${side}}, \"seed\": 1")
    line(shift_${side} ${${side}} ${${side}} ${${side}} bench "\"shift\"")
  endforeach()
  foreach(kind step kl shift)
    file(WRITE ${old} "${${kind}_from}")
    file(WRITE ${new} "${${kind}_to}")
    compare(${kind}_${code} ${code} "1 judged: ${code} regressions")
  endforeach()
endforeach()
line(a null null null bench "\"fidelity\"" extra "\"kl\": 0.002, \"seed\": 1")
line(b null null null bench "\"fidelity\"" extra "\"kl\": 0.004, \"seed\": 1")
file(WRITE ${old} "${a}")
file(WRITE ${new} "${b}")
compare(kl_of_rounding 0 "1 the same")

# Snapshot's and store's figures: better by the line; sizes have no pairs; one name, two rivals.
foreach(bench snapshot_bars store_bars)
  set(keys "\"name\": \"size\", \"better\": \"higher\", \"rival\": \"A\"")
  line(a null null null bench "\"${bench}\"" extra "${keys}, \"value\": 1.0, \"p10\": null, \"p90\": null, \"pairs\": 0")
  line(b null null null bench "\"${bench}\"" extra "${keys}, \"value\": 0.9, \"p10\": null, \"p90\": null, \"pairs\": 0")
  string(REPLACE "\"rival\": \"A\"" "\"rival\": \"B\"" other "${a}")
  file(WRITE ${old} "${a}${other}")
  file(WRITE ${new} "${b}${other}")
  compare(${bench}_size 1 "REGRESSION [^\n]*rival A[^\n]*\nsame [^\n]*rival B[^\n]*\n2 judged: 1 regressions")
  string(REPLACE "\"pairs\": 0" "\"pairs\": 9" a "${a}")
  file(WRITE ${old} "${a}${other}")
  compare(${bench}_no_spread 0 "not judged [^\n]*rival A")
endforeach()

# What only one file has.
line(a 0.80 0.79 0.81)
line(b 0.50 0.49 0.51 ctx 32768)
line(c 0.50 0.49 0.51 ctx 65536)
file(WRITE ${old} "${a}${b}")
file(WRITE ${new} "{\"bench\": \"report\", \"kind\": \"setup\"}\n\n${a}${c}")
compare(missing 0 "only in OLD +decode[^\n]*ctx 32768[^\n]*\nonly in NEW +decode[^\n]*ctx 65536[^\n]*\n1 judged: .*1 only in OLD, 1 only in NEW")
file(WRITE ${old} "${b}")
compare(nothing_in_common 2 "no configuration is in both")

# Figures that are null or NaN, lines of --quick and the machine's own are not judged.
file(WRITE ${old} "${a}${b}")
foreach(nothing null NaN Infinity)
  line(n ${nothing} ${nothing} ${nothing} ctx 32768)
  file(WRITE ${new} "${a}${n}")
  compare(${nothing} 0 "not judged +decode[^\n]*ctx 32768[^\n]*\n1 judged: [^\n]*1 not judged")
endforeach()
line(n 0.1 null null ctx 32768)
file(WRITE ${new} "${a}${n}")
compare(no_spread 0 "not judged +decode[^\n]*ctx 32768")
file(WRITE ${new} "${n}")
compare(nothing_to_judge 2 "nothing to judge")
line(n 0.1 0.1 0.1 quick true)
file(WRITE ${new} "${n}")
compare(quick 2 "nothing to judge")
line(m1 null null null bench "\"machine\"" extra "\"read_gbps\": 30, \"read_p10\": 29, \"read_p90\": 31")
line(m2 null null null bench "\"machine\"" extra "\"read_gbps\": 10, \"read_p10\": 9, \"read_p90\": 11")
file(WRITE ${old} "${a}${m1}")
file(WRITE ${new} "${a}${m2}")
compare(machine 0 "not judged +machine[^\n]* read_gbps [^\n]*30")

# Other machines.
line(b 0.64 0.63 0.65 cpu "\"Another CPU\"")
file(WRITE ${old} "${a}")
file(WRITE ${new} "${b}")
compare(other_machine 2 "different machines: Test CPU[^\n]*Another CPU[^\n]*--force")
compare(other_machine_forced 1 "1 regressions" --force)
string(REPLACE 33554432 16777216 b "${a}")
file(WRITE ${new} "${b}")
compare(other_cache 2 "different machines")
line(b 0.64 0.63 0.65 cpu "\"Another CPU\"" ctx 1)
file(WRITE ${new} "${a}${b}")
compare(mixed 2 "new.jsonl:2: of another machine")

# Files that are no such lines are named with their line.
file(WRITE ${old} "${a}")
string(SUBSTRING "${a}" 0 200 cut)
foreach(bad
    "${cut}" "nonsense" "[1]" "{\"bench\": {}}" "{\"bench\": \"decode\", \"bench\": \"decode\"}"
    "{\"bench\": \"decode\", \"ratio\": 1.2.3}" "{\"bench\": \"decode\", \"ratio\": 01}" "{\"bench\": \"decode\", \"ratio\": }"
    "{\"bench\": \"decode\", \"ratio\": 1,}" "{\"bench\": \"decode\"} x" "{\"bench\" \"decode\"}"
    "{\"ratio\": 1}" "{\"bench\": \"a\\\\x\"}" "{\"bench\": \"a\\\\ud800\"}" "{\"bench\": 'a'}" "{bench: 1}"
    "{\"bench\": \"decode\", \"mode\": nul}")
  string(REPLACE "\\\\" "\\" bad "${bad}")
  file(WRITE ${new} "\n${a}${bad}\n${a}")
  compare("'${bad}'" 2 "new.jsonl:3: [a-z\"\\]")
endforeach()
file(WRITE ${new} "\n \n")
compare(empty 2 "no line in it")
file(REMOVE ${new})
compare(absent 2 "new.jsonl: ")
file(MAKE_DIRECTORY ${new})
compare(folder 2 "new.jsonl: ")
file(REMOVE_RECURSE ${new})

# Texts with escapes are texts.
string(REPLACE "\"near\"" "\"ne\\u0061r\"" b "${a}")
file(WRITE ${new} "${b}")
compare(escape 0 "1 judged")

# Lines of a real run, against themselves.
execute_process(COMMAND ${BENCH} decode --json --runs 9 --llc-mib 1 --layers 1 --heads 4:2 --dim 64
    --ctx 256 --k i8,f16
  OUTPUT_FILE ${old} RESULT_VARIABLE result)
file(COPY_FILE ${old} ${new})
compare(real 0 "2 judged: 0 regressions, 0 improvements, 2 the same")

foreach(arguments "compare" "compare ${old}" "compare ${old} ${new} ${new}" "compare ${old} ${new} --quick"
    "compare ${old} ${new} --threshold -1" "compare ${old} ${new} --threshold 5%" "compare ${old} ${new} --force=1"
    "report --k i8" "report --json" "report --out" "report --from ${DIR}/absent" "report --out ${old}"
    "report --markdown ${DIR}/absent" "decode --force" "decode --out x" "decode x")
  separate_arguments(x UNIX_COMMAND "${arguments}")
  execute_process(COMMAND ${BENCH} ${x} RESULT_VARIABLE result OUTPUT_VARIABLE out ERROR_VARIABLE err
    WORKING_DIRECTORY ${DIR})
  if(NOT err MATCHES "which is not there" AND # report without gnuplot says that first
     (NOT result EQUAL 2 OR NOT out STREQUAL "" OR NOT err MATCHES "^kvt-bench: [^\n]+\n$"))
    message(SEND_ERROR "kvt-bench ${arguments}: exit code ${result}, output '${out}', error '${err}'")
  endif()
endforeach()
