// A picture of which experts were used: one row per layer, one column per expert, the darker the
// more often; 1 would be an even share.
// Include moe_infer.h and tool.h first.
#ifndef HEATMAP_H
#define HEATMAP_H

// How much of its even share an expert got, as a colour between white, blue and black.
static inline void heatmap_colour(double share, char out[8]) {
    static const double stops[4][3] = {
        {255, 255, 255}, {158, 202, 225}, {33, 113, 181}, {8, 24, 58}};
    double at = share < 0 ? 0 : share > 3 ? 3 : share;
    const int i = at >= 3 ? 2 : (int)at;
    int rgb[3];
    at -= i;
    for (int c = 0; c < 3; c++)
        rgb[c] = (int)(stops[i][c] + at * (stops[i + 1][c] - stops[i][c]) + 0.5);
    snprintf(out, 8, "#%02x%02x%02x", rgb[0] & 255, rgb[1] & 255, rgb[2] & 255);
}

static inline void heatmap_legend(FILE *f, int left, int top) {
    for (int i = 0; i <= 12; i++) {
        char colour[8];
        heatmap_colour(i / 4.0, colour);
        fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"16\" height=\"12\" fill=\"%s\" "
                   "stroke=\"#999\" stroke-width=\".5\"/>\n", left + 16 * i, top, colour);
        if (i % 4 == 0)
            fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%d%s</text>\n",
                    left + 16 * i + 8, top + 26, i / 4, i == 12 ? "+" : "");
    }
    fprintf(f, "<text x=\"%d\" y=\"%d\">times an even share</text>\n", left + 222, top + 11);
}

static inline void heatmap_body(FILE *f, const moe_session *session) {
    const moe_model_info *info = moe_model_get_info(moe_session_model(session));
    enum { LEFT = 70, TOP = 58, ROW = 22 };
    const int cell = info->n_expert <= 16 ? 34 : info->n_expert <= 64 ? 12 : 5;
    const int width = LEFT + cell * info->n_expert + 20, height = TOP + ROW * info->n_layer + 76;
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
               "font-family=\"sans-serif\" font-size=\"12\" fill=\"#222\">\n"
               "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
               "<text x=\"10\" y=\"22\" font-size=\"15\" font-weight=\"bold\">Experts used</text>\n"
               "<text x=\"%d\" y=\"%d\">expert</text>\n", width < 430 ? 430 : width, height, LEFT,
            TOP - 20);
    for (int32_t e = 0; e < info->n_expert; e += cell >= 12 ? 1 + (cell < 34) * 7 : 16)
        fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">%d</text>\n",
                LEFT + cell * e + cell / 2, TOP - 5, e);
    for (int32_t il = 0; il < info->n_layer; il++) {
        const uint64_t *counts = moe_session_expert_counts(session, il);
        const int y = TOP + ROW * il;
        double sum = 0;
        fprintf(f, "<text x=\"%d\" y=\"%d\" text-anchor=\"end\">layer %d</text>\n", LEFT - 8,
                y + 15, il);
        if (!counts) fprintf(f, "<text x=\"%d\" y=\"%d\">dense</text>\n", LEFT + 4, y + 15);
        for (int32_t e = 0; counts && e < info->n_expert; e++) sum += (double)counts[e];
        for (int32_t e = 0; counts && e < info->n_expert; e++) {
            char colour[8];
            heatmap_colour(sum > 0 ? (double)counts[e] * info->n_expert / sum : 0, colour);
            fprintf(f, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"%s\" "
                       "stroke=\"#999\" stroke-width=\".5\"><title>layer %d, expert %d: %llu of "
                       "%.0f</title></rect>\n", LEFT + cell * e, y, cell, ROW, colour, il, e,
                    (unsigned long long)counts[e], sum);
        }
    }
    heatmap_legend(f, LEFT, TOP + ROW * info->n_layer + 18);
    fputs("</svg>\n", f);
}

// Returns 0, or -1 with errno set.
static inline int heatmap_write(const char *path, const moe_session *session) {
    FILE *f = output_begin(path);
    if (!f) return -1;
    heatmap_body(f, session);
    return output_end(1);
}

#endif
