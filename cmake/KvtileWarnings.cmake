# Warnings of our own code; errors with KVTILE_WERROR.
add_library(kvtile_warnings INTERFACE)
target_compile_options(kvtile_warnings INTERFACE -Wall -Wextra -Wconversion -Wshadow -Wvla
  -Wstrict-prototypes -Wmissing-prototypes $<$<BOOL:${KVTILE_WERROR}>:-Werror>)
