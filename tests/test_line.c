// examples/line.h: typed to on a pseudo-terminal, through a pipe, ended by signals.
#include "../examples/line.h"
#include "pty.h"
#include "test.h"

// Says back what it reads.
static int echo(void) {
    const char *text;
    size_t size;
    line_result r;
    while ((r = line_read("> ", &text, &size)) == LINE_OK || (r == LINE_INTERRUPTED && size)) {
        if (r == LINE_INTERRUPTED) continue;
        line_remember(text, size);
        printf("[");
        for (size_t i = 0; i < size; i++)
            if ((unsigned char)text[i] >= ' ' && text[i] != 0x7F) putchar(text[i]);
            else printf("\\x%02x", (unsigned)text[i]);
        puts("]");
        fflush(stdout);
        if (size == 5 && !memcmp(text, "abort", 5)) abort();
    }
    static const char *const names[] = {"ok", "end", "interrupted", "failed"};
    puts(names[r]);
    line_close();
    return (int)r;
}

// What is written when keys are edited from now on. Before that the terminal collects lines, and
// Ctrl-D is lost.
#define EDITS "\033[?2004h"

// Begins with an empty prompt on the screen.
static int begin(pty *p, int columns, int rows) {
    if (!pty_start(p, columns, rows, echo, NULL)) return 0;
    return pty_is(p, ">");
}
static void finish(pty *p, int code) {
    CHECKF(pty_end(p) == code, "ended otherwise; screen: %s", pty_screen(p));
    CHECK(pty_is_plain(p));
    pty_close(p);
}
#define BEGIN(columns, rows)                                     \
    pty p;                                                       \
    if (!begin(&p, columns, rows)) SKIP("there is no pseudo-terminal")

static int cursor_is(pty *p, int row, int column) {
    if (p->row == row && p->column == column) return 1;
    printf("    cursor at %d, %d, not %d, %d\n", p->row, p->column, row, column);
    return 0;
}

TEST(typing) {
    BEGIN(80, 24);
    CHECK(pty_is_raw(&p, ""));
    pty_type(&p, "hello");
    CHECK(pty_is(&p, "> hello"));
    CHECK(cursor_is(&p, 0, 7));
    pty_type(&p, "\r");
    CHECK(pty_is(&p, "> hello|[hello]|>"));
    pty_type(&p, "\r"); // an empty line is one
    CHECK(pty_is(&p, "> hello|[hello]|>|[]|>"));
    pty_type(&p, "\004");
    CHECK(pty_sees(&p, "end"));
    finish(&p, LINE_END);
}

