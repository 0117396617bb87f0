// >>pages: how files are mapped, copied and replaced in place, what is measured and what AUTO makes
// of it, with every outcome brought about on purpose: speeds cannot be, so that the limit below
// which a mapping counts as slow is a variable here, and samples and chunks are small.
#include <stddef.h>
static double slow_limit;           // 0: nothing is slow; 1e9: everything is
static double look_again = 1;       // after so many seconds
#define MOE__PAGING_SLOW slow_limit
#define MOE__PAGING_SECONDS look_again
#define MOE__PROBE_WINDOW (1 << 13) // samples of 0.5 MiB
#define MOE__PAGES_CHUNK (1 << 21)
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "meter.h"
#include "models.h"
#include <sys/wait.h>

static const char *const story = "examples/storyteller/storyteller.gguf"; // 6.3 MiB: 4 chunks

// ---- files -----------------------------------------------------------------------------------

static uint8_t byte_at(uint64_t i) { return (uint8_t)(i * 2654435761u >> 13 ^ i >> 20); }

// A file of `size` bytes that are byte_at; it stays in the cache.
static const char *make_file(uint64_t size) {
    const char *path = models_path("bytes");
    FILE *f = fopen(path, "wb");
    CHECK(f != NULL);
    if (!f) exit(1);
    for (uint64_t i = 0; i < size; i++) putc(byte_at(i), f);
    CHECK(fclose(f) == 0);
    return path;
}
static uint64_t n_wrong(const uint8_t *data, uint64_t size) {
    uint64_t n = 0;
    for (uint64_t i = 0; i < size; i++) n += data[i] != byte_at(i);
    return n;
}

static moe__pages map(const char *path, uint64_t size) {
    moe__pages p;
    memset(&p, 0, sizeof p);
    const int file = open(path, O_RDONLY);
    CHECK(file >= 0 && moe__pages_map(&p, file, size, 1) == 0);
    return p;
}

static moe_allocator plain_allocator(void) {
    moe_allocator a;
    CHECK(moe__allocator_init(&a, NULL, NULL) == MOE_OK);
    return a;
}

// ---- mapping and replacing -------------------------------------------------------------------

enum { SIZE = 5 * (1 << 21) + 12345 };

TEST(mappings_begin_at_2_mib) {
    const uint64_t sizes[] = {1, 4096, 4097, (1 << 21) - 1, 1 << 21, SIZE};
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        moe__pages p = map(make_file(sizes[i]), sizes[i]);
        CHECK(p.data && (uintptr_t)p.data % MOE__PAGES_HUGE == 0 && p.n_copied == 0);
        CHECK(n_wrong(p.data, sizes[i]) == 0);
        moe__pages_close(&p);
        CHECK(p.data == NULL);
    }
    moe__pages p;
    memset(&p, 0, sizeof p);
    CHECK(moe__pages_map(&p, -1, 100, 1) == EBADF && !p.data);
    CHECK(moe__pages_map(&p, open(story, O_RDONLY), (uint64_t)1 << 60, 0) == ENOMEM && !p.data);
    CHECK(moe__pages_take((uint64_t)1 << 60, PROT_READ) == NULL);
    moe__pages_close(&p);
}

// Many threads read while chunks are replaced: never a wrong byte.
typedef struct reader {
    const moe__pages *p;
    int stop;
    uint64_t wrong, rounds;
} reader;
static void *read_on(void *context) {
    reader *r = (reader *)context;
    while (!__atomic_load_n(&r->stop, __ATOMIC_RELAXED) || !r->rounds) {
        for (uint64_t i = r->rounds % 509; i < r->p->size; i += 509)
            r->wrong += r->p->data[i] != byte_at(i);
        r->rounds++;
    }
    return NULL;
}

