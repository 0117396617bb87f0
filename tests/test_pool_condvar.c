// >>pool without the futex: moe_pool_open and all that test_pool.c tries, by condition variables.
#define MOE_NO_FUTEX
#include "test_pool.c"
