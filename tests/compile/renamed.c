// The file has another name here, and stands where no moe_infer.h is.
#define MOE_INFER_HEADER "experts.h"
#define MOE_INFER_IMPLEMENTATION
#include "experts.h"
#include "use.h"

int main(void) { return use_library(); }