TEST(chunks_are_replaced_under_readers) {
    moe__pages p = map(make_file(SIZE), SIZE);
    pthread_t handles[4];
    reader readers[4];
    memset(readers, 0, sizeof readers);
    for (int i = 0; i < 4; i++) {
        readers[i].p = &p;
        CHECK(pthread_create(&handles[i], NULL, read_on, &readers[i]) == 0);
    }
    const uint8_t *data = p.data;
    for (int again = 0; again < 3; again++)
        for (uint64_t from = 0; from < SIZE; from += MOE__PAGES_CHUNK)
            CHECK(moe__pages_replace(&p, from, from + MOE__PAGES_CHUNK < SIZE
                                                   ? from + MOE__PAGES_CHUNK : SIZE) == 0);
    for (int i = 0; i < 4; i++) {
        __atomic_store_n(&readers[i].stop, 1, __ATOMIC_RELAXED);
        pthread_join(handles[i], NULL);
        CHECK(readers[i].wrong == 0 && readers[i].rounds > 0);
    }
    CHECK(p.data == data && p.n_copied == 3 * (uint64_t)SIZE && n_wrong(p.data, SIZE) == 0);
    const uint64_t huge = moe__pages_huge("/proc/self/smaps", p.data, SIZE);
    CHECK(huge <= SIZE);
    printf("  %.0f of %.0f MiB on huge pages\n", (double)huge / 1048576, SIZE / 1048576.0);
    moe__pages_close(&p);
}

// What cannot be read or placed leaves the mapping as it was.
TEST(a_piece_that_fails_is_left_alone) {
    moe__pages p = map(make_file(SIZE), SIZE);
    const int file = p.file;
    CHECK(moe__pages_replace(&p, 0, SIZE + 5000) == -1); // the file ends before
    p.file = -1;
    CHECK(moe__pages_replace(&p, 0, MOE__PAGES_CHUNK) == EBADF);
    p.file = file;
    CHECK(p.n_copied == 0 && n_wrong(p.data, SIZE) == 0);
    moe__pages_close(&p);
}

TEST(huge_pages_are_counted) {
    const char *path = models_path("smaps");
    FILE *f = fopen(path, "w");
    CHECK(f != NULL);
    if (!f) return;
    fputs("00400000-00800000 r--p 00000000 08:01 1   /x\nAnonHugePages:      4096 kB\n"
          "10000000-10800000 rw-p 00000000 00:00 0 \nSize: 8192 kB\nAnonHugePages:      6144 kB\n"
          "FilePmdMapped:      0 kB\n"
          "10800000-10c00000 rw-p 00000000 00:00 0 \nAnonHugePages:      2048 kB\nRss: 1 kB\n"
          "20000000-20800000 r--p 00000000 08:01 1  /y\nAnonHugePages: 0 kB\n"
          "FilePmdMapped:     8192 kB", f);
    fclose(f);
    CHECK(moe__pages_huge(path, (void *)(uintptr_t)0x10000000, 0xc00000) == 8u << 20);
    CHECK(moe__pages_huge(path, (void *)(uintptr_t)0x10200000, 0x200000) == 2u << 20);
    CHECK(moe__pages_huge(path, (void *)(uintptr_t)0x30000000, 0xc00000) == 0);
    CHECK(moe__pages_huge(path, (void *)(uintptr_t)0x1fe00000, 0x1000000) == 0); // cut: no \n
    CHECK(moe__pages_huge("/nonexistent", (void *)(uintptr_t)0x10000000, 0xc00000) == 0);
}

// ---- chunks ----------------------------------------------------------------------------------

typedef struct tally {
    int seen[64], fail_at, cancel_at, n_reports;
    uint64_t last;
} tally;
static int tally_work(void *context, uint64_t from, uint64_t to) {
    tally *t = (tally *)context;
    CHECK(from % MOE__PAGES_CHUNK == 0 && to > from && to - from <= MOE__PAGES_CHUNK);
    __atomic_fetch_add(&t->seen[from / MOE__PAGES_CHUNK], 1, __ATOMIC_RELAXED);
    return t->fail_at == (int)(from / MOE__PAGES_CHUNK) ? 77 : 0;
}
static int tally_report(void *context, uint64_t done) {
    tally *t = (tally *)context;
    t->last = done;
    return ++t->n_reports == t->cancel_at ? ECANCELED : 0;
}

