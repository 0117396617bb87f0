// Speed of single kernels beside the roof of the same machine, in the same process and with as many
// threads: for every tensor type and instruction set
//
//     dot    one token: GB/s of weights, from the cache and from memory, and its part of what only
//            reading memory gives
//     tile   many tokens at once: 10^9 multiply-adds per second, the weights coming from memory,
//            and their part of the peak of the multiply instruction (int8, or FMA for float types)
//
// and for attention multiply-adds per second beside the FMA peak and, where the cache of keys and
// values comes from memory, GB/s of it beside reading.
//
//     cc -O2 bench/kernels.c -o kernels -lm -lpthread
//     ./kernels                                all types, instruction sets and attention shapes
//     ./kernels -T Q4_K,Q6_K -i avx2 -t 2      some of them, 2 threads, each with rows of its own
//
// Samples of a few milliseconds alternate with samples of their roof; every figure is a median.
// Time is processor time: other programs cost cache and bandwidth, but are not counted. The rows
// hold random bytes and lie in huge pages, those of a mapped file in small ones.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"

#include "../examples/tool.h"
#include "roofs.h"
#include <strings.h>

static const char program[] = "kernels";
enum { TILE = MOE__TILE_ROWS, MAX_TOKENS = 512, MAX_SAMPLES = 64, MAX_THREADS = 256 };
static const int tokens_of[] = {2, 4, 8, 16, 32, 64, 512};
enum { N_TOKENS = sizeof tokens_of / sizeof *tokens_of };

static struct settings {
    const char *types, *attention;
    tool_list isa;
    int32_t n, n_threads, cache_kib, milliseconds, format;
    int help;
} set = {NULL, NULL, {0, {0}}, 2048, 1, 256, 100, 0, 0};

static const tool_option options[] = {
    {"-T, --types", "NAME,...", TOOL_TEXT, &set.types, 0, 0,
     "tensor types (default: all); none: attention only"},
    {"-a, --attention", "TEXT", TOOL_TEXT, &set.attention, 0, 0,
     "attention shapes with TEXT in their names (default: all);\nnone: tensor types only"},
    {"-i, --isa", "best|scalar|avx2|avx512|avx-vnni", TOOL_CHOICES, &set.isa, 0, 0,
     "instruction sets (default: all that are there)"},
    {"-n, --row", "N", TOOL_INT, &set.n, 32, 1 << 16,
     "weights per row (default 2048); types whose block does\nnot divide it are left out"},
    {"-t, --threads", "N", TOOL_INT, &set.n_threads, 1, MAX_THREADS, "threads (default 1)"},
    {"-l, --cache", "KIB", TOOL_INT, &set.cache_kib, 1, 1 << 20,
     "weights per thread that count as in the cache (default 256)"},
    {"-s, --time", "MS", TOOL_INT, &set.milliseconds, 1, 60000,
     "milliseconds per figure, roofs included (default 100)"},
    {"-o, --output", "md|csv|json", TOOL_CHOICE, &set.format, 0, 0,
     "tables in Markdown (default), or a line per figure"},
    {"-h, --help", NULL, TOOL_FLAG, &set.help, 0, 0, "show this"},
    {NULL, NULL, TOOL_HEADING, NULL, 0, 0, NULL}};

// ---- a figure --------------------------------------------------------------------------------

typedef double roof_fn(roofs *r, double seconds);

typedef struct figure {
    double rate, roof, fraction; // medians, per second; of the samples' fractions, too
} figure;

// Samples of the work and of its roof in turns, until the time is over.
static figure measure(roofs *r, roofs_work *work, void *user, roof_fn *roof) {
    static double rate[MAX_SAMPLES], roof_rate[MAX_SAMPLES], fraction[MAX_SAMPLES];
    const double sample = 0.003;
    figure f;
    int n = 0;
    roofs_run(r, work, user, sample);
    double before = roof(r, sample), start = tool_seconds();
    while (n < MAX_SAMPLES && (n < 3 || tool_seconds() - start < set.milliseconds * 1e-3)) {
        rate[n] = roofs_run(r, work, user, sample);
        double after = roof(r, sample);
        roof_rate[n] = (before + after) / 2;
        fraction[n] = rate[n] / roof_rate[n];
        before = after;
        n++;
    }
    f.rate = roofs_median(rate, n);
    f.roof = roofs_median(roof_rate, n);
    f.fraction = roofs_median(fraction, n);
    return f;
}

