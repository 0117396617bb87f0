// moe-bench --sweep: speed against depth, printed as llama-sweep-bench prints it, so that its plot
// script reads it. For a context of 0, ub, 2 ub, ... tokens: ub / 4 tokens one by one, which are
// forgotten again, then a prompt of ub tokens, which stays.
// Include timing.h and svg.h first.
#ifndef BENCH_SWEEP_H
#define BENCH_SWEEP_H

typedef struct sweep_row {
    int32_t n_kv;
    double t_pp, t_tg;
} sweep_row;

static inline void sweep_print(const moe_session_info *info, int32_t ub, int32_t tg,
                               const sweep_row *row) {
    if (set.format == FORMAT_JSON || set.format == FORMAT_JSONL)
        printf("{\"n_kv_max\": %d, \"n_batch\": %d, \"n_ubatch\": %d, \"flash_attn\": 1, "
               "\"n_gpu_layers\": 0, \"n_threads\": %d, \"n_threads_batch\": %d, \"pp\": %d, "
               "\"tg\": %d, \"n_kv\": %d, \"t_pp\": %f, \"speed_pp\": %f, \"t_tg\": %f, "
               "\"speed_tg\": %f}\n",
               info->n_ctx, ub, ub, info->n_threads, info->n_threads_batch, ub, tg, row->n_kv,
               row->t_pp, ub / row->t_pp, row->t_tg, tg / row->t_tg);
    else
        printf("|%6d | %6d | %6d | %8.3f | %8.2f | %8.3f | %8.2f |\n", ub, tg, row->n_kv,
               row->t_pp, ub / row->t_pp, row->t_tg, tg / row->t_tg);
    fflush(stdout);
}

static inline int sweep_draw(const model *m, int32_t n_threads, const sweep_row *rows, int n,
                             int32_t ub, int32_t tg) {
    svg_panel *panels = (svg_panel *)calloc(2, sizeof *panels);
    char title[128];
    if (!panels) return TOOL_ERROR;
    snprintf(title, sizeof title, "%s, %d thread%s", m->type, n_threads, n_threads > 1 ? "s" : "");
    for (int i = 0; i < 2; i++) {
        svg_panel *p = &panels[i];
        p->title = i ? "Prompts" : "Generation";
        p->x_label = "tokens in the context";
        p->y_label = "tokens per second";
        p->n_lines = 1;
        for (int r = 0; r < n && r < SVG_POINTS; r++, p->line[0].n++) {
            p->line[0].x[r] = rows[r].n_kv;
            p->line[0].y[r] = i ? ub / rows[r].t_pp : tg / rows[r].t_tg;
        }
    }
    const int failed = svg_write(set.svg, title, panels, 2);
    if (failed) fprintf(stderr, "%s: %s: %s\n", program, set.svg, strerror(errno));
    free(panels);
    return failed ? TOOL_ERROR : TOOL_OK;
}

static inline int run_sweep(const model *m) {
    static usage u;
    const int32_t ub = set.n_ubatch.item[0] < set.n_batch.item[0] ? set.n_ubatch.item[0]
                                                                  : set.n_batch.item[0];
    const int32_t n_ctx = set.n_ctx, tg = ub / 4 > 0 ? ub / 4 : 1;
    const int n_rows = n_ctx / ub;
    int status = TOOL_ERROR, done = 0;
    uint64_t random = RANDOM_SEED;
    moe_error error;
    memset(&error, 0, sizeof error);
    if (n_rows < 1) {
        fprintf(stderr, "%s: -c %d holds no batch of %d tokens\n", program, n_ctx, ub);
        return TOOL_USAGE;
    }
    if (set.svg && output_is_input(set.svg, m->path)) {
        fprintf(stderr, "%s: --svg would replace the model\n", program);
        return TOOL_USAGE;
    }
    moe_session *session = open_session(m, n_ctx, ub, set.n_threads.item[0], set.isa.item[0],
                                        set.schedule.item[0], &error);
    int32_t *tokens = (int32_t *)malloc((size_t)ub * sizeof *tokens);
    sweep_row *rows = (sweep_row *)calloc((size_t)n_rows, sizeof *rows);
    if (session && tokens && rows) {
        const moe_session_info *info = moe_session_get_info(session);
        // not part of the table: the plot script reads standard output
        fprintf(stderr, "main: n_kv_max = %d, n_batch = %d, n_ubatch = %d, flash_attn = 1, "
                "n_gpu_layers = 0, n_threads = %d, n_threads_batch = %d\n", info->n_ctx,
                set.n_batch.item[0], ub, info->n_threads, info->n_threads_batch);
        if (set.format == FORMAT_MD)
            printf("|%6s | %6s | %6s | %8s | %8s | %8s | %8s |\n"
                   "|%6s-|-%6s-|-%6s-|-%8s-|-%8s-|-%8s-|-%8s-|\n", "PP", "TG", "N_KV", "T_PP s",
                   "S_PP t/s", "T_TG s", "S_TG t/s", "------", "------", "------", "--------",
                   "--------", "--------", "--------");
        random_tokens(m->handle, &random, tokens, ub);
        if (set.warm_up) timed_run(session, 0, tokens, ub, 0, &u, &error);
        if (set.warm_up && !error.status)
            timed_run(session, 0, tokens, 0, tg < 8 ? tg : 8, &u, &error);
        for (; done < n_rows && !error.status; done++) {
            sweep_row *row = &rows[done];
            row->n_kv = done * ub;
            if (timed_run(session, row->n_kv, tokens, 0, tg, &u, &error)) break;
            row->t_tg = u.seconds;
            if (timed_run(session, row->n_kv, tokens, ub, 0, &u, &error)) break;
            row->t_pp = u.seconds;
            sweep_print(info, ub, tg, row);
            random_tokens(m->handle, &random, tokens, ub);
        }
        status = error.status ? TOOL_ERROR : TOOL_OK;
        if (status == TOOL_OK && set.svg)
            status = sweep_draw(m, info->n_threads, rows, done, ub, tg);
    } else if (!error.status) {
        fprintf(stderr, "%s: out of memory\n", program);
    }
    if (error.status) tool_fail(program, "--sweep", &error);
    free(rows);
    free(tokens);
    moe_session_close(session);
    return status;
}

#endif
