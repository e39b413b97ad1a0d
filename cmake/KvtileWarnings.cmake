# Warnings of our own code; errors with KVTILE_WERROR. None where kvtile is a part of another project:
# its -Werror is for its own code.
add_library(kvtile_warnings INTERFACE)
if(PROJECT_IS_TOP_LEVEL OR KVTILE_WERROR)
  target_compile_options(kvtile_warnings INTERFACE -Wall -Wextra -Wconversion -Wshadow -Wvla
    -Wstrict-prototypes -Wmissing-prototypes $<$<BOOL:${KVTILE_WERROR}>:-Werror>)
else()
  target_compile_options(kvtile_warnings INTERFACE -w)
endif()