TEST(chunks_are_each_done_once) {
    const moe_allocator allocator = plain_allocator();
    moe_pool_options options;
    memset(&options, 0, sizeof options);
    for (options.n_threads = 0; options.n_threads < 5; options.n_threads++) {
        moe_pool *pool = options.n_threads ? moe_pool_open(&options, NULL) : NULL;
        for (uint64_t size = 0; size < (uint64_t)20 << 21; size += 1234567) {
            tally t;
            moe__chunks p;
            memset(&t, 0, sizeof t);
            memset(&p, 0, sizeof p);
            t.fail_at = -1;
            p.work = tally_work;
            p.report = tally_report;
            p.context = p.user = &t;
            p.size = size;
            CHECK(moe__chunks_run(&p, pool, &allocator) == 0 && p.done == size);
            CHECK(size == 0 || t.last == size);
            for (uint64_t i = 0; i < 64; i++)
                CHECK(t.seen[i] == (i * MOE__PAGES_CHUNK < size));
            if (size < 5 * (uint64_t)MOE__PAGES_CHUNK) continue;
            t.fail_at = 3;
            p.next = p.done = p.reported = 0;
            CHECK(moe__chunks_run(&p, pool, &allocator) == 77 && p.done < size);
            t.fail_at = -1;
            t.n_reports = 0;
            t.cancel_at = 1;
            p.next = p.done = p.reported = 0;
            p.code = 0;
            CHECK(moe__chunks_run(&p, pool, &allocator) == ECANCELED);
        }
        moe_pool_close(pool);
    }
}

// ---- measuring -------------------------------------------------------------------------------

static int has_cold_pages(const moe__pages *p) {
    moe__pages_advise(p->data, p->size, MOE__MADV_DONTNEED);
    fsync(p->file);
    moe__pages_drop(p->file, 0, p->size);
    return !moe__pages_resident(p->data, MOE__PAGES_HUGE);
}

TEST(only_what_is_cached_is_measured) {
    moe_pool_options options;
    moe__rates rates;
    memset(&options, 0, sizeof options);
    moe__pages p[2] = {map(make_file(SIZE), SIZE), map(story, 6 << 20)};
    for (int way = 0; way < 6; way++) {
        const int in_use = way % 2;
        options.n_threads = 1 + way / 2;
        moe_pool *pool = moe_pool_open(&options, NULL);
        CHECK(pool != NULL);
        CHECK(n_wrong(p[0].data, SIZE) == 0); // it is cached now
        CHECK(moe__probe_run(p, 1, in_use, pool, &rates) == 1);
        CHECK(rates.map > 0 && rates.copy > 0 && rates.fill > 0);
        moe__pages small = p[0];
        small.size = MOE__PROBE_WINDOW * (MOE__PROBE_WINDOWS - 1);
        CHECK(moe__probe_run(&small, 1, in_use, pool, &rates) == 0 && rates.map == 0);
        CHECK(moe__probe_run(p, 2, in_use, pool, &rates) == 1);
        if (has_cold_pages(&p[0])) {
            CHECK(moe__probe_run(p, 1, in_use, pool, &rates) == 0 && rates.map == 0);
            // and nothing was read for it
            CHECK(!moe__pages_resident(p[0].data, MOE__PAGES_HUGE));
        }
        moe_pool_close(pool);
    }
    moe__pages_close(&p[0]);
    moe__pages_close(&p[1]);
}

// ---- AUTO ------------------------------------------------------------------------------------

static moe__paging paging_of(moe__pages *p, int n) {
    moe__paging g;
    memset(&g, 0, sizeof g);
    g.files = p;
    g.n_files = n;
    for (int i = 0; i < n; i++) g.size += p[i].size;
    g.allocator = plain_allocator();
    look_again = 1;
    return g;
}

