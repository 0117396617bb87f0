// A GGUF file taken apart, changed, and put together again in memory: for tests that hand broken
// files to the library. It does not use the library's reader. Changes are made in place in the
// arrays `values` and `tensors`; an entry with `removed` set is left out.
#ifndef GGUF_EDIT_H
#define GGUF_EDIT_H
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EDIT_FN __attribute__((unused)) static

enum { EDIT_MAX_VALUES = 256, EDIT_MAX_TENSORS = 512 };

typedef struct edit_value {
    char key[128];
    uint32_t type;
    const uint8_t *data; // as in the file
    size_t size;
    int removed;
} edit_value;

typedef struct edit_tensor {
    char name[64];
    uint32_t n_dims;
    uint64_t ne[4];
    uint32_t type;
    const uint8_t *data; // if fewer bytes than the shape needs, zeros follow
    size_t size;
    int removed;
} edit_tensor;

typedef struct edit_file {
    uint8_t *bytes; // the original file
    size_t size;
    edit_value values[EDIT_MAX_VALUES];
    edit_tensor tensors[EDIT_MAX_TENSORS];
    int n_values, n_tensors;
} edit_file;

EDIT_FN uint64_t edit_get(const uint8_t **p, int bytes) {
    uint64_t x = 0;
    for (int i = 0; i < bytes; i++) x |= (uint64_t)*(*p)++ << 8 * i;
    return x;
}

// Bytes of a scalar value by its type, 0 for strings and arrays.
EDIT_FN size_t edit_scalar(uint32_t type) {
    static const uint8_t sizes[13] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
    return type < 13 ? sizes[type] : 0;
}

EDIT_FN void edit_skip(const uint8_t **p, uint32_t type) {
    if (type == 8) {
        uint64_t n = edit_get(p, 8);
        *p += n;
    } else if (type == 9) {
        uint32_t element = (uint32_t)edit_get(p, 4);
        uint64_t n = edit_get(p, 8);
        for (uint64_t i = 0; i < n; i++) edit_skip(p, element);
    } else {
        *p += edit_scalar(type);
    }
}

// Weights and bytes per block of the types that tests write.
EDIT_FN void edit_block(uint32_t type, uint64_t *block, uint64_t *bytes) {
    static const struct {
        uint32_t id, block, bytes;
    } types[] = {{0, 1, 4},      {1, 1, 2},      {2, 32, 18},    {3, 32, 20},  {6, 32, 22},
                 {7, 32, 24},    {8, 32, 34},    {10, 256, 84},  {12, 256, 144}, {13, 256, 176},
                 {14, 256, 210}, {20, 32, 18},   {23, 256, 136}, {30, 1, 2},   {39, 32, 17}};
    *block = *bytes = 1;
    for (size_t i = 0; i < sizeof types / sizeof types[0]; i++)
        if (types[i].id == type) {
            *block = types[i].block;
            *bytes = types[i].bytes;
        }
}

// The size in bytes that a tensor's shape and type ask for.
EDIT_FN size_t edit_tensor_size(const edit_tensor *t) {
    uint64_t block, bytes, n = t->ne[0];
    edit_block(t->type, &block, &bytes);
    n = (n + block - 1) / block * bytes;
    for (uint32_t d = 1; d < t->n_dims && d < 4; d++) n *= t->ne[d];
    return (size_t)n;
}

// 0 if the file cannot be read or has too many entries.
EDIT_FN int edit_open(edit_file *e, const char *path) {
    FILE *file = fopen(path, "rb");
    memset(e, 0, sizeof *e);
    if (!file) return 0;
    fseek(file, 0, SEEK_END);
    e->size = (size_t)ftell(file);
    rewind(file);
    e->bytes = (uint8_t *)malloc(e->size);
    int read = e->bytes && fread(e->bytes, 1, e->size, file) == e->size;
    fclose(file);
    if (!read) return 0;
    const uint8_t *p = e->bytes + 8;
    e->n_tensors = (int)edit_get(&p, 8);
    e->n_values = (int)edit_get(&p, 8);
    if (e->n_tensors > EDIT_MAX_TENSORS || e->n_values > EDIT_MAX_VALUES) return 0;
    for (int i = 0; i < e->n_values; i++) {
        edit_value *v = &e->values[i];
        size_t n = (size_t)edit_get(&p, 8);
        memcpy(v->key, p, n < sizeof v->key ? n : sizeof v->key - 1);
        p += n;
        v->type = (uint32_t)edit_get(&p, 4);
        v->data = p;
        edit_skip(&p, v->type);
        v->size = (size_t)(p - v->data);
    }
    uint64_t offsets[EDIT_MAX_TENSORS];
    for (int i = 0; i < e->n_tensors; i++) {
        edit_tensor *t = &e->tensors[i];
        size_t n = (size_t)edit_get(&p, 8);
        memcpy(t->name, p, n < sizeof t->name ? n : sizeof t->name - 1);
        p += n;
        t->n_dims = (uint32_t)edit_get(&p, 4);
        for (int d = 0; d < 4; d++) t->ne[d] = d < (int)t->n_dims ? edit_get(&p, 8) : 1;
        t->type = (uint32_t)edit_get(&p, 4);
        offsets[i] = edit_get(&p, 8);
    }
    size_t start = ((size_t)(p - e->bytes) + 31) / 32 * 32;
    for (int i = 0; i < e->n_tensors; i++) {
        e->tensors[i].data = e->bytes + start + offsets[i];
        e->tensors[i].size = edit_tensor_size(&e->tensors[i]);
    }
    return 1;
}
EDIT_FN void edit_close(edit_file *e) { free(e->bytes); }

