// >>cache: rings of rows of layers with a window, beside caches that keep all rows. That rows and
// states of other layers are right shows in test_session and test_recurrent.
#define MOE_INFER_IMPLEMENTATION
#include "../moe_infer.h"
#include "models.h"

enum { LONG = 4700, SOME = 300, RING_CTX = 6000, FULL_CTX = 4800 };

static int32_t tokens[LONG + SOME];
static const moe_model *opened;

static int stop_after;
static int stop(void *user) {
    (void)user;
    return stop_after >= 0 && stop_after-- == 0;
}

static moe_session *open_with(int32_t n_ctx, int32_t n_batch, moe_kv_type kv_type) {
    moe_error error;
    moe_session_options o;
    memset(&o, 0, sizeof o);
    o.n_ctx = n_ctx;
    o.n_batch = n_batch;
    o.n_threads = 2;
    o.kv_type = kv_type;
    o.should_stop = stop;
    moe_session *session = moe_session_open(opened, &o, &error);
    if (!session) printf("  %s: %s\n", error.where, error.text);
    return session;
}
// A ring of 4096 rows, and all rows: a batch of nearly the whole context needs them.
static moe_session *open_ring(void) { return open_with(RING_CTX, 100, MOE_KV_F16); }
static moe_session *open_full(void) { return open_with(FULL_CTX, 4600, MOE_KV_F16); }

static int eval(moe_session *session, int32_t from, int32_t n) {
    moe_error error;
    if (moe_session_eval(session, tokens + from, n, &error) == MOE_OK) return 1;
    printf("  eval: %s: %s\n", error.where, error.text);
    return 0;
}
static int rewound(moe_session *session, int32_t length) {
    moe_error error;
    if (moe_session_rewind(session, length, &error) == MOE_OK) return 1;
    printf("  rewind: %s: %s\n", error.where, error.text);
    return 0;
}
static uint64_t replayed(const moe_session *session) {
    return moe_session_get_stats(session)->n_replayed;
}

static int agree(const moe_session *a, const moe_session *b) {
    const float *x = moe_session_logits(a, -1), *y = moe_session_logits(b, -1);
    return x && y &&
           !memcmp(x, y, (size_t)moe_model_get_info(opened)->n_vocab * sizeof(float));
}

// Some tokens more: what is read from the cache shows in their logits.
static int go_on_alike(moe_session *a, moe_session *b) {
    return eval(a, 5, 7) && eval(b, 5, 7) && agree(a, b) && eval(a, 99, 1) && eval(b, 99, 1) &&
           agree(a, b);
}

static int begin(void) {
    opened = models_open(models_simple("gptoss_tiny", "f16")); // windows of 16
    if (!opened) return 0;
    models_tokens(tokens, LONG + SOME, moe_model_get_info(opened)->n_vocab, 3);
    stop_after = -1;
    return 1;
}
static void end(void) { moe_model_close((moe_model *)opened); }

TEST(layers_with_a_window_take_memory_for_a_ring) {
    CHECK(begin());
    moe_session_options o;
    moe_session_info short_info, long_info;
    moe_error error;
    memset(&o, 0, sizeof o);
    o.n_batch = 64;
    o.n_ctx = 4096;
    CHECK(moe_session_estimate(opened, &o, &short_info, &error) == MOE_OK);
    CHECK(short_info.n_checkpoints == 0); // all rows are there
    o.n_ctx = 131072;
    CHECK(moe_session_estimate(opened, &o, &long_info, &error) == MOE_OK);
    // Half of the layers have a window, the others grow with the context.
    const double grown = (double)long_info.kv_bytes / (double)short_info.kv_bytes;
    CHECKF(grown > 15.9 && grown < 17.1, "%.2f", grown);
    CHECK(long_info.n_checkpoints > 0 && long_info.checkpoint_bytes > 0);
    moe_session *session = open_ring();
    CHECK(session);
    CHECK(moe_session_get_info(session)->kv_bytes <
          (size_t)RING_CTX * short_info.kv_bytes / 4096);
    moe_session_close(session);
    end();
}

TEST(a_ring_gives_the_bits_of_a_cache_that_keeps_all_rows) {
    CHECK(begin());
    static const moe_kv_type types[] = {MOE_KV_F16, MOE_KV_F32};
    for (int i = 0; i < (MODELS_SLOW ? 1 : 2); i++) {
        moe_session *ring = open_with(RING_CTX, 100, types[i]);
        moe_session *full = open_with(FULL_CTX, 4600, types[i]);
        CHECK(ring && full);
        CHECK(eval(ring, 0, 4090) && eval(full, 0, 4090) && agree(ring, full));
        for (int k = 4090; k < 4110; k++) // over the end of the ring
            CHECKF(eval(ring, k, 1) && eval(full, k, 1) && agree(ring, full), "token %d", k);
        CHECK(eval(ring, 4110, 500) && eval(full, 4110, 500) && agree(ring, full));
        CHECK(go_on_alike(ring, full));
        moe_session_close(ring);
        moe_session_close(full);
    }
    end();
}