// One line of JSON or CSV. `unit`: gbps or gmacs.
static void print_figure(const char *kernel, const char *what, const char *place, moe_isa isa,
                         int tokens, const char *unit, const figure *f) {
    static int n_lines;
    const char *json = "{\"kernel\": \"%s\", \"what\": \"%s\", \"place\": \"%s\", \"isa\": \"%s\", "
                       "\"threads\": %d, \"tokens\": %d, \"unit\": \"%s\", \"value\": %.4f, "
                       "\"roof\": %.4f, \"roof_fraction\": %.4f}\n";
    const char *csv = "%s,\"%s\",%s,%s,%d,%d,%s,%.4f,%.4f,%.4f\n";
    if (set.format == 1 && n_lines++ == 0)
        puts("kernel,what,place,isa,threads,tokens,unit,value,roof,roof_fraction");
    if (set.format)
        printf(set.format == 1 ? csv : json, kernel, what, place, moe_isa_name(isa), set.n_threads,
               tokens, unit, f->rate * 1e-9, f->roof * 1e-9, f->fraction);
    else
        printf(" %7.1f %3.0f |", f->rate * 1e-9, 100 * f->fraction);
    fflush(stdout);
}

// ---- matrices --------------------------------------------------------------------------------

// What each thread has: activations, results and scratch. Its weights are its part of the roof's
// memory, which is far larger than the caches.
typedef struct lane {
    uint8_t *acts;
    const void *x[MAX_TOKENS];
    float *out;
    void *pack;
    size_t at; // where it goes on in the weights
} lane;
static lane lanes[MAX_THREADS];

typedef struct job {
    const moe__type_kernels *kernels;
    int64_t n, n_rows; // of one call
    int tokens;
    size_t row_size, span; // bytes of weights that are walked through
} job;

static const uint8_t *next_rows(lane *l, const roofs_thread *t, const job *j) {
    const size_t size = j->row_size * (size_t)j->n_rows;
    const size_t span = j->span && j->span < t->size ? j->span : t->size;
    if (l->at + size > span) l->at = 0;
    l->at += size;
    return t->memory + l->at - size;
}

static double dot_work(roofs *r, int thread, double seconds, void *user) {
    const job *j = (const job *)user;
    lane *l = &lanes[thread];
    const double start = roofs_now(r);
    double now = start, bytes = 0;
    do {
        // asking for the time takes as long as reading 10 KiB
        for (double until = bytes + (1 << 18); bytes < until;
             bytes += (double)j->row_size * (double)j->n_rows)
            j->kernels->dot(next_rows(l, &r->threads[thread], j), j->row_size, j->n_rows, j->n,
                            l->x[0], l->out);
        now = roofs_now(r);
    } while (now - start < seconds);
    return bytes / (now - start);
}

static double tile_work(roofs *r, int thread, double seconds, void *user) {
    const job *j = (const job *)user;
    lane *l = &lanes[thread];
    const double start = roofs_now(r);
    double now = start, macs = 0;
    const uint8_t *rows = next_rows(l, &r->threads[thread], j);
    do {
        const uint8_t *next = next_rows(l, &r->threads[thread], j);
        j->kernels->tile(rows, j->row_size, TILE, j->n, l->x, j->tokens, l->out, TILE, l->pack,
                         next, TILE * j->row_size);
        rows = next;
        macs += (double)TILE * (double)j->n * j->tokens;
        now = roofs_now(r);
    } while (now - start < seconds);
    return macs / (now - start);
}

// Activations of a kind: small whole floats, which are good for every field of the records.
static void set_acts(moe__act_kind kind, int64_t n) {
    const size_t size = moe__act_size(kind, n);
    for (int i = 0; i < set.n_threads; i++) {
        for (size_t k = 0; k + 4 <= size * MAX_TOKENS; k += 4) {
            const float v = (float)(k / 4 % 17) - 8.0f;
            memcpy(lanes[i].acts + k, &v, 4);
        }
        for (size_t t = 0; t < MAX_TOKENS; t++) lanes[i].x[t] = lanes[i].acts + t * size;
    }
}

