// In which state a file lies in the system's page cache, and putting it into a known one: how fast
// a mapped model generates depends on it. The cache keeps a file in folios, pieces of one page
// (4 KiB) or of many (up to 2 MiB and more), as large as the read-ahead was that fetched them.
//
// To find the state disturbs nothing: pages are spread evenly over the file, and of those that are
// cached the system says how large their folios are. As many of them lie in large folios as of the
// bytes, so three hundred tell the shares to some hundredths, for files of any size. Sizes are
// shown to root only. All parts of a split model count as one file.
//
// Include moe_infer.h and tool.h first. Linux only.
#ifndef BENCH_PAGE_STATE_H
#define BENCH_PAGE_STATE_H
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#define PAGE_STATES "huge|large|small|cold" // for an option; the order of the enumeration
enum { PAGES_HUGE, PAGES_LARGE, PAGES_SMALL, PAGES_COLD };

// Sizes of folios that are told apart.
enum { FOLIO_4K, FOLIO_64K, FOLIO_1M, FOLIO_2M, FOLIO_SIZES };
enum { FOLIO_PAGES = 512, PAGE_BYTES = 4096, PAGE_SAMPLES = 300 };

typedef struct page_state {
    double bytes, cached;      // of the file, of that in the cache
    double folio[FOLIO_SIZES]; // cached bytes by the size of their folio
    int cached_known, folios_known;
} page_state;

// Of the file's bytes; NAN: unknown.
static inline double page_state_cached(const page_state *s) {
    return s->cached_known && s->bytes > 0 ? s->cached / s->bytes : (double)NAN;
}
// Of the cached bytes; NAN: unknown, or none is cached.
static inline double page_state_folio(const page_state *s, int size) {
    return s->folios_known && s->cached > 0 ? s->folio[size] / s->cached : (double)NAN;
}

// ---- the parts of a model --------------------------------------------------------------------

// Where the "-00001-of-00003.gguf" of a split model's first part begins, and how many parts there
// are; NULL: the model is one file.
static inline const char *split_name(const char *path, int *n_parts) {
    static const char pattern[] = "-00001-of-ddddd.gguf";
    const size_t size = strlen(path), n = sizeof pattern - 1;
    const char *tail = path + size - n;
    if (size < n) return NULL;
    for (size_t i = 0; i < n; i++)
        if (pattern[i] == 'd' ? tail[i] < '0' || tail[i] > '9' : tail[i] != pattern[i]) return NULL;
    *n_parts = (int)strtol(tail + 10, NULL, 10);
    return tail;
}

// Calls `each` with every part's path until it returns something other than 0.
static inline int for_parts(const char *path, int (*each)(const char *part, void *user),
                            void *user) {
    int n_parts = 0, result = 0;
    const char *tail = split_name(path, &n_parts);
    if (!tail) return each(path, user);
    char *part = (char *)malloc(strlen(path) + 32);
    if (!part) return -1;
    for (int i = 1; i <= n_parts && result == 0; i++) {
        sprintf(part, "%.*s-%05d-of-%05d.gguf", (int)(tail - path), path, i, n_parts);
        result = each(part, user);
    }
    free(part);
    return result;
}

// ---- finding the state -----------------------------------------------------------------------

// Bytes of the file in the cache by cachestat (Linux 6.5); 0: it finds none or does not exist. (On
// overlayfs it looks where no pages are: 0 never means "cold".)
static inline double cachestat_bytes(int fd) {
#ifdef __NR_cachestat
    const long number = __NR_cachestat;
#else
    const long number = 451;
#endif
    struct { uint64_t offset, size; } all = {0, 0};
    struct { uint64_t cached, dirty, writeback, evicted, evicted_recently; } pages;
    memset(&pages, 0, sizeof pages);
    if (syscall(number, fd, &all, &pages, 0)) return 0;
    return (double)pages.cached * PAGE_BYTES;
}

// What tells folios apart: tables that root may read.
typedef struct folio_tables {
    int pagemap, flags;
} folio_tables;