TEST(auto_does_what_was_measured) {
    char text[160];
    for (int slow = 0; slow < 2; slow++) {
        moe__pages p[2] = {map(make_file(SIZE), SIZE), map(story, 6 << 20)};
        moe__paging g = paging_of(p, 2);
        CHECK(n_wrong(p[0].data, SIZE) == 0);
        slow_limit = slow ? 1e9 : 0;
        CHECK(moe__paging_open(&g) == 0);
        moe__paging_say(&g, text, sizeof text);
        printf("  %s\n", text);
        CHECK(g.rates.map > 0 && strstr(text, "GB/s") && n_wrong(p[0].data, SIZE) == 0);
        if (!slow) {
            CHECK(g.outcome == MOE__PAGED_FAST && g.state == MOE__PAGING_WATCH);
            CHECK(moe__paging_copied(&g) == 0 && strstr(text, "mapped"));
        } else {
            CHECK(g.outcome != MOE__PAGED_FAST && g.state == MOE__PAGING_DONE);
            if (g.outcome == MOE__PAGED_COPIED)
                CHECK(moe__paging_copied(&g) == g.size && strstr(text, "copied to huge pages"));
        }
        moe__pages_close(&p[0]);
        moe__pages_close(&p[1]);
    }
}

TEST(small_and_cold_files_stay_mapped) {
    char text[160];
    slow_limit = 1e9;
    moe__pages p = map(make_file(300000), 300000);
    moe__paging g = paging_of(&p, 1);
    CHECK(moe__paging_open(&g) == 0 && g.outcome == MOE__PAGED_SMALL && !g.state);
    moe__paging_say(&g, text, sizeof text);
    CHECK(!strcmp(text, "0.3 MiB mapped"));
    moe__pages_close(&p);
    p = map(make_file(SIZE), SIZE);
    g = paging_of(&p, 1);
    if (has_cold_pages(&p)) {
        CHECK(moe__paging_open(&g) == 0 && g.outcome == MOE__PAGED_COLD && g.state);
        moe__paging_say(&g, text, sizeof text);
        CHECK(strstr(text, "not cached") && moe__paging_copied(&g) == 0);
    }
    moe__pages_close(&p);
}

// The steps of a copy, whatever else fails: read again, no room, a file that became shorter.
TEST(what_does_not_fit_is_not_copied) {
    char text[160];
    moe__pages p = map(make_file(SIZE), SIZE);
    moe__paging g = paging_of(&p, 1);
    g.rates.map = 7.1e9;
    g.rates.copy = 41.3e9;
    CHECK(moe__paging_fits(&g) && g.room > SIZE);
    g.size = g.room - (g.room >> 2); // more than half, however much others take meanwhile
    CHECK(!moe__paging_fits(&g));
    g.size = UINT64_MAX / 2; // more than there is: neither copied nor read again
    CHECK(moe__paging_repair(&g, NULL) == 0);
    if (g.outcome != MOE__PAGED_COLLAPSED) {
        CHECK(g.outcome == MOE__PAGED_NO_ROOM && p.n_copied == 0);
        moe__paging_say(&g, text, sizeof text);
        CHECKF(strstr(text, "7.1 of 41.3 GB/s") && strstr(text, "more than half"), "%s", text);
    }
    g.size = SIZE;
    fsync(p.file);
    const int code = moe__paging_all(&g, NULL, moe__paging_reread_chunk);
    printf("  reading again: %d\n", code);
    CHECK(code == 0 || code == EBUSY || code == ETIMEDOUT);
    CHECK(p.n_copied == 0 && n_wrong(p.data, SIZE) == 0);
    const int file = p.file;
    p.file = -1; // a file that is not open any more
    CHECK(!moe__paging_fits(&g));
    p.file = file;
    p.data += 4096; // a mapping that does not begin at 2 MiB
    CHECK(!moe__paging_fits(&g));
    p.data -= 4096;
    moe__pages_close(&p);
}

// ---- models ----------------------------------------------------------------------------------

