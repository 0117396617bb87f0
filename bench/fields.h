// Rows of results in JSON and CSV, for the modes of moe-bench that write both. One row is written
// three ways: a JSON object, the names of the CSV columns, a line of CSV (all values in quotes, as
// llama-bench does). Names that llama-bench has mean what they mean there.
// Include moe_infer.h, tool.h, machine.h, model.h and timing.h first.
#ifndef BENCH_FIELDS_H
#define BENCH_FIELDS_H
#include <time.h>

static enum { WRITE_JSON, WRITE_NAMES, WRITE_CSV } writing;
static int n_fields;

// What stands before a field's value; 0 if only names are wanted.
static inline int begin_field(const char *key) {
    if (n_fields++) fputs(writing == WRITE_JSON ? ", " : ",", stdout);
    if (writing == WRITE_JSON) printf("\"%s\": ", key);
    else if (writing == WRITE_NAMES) fputs(key, stdout);
    return writing != WRITE_NAMES;
}

// Bytes that are not UTF-8 become U+FFFD.
static inline void field_text(const char *key, const char *text) {
    if (!begin_field(key)) return;
    putchar('"');
    for (size_t i = 0, size = strlen(text); i < size;) {
        size_t n = tool_character(text + i, size - i);
        if (n && text[i] != '"' && (text[i] != '\\' || writing == WRITE_CSV))
            fwrite(text + i, 1, n, stdout);
        else if (n) printf(writing == WRITE_CSV ? "\"%c" : "\\%c", text[i]);
        else if ((unsigned char)text[i] < 0x80 && writing == WRITE_JSON)
            printf("\\u%04X", (unsigned)text[i]);
        else fputs("\xEF\xBF\xBD", stdout);
        i += n ? n : 1;
    }
    putchar('"');
}

static inline void field_number(const char *key, int digits, double value) {
    if (!begin_field(key)) return;
    if (writing == WRITE_CSV) putchar('"');
    if (value == value) printf("%.*f", digits, value);
    else if (writing == WRITE_JSON) fputs("null", stdout);
    if (writing == WRITE_CSV) putchar('"');
}

static inline void field_list(const char *key, int digits, const double *x, int n) {
    if (!begin_field(key)) return;
    for (int i = 0; i < n; i++) printf("%s%.*f", i ? ", " : "[", digits, x[i]);
    putchar(']');
}

// What every row says about the library, the machine, the model and its pages.
static inline void field_model(const model *m) {
    char version[32], when[32] = "", cpu[128], found[PAGE_SENTENCE];
    const moe_model_memory *memory = moe_model_get_memory(m->handle);
    const time_t now = time(NULL);
    struct tm utc;
    cpu_name(cpu, sizeof cpu);
    snprintf(version, sizeof version, "%d.%d.%d", MOE_VERSION_MAJOR, MOE_VERSION_MINOR,
             MOE_VERSION_PATCH);
    if (gmtime_r(&now, &utc)) strftime(when, sizeof when, "%Y-%m-%dT%H:%M:%SZ", &utc);
    field_text("engine", "moe_infer.h");
    field_text("version", version);
    field_text("cpu_info", cpu);
    field_text("backends", "CPU");
    field_text("model_filename", m->path);
    field_text("model_type", m->type);
    field_number("model_size", 0, (double)m->info->n_bytes);
    field_number("model_n_params", 0, (double)m->info->n_params);
    field_number("use_mmap", 0, set.mmap && set.pages != MOE_PAGES_COPY);
    field_text("pages", memory->text);
    field_number("pages_map_gbps", 4, memory->map_rate > 0 ? memory->map_rate * 1e-9 : NAN);
    field_number("pages_copy_gbps", 4, memory->copy_rate > 0 ? memory->copy_rate * 1e-9 : NAN);
    field_number("pages_copied_bytes", 0, (double)memory->n_bytes_copied);
    field_number("pages_huge_bytes", 0, (double)moe_model_huge_bytes(m->handle));
    field_text("page_state_found", page_state_sentence(&m->pages, found));
    field_number("cached_fraction", 4, page_state_cached(&m->pages));
    field_number("folio_2m_fraction", 4, page_state_folio(&m->pages, FOLIO_2M));
    field_text("test_time", when);
}

// A row counts when it is out.
static inline int flush_rows(void) {
    if (fflush(stdout) == 0) return TOOL_OK;
    fprintf(stderr, "%s: cannot write: %s\n", program, strerror(errno));
    return TOOL_ERROR;
}

static int rows_written;

// One row in the chosen format; `fields` writes what it consists of.
static inline int write_row(void (*fields)(const void *row), const void *row) {
    const int csv = set.format == FORMAT_CSV, array = set.format == FORMAT_JSON;
    writing = !csv ? WRITE_JSON : rows_written ? WRITE_CSV : WRITE_NAMES;
    for (;; writing = WRITE_CSV) {
        if (!csv) fputs(!array ? "{" : rows_written ? ",\n  {" : "[\n  {", stdout);
        n_fields = 0;
        fields(row);
        fputs(csv ? "\n" : array ? "}" : "}\n", stdout);
        if (writing != WRITE_NAMES) break;
    }
    rows_written++;
    return flush_rows();
}

#endif
