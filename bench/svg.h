// Line charts as SVG: panels side by side, each with axes, units and lines of its own, one legend
// for all. Include moe_infer.h and tool.h first.
#ifndef BENCH_SVG_H
#define BENCH_SVG_H
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SVG_POINTS = 512, SVG_LINES = 8, SVG_PANELS = 4 };

typedef struct svg_line {
    const char *name;
    int n;
    double x[SVG_POINTS], y[SVG_POINTS];
    double low[SVG_POINTS], high[SVG_POINTS]; // quartiles, drawn as bars where they differ
} svg_line;

typedef struct svg_panel {
    const char *title, *x_label, *y_label;
    int log2_x; // threads: 1, 2, 4, 8 are equally far from each other
    int n_lines;
    svg_line line[SVG_LINES];
} svg_panel;

enum { SVG_WIDTH = 440, SVG_HEIGHT = 300, SVG_LEFT = 66, SVG_RIGHT = 14, SVG_TOP = 34,
       SVG_BOTTOM = 48, SVG_HEAD = 34, SVG_LEGEND = 34 };

static inline void svg_text(FILE *f, double x, double y, const char *style, const char *text) {
    fprintf(f, "<text x=\"%.1f\" y=\"%.1f\" %s>", x, y, style);
    for (const char *c = text; *c; c++) {
        if (*c == '<') fputs("&lt;", f);
        else if (*c == '>') fputs("&gt;", f);
        else if (*c == '&') fputs("&amp;", f);
        else if ((unsigned char)*c >= 0x20) fputc(*c, f);
    }
    fputs("</text>\n", f);
}

// 1, 2 or 5 times a power of ten, so that `range` has at most 6 steps.
static inline double svg_step(double range) {
    if (!(range > 0)) return 1;
    const double power = pow(10, floor(log10(range / 6)));
    const double steps[] = {1, 2, 5, 10};
    for (int i = 0; i < 4; i++)
        if (range / (steps[i] * power) <= 6) return steps[i] * power;
    return 10 * power;
}

// Colours that are told apart with any eyes (Okabe and Ito), and a sign for each.
static inline const char *svg_colour(int i) {
    static const char *const colours[] = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                          "#E69F00", "#56B4E9", "#000000", "#999999"};
    return colours[i % 8];
}
static inline void svg_sign(FILE *f, double x, double y, int i) {
    const char *colour = svg_colour(i);
    if (i % 3 == 0)
        fprintf(f, "<circle cx=\"%.1f\" cy=\"%.1f\" r=\"3.5\" fill=\"%s\"/>\n", x, y, colour);
    else if (i % 3 == 1)
        fprintf(f, "<rect x=\"%.1f\" y=\"%.1f\" width=\"7\" height=\"7\" fill=\"%s\"/>\n", x - 3.5,
                y - 3.5, colour);
    else
        fprintf(f, "<path d=\"M%.1f %.1fl4.5 8h-9z\" fill=\"%s\"/>\n", x, y - 5, colour);
}

// Where values lie in a panel.
typedef struct svg_scale {
    double left, top, width, height; // of the area of the lines
    double x0, x1, y1;               // values at its edges; y begins with 0
    int log2_x;
} svg_scale;
static inline double svg_x(const svg_scale *s, double x) {
    if (s->log2_x) x = log2(x);
    return s->left + (s->x1 > s->x0 ? (x - s->x0) / (s->x1 - s->x0) : 0.5) * s->width;
}
static inline double svg_y(const svg_scale *s, double y) {
    return s->top + (1 - y / s->y1) * s->height;
}

static inline svg_scale svg_fit(const svg_panel *p, double left, double top) {
    svg_scale s = {left + SVG_LEFT, top + SVG_TOP, SVG_WIDTH - SVG_LEFT - SVG_RIGHT,
                   SVG_HEIGHT - SVG_TOP - SVG_BOTTOM, INFINITY, -INFINITY, 0, p->log2_x};
    for (int l = 0; l < p->n_lines; l++)
        for (int i = 0; i < p->line[l].n; i++) {
            const double x = p->log2_x ? log2(p->line[l].x[i]) : p->line[l].x[i];
            s.x0 = fmin(s.x0, x);
            s.x1 = fmax(s.x1, x);
            s.y1 = fmax(s.y1, fmax(p->line[l].y[i], p->line[l].high[i]));
        }
    if (!(s.x0 <= s.x1)) s.x0 = 0, s.x1 = 1;
    if (!(s.y1 > 0)) s.y1 = 1;
    const double step = svg_step(s.y1);
    s.y1 = step * ceil(s.y1 * 1.02 / step);
    if (s.log2_x) s.x0 -= 0.15, s.x1 += 0.15;
    return s;
}