enum { N = 40 };
static float *run_story(const moe_model *model, int n_threads, int32_t *tokens) {
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_threads = n_threads;
    models_tokens(tokens, N, moe_model_get_info(model)->n_vocab, 5);
    return models_run(model, &o, tokens, N, 1);
}
static float *expected_logits(size_t *size) {
    int32_t tokens[N];
    moe_model_options o;
    memset(&o, 0, sizeof o);
    o.pages = MOE_PAGES_MAP;
    moe_model *model = moe_model_open(story, &o, NULL);
    CHECK(model != NULL);
    if (!model) exit(1);
    const moe_model_memory *memory = moe_model_get_memory(model);
    CHECK(memory->pages == MOE_PAGES_MAP && !memory->n_bytes_copied && !memory->map_rate);
    *size = (size_t)moe_model_get_info(model)->n_vocab * N * sizeof(float);
    float *logits = run_story(model, 2, tokens);
    CHECK(moe_model_get_memory(model) == memory);
    moe_model_close(model);
    return logits;
}

// Slow from the beginning: copied when it is opened. Asked for: copied. The bits are the same.
TEST(models_are_copied_at_opening) {
    int32_t tokens[N];
    size_t size;
    float *expected = expected_logits(&size);
    for (int way = 0; way < 4; way++) {
        moe_model_options o;
        moe_gguf_options go;
        moe_error error;
        memset(&o, 0, sizeof o);
        memset(&go, 0, sizeof go);
        slow_limit = 1e9;
        look_again = 1e-6;
        o.pages = way & 1 ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
        moe_gguf *gguf = way & 2 ? moe_gguf_open(story, &go, &error) : NULL;
        moe_model *model = gguf ? moe_model_open_gguf(gguf, &o, &error)
                                : moe_model_open(story, &o, &error);
        CHECK(model != NULL);
        if (!model) continue;
        const moe_model_memory *memory = moe_model_get_memory(model);
        printf("  %s\n", memory->text);
        if (way & 1 || model->paging.outcome == MOE__PAGED_COPIED)
            CHECK(memory->pages == MOE_PAGES_COPY && strstr(memory->text, "copied") &&
                  memory->n_bytes_copied == moe_gguf_file_size(moe_model_gguf(model)));
        CHECK(moe_model_huge_bytes(model) <= moe_gguf_file_size(moe_model_gguf(model)));
        float *logits = run_story(model, 2, tokens);
        CHECK(logits && expected && !memcmp(logits, expected, size));
        free(logits);
        CHECK(moe_model_get_memory(model) == memory);
        moe_model_close(model);
        moe_gguf_close(gguf);
    }
    free(expected);
}

// Fast at first, slow later: chunks are copied between tokens, while several sessions in threads
// of their own go on.
typedef struct user {
    const moe_model *model;
    int n_threads;
    float *logits;
} user;
static void *use(void *context) {
    user *u = (user *)context;
    int32_t tokens[N];
    u->logits = run_story(u->model, u->n_threads, tokens);
    return NULL;
}
TEST(models_that_become_slow_are_copied_between_tokens) {
    size_t size;
    float *expected = expected_logits(&size);
    for (int n_users = 1; n_users <= 3; n_users += 2) {
        pthread_t handles[3];
        user users[3];
        slow_limit = 0;
        look_again = 1e-6;
        moe_model *model = moe_model_open(story, NULL, NULL);
        CHECK(model != NULL);
        if (!model) return;
        const moe_model_memory *memory = moe_model_get_memory(model);
        CHECK(memory->pages == MOE_PAGES_MAP && strstr(memory->text, "mapped"));
        slow_limit = 1e9;
        for (int i = 0; i < n_users; i++) {
            users[i].model = model;
            users[i].n_threads = i + 1;
            CHECK(pthread_create(&handles[i], NULL, use, &users[i]) == 0);
        }
        for (int i = 0; i < n_users; i++) {
            pthread_join(handles[i], NULL);
            CHECK(users[i].logits && expected && !memcmp(users[i].logits, expected, size));
            free(users[i].logits);
        }
        const moe_model_memory *later = moe_model_get_memory(model);
        printf("  %s, then %s\n", memory->text, later->text);
        CHECK(later != memory && memory->pages == MOE_PAGES_MAP);
        if (later->pages == MOE_PAGES_COPY)
            CHECK(later->n_bytes_copied == moe_gguf_file_size(moe_model_gguf(model)));
        else
            CHECK(strstr(later->text, "more than half"));
        moe_model_close(model);
    }
    free(expected);
}