EDIT_FN edit_value *edit_find_value(edit_file *e, const char *key) {
    for (int i = 0; i < e->n_values; i++)
        if (!strcmp(e->values[i].key, key)) return &e->values[i];
    return NULL;
}
EDIT_FN edit_tensor *edit_find_tensor(edit_file *e, const char *name) {
    for (int i = 0; i < e->n_tensors; i++)
        if (!strcmp(e->tensors[i].name, name)) return &e->tensors[i];
    return NULL;
}
// The value of a key, a new one at the end if there is none yet.
EDIT_FN edit_value *edit_add_value(edit_file *e, const char *key) {
    edit_value *v = edit_find_value(e, key);
    if (v || e->n_values == EDIT_MAX_VALUES) return v;
    v = &e->values[e->n_values++];
    memset(v, 0, sizeof *v);
    snprintf(v->key, sizeof v->key, "%s", key);
    return v;
}
// data must stay where it is until edit_build.
EDIT_FN void edit_set(edit_file *e, const char *key, uint32_t type, const void *data, size_t size) {
    edit_value *v = edit_add_value(e, key);
    if (!v) return;
    v->type = type;
    v->data = (const uint8_t *)data;
    v->size = size;
    v->removed = 0;
}

typedef struct edit_image {
    uint8_t *data;
    size_t size, capacity;
} edit_image;

EDIT_FN void edit_put_bytes(edit_image *m, const void *data, size_t size) {
    if (m->size + size > m->capacity) {
        m->capacity = (m->size + size) * 2;
        m->data = (uint8_t *)realloc(m->data, m->capacity);
        if (!m->data) exit(1);
    }
    if (size && data) memcpy(m->data + m->size, data, size);
    else if (size) memset(m->data + m->size, 0, size);
    m->size += size;
}
EDIT_FN void edit_put(edit_image *m, uint64_t x, int bytes) {
    uint8_t b[8];
    for (int i = 0; i < bytes; i++) b[i] = (uint8_t)(x >> 8 * i);
    edit_put_bytes(m, b, (size_t)bytes);
}
EDIT_FN void edit_put_string(edit_image *m, const char *text) {
    edit_put(m, strlen(text), 8);
    edit_put_bytes(m, text, strlen(text));
}
EDIT_FN void edit_pad(edit_image *m) { edit_put_bytes(m, NULL, (32 - m->size % 32) % 32); }

// The changed file in memory; free image.data.
EDIT_FN edit_image edit_build(const edit_file *e) {
    edit_image m = {NULL, 0, 0};
    uint64_t n_values = 0, n_tensors = 0, offset = 0;
    for (int i = 0; i < e->n_values; i++) n_values += !e->values[i].removed;
    for (int i = 0; i < e->n_tensors; i++) n_tensors += !e->tensors[i].removed;
    edit_put_bytes(&m, "GGUF", 4);
    edit_put(&m, 3, 4);
    edit_put(&m, n_tensors, 8);
    edit_put(&m, n_values, 8);
    for (int i = 0; i < e->n_values; i++) {
        const edit_value *v = &e->values[i];
        if (v->removed) continue;
        edit_put_string(&m, v->key);
        edit_put(&m, v->type, 4);
        edit_put_bytes(&m, v->data, v->size);
    }
    for (int i = 0; i < e->n_tensors; i++) {
        const edit_tensor *t = &e->tensors[i];
        if (t->removed) continue;
        edit_put_string(&m, t->name);
        edit_put(&m, t->n_dims, 4);
        for (uint32_t d = 0; d < t->n_dims && d < 4; d++) edit_put(&m, t->ne[d], 8);
        edit_put(&m, t->type, 4);
        edit_put(&m, offset, 8);
        offset += (edit_tensor_size(t) + 31) / 32 * 32;
    }
    edit_pad(&m);
    for (int i = 0; i < e->n_tensors; i++) {
        const edit_tensor *t = &e->tensors[i];
        size_t size = edit_tensor_size(t), there = t->size < size ? t->size : size;
        if (t->removed) continue;
        edit_put_bytes(&m, t->data, there);
        edit_put_bytes(&m, NULL, size - there);
        edit_pad(&m);
    }
    return m;
}

#endif