// Each: what is typed, and what the line then is.
TEST(editing) {
    static const char *const cases[][2] = {
        {"helo\033[Dl", "hello"},                       // arrow left
        {"elo\001h\033[C\033[Cl", "hello"},             // Ctrl-A, arrow right
        {"ello\033[Hh", "hello"}, {"ello\033OHh", "hello"}, {"ello\033[1~h", "hello"},
        {"hell\033[H\033[Fo", "hello"}, {"hell\001\005o", "hello"}, {"hell\001\033[4~o", "hello"},
        {"helxlo\033[D\033[D\177", "hello"},            // Backspace
        {"helxlo\002\002\010", "hello"},                // Ctrl-B, Ctrl-H
        {"helxlo\002\002\002\033[3~", "hello"},         // Delete
        {"helxlo\002\002\002\004", "hello"},            // Ctrl-D
        {"helloxyz\002\002\002\013", "hello"},          // Ctrl-K
        {"xyzhello\001\006\006\006\025", "hello"},      // Ctrl-F, Ctrl-U
        {"some words, here\027there", "some words, there"}, // Ctrl-W
        {"some.word\033\177x", "some.x"},               // Alt-Backspace
        {"one two\033b\033bx", "xone two"},             // Alt-B
        {"one two\001\033fx", "onex two"},              // Alt-F
        {"one two\033[1;5Dx", "one xtwo"}, {"one two\001\033[1;5Cx", "onex two"},
        {"one two\001\033d", " two"},                   // Alt-D
        {"one two\027\031\031", "one twotwo"},          // Ctrl-W, Ctrl-Y
        {"hlelo\001\006\006\024", "hello"},             // Ctrl-T between two
        {"helol\024", "hello"},                         // at the end
        {"\024a\024", "a"},                             // where there are not two
        {"h\xC3\xA9llo\002\002\002\177e", "hello"},     // a character of two bytes is one
        {"e\xCC\x81x\002\177e", "ex"},                  // with an accent over it, too
        {"\xE6\xBC\xA2\xE5\xAD\x97\002x", "\xE6\xBC\xA2x\xE5\xAD\x97"},
        {"\xE6\xBC\xA2z\024", "z\xE6\xBC\xA2"},
        {"a\177\177\177\033[D\033[C\033[3~b", "b"},     // at the ends nothing happens
        {"a\001\013b\031", "ba"},
        {"\033[Z\033[99~\033xa\033[1;2;3;4;5Rb\033[?1;99999999c", "ab"}, // unknown keys
        {"a\0331\0339b", "ab"},
        {"one\\\rtwo", "one\\x0atwo"},                  // a backslash, Alt-Enter, Shift-Enter
        {"one\033\rtwo", "one\\x0atwo"}, {"one\033[13;2utwo", "one\\x0atwo"},
        {"one\033\rthree\033[A\002x\033[Bx", "onxe\\x0athrxee"}, // up and down in it
        {"one\033\rthree\001x\033[A\005y", "oney\\x0axthree"},
        {"one\033\rtwo\001\177", "onetwo"},
        {"\033[200~a\rb\nc\r\nd\033[201~e", "a\\x0ab\\x0ac\\x0ade"}, // a pasted text
        {"\033[200~a\033[31mb\001\033[201~c", "abc"}, // does not drive the terminal
        {"\033[200~tab\t\033[201~.", "tab\\x09."},
        {"\\", "\\x0a"},
    };
    BEGIN(80, 60);
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        char wanted[256];
        pty_type(&p, "\014"); // Ctrl-L: an empty screen
        CHECK(pty_is(&p, ">"));
        pty_type(&p, cases[i][0]);
        pty_type(&p, "\r");
        if (!strcmp(cases[i][0], "\\")) pty_type(&p, "\r");
        snprintf(wanted, sizeof wanted, "|[%s]|>", cases[i][1]);
        CHECKF(pty_sees(&p, wanted), "case %d: %s", (int)i, cases[i][1]);
    }
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(history) {
    BEGIN(80, 24);
    pty_type(&p, "one\rtwo\rtwo\rthree\r");
    CHECK(pty_sees(&p, "[three]|>"));
    pty_type(&p, "\014new\033[A");
    CHECK(pty_is(&p, "> three"));
    pty_type(&p, "\020");
    CHECK(pty_is(&p, "> two"));
    pty_type(&p, "\033OA\033[A\033[A");
    CHECK(pty_is(&p, "> one"));
    pty_type(&p, "!\033[B\033[B\033[B\033[B"); // what was being typed is there again
    CHECK(pty_is(&p, "> new"));
    pty_type(&p, "\033[A\033[A\033[A\016\016x\r"); // what was changed above is as it was
    CHECK(pty_is(&p, "> threex|[threex]|>"));
    pty_type(&p, "a\033\rb\r\014\033[A\033[Ax\r");
    CHECK(pty_is(&p, "> ax|  b|[ax\\x0ab]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(twenty_columns) {
    BEGIN(20, 6);
    pty_type(&p, "abcdefghijklmnopqr"); // the row is full: the cursor is in the next one
    CHECK(pty_is(&p, "> abcdefghijklmnopqr"));
    CHECK(cursor_is(&p, 1, 0));
    pty_type(&p, "st");
    CHECK(pty_is(&p, "> abcdefghijklmnopqr|st"));
    CHECK(cursor_is(&p, 1, 2));
    pty_type(&p, "\001X");
    CHECK(pty_is(&p, "> Xabcdefghijklmnopq|rst"));
    CHECK(cursor_is(&p, 0, 3));
    pty_type(&p, "\005\177\177\177");
    CHECK(pty_is(&p, "> Xabcdefghijklmnopq"));
    // a wide character that does not fit goes to the next row as a whole
    pty_type(&p, "\177\xE6\xBC\xA2\xE5\xAD\x97");
    CHECK(pty_is(&p, "> Xabcdefghijklmnop|\xE6\xBC\xA2\xE5\xAD\x97"));
    CHECK(cursor_is(&p, 1, 4));
    pty_type(&p, "\002\002\002z");
    CHECK(pty_is(&p, "> Xabcdefghijklmnozp|\xE6\xBC\xA2\xE5\xAD\x97"));
    CHECK(cursor_is(&p, 0, 19));
    pty_type(&p, "\r");
    CHECK(pty_sees(&p, "[Xabcdefghijklmnozp|\xE6\xBC\xA2\xE5\xAD\x97]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

// More rows than the terminal has: those around the cursor are seen.
TEST(tall) {
    BEGIN(10, 4);
    pty_type(&p, "0123456789012345678901234567890123456789012345");
    CHECK(pty_is(&p, "8901234567|8901234567|8901234567|89012345"));
    pty_type(&p, "\001");
    CHECK(pty_is(&p, "> 01234567|8901234567|8901234567|8901234567"));
    CHECK(cursor_is(&p, 0, 2));
    pty_type(&p, "\r");
    CHECK(pty_sees(&p, "012345]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(narrow) {
    for (int columns = 1; columns < 8; columns++) {
        pty p;
        if (!pty_start(&p, columns, 20, echo, NULL)) SKIP("there is no pseudo-terminal");
        CHECK(pty_wait(&p, pty_is_raw, ""));
        pty_type(&p, "ab\xE6\xBC\xA2\x01\tcd\033\ref\r");
        CHECK(pty_logged(&p, "[\\x09cd\\x0aefab\xE6\xBC\xA2]\r\n" EDITS));
        pty_type(&p, "\004");
        finish(&p, LINE_END);
    }
}

TEST(lines) {
    BEGIN(80, 24);
    pty_type(&p, "one\\\rtwo\033\rthree");
    CHECK(pty_is(&p, "> one|  two|  three"));
    CHECK(cursor_is(&p, 2, 7));
    pty_type(&p, "\033[A\001\013\013");
    CHECK(pty_is(&p, "> one|  three"));
    pty_type(&p, "\r");
    CHECK(pty_is(&p, "> one|  three|[one\\x0athree]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(resize) {
    BEGIN(40, 10);
    pty_type(&p, "first\r0123456789012345678901234567890123456789");
    CHECK(pty_is(&p, "> first|[first]|> 01234567890123456789012345678901234567|89"));
    pty_size(&p, 60, 10);
    CHECK(pty_is(&p, "> first|[first]|> 0123456789012345678901234567890123456789"));
    pty_type(&p, "\025short");
    CHECK(pty_is(&p, "> first|[first]|> short"));
    pty_size(&p, 20, 10);
    pty_type(&p, "er than before");
    CHECK(pty_is(&p, "> first|[first]|> shorter than befor|e"));
    pty_type(&p, "\r");
    CHECK(pty_logged(&p, "[shorter than before]\r\n" EDITS));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(interrupt) {
    BEGIN(80, 24);
    pty_type(&p, "some\003");
    CHECK(pty_is(&p, "> some^C|>"));
    pty_type(&p, "\003");
    CHECK(pty_sees(&p, "interrupted"));
    finish(&p, LINE_INTERRUPTED);
}

// What the terminal was it is again, whatever ends the program.
TEST(signals) {
    static const int signals[] = {SIGTERM, SIGHUP, SIGINT, SIGQUIT};
    for (int i = 0; i < 4; i++) {
        BEGIN(80, 24);
        struct termios before, after;
        pty_type(&p, "typed");
        CHECK(pty_is(&p, "> typed"));
        CHECK(pty_is_raw(&p, ""));
        kill(p.pid, signals[i]);
        CHECKF(pty_end(&p) == -signals[i], "signal %d", signals[i]);
        CHECK(pty_is_plain(&p));
        CHECK(strstr(p.log, "\033[?2004l") != NULL);
        CHECK(!tcgetattr(p.slave, &after));
        pty_close(&p);
        if (!pty_start(&p, 80, 24, echo, NULL)) SKIP("there is no pseudo-terminal");
        if (!tcgetattr(p.slave, &before)) CHECK(before.c_oflag == after.c_oflag);
        CHECK(pty_is(&p, ">")); // before that Ctrl-D is the terminal's, and lost
        pty_type(&p, "\004");
        CHECK(pty_end(&p) == LINE_END);
        pty_close(&p);
    }
    BEGIN(80, 24);
    pty_type(&p, "abort\r");
    finish(&p, -SIGABRT);
    if (!begin(&p, 80, 24)) return;
    pty_type(&p, "\034"); // Ctrl-backslash
    finish(&p, -SIGQUIT);
}

// A handler of the program's own.
static volatile sig_atomic_t handled;
static void handle(int number) { handled = number; }
static int with_handler(void) {
    const char *text;
    size_t size;
    signal(SIGTERM, handle);
    const line_result r = line_read("> ", &text, &size);
    const int is_plain = r == LINE_FAILED && errno == EINTR && handled == SIGTERM;
    puts(is_plain ? "handled" : "not handled");
    fflush(stdout);
    return line_read("again> ", &text, &size) == LINE_OK ? 0 : 9;
}
TEST(own_handler) {
    pty p;
    if (!pty_start(&p, 80, 24, with_handler, NULL)) SKIP("there is no pseudo-terminal");
    CHECK(pty_is(&p, ">"));
    kill(p.pid, SIGTERM);
    CHECK(pty_sees(&p, "again>"));
    CHECK(pty_sees(&p, "|handled|"));
    pty_type(&p, "x\r");
    finish(&p, 0);
}

// A little shell: its child edits, is stopped, and goes on.
static int shell(void) {
    const pid_t child = fork();
    if (!child) {
        setpgid(0, 0);
        signal(SIGTTOU, SIG_IGN);
        tcsetpgrp(0, getpid());
        signal(SIGTTOU, SIG_DFL);
        exit(echo());
    }
    int status = 0;
    signal(SIGTTOU, SIG_IGN);
    waitpid(child, &status, WUNTRACED);
    tcsetpgrp(0, getpid());
    struct termios now;
    tcgetattr(0, &now);
    puts(WIFSTOPPED(status) && (now.c_lflag & ICANON) ? "stopped" : "not stopped");
    fflush(stdout);
    tcsetpgrp(0, child);
    kill(child, SIGCONT);
    waitpid(child, &status, 0);
    return WIFEXITED(status) ? WEXITSTATUS(status) : 99;
}
TEST(suspend) {
    pty p;
    if (!pty_start(&p, 80, 24, shell, NULL)) SKIP("there is no pseudo-terminal");
    CHECK(pty_is(&p, ">"));
    pty_type(&p, "abc\002\032");
    CHECK(pty_is(&p, "> abc|stopped|> abc"));
    CHECK(pty_wait(&p, pty_is_raw, ""));
    pty_type(&p, "x\r");
    CHECK(pty_sees(&p, "[abxc]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

// The terminal is gone.
TEST(hangup) {
    BEGIN(80, 24);
    pty_type(&p, "typed");
    CHECK(pty_is(&p, "> typed"));
    close(p.fd);
    close(p.slave);
    int status = 0;
    waitpid(p.pid, &status, 0);
    CHECK((WIFSIGNALED(status) && WTERMSIG(status) == SIGHUP) ||
          (WIFEXITED(status) && WEXITSTATUS(status) == LINE_END));
    free(p.log);
}

// A megabyte, pasted and typed.
TEST(long_paste) {
    enum { SIZE = 1 << 20 };
    char *text = (char *)malloc(SIZE + 16);
    if (!text) SKIP("no memory");
    for (int i = 0; i < SIZE; i++) text[i] = i % 61 == 60 ? '\r' : (char)('a' + i % 26);
    BEGIN(20, 5);
    pty_type(&p, "\033[200~");
    pty_type_bytes(&p, text, SIZE);
    pty_type(&p, "end!\033[201~\r");
    CHECK(pty_logged(&p, "end!]\r\n" EDITS));
    pty_type(&p, "\014\004");
    finish(&p, LINE_END);
    free(text);
}

// Bytes that are no text.
TEST(odd_bytes) {
    BEGIN(80, 24);
    const char odd[] = "a\xFF\xC3\x28\x80\x9B\xF0\x9F\0b\xED\xA0\x80z";
    pty_type_bytes(&p, odd, sizeof odd - 1);
    CHECK(pty_sees(&p, "b\xEF\xBF\xBD\xEF\xBF\xBD\xEF\xBF\xBDz"));
    CHECK(!strchr(p.log, (char)0x9B)); // what a terminal might obey is not written to it
    pty_type(&p, "\177\177\177\177\177\177\177\177\177\177\177\177\177\177\177x\r");
    CHECK(pty_sees(&p, "[x]|>"));
    pty_type(&p, "\004");
    finish(&p, LINE_END);
}

TEST(random_bytes) {
    unsigned seed = 1;
    for (int run = 0; run < 20; run++) {
        BEGIN(20, 8);
        for (int i = 0; i < 300; i++) {
            seed = seed * 1103515245u + 12345u;
            char c = (char)(seed >> 16);
            if (c == 3 || c == 4 || c == 26 || c == 28) c = '\033';
            pty_type_bytes(&p, &c, 1);
        }
        pty_type(&p, "x\r\033[201~\r\003");
        pty_type(&p, "\003\003\004");
        const int code = pty_end(&p);
        // Ctrl-C between two lines is the program's own matter
        CHECKF(code == LINE_END || code == LINE_INTERRUPTED || code == -SIGINT, "run %d: %d", run,
               code);
        CHECK(pty_is_plain(&p));
        pty_close(&p);
    }
}

// ---- without a terminal ----------------------------------------------------------------------

// What echo() says to the bytes on its standard input.
static size_t through_pipe(const char *in, size_t size, char *out, size_t capacity) {
    int to[2], from[2];
    size_t n = 0;
    fflush(stdout);
    if (pipe(to) || pipe(from)) return 0;
    const pid_t child = fork(), writer = child ? fork() : -1;
    if (!child) {
        dup2(to[0], 0), dup2(from[1], 1);
        close(to[1]), close(from[0]);
        exit(echo());
    }
    if (!writer) {
        close(to[0]), close(from[0]), close(from[1]);
        while (size) {
            const ssize_t k = write(to[1], in, size);
            if (k <= 0) break;
            in += k, size -= (size_t)k;
        }
        _exit(0);
    }
    close(to[0]), close(to[1]), close(from[1]);
    for (ssize_t k; n < capacity && (k = read(from[0], out + n, capacity - n)) > 0;) n += (size_t)k;
    close(from[0]);
    waitpid(child, NULL, 0);
    waitpid(writer, NULL, 0);
    return n;
}
static int answers(const char *in, size_t size, const char *wanted) {
    char out[4096];
    const size_t n = through_pipe(in, size, out, sizeof out - 1);
    out[n] = 0;
    if (!strcmp(out, wanted)) return 1;
    printf("    wanted: %s    came: %s", wanted, out);
    return 0;
}

TEST(pipes) {
    CHECK(answers("one\ntwo\n", 8, "[one]\n[two]\nend\n"));
    CHECK(answers("one\n\nlast", 9, "[one]\n[]\n[last]\nend\n"));
    CHECK(answers("", 0, "end\n"));
    CHECK(answers("dos\r\nx", 6, "[dos]\n[x]\nend\n"));
    CHECK(answers("a\\\nb\nc\\", 7, "[a\\x0ab]\n[c\\x0a]\nend\n"));
    CHECK(answers("a\0b\n\001\n", 6, "[a\\x00b]\n[\\x01]\nend\n"));
    const size_t size = 3 << 20;
    char *in = (char *)malloc(size), *out = (char *)malloc(size + 16);
    if (!in || !out) SKIP("no memory");
    memset(in, 'x', size);
    CHECK(through_pipe(in, size, out, size + 16) == size + 7);
    free(in);
    free(out);
}

MAIN()