// Looks that find nothing become rare.
TEST(fast_mappings_are_looked_at_seldom) {
    int32_t tokens[N];
    slow_limit = 0;
    look_again = 1e-6; // every token takes longer
    moe_model *model = moe_model_open(story, NULL, NULL);
    CHECK(model != NULL);
    if (!model) return;
    free(run_story(model, 1, tokens));
    CHECK(model->paging.state == MOE__PAGING_WATCH && model->paging.interval == 64000);
    moe_model_close(model);
    look_again = 1e6;
    model = moe_model_open(story, NULL, NULL);
    free(run_story(model, 1, tokens));
    CHECK(model->paging.interval == (int64_t)1e15 && model->paging.left < (int64_t)1e15);
    moe_model_close(model);
}

// The pages of a caller's gguf have one model that looks after them.
TEST(one_model_looks_after_a_gguf) {
    slow_limit = 0;
    look_again = 1e-6;
    moe_gguf *gguf = moe_gguf_open(story, NULL, NULL);
    moe_model *first = moe_model_open_gguf(gguf, NULL, NULL);
    moe_model *second = moe_model_open_gguf(gguf, NULL, NULL);
    CHECK(first && second && first->paging.files && !second->paging.files);
    moe_model_close(first);
    moe_model *third = moe_model_open_gguf(gguf, NULL, NULL);
    CHECK(third && third->paging.files);
    moe_model_close(third);
    moe_model_close(second);
    moe_gguf_close(gguf);
}

static int refuse(void *context, float fraction) {
    ++*(int *)context;
    return fraction < 0;
}
TEST(a_copy_can_be_cancelled) {
    for (int way = 0; way < 2; way++) {
        moe_model_options o;
        moe_error error;
        int calls = 0;
        memset(&o, 0, sizeof o);
        memset(&error, 0, sizeof error);
        slow_limit = 1e9;
        o.pages = way ? MOE_PAGES_COPY : MOE_PAGES_AUTO;
        o.progress = refuse;
        o.progress_user = &calls;
        moe_model *model = moe_model_open(story, &o, &error);
        if (calls) CHECK(!model && error.status == MOE_ERROR_CANCELLED && calls == 1);
        else CHECK(model != NULL && !way); // neither copied nor read again
        moe_model_close(model);
    }
}

// Every allocation of opening fails once; without a team the caller's thread does the work.
TEST(without_memory_for_a_team_the_caller_does_the_work) {
    for (int way = 0; way < 4; way++) {
        long n_opened = 0;
        for (long fail_at = 1;; fail_at++) {
            meter m;
            moe_model_options o;
            moe_error error;
            memset(&m, 0, sizeof m);
            memset(&o, 0, sizeof o);
            memset(&error, 0, sizeof error);
            m.fail_at = fail_at;
            o.pages = (moe_pages)(way % 3);
            slow_limit = way == 3 ? 1e9 : 0;
            o.allocator = meter_allocator(&m);
            moe_model *model = moe_model_open(story, &o, &error);
            if (!model) CHECK(error.status == MOE_ERROR_MEMORY);
            n_opened += model != NULL;
            moe_model_close(model);
            CHECK(m.live == 0);
            if (m.calls < fail_at) break;
        }
        CHECK(n_opened >= 1);
    }
}

// ---- limits ----------------------------------------------------------------------------------