static void bench_type(roofs *r, int type, moe_isa isa) {
    const moe__type *info = &moe__types[type];
    const moe__kernels *kernels = moe__kernels_get(isa);
    roof_fn *roof = info->act == MOE__ACT_F32 ? roofs_float : roofs_int8;
    const size_t row_size = moe_type_row_size(info->id, set.n);
    const size_t cached = (size_t)set.cache_kib << 10, large = (size_t)256 << 10;
    figure f;
    job j;
    memset(&j, 0, sizeof j);
    j.kernels = &kernels->type[type], j.n = set.n, j.row_size = row_size;
    r->isa = isa;
    set_acts(info->act, set.n);
    if (set.format == 0) printf("| %-8s | %-8s |", info->name, moe_isa_name(isa));
    for (int memory = 0; memory < 2; memory++) { // rows in multiples of TILE suit every layout
        const size_t bytes = memory ? large : cached / 2;
        j.n_rows = bytes / row_size < TILE ? TILE : (int64_t)(bytes / row_size / TILE * TILE);
        j.span = memory ? 0 : cached;
        if (!memory && cached < row_size * TILE) j.span = row_size * TILE;
        f = measure(r, dot_work, &j, roofs_read);
        print_figure("dot", info->name, memory ? "memory" : "cache", isa, 1, "gbps", &f);
    }
    j.span = 0, j.n_rows = TILE;
    for (int i = 0; i < N_TOKENS; i++) {
        j.tokens = tokens_of[i];
        f = measure(r, tile_work, &j, roof);
        print_figure("tile", info->name, "memory", isa, j.tokens, "gmacs", &f);
    }
    if (set.format == 0) puts("");
}

// Is `name` one of "a,b,c"? Nothing given: yes.
static int is_wanted(const char *names, const char *name) {
    const size_t size = strlen(name);
    if (!names) return 1;
    for (; *names; names += strcspn(names, ","), names += *names == ',')
        if (strcspn(names, ",") == size && !strncasecmp(names, name, size)) return 1;
    return 0;
}

// Lists given are taken as they are; an instruction set that is missing is left out.
static int is_wanted_isa(moe_isa isa) {
    if (moe_isa_resolve(isa) != isa) return 0;
    for (int32_t i = 0; i < set.isa.n; i++)
        if (moe_isa_resolve((moe_isa)set.isa.item[i]) == isa) return 1;
    return set.isa.n == 0;
}

static int bench_types(roofs *r) {
    int found = 0;
    if (set.format == 0) {
        printf("Rows of %d weights, %d thread%s. dot: GB/s of weights and %% of reading memory; "
               "tile:\nG multiply-adds/s and %% of the instruction's peak, by tokens.\n\n", set.n,
               set.n_threads, set.n_threads > 1 ? "s" : "");
        printf("| %-8s | %-8s |  dot, cache | dot, memory |", "type", "isa");
        for (int i = 0; i < N_TOKENS; i++) printf(" tile, T %3d |", tokens_of[i]);
        printf("\n| -------- | -------- |");
        for (int i = 0; i < N_TOKENS + 2; i++) printf(" ----------: |");
        puts("");
    }
    for (int type = 0; type < MOE__N_TYPES; type++) {
        if (!is_wanted(set.types, moe__types[type].name)) continue;
        found = 1;
        if (!moe_type_row_size(moe__types[type].id, set.n)) continue;
        for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX_VNNI; isa++)
            if (is_wanted_isa((moe_isa)isa)) bench_type(r, type, (moe_isa)isa);
    }
    return found;
}

// ---- attention -------------------------------------------------------------------------------

// One call takes the queries that share a head of keys. The cache lies as in a session: rows of all
// heads one after another, a layer of `depth` rows of keys, then of values, then the next layer.
typedef struct shape {
    const char *name;
    int n_queries, dk, dv, causal;
    int heads;       // of keys and values
    int same_memory; // values are the front of the keys (latent rows)
    int depth;       // positions; 0: MOE__ATTEND_KEYS of them, always the same
} shape;

static const shape shapes[] = {
    {"prompt, 32 queries, d 128", 32, 128, 128, 0, 1, 0, 0},
    {"prompt, 32 queries, d 128, causal", 32, 128, 128, 1, 1, 0, 0},
    {"prompt, 32 queries, d 64", 32, 64, 64, 0, 1, 0, 0},
    {"prompt, 32 queries, MLA expanded 192/128", 32, 192, 128, 1, 1, 0, 0},
    {"prompt, 32 queries, MLA absorbed 576/512", 32, 576, 512, 0, 1, 1, 0},
    {"token, 8 queries, d 128, 1 head, cached", 8, 128, 128, 0, 1, 0, 0},
    {"token, 1 query, d 128, 16 heads, depth 512", 1, 128, 128, 0, 16, 0, 512},
    {"token, 8 queries, d 128, 4 heads, depth 512", 8, 128, 128, 0, 4, 0, 512},
    {"token, 8 queries, d 128, 4 heads, depth 8192", 8, 128, 128, 0, 4, 0, 8192},
    {"token, 8 queries, d 64, 8 heads, depth 8192", 8, 64, 64, 0, 8, 0, 8192},
    {"token, MLA 16 queries, 576/512, cached", 16, 576, 512, 0, 1, 1, 0},
    {"token, MLA 16 queries, 576/512, depth 8192", 16, 576, 512, 0, 1, 1, 8192},
};

