// Included again and again: first as a header, then with the implementation, then both anew.
#include "moe_infer.h"
#include "moe_infer.h"
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
#include "moe_infer.h"
#undef MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
#include "use.h"

int main(void) { return use_library(); }