// The size of the folio that a mapped page lies in; -1: the system does not say. Folios of less
// than 2 MiB lie within one block of 512 frames, at a multiple of their size.
static inline int folio_size(const folio_tables *tables, const volatile char *page) {
    static uint64_t flags[FOLIO_PAGES];
    const uint64_t head = (uint64_t)1 << 15, tail = (uint64_t)1 << 16;
    const uint64_t present = (uint64_t)1 << 63, frame_bits = ((uint64_t)1 << 55) - 1;
    uint64_t entry;
    const off_t at = (off_t)((uintptr_t)page / PAGE_BYTES * sizeof entry);
    if (pread(tables->pagemap, &entry, sizeof entry, at) != (ssize_t)sizeof entry) return -1;
    const uint64_t frame = entry & frame_bits, block = frame / FOLIO_PAGES * FOLIO_PAGES;
    if (!(entry & present) || !frame) return -1;
    if (pread(tables->flags, flags, sizeof flags, (off_t)(block * sizeof *flags)) !=
        (ssize_t)sizeof flags)
        return -1;
    int first = (int)(frame - block), end = first + 1;
    if (!(flags[first] & (head | tail))) return FOLIO_4K;
    while (first > 0 && !(flags[first] & head)) first--;
    while (end < FOLIO_PAGES && flags[end] & tail) end++;
    const int pages = end - first;
    return pages >= FOLIO_PAGES ? FOLIO_2M : pages >= 32 ? FOLIO_1M : pages > 1 ? FOLIO_64K
                                                                                : FOLIO_4K;
}

// Whether the page at `offset` is cached, and the size of its folio (-1: unknown). Only a cached
// page is touched, and MADV_RANDOM keeps the touch from starting a read-ahead and from counting as
// use of the page. Returns -1 if the system does not say.
static inline int look_at_page(int fd, off_t offset, const folio_tables *tables, int *size) {
    unsigned char cached = 0;
    *size = -1;
    void *at = mmap(NULL, PAGE_BYTES, PROT_READ, MAP_SHARED, fd, offset);
    if (at == MAP_FAILED) return -1;
    const int failed = madvise(at, PAGE_BYTES, MADV_RANDOM) || mincore(at, PAGE_BYTES, &cached);
    if (!failed && cached & 1 && tables->flags >= 0) {
        const volatile char *page = (const volatile char *)at;
        (void)*page;
        *size = folio_size(tables, page);
    }
    munmap(at, PAGE_BYTES);
    return failed ? -1 : cached & 1;
}

// What the looks at one file found.
typedef struct page_looks {
    int n, cached, sized, of_size[FOLIO_SIZES], failed;
} page_looks;

// Looks at up to PAGE_SAMPLES pages, one in each of as many equal stretches, at a place that
// changes (a fixed one could always meet the same end of a folio).
static inline void look_at_file(int fd, double bytes, const folio_tables *tables,
                                page_looks *looks) {
    const int64_t pages = ((int64_t)bytes + PAGE_BYTES - 1) / PAGE_BYTES;
    const int64_t n = pages < PAGE_SAMPLES ? pages : PAGE_SAMPLES;
    uint64_t random = 88172645463325252u;
    for (int64_t i = 0; i < n && !looks->failed; i++) {
        const int64_t begin = pages * i / n, end = pages * (i + 1) / n;
        int size;
        random = random * 6364136223846793005u + 1442695040888963407u;
        const int64_t page = begin + (int64_t)((random >> 33) % (uint64_t)(end - begin));
        const int cached = look_at_page(fd, (off_t)(page * PAGE_BYTES), tables, &size);
        looks->failed = cached < 0;
        looks->n++;
        looks->cached += cached > 0;
        looks->sized += size >= 0;
        if (size >= 0) looks->of_size[size]++;
    }
}

// The kernel tells only who may write the file what of it is cached; to others mincore says that
// everything is.
static inline int may_know(int fd, const struct stat *file) {
    char path[64];
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    return geteuid() == file->st_uid || access(path, W_OK) == 0;
}

typedef struct page_search {
    page_state *state;
    folio_tables tables;
} page_search;

static inline int find_part(const char *path, void *user) {
    page_search *search = (page_search *)user;
    page_state *s = search->state;
    page_looks looks;
    struct stat file;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    memset(&looks, 0, sizeof looks);
    if (fd < 0 || fstat(fd, &file) || !S_ISREG(file.st_mode) || !may_know(fd, &file)) {
        s->cached_known = s->folios_known = 0;
        if (fd >= 0) close(fd);
        return 0;
    }
    const double bytes = (double)file.st_size;
    double cached = cachestat_bytes(fd);
    look_at_file(fd, bytes, &search->tables, &looks);
    if (cached <= 0 && looks.n) cached = bytes * looks.cached / looks.n;
    if (cached > bytes) cached = bytes; // the last page is a whole one
    s->bytes += bytes;
    s->cached += cached;
    s->cached_known &= !looks.failed;
    if (cached > 0 && !looks.sized) s->folios_known = 0;
    for (int i = 0; i < FOLIO_SIZES && looks.sized; i++)
        s->folio[i] += cached * looks.of_size[i] / looks.sized;
    close(fd);
    return 0;
}

