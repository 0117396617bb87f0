// Two files with a private copy each are linked together.
#define MOE_INFER_STATIC
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
#include "use.h"

extern int other_copy(void);
int main(void) { return use_library() + other_copy(); }
