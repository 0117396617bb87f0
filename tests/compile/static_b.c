#define MOE_INFER_STATIC
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
#include "use.h"

extern int other_copy(void);
int other_copy(void) { return use_library(); }