static inline void svg_axes(FILE *f, const svg_panel *p, const svg_scale *s) {
    const double bottom = s->top + s->height, right = s->left + s->width;
    const double step = svg_step(s->y1), x_step = svg_step(s->x1 - s->x0);
    char text[32];
    for (int i = 0; i * step <= s->y1 * 1.0001; i++) {
        const double y = svg_y(s, i * step);
        fprintf(f, "<path d=\"M%.1f %.1fH%.1f\" stroke=\"#ddd\"/>\n", s->left, y, right);
        snprintf(text, sizeof text, "%g", i * step);
        svg_text(f, s->left - 6, y + 4, "text-anchor=\"end\"", text);
    }
    if (s->log2_x) { // every value that the first line has
        for (int i = 0; p->n_lines && i < p->line[0].n; i++) {
            snprintf(text, sizeof text, "%g", p->line[0].x[i]);
            svg_text(f, svg_x(s, p->line[0].x[i]), bottom + 17, "text-anchor=\"middle\"", text);
        }
    } else {
        for (double x = ceil(s->x0 / x_step) * x_step; x <= s->x1 * 1.0001; x += x_step) {
            snprintf(text, sizeof text, "%g", x);
            svg_text(f, svg_x(s, x), bottom + 17, "text-anchor=\"middle\"", text);
        }
    }
    fprintf(f, "<path d=\"M%.1f %.1fV%.1fH%.1f\" fill=\"none\" stroke=\"#444\"/>\n", s->left,
            s->top, bottom, right);
    svg_text(f, (s->left + right) / 2, bottom + 36, "text-anchor=\"middle\"", p->x_label);
    snprintf(text, sizeof text, "%.1f", (s->top + bottom) / 2);
    fprintf(f, "<g transform=\"rotate(-90 %.1f %s)\">", s->left - 50, text);
    svg_text(f, s->left - 50, (s->top + bottom) / 2, "text-anchor=\"middle\"", p->y_label);
    fputs("</g>\n", f);
    svg_text(f, s->left, s->top - 12, "font-weight=\"bold\"", p->title);
}

static inline void svg_lines(FILE *f, const svg_panel *p, const svg_scale *s) {
    for (int l = 0; l < p->n_lines; l++) {
        const svg_line *line = &p->line[l];
        fprintf(f, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\" points=\"",
                svg_colour(l));
        for (int i = 0; i < line->n; i++)
            fprintf(f, "%.1f,%.1f ", svg_x(s, line->x[i]), svg_y(s, line->y[i]));
        fputs("\"/>\n", f);
        for (int i = 0; i < line->n; i++) {
            const double x = svg_x(s, line->x[i]) + 3 * (l - (p->n_lines - 1) / 2.0);
            if (line->high[i] > line->low[i])
                fprintf(f, "<path d=\"M%.1f %.1fV%.1f\" stroke=\"%s\"/>\n", x,
                        svg_y(s, line->low[i]), svg_y(s, line->high[i]), svg_colour(l));
            svg_sign(f, svg_x(s, line->x[i]), svg_y(s, line->y[i]), l);
        }
    }
}

static inline void svg_chart(FILE *f, const char *title, const svg_panel *panels, int n) {
    const int legend = n && panels[0].n_lines > 1 ? SVG_LEGEND : 0;
    const int width = n * SVG_WIDTH, height = SVG_HEAD + SVG_HEIGHT + legend;
    double x = SVG_LEFT;
    fprintf(f, "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
               "viewBox=\"0 0 %d %d\" font-family=\"sans-serif\" font-size=\"13\" "
               "fill=\"#222\">\n<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n",
            width, height, width, height);
    svg_text(f, SVG_LEFT, 24, "font-size=\"16\" font-weight=\"bold\"", title);
    for (int i = 0; i < n; i++) {
        const svg_scale scale = svg_fit(&panels[i], i * SVG_WIDTH, SVG_HEAD);
        svg_axes(f, &panels[i], &scale);
        svg_lines(f, &panels[i], &scale);
    }
    for (int l = 0; legend && l < panels[0].n_lines; l++) {
        const double y = SVG_HEAD + SVG_HEIGHT + 14;
        fprintf(f, "<path d=\"M%.1f %.1fh24\" stroke=\"%s\" stroke-width=\"2\"/>\n", x, y,
                svg_colour(l));
        svg_sign(f, x + 12, y, l);
        svg_text(f, x + 30, y + 4, "", panels[0].line[l].name);
        x += 60 + 8.0 * (double)strlen(panels[0].line[l].name);
    }
    fputs("</svg>\n", f);
}

// Returns 0, or -1 with errno set.
static inline int svg_write(const char *path, const char *title, const svg_panel *panels, int n) {
    FILE *f = output_begin(path);
    if (!f) return -1;
    svg_chart(f, title, panels, n);
    return output_end(1);
}

#endif
