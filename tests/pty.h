// A program on a pseudo-terminal: typed to, its signals sent, and what a person would see. The
// screen knows the sequences of a VT100 that our programs write, wide and combining characters
// among what it shows; it is no part of the programs, so that both would have to be wrong.
//
//     pty_start(&p, 80, 24, function, NULL)     or  NULL, argv
//     pty_type(&p, "hello\r");
//     CHECK(pty_sees(&p, "> hello"));           waits until the screen shows it
//     pty_end(&p)                               its exit code, or minus the signal that ended it
#ifndef PTY_H
#define PTY_H
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define PTY_FN __attribute__((unused)) static

// Seconds to wait for what never comes: a failure, not a limit of speed.
#ifndef PTY_PATIENCE
#define PTY_PATIENCE 300
#endif
enum { PTY_ROWS = 64, PTY_COLUMNS = 200, PTY_CELL = 24 };

typedef struct pty {
    int fd, slave; // the slave stays open, so that its settings can be read when the program ended
    pid_t pid;
    int columns, rows;
    char cell[PTY_ROWS][PTY_COLUMNS][PTY_CELL]; // a character and what combines with it; "" beside
                                                // a wide one
    int row, column, wraps;                     // wraps: the next character goes to the next row
    char sequence[64];                          // what has come of one
    size_t n_sequence;
    char *log;                                  // all bytes
    size_t n_log;
    int is_gone;                                // the program closed its end
} pty;

// ---- the screen ------------------------------------------------------------------------------

PTY_FN void pty_blank(pty *p, int row, int from, int to) {
    for (int c = from; c < to; c++) strcpy(p->cell[row][c], " ");
}
PTY_FN void pty_feed(pty *p) {
    p->wraps = 0;
    if (++p->row < p->rows) return;
    p->row = p->rows - 1;
    memmove(p->cell[0], p->cell[1], sizeof p->cell[0] * (size_t)(p->rows - 1));
    pty_blank(p, p->row, 0, p->columns);
}

PTY_FN int pty_width(uint32_t c) {
    if ((c >= 0x300 && c < 0x370) || (c >= 0xFE00 && c <= 0xFE0F)) return 0;
    return 1 + ((c >= 0x2E80 && c < 0xA4D0) || (c >= 0xAC00 && c < 0xD7A4) ||
                (c >= 0xFF01 && c < 0xFF61) || (c >= 0x1F300 && c < 0x1F650));
}

PTY_FN void pty_show(pty *p, const char *bytes) {
    const unsigned char *b = (const unsigned char *)bytes;
    const uint32_t code = b[0] < 0x80   ? b[0]
                          : b[0] < 0xE0 ? (b[0] & 31u) << 6 | (b[1] & 63u)
                          : b[0] < 0xF0 ? (b[0] & 15u) << 12 | (b[1] & 63u) << 6 | (b[2] & 63u)
                                        : (b[0] & 7u) << 18 | (b[1] & 63u) << 12 |
                                              (b[2] & 63u) << 6 | (b[3] & 63u);
    const int width = pty_width(code);
    if (!width) {
        int c = p->wraps ? p->column : p->column - 1;
        while (c > 0 && !*p->cell[p->row][c]) c--;
        char *cell = p->cell[p->row][c < 0 ? 0 : c];
        if (strlen(cell) + strlen(bytes) < PTY_CELL) strcat(cell, bytes);
        return;
    }
    if (p->wraps || p->column + width > p->columns) p->column = 0, pty_feed(p);
    strcpy(p->cell[p->row][p->column], bytes);
    if (width == 2 && p->column + 1 < p->columns) *p->cell[p->row][p->column + 1] = 0;
    p->column += width;
    if (p->column >= p->columns) p->column = p->columns - 1, p->wraps = 1;
}

PTY_FN int pty_clamp(int x, int low, int high) { return x < low ? low : x > high ? high : x; }

