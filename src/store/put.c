#include "src/store/prefix.h"
