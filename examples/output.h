// What the programs write: files that are replaced only when the new one is whole, and standard
// output whose failures are noticed. Needs libc alone.
//
//     FILE *f = output_begin(path);       NULL, with errno set, if it cannot be written
//     ...
//     if (output_end(good)) ...           if not good, what was there before stays
//
// A regular file is written as a draft beside it, which then takes its place; a signal that ends
// the program removes the draft. A link stays a link: what it leads to is replaced. Anything else,
// such as a device or a pipe, is written to as it is. One file at a time.
#ifndef OUTPUT_H
#define OUTPUT_H
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { OUTPUT_PATH = 4096, OUTPUT_LINKS = 40, OUTPUT_TRIES = 100, OUTPUT_SIGNALS = 5 };

// The file that is being written.
static struct output_file {
    FILE *f;
    int is_direct;                   // no draft: what is written arrives at once
    volatile sig_atomic_t has_draft; // there is a file named `draft`, and it is ours
    char target[OUTPUT_PATH];        // what the draft will replace
    char draft[OUTPUT_PATH + 64];
    struct sigaction before[OUTPUT_SIGNALS];
} output_file;

static const int output_signals[OUTPUT_SIGNALS] = {SIGHUP, SIGINT, SIGQUIT, SIGTERM, SIGXFSZ};

static inline void output_interrupted(int number) {
    if (output_file.has_draft) unlink(output_file.draft);
    signal(number, SIG_DFL);
    raise(number);
}

// Signals that the program ignores or catches itself stay as they are. A limit on the size of files
// is reported like a full disk.
static inline void output_catch(void) {
    for (int i = 0; i < OUTPUT_SIGNALS; i++) {
        struct sigaction now;
        memset(&now, 0, sizeof now);
        now.sa_handler = output_signals[i] == SIGXFSZ ? SIG_IGN : output_interrupted;
        sigfillset(&now.sa_mask);
        sigaction(output_signals[i], NULL, &output_file.before[i]);
        if (output_file.before[i].sa_handler == SIG_DFL) sigaction(output_signals[i], &now, NULL);
    }
}
static inline void output_release(void) {
    for (int i = 0; i < OUTPUT_SIGNALS; i++)
        if (output_file.before[i].sa_handler == SIG_DFL)
            sigaction(output_signals[i], &output_file.before[i], NULL);
}

// Does the name lead to an open file of a process, as /dev/stdout does in the end? Whoever opened
// that one goes on with it, even if its name became another file's.
static inline int output_is_open_file(const char *name) {
    return !strncmp(name, "/proc/", 6) || !strncmp(name, "/dev/fd/", 8);
}

// The target: what is at the end of links, also where nothing is there yet. 0, or -1 with errno.
static inline int output_follow(const char *path) {
    char *name = output_file.target, link[OUTPUT_PATH];
    errno = ENAMETOOLONG;
    if (strlen(path) >= OUTPUT_PATH) return -1;
    strcpy(name, path);
    for (int i = 0; i < OUTPUT_LINKS; i++) {
        if (output_is_open_file(name)) return 0;
        const ssize_t n = readlink(name, link, sizeof link - 1);
        if (n < 0) return errno == EINVAL || errno == ENOENT ? 0 : -1; // it is no link
        link[n] = 0;
        const char *slash = strrchr(name, '/');
        const size_t folder = link[0] == '/' || !slash ? 0 : (size_t)(slash + 1 - name);
        errno = ENAMETOOLONG;
        if (folder + (size_t)n >= OUTPUT_PATH) return -1;
        memcpy(name + folder, link, (size_t)n + 1);
    }
    errno = ELOOP;
    return -1;
}

