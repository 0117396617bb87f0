// Counts the basic blocks that a program compiled with -fsanitize-coverage=trace-pc runs through.
// This file is compiled without that.
#include <stdint.h>

_Thread_local uint64_t steps_taken;

uint64_t steps_now(void);
uint64_t steps_now(void) { return steps_taken; }

void __sanitizer_cov_trace_pc(void);
void __sanitizer_cov_trace_pc(void) { steps_taken++; }
