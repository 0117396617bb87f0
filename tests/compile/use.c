// One of many files that only use the library. Compiled as C and as C++, linked with either.
#include "moe_infer.h"
#include "use.h"

int use_from_c(void) { return use_library(); }