// What the keys and values are kept as: a new kind of moe__attend_args is a row here.
typedef struct kind {
    const char *name;
    size_t block, bytes; // values and bytes per block
    moe_kv_type type;
} kind;
static const kind kinds[] = {
    {"f16", 1, 2, MOE_KV_F16}, {"q8_0", 32, 34, MOE_KV_Q8_0}, {"f32", 1, 4, MOE_KV_F32}};
enum { N_KINDS = sizeof kinds / sizeof *kinds };

typedef struct attend_job {
    const moe__kernels *kernels;
    const shape *s;
    const kind *k;
    double macs; // 0: the rate is bytes of the cache, else this many multiply-adds per call
} attend_job;

typedef struct attend_lane {
    float q[MOE__ATTEND_QUERIES * 576], out[MOE__ATTEND_QUERIES][512];
    float *rows[MOE__ATTEND_QUERIES];
    MOE__ALIGNED(64) float scores[MOE__ATTEND_QUERIES * MOE__ATTEND_KEYS];
    float max[MOE__ATTEND_QUERIES], sum[MOE__ATTEND_QUERIES];
    int32_t visible[MOE__ATTEND_QUERIES];
    size_t at; // calls so far
} attend_lane;
static attend_lane *attend_lanes;

// Keys of one call, as sessions make them: all of a token's, some of a prompt's
static int32_t attend_keys(const shape *s) { return s->depth ? s->depth : MOE__ATTEND_CALL; }
static int32_t attend_visible(const shape *s, int query) {
    return attend_keys(s) - (s->causal ? s->n_queries - 1 - query : 0);
}

static double attend_work(roofs *r, int thread, double seconds, void *user) {
    const attend_job *j = (const attend_job *)user;
    const shape *s = j->s;
    const roofs_thread *t = &r->threads[thread];
    attend_lane *l = &attend_lanes[thread];
    const size_t heads = (size_t)s->heads, depth = (size_t)attend_keys(s);
    const size_t k_size = (size_t)s->dk / j->k->block * j->k->bytes;
    const size_t v_size = (size_t)s->dv / j->k->block * j->k->bytes;
    const size_t keys_size = depth * heads * k_size;
    const size_t layer_size = keys_size + (s->same_memory ? 0 : depth * heads * v_size);
    const size_t layers = s->depth && t->size > layer_size ? t->size / layer_size : 1;
    moe__attend_args a;
    memset(&a, 0, sizeof a);
    a.q = l->q, a.q_stride = s->dk;
    a.k_bytes = k_size, a.v_bytes = s->same_memory ? k_size : v_size;
    a.type = j->k->type;
    a.dk = s->dk, a.dv = s->dv, a.n_queries = s->n_queries, a.n_keys = (int32_t)depth;
    a.n_visible = l->visible, a.max = l->max, a.sum = l->sum;
    a.out = l->rows, a.scores = l->scores;
    for (int i = 0; i < s->n_queries; i++) {
        l->rows[i] = l->out[i];
        l->visible[i] = attend_visible(s, i);
        l->max[i] = -INFINITY, l->sum[i] = 0;
    }
    const double start = roofs_now(r);
    double now = start, calls = 0;
    do {
        const size_t head = l->at % heads;
        const uint8_t *layer = t->memory + l->at / heads % layers * layer_size;
        const uint8_t *v = s->same_memory ? layer : layer + keys_size;
        a.k = layer + head * depth * a.k_bytes; // as sessions keep them
        a.v = v + head * depth * a.v_bytes;
        j->kernels->attend(&a);
        l->at++, calls++;
        now = roofs_now(r);
    } while (now - start < seconds);
    const double bytes = (double)depth * (double)(s->same_memory ? k_size : k_size + v_size);
    return calls * (j->macs > 0 ? j->macs : bytes) / (now - start);
}