// Runs in a child whose address space may grow by `room` bytes only: opening and evaluating work,
// or fail with a sentence. 0: a model was run; 1: it was refused; more: wrong. *copied: bytes.
static int run_limited(moe_pages pages, uint64_t room, int *was_copied) {
    const pid_t child = fork();
    int state = 0;
    *was_copied = 0;
    if (child == 0) {
        moe_model_options o;
        moe_session_options s;
        moe_error error;
        struct rlimit limit;
        char text[256];
        int32_t token = 1;
        memset(&o, 0, sizeof o);
        memset(&s, 0, sizeof s);
        memset(&error, 0, sizeof error);
        o.pages = pages;
        s.n_threads = 1;
        s.n_ctx = 64;
        slow_limit = 1e9;
        moe__machine_file("", "/proc/self/statm", text, sizeof text);
        limit.rlim_cur = strtoull(text, NULL, 10) * moe__machine_page() + room;
        limit.rlim_max = RLIM_INFINITY;
        if (setrlimit(RLIMIT_AS, &limit)) _exit(64);
        moe_model *model = moe_model_open(story, &o, &error);
        if (!model) _exit(*error.text ? 1 : 65);
        const int copied = moe_model_get_memory(model)->pages == MOE_PAGES_COPY;
        moe_session *session = moe_session_open(model, &s, &error);
        if (!session) _exit(*error.text ? 1 | copied << 4 : 66);
        if (moe_session_eval(session, &token, 1, &error)) _exit(67);
        moe_session_close(session);
        moe_model_close(model);
        _exit(copied << 4);
    }
    if (child < 0 || waitpid(child, &state, 0) != child || !WIFEXITED(state)) return 99;
    *was_copied = WEXITSTATUS(state) >> 4 & 1;
    return WEXITSTATUS(state) & ~(1 << 4);
}

TEST(address_space_may_be_short) {
    int copied, ran = 0;
    if (MODELS_SLOW) SKIP("sanitizers need address space of their own");
    for (uint64_t room = 1 << 20; room <= (uint64_t)64 << 20; room += (uint64_t)1 << 20) {
        const int result = run_limited(MOE_PAGES_AUTO, room, &copied);
        CHECKF(result <= 1, "%d with room for %d MiB", result, (int)(room >> 20));
        // the file has 6.3 MiB: with less than twice as much it is never copied
        if (room < (uint64_t)12 << 20) CHECK(!copied);
        ran += result == 0;
        CHECK(run_limited(MOE_PAGES_MAP, room, &copied) <= 1 && !copied);
        CHECK(run_limited(MOE_PAGES_COPY, room, &copied) <= 1);
    }
    CHECK(ran > 32);
}

// ---- sessions --------------------------------------------------------------------------------

TEST(sessions_begin_at_huge_pages) {
    moe_session_options o;
    moe_session_info told;
    memset(&o, 0, sizeof o);
    slow_limit = 0;
    moe_model *model = moe_model_open(story, NULL, NULL);
    CHECK(model != NULL);
    for (o.n_ctx = 1; model && o.n_ctx <= 1 << 18; o.n_ctx *= 8) {
        CHECK(moe_session_estimate(model, &o, &told, NULL) == MOE_OK);
        moe_session *session = moe_session_open(model, &o, NULL);
        CHECK(session != NULL);
        if (!session) break;
        const moe_session_info *info = moe_session_get_info(session);
        CHECK(told.kv_bytes == info->kv_bytes && told.work_bytes == info->work_bytes);
        if (session->n_bytes >= 8 * (size_t)MOE__PAGES_HUGE)
            CHECK((uintptr_t)session->buffers % MOE__PAGES_HUGE == 0);
        CHECK((uintptr_t)session->buffers % 64 == 0);
        CHECK(moe_session_huge_bytes(session) <= session->n_bytes + session->pool->work_size);
        if (o.n_ctx * 8 > 1 << 18)
            printf("  %.1f of %.1f MiB on huge pages\n",
                   (double)moe_session_huge_bytes(session) / 1048576,
                   (double)session->n_bytes / 1048576);
        moe_session_close(session);
    }
    moe_model_close(model);
    CHECK(moe_session_huge_bytes(NULL) == 0 && moe_model_huge_bytes(NULL) == 0);
}

MAIN()
