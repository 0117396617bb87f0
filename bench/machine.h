// What a table of speeds says about the machine.
#ifndef BENCH_MACHINE_H
#define BENCH_MACHINE_H
#include <stdio.h>
#include <string.h>

// "model name" of the processor, "" where the system does not tell.
static inline void cpu_name(char *out, size_t size) {
    char line[256];
    FILE *f = fopen("/proc/cpuinfo", "r");
    out[0] = 0;
    while (f && fgets(line, sizeof line, f)) {
        const char *value = strchr(line, ':');
        if (strncmp(line, "model name", 10) != 0 || !value) continue;
        snprintf(out, size, "%.*s", (int)strcspn(value + 2, "\n"), value + 2);
        break;
    }
    if (f) fclose(f);
}

#endif