TEST(a_session_with_rings_goes_back_to_any_length) {
    CHECK(begin());
    static const int32_t lengths[] = {4699, 4500, 4096, 1500, 615, 614, 600, 70, 15, 1, 0};
    moe_session *ring = open_ring(), *full = open_full();
    CHECK(ring && full);
    for (size_t i = 0; i < sizeof lengths / sizeof lengths[0]; i += MODELS_SLOW ? 3 : 1) {
        const int32_t n = lengths[i];
        CHECK(rewound(ring, 0) && eval(ring, 0, LONG));
        CHECK(rewound(full, 0) && (n == 0 || eval(full, 0, n)));
        const uint64_t before = replayed(ring);
        CHECK(rewound(ring, n));
        const int32_t again = (int32_t)(replayed(ring) - before);
        // Without cost as far as windows are whole, else from a checkpoint between batches
        CHECKF(n >= LONG - (4096 - 16) ? again == 0 : again <= n && again <= 1000,
               "%d tokens again for %d", again, n);
        CHECKF(go_on_alike(ring, full), "length %d", n);
    }
    moe_session_close(ring);
    moe_session_close(full);
    end();
}

TEST(a_cancelled_eval_leaves_the_windows_of_a_ring) {
    CHECK(begin());
    moe_error error;
    moe_session *ring = open_ring(), *full = open_full(), *a = open_ring(), *b = open_full();
    CHECK(ring && full && a && b);
    CHECK(eval(ring, 0, 300) && eval(full, 0, 300));
    for (int k = 1; k < 170; k += MODELS_SLOW ? 60 : 13) {
        stop_after = k;
        CHECK(moe_session_eval(ring, tokens, LONG - 300, &error) == MOE_ERROR_CANCELLED);
        stop_after = -1;
        CHECK(moe_session_length(ring) == 300);
        CHECK(moe_session_copy(a, ring, &error) == MOE_OK);
        CHECK(moe_session_copy(b, full, &error) == MOE_OK);
        CHECKF(go_on_alike(a, b), "stopped after %d", k);
    }
    // Going back evaluates tokens again: stopped, it leaves the session as it was.
    CHECK(eval(ring, 300, LONG - 300) && eval(full, 300, LONG - 300));
    for (int k = 0; k < 4; k++) {
        stop_after = k;
        const moe_status status = moe_session_rewind(ring, 90, &error);
        stop_after = -1;
        if (status == MOE_OK) break;
        CHECK(status == MOE_ERROR_CANCELLED && moe_session_length(ring) == LONG);
        CHECK(moe_session_copy(a, ring, &error) == MOE_OK);
        CHECK(moe_session_copy(b, full, &error) == MOE_OK);
        CHECKF(go_on_alike(a, b), "going back was stopped after %d", k);
    }
    moe_session_close(ring);
    moe_session_close(full);
    moe_session_close(a);
    moe_session_close(b);
    end();
}

TEST(rings_are_copied_and_saved_into_rings_of_other_lengths) {
    CHECK(begin());
    moe_error error;
    const char *path = models_path("ring.session");
    moe_session *ring = open_ring(), *full = open_full(), *other = open_full();
    moe_session *small = open_with(RING_CTX, 100, MOE_KV_F16);
    CHECK(ring && full && other && small);
    CHECK(eval(ring, 0, 4600) && eval(full, 0, 4600));
    CHECK(moe_session_copy(other, ring, &error) == MOE_OK);
    CHECK(moe_session_copy(small, full, &error) == MOE_OK);
    CHECK(go_on_alike(other, small));
    CHECK(moe_session_save(ring, path, &error) == MOE_OK);
    CHECK(moe_session_load(other, path, &error) == MOE_OK);
    CHECK(moe_session_save(full, path, &error) == MOE_OK);
    CHECK(moe_session_load(small, path, &error) == MOE_OK);
    CHECK(go_on_alike(other, small));
    // Rows that were not in the file are made anew.
    CHECK(rewound(other, 400) && rewound(small, 400) && rewound(full, 400));
    CHECK(go_on_alike(other, full));
    CHECK(rewound(full, 400) && go_on_alike(small, full));
    moe_session_close(ring);
    moe_session_close(full);
    moe_session_close(other);
    moe_session_close(small);
    end();
}

MAIN()
