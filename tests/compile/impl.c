/* The implementation, in the one file that has it. Compiled as C and as C++. */
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
