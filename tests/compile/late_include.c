// Under -std=c11 a system header that comes first decides what libc shows: the library has to cope
// with less than it would like.
#include <stdio.h>
#include <stdlib.h>

#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
#include "use.h"

int main(void) { return use_library(); }