static inline void page_state_find(const char *path, page_state *out) {
    page_search search;
    memset(out, 0, sizeof *out);
    out->cached_known = out->folios_known = 1;
    search.state = out;
    search.tables.pagemap = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    search.tables.flags = search.tables.pagemap < 0
                              ? -1 : open("/proc/kpageflags", O_RDONLY | O_CLOEXEC);
    if (for_parts(path, find_part, &search)) out->cached_known = out->folios_known = 0;
    if (search.tables.pagemap >= 0) close(search.tables.pagemap);
    if (search.tables.flags >= 0) close(search.tables.flags);
}

enum { PAGE_SENTENCE = 192, PAGE_REASON = 1024 /* what page_state_set's sentence takes */ };
// "3.90 GiB of 4.00 GiB cached: 96 % in 2 MiB folios, 4 % in 4 KiB pages".
static inline const char *page_state_sentence(const page_state *s, char out[PAGE_SENTENCE]) {
    static const char *const names[] = {"4 KiB pages", "8 to 64 KiB folios",
                                        "128 KiB to 1 MiB folios", "2 MiB folios"};
    char cached[32], bytes[32];
    if (!s->cached_known) {
        snprintf(out, PAGE_SENTENCE, "page cache unknown");
        return out;
    }
    int n = snprintf(out, PAGE_SENTENCE, "%s of %s cached", tool_size(cached, s->cached),
                     tool_size(bytes, s->bytes));
    if (s->cached > 0 && !s->folios_known)
        snprintf(out + n, (size_t)(PAGE_SENTENCE - n), ", folios unknown%s",
                 geteuid() ? " (needs root)" : "");
    for (int i = FOLIO_SIZES, shown = 0; s->cached > 0 && s->folios_known && i-- > 0;) {
        const double percent = 100 * page_state_folio(s, i);
        if (percent < 0.5) continue;
        n += snprintf(out + n, (size_t)(PAGE_SENTENCE - n), "%s %.0f %% in %s",
                      shown++ ? "," : ":", percent, names[i]);
    }
    return out;
}

// ---- setting the state -----------------------------------------------------------------------

// The disk's read-ahead while it is another one than the system's; fd < 0: it is not.
static struct read_ahead {
    volatile sig_atomic_t fd;
    char before[32];
    size_t n;
} read_ahead = {-1, "", 0};

// Also called from a signal handler, at any line of itself: restoring twice does no harm.
static inline void read_ahead_restore(void) {
    const int fd = (int)read_ahead.fd;
    if (fd < 0) return;
    const int written = pwrite(fd, read_ahead.before, read_ahead.n, 0) >= 0;
    read_ahead.fd = -1;
    close(fd);
    (void)written;
}

static void read_ahead_interrupted(int number) {
    read_ahead_restore();
    signal(number, SIG_DFL);
    raise(number);
}

#define COLD_SHARE 0.01 // of the bytes may be cached in a file that counts as cold

// A step of setting the state: what is wanted, and a sentence if it fails.
typedef struct page_order {
    int wanted;
    char *why;
} page_order;

#if defined(__GNUC__)
__attribute__((format(printf, 2, 3)))
#endif
static inline int order_fails(page_order *order, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(order->why, PAGE_REASON, format, arguments);
    va_end(arguments);
    return -1;
}

// Opens the read_ahead_kb of the disk (or the partition's disk) that a file lies on, and keeps
// others that do the same waiting: the last of them would restore what the first has set.
static inline int read_ahead_open(const struct stat *file) {
    static const char *const places[] = {"queue", "../queue"};
    char path[96];
    int fd = -1;
    for (int i = 0; i < 2 && fd < 0; i++) {
        snprintf(path, sizeof path, "/sys/dev/block/%u:%u/%s/read_ahead_kb", major(file->st_dev),
                 minor(file->st_dev), places[i]);
        fd = open(path, O_RDWR | O_CLOEXEC);
        if (fd < 0 && errno != ENOENT) break;
    }
    if (fd >= 0) flock(fd, LOCK_EX);
    return fd;
}

static inline int read_ahead_set(page_order *order, const char *path, const char *kb) {
    struct stat file;
    if (stat(path, &file)) return order_fails(order, "cannot open %s: %s", path, strerror(errno));
    const int fd = read_ahead_open(&file);
    if (fd < 0)
        return order_fails(order, "cannot set the read-ahead of the disk under %s: %s", path,
                           errno == ENOENT ? "it lies on none" : strerror(errno));
    const ssize_t n = pread(fd, read_ahead.before, sizeof read_ahead.before, 0);
    if (n <= 0) {
        close(fd);
        return order_fails(order, "cannot read the read-ahead of the disk under %s", path);
    }
    read_ahead.n = (size_t)n;
    read_ahead.fd = fd;
    if (pwrite(fd, kb, strlen(kb), 0) > 0) return 0;
    read_ahead_restore();
    return order_fails(order, "cannot set the read-ahead of the disk under %s", path);
}

