// The same from C++; main() asks both.
#include "moe_infer.h"
#include "use.h"

extern "C" int use_from_c(void);

int main() { return use_library() + use_from_c(); }