// A new file beside the target, which nobody else has opened or can have made a link of. Returns
// its descriptor, or -1 with errno.
static inline int output_open_draft(mode_t mode) {
    const char *slash = strrchr(output_file.target, '/');
    const char *base = slash ? slash + 1 : output_file.target;
    const size_t n = strlen(base) < 200 ? strlen(base) : 200; // names have at most 255 bytes
    errno = *output_file.target ? EISDIR : ENOENT;
    if (!*base) return -1;
    for (int i = 0; i < OUTPUT_TRIES; i++) {
        struct timespec now;
        clock_gettime(CLOCK_REALTIME, &now);
        snprintf(output_file.draft, sizeof output_file.draft, "%.*s.%lx-%lx.tmp",
                 (int)(base + n - output_file.target), output_file.target,
                 (unsigned long)getpid(), (unsigned long)now.tv_nsec);
        const int fd = open(output_file.draft, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, mode);
        if (fd >= 0 || errno != EEXIST) return fd;
    }
    return -1;
}

// The draft for a file that has the permissions of `old`, if there is one.
static inline FILE *output_begin_draft(const struct stat *old) {
    sigset_t all, before;
    sigfillset(&all);
    sigprocmask(SIG_BLOCK, &all, &before); // none between making the draft and knowing of it
    const int fd = output_open_draft(old ? old->st_mode & 0777 : 0666);
    if (fd >= 0) {
        output_file.has_draft = 1;
        output_catch();
    }
    sigprocmask(SIG_SETMASK, &before, NULL);
    if (fd < 0) return NULL;
    if (old) (void)fchmod(fd, old->st_mode & 0777); // also what the process's mask leaves out
    return fdopen(fd, "wb");
}

static inline void output_drop_draft(void) {
    if (output_file.has_draft) unlink(output_file.draft);
    output_file.has_draft = 0;
}

static inline FILE *output_begin(const char *path) {
    struct stat old;
    errno = EBUSY;
    if (output_file.f || output_follow(path)) return NULL;
    const int is_there = stat(path, &old) == 0;
    output_file.is_direct =
        is_there && (!S_ISREG(old.st_mode) || output_is_open_file(output_file.target));
    if (output_file.is_direct) {
        const int behind = S_ISREG(old.st_mode) ? O_APPEND : 0; // what was written to it before
        const int fd = open(path, O_WRONLY | O_NOCTTY | O_CLOEXEC | behind);
        output_file.f = fd >= 0 ? fdopen(fd, "wb") : NULL;
    } else {
        output_file.f = output_begin_draft(is_there ? &old : NULL);
        if (!output_file.f && output_file.has_draft) {
            output_drop_draft();
            output_release();
        }
    }
    return output_file.f;
}

// Closes the file; a draft takes the target's place if it is `good` and all was written. Returns 0,
// or -1 with errno set; what is not good: -1.
static inline int output_end(int good) {
    int failed = !good || ferror(output_file.f), reason = failed ? errno : 0;
    if (fclose(output_file.f)) failed = 1, reason = errno;
    output_file.f = NULL;
    if (!failed && output_file.has_draft && rename(output_file.draft, output_file.target))
        failed = 1, reason = errno;
    if (failed) output_drop_draft();
    if (!output_file.is_direct) {
        output_file.has_draft = 0;
        output_release();
    }
    errno = reason ? reason : EIO;
    return failed ? -1 : 0;
}

// Would writing to `path` change what is read from `input`? Devices and pipes have two ends.
static inline int output_is_input(const char *path, const char *input) {
    struct stat out, in;
    if (stat(path, &out) || stat(input, &in)) return 0;
    return (S_ISREG(in.st_mode) || S_ISBLK(in.st_mode)) && out.st_dev == in.st_dev &&
           out.st_ino == in.st_ino;
}

// The exit code of a program that has nothing more to say: 1 instead of 0 if standard output did
// not take all of it, now or before.
static inline int output_finish(const char *program, int status) {
    const int failed_before = ferror(stdout), fails = fflush(stdout);
    if (status || (!failed_before && !fails)) return status;
    fprintf(stderr, "%s: cannot write to standard output: %s\n", program,
            fails ? strerror(errno) : "part of it is missing");
    return 1;
}

#endif
