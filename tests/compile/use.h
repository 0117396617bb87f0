// A few calls that need no model; returns 0 if they answer as they should.
#ifndef USE_H
#define USE_H

static int use_library(void) {
    moe_error error;
    moe_model *model = moe_model_open("no/such/file.gguf", NULL, &error);
    if (model || error.status != MOE_ERROR_IO || !error.text[0]) return 1;
    if (moe_session_open(NULL, NULL, &error) || error.status != MOE_ERROR_ARGUMENT) return 2;
    if (moe_type_row_size(MOE_TYPE_Q4_K, 512) != 288) return 3;
    if (moe_isa_resolve(MOE_ISA_SCALAR) != MOE_ISA_SCALAR) return 4;
    moe_pool *pool = moe_pool_open(NULL, &error);
    if (!pool || moe_pool_threads(pool) < 1) return 5;
    moe_pool_close(pool);
    moe_session_close(NULL);
    moe_model_close(model);
    return 0;
}

#endif
