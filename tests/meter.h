// An allocator that counts what is taken and given back, and fails when told to.
#ifndef METER_H
#define METER_H
#include "test.h"

#define METER_FN __attribute__((unused)) static

typedef struct meter {
    size_t live, peak, largest; // bytes
    long calls, fail_at;        // fail_at: the call that fails, from 1; 0: none
    size_t limit, most;         // larger requests fail, and those beyond so many; 0: none
} meter;

METER_FN void *meter_alloc(void *user, size_t size) {
    meter *m = (meter *)user;
    if (size > m->largest) m->largest = size;
    if (++m->calls == m->fail_at || (m->limit && size > m->limit) ||
        (m->most && m->live + size > m->most))
        return NULL;
    void *memory = malloc(size);
    if (!memory) return NULL;
    m->live += size;
    if (m->live > m->peak) m->peak = m->live;
    return memory;
}
METER_FN void meter_free(void *user, void *memory, size_t size) {
    ((meter *)user)->live -= size;
    free(memory);
}
METER_FN moe_allocator meter_allocator(meter *m) {
    moe_allocator a = {meter_alloc, meter_free, m};
    return a;
}

// No function leaves this status.
METER_FN void clear_error(moe_error *error) {
    memset(error, 0, sizeof *error);
    error->status = (moe_status)-1;
}

#endif