// ESC [ ... letter.
PTY_FN void pty_obey(pty *p) {
    const char last = p->sequence[p->n_sequence - 1];
    const int n = atoi(p->sequence + 2), some = n ? n : 1;
    const int bottom = p->rows - 1, right = p->columns - 1;
    if (last != 'm' && last != 'h' && last != 'l') p->wraps = 0;
    if (last == 'A') p->row = pty_clamp(p->row - some, 0, bottom);
    else if (last == 'B') p->row = pty_clamp(p->row + some, 0, bottom);
    else if (last == 'C') p->column = pty_clamp(p->column + some, 0, right);
    else if (last == 'D') p->column = pty_clamp(p->column - some, 0, right);
    else if (last == 'H') p->row = p->column = 0;
    else if (last == 'K') pty_blank(p, p->row, p->column, p->columns);
    else if (last == 'J') {
        if (n == 2) pty_blank(p, p->row, 0, p->columns);
        else pty_blank(p, p->row, p->column, p->columns);
        for (int r = n == 2 ? 0 : p->row + 1; r < p->rows; r++) pty_blank(p, r, 0, p->columns);
    }
}

PTY_FN void pty_byte(pty *p, char c) {
    if (p->n_sequence || c == 27 || (unsigned char)c >= 0x80) {
        if (p->n_sequence + 1 >= sizeof p->sequence) p->n_sequence = 0;
        p->sequence[p->n_sequence++] = c;
        p->sequence[p->n_sequence] = 0;
        const unsigned char first = (unsigned char)p->sequence[0];
        if (first == 27) {
            if (p->n_sequence < 3 || c < '@') return;
            pty_obey(p);
        } else {
            if (p->n_sequence < (first >= 0xF0 ? 4u : first >= 0xE0 ? 3u : 2u)) return;
            pty_show(p, p->sequence);
        }
        p->n_sequence = 0;
    } else if (c == '\r') p->column = p->wraps = 0;
    else if (c == '\n') pty_feed(p);
    else if (c == '\b') p->column -= p->column > 0, p->wraps = 0;
    else if (c >= ' ') {
        const char text[2] = {c, 0};
        pty_show(p, text);
    }
}

// Row r without the blanks at its end; valid until the next call.
PTY_FN const char *pty_row(const pty *p, int r) {
    static char text[PTY_COLUMNS * PTY_CELL];
    text[0] = 0;
    for (int c = 0; c < p->columns; c++) strcat(text, p->cell[r][c]);
    size_t n = strlen(text);
    while (n && text[n - 1] == ' ') text[--n] = 0;
    return text;
}

// The screen as "row|row|row", without the empty rows at its end.
PTY_FN const char *pty_screen(const pty *p) {
    static char text[PTY_ROWS * PTY_COLUMNS * 4];
    text[0] = 0;
    for (int r = 0; r < p->rows; r++) {
        if (r) strcat(text, "|");
        strcat(text, pty_row(p, r));
    }
    size_t n = strlen(text);
    while (n && text[n - 1] == '|') text[--n] = 0;
    return text;
}

// ---- the program -----------------------------------------------------------------------------

PTY_FN void pty_size(pty *p, int columns, int rows) {
    struct winsize size;
    memset(&size, 0, sizeof size);
    size.ws_col = (unsigned short)columns, size.ws_row = (unsigned short)rows;
    for (int r = 0; r < PTY_ROWS; r++) // what is new is empty; nothing is folded
        for (int c = 0; c < PTY_COLUMNS; c++)
            if (r >= p->rows || c >= p->columns) strcpy(p->cell[r][c], " ");
    p->columns = columns, p->rows = rows;
    p->column = pty_clamp(p->column, 0, columns - 1), p->row = pty_clamp(p->row, 0, rows - 1);
    ioctl(p->fd, TIOCSWINSZ, &size);
}

// Runs function(), or a program, with the terminal as its own. 0 if the system has none.
PTY_FN int pty_start(pty *p, int columns, int rows, int (*function)(void), char *const *argv) {
    memset(p, 0, sizeof *p);
    char name[32];
    int number = 0, is_locked = 0; // posix_openpt needs macros in front of all headers
    p->fd = open("/dev/ptmx", O_RDWR | O_NOCTTY);
    if (p->fd < 0 || ioctl(p->fd, TIOCSPTLCK, &is_locked) || ioctl(p->fd, TIOCGPTN, &number))
        return 0;
    snprintf(name, sizeof name, "/dev/pts/%d", number);
    p->slave = open(name, O_RDWR | O_NOCTTY);
    if (p->slave < 0) return 0;
    pty_size(p, columns, rows);
    fflush(stdout);
    p->pid = fork();
    if (p->pid) {
        fcntl(p->fd, F_SETFL, O_NONBLOCK);
        return p->pid > 0;
    }
    setsid();
    ioctl(p->slave, TIOCSCTTY, 0);
    for (int fd = 0; fd < 3; fd++) dup2(p->slave, fd);
    close(p->fd);
    close(p->slave);
    setenv("TERM", "xterm", 1);
    if (!argv) exit(function());
    execv(argv[0], argv);
    _exit(127);
}