// advice: POSIX_FADV_NORMAL, or RANDOM: as much as a read asks for and no more, in single pages.
static inline int read_whole(page_order *order, const char *path, int advice) {
    static char buffer[1 << 17]; // as cat does: a read asks for no more than the read-ahead
    ssize_t n = -1;
    const int fd = open(path, O_RDONLY | O_CLOEXEC); // takes over the disk's read-ahead
    if (fd >= 0) posix_fadvise(fd, 0, 0, advice);
    if (fd >= 0)
        while ((n = read(fd, buffer, sizeof buffer)) > 0) continue;
    const int failed = n < 0 ? errno : 0;
    if (fd >= 0) close(fd);
    return failed ? order_fails(order, "cannot read %s: %s", path, strerror(failed)) : 0;
}

// Reads the file with another read-ahead, which is put back in any case but SIGKILL.
static inline int read_with(page_order *order, const char *path, const char *kb) {
    static const int numbers[] = {SIGINT, SIGTERM, SIGHUP, SIGQUIT};
    struct sigaction before[4], now;
    memset(&now, 0, sizeof now);
    now.sa_handler = read_ahead_interrupted;
    sigemptyset(&now.sa_mask);
    for (int i = 0; i < 4; i++) {
        sigaction(numbers[i], NULL, &before[i]);
        if (before[i].sa_handler != SIG_IGN) sigaction(numbers[i], &now, NULL);
    }
    int status = read_ahead_set(order, path, kb);
    if (status == 0) status = read_whole(order, path, POSIX_FADV_NORMAL);
    read_ahead_restore();
    for (int i = 0; i < 4; i++) sigaction(numbers[i], &before[i], NULL);
    return status;
}

// Single pages come without touching the disk's read-ahead, and faster than with one of 0.
static inline int load_part(const char *path, void *user) {
    page_order *order = (page_order *)user;
    if (order->wanted == PAGES_SMALL) return read_whole(order, path, POSIX_FADV_RANDOM);
    return read_with(order, path, order->wanted == PAGES_HUGE ? "8192" : "128");
}

// Drops a file's pages, and nobody else's. (Dropping all of the system's would free no more of
// them: what another process has mapped stays in both.)
static inline int drop_part(const char *path, void *user) {
    page_order *order = (page_order *)user;
    const int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return order_fails(order, "cannot open %s: %s", path, strerror(errno));
    fsync(fd); // pages that are not on the disk yet cannot be dropped
    posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    close(fd);
    return 0;
}

// Puts a model's files into a state; at least nine tenths of the bytes are in folios of the wanted
// size, or at most a hundredth is cached ("cold"). Else, and if the system does not allow it, -1
// and a sentence: a figure must not claim a state that it was not measured in. why: PAGE_REASON
// bytes.
static inline int page_state_set(const char *path, int wanted, char *why) {
    static const char *const words[] = {"huge", "large", "small", "cold"};
    static const int sizes[] = {FOLIO_2M, FOLIO_1M, FOLIO_4K};
    page_order order = {wanted, why};
    page_state found;
    char sentence[PAGE_SENTENCE];
    if (wanted != PAGES_COLD && geteuid() != 0)
        return order_fails(&order, "page state %s: needs root, to set the disk's read-ahead "
                           "and to see the folios", words[wanted]);
    for (int tries = 0; tries < 5; tries++) { // pages that are just being read stay
        const struct timespec pause = {0, 20000000};
        if (tries) nanosleep(&pause, NULL);
        if (for_parts(path, drop_part, &order)) return -1;
        page_state_find(path, &found);
        if (found.cached_known && found.cached <= COLD_SHARE * found.bytes) break;
    }
    if (!found.cached_known)
        return order_fails(&order, "page state %s: the system does not say what is cached",
                           words[wanted]);
    if (found.cached > COLD_SHARE * found.bytes)
        return order_fails(&order, "page state %s: its pages cannot be dropped (%s): another "
                           "process has mapped it, or it lies in a file system in memory",
                           words[wanted], page_state_sentence(&found, sentence));
    if (wanted == PAGES_COLD) return 0;
    if (for_parts(path, load_part, &order)) return -1;
    page_state_find(path, &found);
    if (found.folios_known && found.folio[sizes[wanted]] >= 0.9 * found.bytes) return 0;
    return order_fails(&order, "page state %s: not reached, the file is too short or its file "
                       "system has no such folios: %s", words[wanted],
                       page_state_sentence(&found, sentence));
}

#endif
