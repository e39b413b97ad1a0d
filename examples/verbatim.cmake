# Fail unless README contains the whole of PROGRAM.
file(READ ${README} readme)
file(READ ${PROGRAM} program)
string(FIND "${readme}" "${program}" at)
if(at EQUAL -1)
  message(FATAL_ERROR "${README} does not contain ${PROGRAM} word for word")
endif()