// Takes in what the program has written; waits for it up to so many milliseconds.
PTY_FN void pty_read(pty *p, int milliseconds) {
    char bytes[4096];
    struct pollfd wait = {p->fd, POLLIN, 0};
    if (poll(&wait, 1, milliseconds) <= 0) return;
    const ssize_t n = read(p->fd, bytes, sizeof bytes);
    if (n <= 0) {
        p->is_gone = n == 0 || errno != EAGAIN;
        return;
    }
    char *log = (char *)realloc(p->log, p->n_log + (size_t)n + 1);
    if (log) {
        memcpy(log + p->n_log, bytes, (size_t)n);
        p->n_log += (size_t)n;
        log[p->n_log] = 0;
        p->log = log;
    }
    for (ssize_t i = 0; i < n; i++) pty_byte(p, bytes[i]);
}

PTY_FN void pty_type_bytes(pty *p, const char *text, size_t size) {
    while (size) {
        const ssize_t n = write(p->fd, text, size);
        if (n > 0) text += n, size -= (size_t)n;
        else if (n < 0 && errno != EAGAIN && errno != EINTR) return;
        pty_read(p, n > 0 ? 0 : 1);
    }
}
PTY_FN void pty_type(pty *p, const char *text) { pty_type_bytes(p, text, strlen(text)); }

// Waits until `wanted` says yes to what is seen.
PTY_FN int pty_wait(pty *p, int (*wanted)(const pty *, const char *), const char *text) {
    const time_t start = time(NULL);
    while (!wanted(p, text)) {
        if (p->is_gone && !wanted(p, text)) return 0;
        if (time(NULL) - start > PTY_PATIENCE) return 0;
        pty_read(p, 20);
    }
    return 1;
}
PTY_FN int pty_has_screen(const pty *p, const char *text) { return !strcmp(pty_screen(p), text); }
PTY_FN int pty_has_text(const pty *p, const char *text) {
    return strstr(pty_screen(p), text) != NULL;
}
PTY_FN int pty_has_logged(const pty *p, const char *text) {
    return p->log && strstr(p->log, text) != NULL;
}
// Do all rows together look like this? Does any part?
PTY_FN int pty_is(pty *p, const char *text) {
    if (pty_wait(p, pty_has_screen, text)) return 1;
    printf("    wanted: %s\n    seen:   %s\n", text, pty_screen(p));
    return 0;
}
PTY_FN int pty_sees(pty *p, const char *text) {
    if (pty_wait(p, pty_has_text, text)) return 1;
    printf("    wanted: ...%s...\n    seen:   %s\n", text, pty_screen(p));
    return 0;
}
PTY_FN int pty_logged(pty *p, const char *text) { return pty_wait(p, pty_has_logged, text); }

// Is the terminal one that echoes and collects lines?
PTY_FN int pty_is_plain(const pty *p) {
    struct termios now;
    if (tcgetattr(p->slave, &now)) return 0;
    return (now.c_lflag & (ICANON | ECHO | ISIG)) == (ICANON | ECHO | ISIG) &&
           (now.c_iflag & ICRNL) != 0;
}
PTY_FN int pty_is_raw(const pty *p, const char *text) {
    (void)text;
    return !pty_is_plain(p);
}

// Waits for the program's end. Its exit code, or minus a signal's number; -1000: it does not end.
PTY_FN int pty_end(pty *p) {
    const time_t start = time(NULL);
    int status = 0;
    while (waitpid(p->pid, &status, WNOHANG) == 0) {
        pty_read(p, 5);
        if (time(NULL) - start > PTY_PATIENCE) kill(p->pid, SIGKILL);
    }
    while (!p->is_gone) {
        const size_t before = p->n_log;
        pty_read(p, 0);
        if (p->n_log == before) break;
    }
    if (time(NULL) - start > PTY_PATIENCE) return -1000;
    return WIFEXITED(status) ? WEXITSTATUS(status) : -WTERMSIG(status);
}
PTY_FN void pty_close(pty *p) {
    close(p->fd);
    close(p->slave);
    free(p->log);
    memset(p, 0, sizeof *p);
}

#endif