static void bench_shape(roofs *r, const shape *s, const kind *k, moe_isa isa) {
    attend_job j = {moe__kernels_get(isa), s, k, 0};
    char what[96];
    figure f;
    r->isa = isa;
    snprintf(what, sizeof what, "%s, %s", s->name, k->name);
    for (int i = 0; i < s->n_queries; i++)
        j.macs += (double)attend_visible(s, i) * (s->dk + s->dv);
    if (set.format == 0) printf("| %-50s | %-8s |", what, moe_isa_name(isa));
    f = measure(r, attend_work, &j, roofs_float);
    print_figure("attend", what, s->depth ? "memory" : "cache", isa, 0, "gmacs", &f);
    if (s->depth) {
        j.macs = 0;
        f = measure(r, attend_work, &j, roofs_read);
        print_figure("attend", what, "memory", isa, 0, "gbps", &f);
    } else if (set.format == 0) {
        printf(" %11s |", "");
    }
    if (set.format == 0) puts("");
}

static int bench_attention(roofs *r) {
    const int n_shapes = (int)(sizeof shapes / sizeof *shapes);
    int found = 0;
    attend_lanes = (attend_lane *)aligned_alloc(64, (size_t)set.n_threads * sizeof *attend_lanes);
    if (!attend_lanes) return -1;
    memset(attend_lanes, 0, (size_t)set.n_threads * sizeof *attend_lanes);
    for (int t = 0; t < set.n_threads; t++)
        for (int i = 0; i < MOE__ATTEND_QUERIES * 576; i++)
            attend_lanes[t].q[i] = (float)((i * 37 % 101) - 50) * 0.002f;
    if (set.format == 0) {
        printf("\nAttention, blocks of %d keys: G multiply-adds/s and %% of the FMA peak; from "
               "memory also\nGB/s of keys and values and %% of reading.\n\n",
               (int)MOE__ATTEND_KEYS);
        printf("| %-50s | %-8s | %11s | %11s |\n", "shape", "isa", "multiply", "read");
        printf("| -------------------------------------------------- | -------- |"
               " ----------: | ----------: |\n");
    }
    for (int i = 0; i < n_shapes; i++)
        for (int k = 0; k < N_KINDS; k++) {
            if (set.attention && !strstr(shapes[i].name, set.attention)) continue;
            found = 1;
            for (int isa = MOE_ISA_SCALAR; isa <= MOE_ISA_AVX_VNNI; isa++)
                if (is_wanted_isa((moe_isa)isa)) bench_shape(r, &shapes[i], &kinds[k],
                                                             (moe_isa)isa);
        }
    free(attend_lanes);
    return found;
}

// ---- the program -----------------------------------------------------------------------------

static int open_lanes(void) {
    const size_t acts = (size_t)set.n * 8 + 4096; // per token: more than any record takes
    const size_t rows = ((size_t)set.cache_kib << 10) + (1 << 20);
    for (int i = 0; i < set.n_threads; i++) {
        lane *l = &lanes[i];
        l->acts = (uint8_t *)aligned_alloc(64, acts / 64 * 64 * MAX_TOKENS);
        l->out = (float *)aligned_alloc(64, rows / 64 * 64 + sizeof(float) * TILE * MAX_TOKENS);
        l->pack = aligned_alloc(64, MOE__PACK_SIZE);
        if (!l->acts || !l->out || !l->pack) return -1;
    }
    return 0;
}

int main(int argc, char **argv) {
    static roofs r;
    int status = tool_parse(program, options, argc, argv);
    if (status) return status;
    if (set.help) {
        printf("usage: %s [options]\n\nSpeed of the kernels of moe_infer.h beside the machine's "
               "roofs.\n", program);
        tool_help(stdout, options);
        return output_finish(program, TOOL_OK);
    }
    if (open_lanes() || roofs_open(&r, set.n_threads, MOE_ISA_SCALAR, CLOCK_THREAD_CPUTIME_ID)) {
        fprintf(stderr, "%s: out of memory or threads\n", program);
        return TOOL_ERROR;
    }
    const int types = set.types && !strcmp(set.types, "none") ? 2 : bench_types(&r);
    const int shown = set.attention && !strcmp(set.attention, "none") ? 2 : bench_attention(&r);
    roofs_close(&r);
    for (int i = 0; i < set.n_threads; i++) {
        free(lanes[i].acts);
        free(lanes[i].out);
        free(lanes[i].pack);
    }
    if (!types) fprintf(stderr, "%s: no type of that name\n", program);
    if (!shown) fprintf(stderr, "%s: no attention shape of that name\n", program);
    if (shown < 0) fprintf(stderr, "%s: out of memory\n", program);
    return output_finish(program, types && shown > 0 ? TOOL_OK : TOOL_ERROR);
}
