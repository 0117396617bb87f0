// moe-cli's dialogue as a person has it: on a pseudo-terminal, with the model in the box, and with
// one that has a part to play (tests/actor.c), for what a storyteller does not do.
#include "pty.h"
#include "test.h"

static const char *const story = "examples/storyteller/storyteller.gguf";
// One role per line, as ChatML has it, with the model's own control tokens.
static const char *const marks =
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}";
// What is asked is gone on with: the model tells stories.
static const char *const goes_on = "<|begin|>{{ messages[-1].content }}";

// The program beside the folder of the tests, and files there.
static char cli[4200], saved[4200], actor[4200], tools[4200];
static int find_cli(void) {
    char self[4096];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) return 0;
    self[n] = 0;
    if (!strrchr(self, '/')) return 0;
    *strrchr(self, '/') = 0;
    snprintf(saved, sizeof saved, "%s/talk.json", self);
    snprintf(actor, sizeof actor, "%s/talk_actor.gguf", self);
    snprintf(tools, sizeof tools, "%s/talk_tools.json", self);
    snprintf(cli, sizeof cli, "%s/../moe-cli", self);
    if (getenv("MOE_CLI")) snprintf(cli, sizeof cli, "%s", getenv("MOE_CLI"));
    return access(cli, X_OK) == 0 && access(story, R_OK) == 0;
}

// The model that plays, and a tool for it.
static int write_actor(void) {
    char command[9000];
    FILE *f = fopen(tools, "w");
    if (!f) return 0;
    fputs("[{\"type\": \"function\", \"function\": {\"name\": \"add\"}}]\n", f);
    fclose(f);
    snprintf(command, sizeof command, "'%.*s/actor' '%s'", (int)(strrchr(actor, '/') - actor),
             actor, actor);
    return system(command) == 0;
}

// Runs it with a template (NULL: the actor, which has one) and more arguments, and waits for its
// prompt.
static int begin(pty *p, int columns, const char *chat_template, const char *const *more) {
    char *argv[32] = {cli, (char *)"--temp", (char *)"0", (char *)"-t", (char *)"1", (char *)"-m",
                      chat_template ? (char *)story : actor};
    int n = 7;
    if (!find_cli() || (!chat_template && !write_actor())) return 0;
    if (chat_template) argv[n++] = (char *)"--chat-template", argv[n++] = (char *)chat_template;
    while (*more && n < 31) argv[n++] = (char *)*more++;
    argv[n] = NULL;
    if (!pty_start(p, columns, 24, NULL, argv)) return 0;
    if (!pty_logged(p, "/help for more.")) return 0;
    return pty_sees(p, "|>");
}
#define BEGIN(columns, chat_template, ...)                                        \
    pty p;                                                                        \
    const char *const more[] = {__VA_ARGS__, NULL};                               \
    if (!begin(&p, columns, chat_template, more))                                 \
        SKIP("no pseudo-terminal, no moe-cli, or no model in %s", story)

static void finish(pty *p, int code) {
    CHECKF(pty_end(p) == code, "ended otherwise; screen: %s", pty_screen(p));
    CHECK(pty_is_plain(p));
    pty_close(p);
}

// Is it our turn again? Before that the terminal collects lines, and Ctrl-D is lost.
static int ends_with_prompt(const pty *p, const char *text) {
    const char *screen = pty_screen(p);
    const size_t n = strlen(screen);
    return strstr(screen, text) && n >= 2 && !strcmp(screen + n - 2, "|>");
}
static int prompts(pty *p, const char *text) {
    if (pty_wait(p, ends_with_prompt, text)) return 1;
    printf("    wanted: ...%s... and a prompt\n    seen:   %s\n", text, pty_screen(p));
    return 0;
}

// /save, which says what it did, and what is in the file then.
static void save(pty *p, const char *said) {
    char command[4300];
    snprintf(command, sizeof command, "\014/save %s\r", saved);
    pty_type(p, command);
    CHECK(prompts(p, said));
}
static const char *read_saved(void) {
    static char text[1 << 16];
    FILE *f = fopen(saved, "r");
    text[0] = 0;
    if (f) text[fread(text, 1, sizeof text - 1, f)] = 0, fclose(f);
    remove(saved);
    return text;
}

// Types, and waits until an answer comes: what is written when keys are no longer edited. The
// screen would not do, long answers leave it.
static int pours(pty *p, const char *keys) {
    const size_t before = p->n_log;
    const time_t start = time(NULL);
    pty_type(p, keys);
    while (!p->is_gone && time(NULL) - start < PTY_PATIENCE) {
        const char *left = p->log ? strstr(p->log + before, "\033[?2004l") : NULL;
        if (left && strlen(left) > 60) return 1;
        pty_read(p, 20);
    }
    return 0;
}

TEST(answers) {
    BEGIN(80, goes_on, "-n", "6");
    pty_type(&p, "\014Once upon a time therr\177e\r"); // Ctrl-L: an empty screen
    CHECK(prompts(&p, "]|>"));
    CHECK(strstr(pty_screen(&p), "> Once upon a time there|was a ") != NULL);
    pty_type(&p, "\033[A was\r"); // the line again, and more
    CHECK(prompts(&p, "> Once upon a time there was|a "));
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(commands) {
    BEGIN(80, marks, "-n", "4", "-sys", "You tell stories.");
    pty_type(&p, "/help\r");
    CHECK(pty_sees(&p, "/save FILE"));
    pty_type(&p, "\014/undo\r");
    CHECK(pty_sees(&p, "nothing to undo"));
    pty_type(&p, "\014/regen\r");
    CHECK(pty_sees(&p, "no answer yet"));
    pty_type(&p, "\014/frob nicate\r");
    CHECK(pty_sees(&p, "unknown command /frob;"));
    pty_type(&p, "\014/save\r");
    CHECK(pty_sees(&p, "needs the name"));
    pty_type(&p, "\014one\r");
    CHECK(prompts(&p, "]|>"));
    pty_type(&p, "\014two\r");
    CHECK(prompts(&p, "]|>"));
    pty_type(&p, "\014/undo\r");
    CHECK(pty_sees(&p, "1 turns are left"));
    pty_type(&p, "\014/regen\r");
    CHECK(prompts(&p, "]|>"));
    save(&p, "1 turns are in");
    pty_type(&p, "\014/clear\r");
    CHECK(prompts(&p, "begins anew"));
    pty_type(&p, "/exit\r");
    finish(&p, 0);
    const char *text = read_saved();
    CHECK(strstr(text, "{\"role\": \"system\", \"content\": \"You tell stories.\"}"));
    CHECK(strstr(text, "{\"role\": \"user\", \"content\": \"one\"}"));
    CHECK(strstr(text, "{\"role\": \"assistant\", \"content\": \""));
    CHECK(!strstr(text, "two"));
}

// What came of an answer stays, and the dialogue goes on behind it.
TEST(interrupt) {
    BEGIN(80, marks, "-n", "-1", "-c", "1000000", "--ignore-eos");
    CHECK(pours(&p, "Once\r"));
    pty_type(&p, "\003");
    CHECK(pty_sees(&p, "; interrupted ]|>"));
    save(&p, "1 turns are in");
    const char *answer = strstr(read_saved(), "\"assistant\", \"content\": \"");
    CHECK(answer && strlen(answer) > 60);
    CHECK(pours(&p, "\014more\r"));
    pty_type(&p, "\003");
    CHECK(pty_sees(&p, "; interrupted ]|>"));
    pty_type(&p, "\003"); // the second one ends
    finish(&p, 130);
}

TEST(ends) {
    BEGIN(80, marks, "-n", "4");
    pty_type(&p, "\014typed\003");
    CHECK(pty_is(&p, "> typed^C|>"));
    pty_type(&p, "one\r");
    CHECK(prompts(&p, "]|>"));
    pty_type(&p, "\014\003");
    CHECK(prompts(&p, "Ctrl-C again or Ctrl-D ends"));
    pty_type(&p, "\004");
    finish(&p, 0);
    if (!begin(&p, 80, marks, more)) return;
    pty_type(&p, "\003");
    CHECK(prompts(&p, "again"));
    pty_type(&p, "\003");
    finish(&p, 130);
}

TEST(twenty_columns) {
    BEGIN(20, goes_on, "-n", "6", "--no-show-timings");
    pty_type(&p, "\014Once upon a time there");
    CHECK(pty_is(&p, "> Once upon a time t|here"));
    pty_type(&p, "\001\013Once upon a tame there\033b\002\002\002\177i\r");
    CHECK(prompts(&p, "> Once upon a time t|here|was a "));
    pty_type(&p, "\004");
    finish(&p, 0);
}

// Keys, older lines, characters of other widths: what was sent is what was seen.
TEST(editing) {
    BEGIN(80, NULL, "--no-show-timings");
    pty_type(&p, "\014bc\001a\005d e\033[D\033[D\033[C\033[3~f\033[H\033[3~A\033[F!!\177\177\r");
    CHECK(prompts(&p, "> Abcd f|I see.|>"));
    pty_type(&p, "\014one two three\027\027two\001\013\031 x\025y\r"); // W W, A K Y, U
    CHECK(prompts(&p, "> y|I see.|>"));
    pty_type(&p, "\014ab\xC3\xA9\xE6\x97\xA5\xE6\x9C\xAC\xF0\x9F\x98\x80");
    CHECK(pty_is(&p, "> ab\xC3\xA9\xE6\x97\xA5\xE6\x9C\xAC\xF0\x9F\x98\x80"));
    CHECK(p.column == 11); // three characters of two columns
    pty_type(&p, "\033[D\177");
    CHECK(pty_is(&p, "> ab\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80"));
    pty_type(&p, "\r");
    CHECK(prompts(&p, "I see.|>"));
    pty_type(&p, "\014draft\033[A\033[A");
    CHECK(pty_is(&p, "> y"));
    pty_type(&p, "\033[A");
    CHECK(pty_is(&p, "> Abcd f"));
    pty_type(&p, "\033[B\033[B\033[B");
    CHECK(pty_is(&p, "> draft"));
    pty_type(&p, "\r");
    CHECK(prompts(&p, "I see.|>"));
    save(&p, "4 turns are in");
    const char *text = read_saved();
    CHECK(strstr(text, "\"content\": \"Abcd f\"}") != NULL);
    CHECK(strstr(text, "\"content\": \"y\"}") != NULL);
    CHECK(strstr(text, "\"ab\xC3\xA9\xE6\x97\xA5\xF0\x9F\x98\x80\"}") != NULL);
    CHECK(strstr(text, "\"content\": \"draft\"}") != NULL);
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(resized) {
    BEGIN(40, NULL, "--no-show-timings");
    pty_type(&p, "\014a question of more than twenty columns");
    CHECK(pty_is(&p, "> a question of more than twenty columns"));
    pty_size(&p, 20, 24);
    pty_type(&p, "\025short\r"); // Ctrl-U
    CHECK(prompts(&p, "> short|I see.|>"));
    pty_size(&p, 60, 24);
    pty_type(&p, "\014now there is room for all of this, in one row\r");
    CHECK(prompts(&p, "> now there is room for all of this, in one row|I see.|>"));
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(thinking) {
    BEGIN(80, NULL, "--no-show-timings");
    pty_type(&p, "\014well!\r");
    CHECK(prompts(&p, "> well!|Let me see.||Yes, indeed.|>"));
    CHECK(strstr(p.log, "\033[2mLet me see.") != NULL); // dim,
    CHECK(strstr(p.log, "\033[0m\r\n\r\nYes") != NULL);  // and no more
    save(&p, "1 turns are in");
    CHECK(strstr(read_saved(), "\"content\": \"Yes, indeed.\", "
                               "\"reasoning_content\": \"Let me see.\"}") != NULL);
    pty_type(&p, "\004");
    finish(&p, 0);
    const char *const off[] = {"--no-show-timings", "--reasoning", "off", NULL};
    if (!begin(&p, 80, NULL, off)) return;
    pty_type(&p, "\014well!\r");
    CHECK(prompts(&p, "> well!|I see.|>"));
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(tool) {
    BEGIN(80, NULL, "--no-show-timings", "--tools", tools);
    pty_type(&p, "\014how much?\r");
    CHECK(pty_sees(&p, "> how much?|[calls add {\"a\": 17, \"b\": 25}]|result>"));
    pty_type(&p, "42\r");
    CHECK(prompts(&p, "result> 42|It ends with 2.|>"));
    save(&p, "2 turns are in");
    CHECK(strstr(read_saved(), "{\"role\": \"tool\", \"content\": \"42\"}") != NULL);
    pty_type(&p, "\014/undo\r"); // the result: it is asked for again
    CHECK(pty_sees(&p, "1 turns are left|result>"));
    pty_type(&p, "43\r");
    CHECK(prompts(&p, "result> 43|It ends with 3.|>"));
    pty_type(&p, "\004");
    finish(&p, 0);
}

// An answer without end is stopped, asked for anew, undone.
TEST(endless) {
    BEGIN(80, NULL, "-c", "100000");
    for (int i = 0; i < 2; i++) {
        CHECK(pours(&p, i ? "\014/regen\r" : "\014sing.\r"));
        pty_type(&p, "\003");
        CHECK(prompts(&p, "; interrupted ]"));
    }
    CHECK(pours(&p, "\014go on.\r")); // behind what there is
    pty_type(&p, "\003");
    CHECK(prompts(&p, "; interrupted ]"));
    CHECK(strstr(pty_screen(&p), " 0 reused") == NULL);
    save(&p, "2 turns are in");
    const char *text = read_saved();
    CHECK(strstr(text, "\"content\": \"la la la ") != NULL);
    CHECK(strstr(text, "\"content\": \"go on.\"") != NULL);
    pty_type(&p, "\014/undo\r/undo\r");
    CHECK(prompts(&p, "0 turns are left"));
    pty_type(&p, "\014hello\r");
    CHECK(prompts(&p, "> hello|I see.|[ prompt "));
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(several_lines) {
    BEGIN(80, marks, "-n", "4", "--no-show-timings");
    pty_type(&p, "\014one\\\rtwo\033\rthree\r");
    CHECK(prompts(&p, "> one|  two|  three|"));
    save(&p, "1 turns are in");
    CHECK(strstr(read_saved(), "\"one\\ntwo\\nthree\"") != NULL);
    pty_type(&p, "\014\033[200~four\r\nfive\nsix\033[201~"); // pasted: not sent yet
    CHECK(pty_is(&p, "> four|  five|  six"));
    pty_type(&p, "!\r");
    CHECK(prompts(&p, "|  six!|"));
    save(&p, "2 turns are in");
    CHECK(strstr(read_saved(), "\"four\\nfive\\nsix!\"") != NULL);
    pty_type(&p, "\004");
    finish(&p, 0);
}

// Killed at the prompt and while it answers: the terminal is what it was.
TEST(killed) {
    static const int signals[] = {SIGTERM, SIGHUP, SIGQUIT, SIGINT};
    for (int i = 0; i < 4; i++) {
        BEGIN(80, marks, "-n", "-1", "-c", "1000000", "--ignore-eos");
        pty_type(&p, "typed");
        CHECK(pty_sees(&p, "> typed"));
        kill(p.pid, signals[i]);
        finish(&p, -signals[i]);
        if (!begin(&p, 80, marks, more)) return;
        CHECK(pours(&p, "Once\r"));
        kill(p.pid, signals[i]);
        if (signals[i] == SIGINT) { // from the keyboard or not, it is Ctrl-C
            CHECK(pty_sees(&p, "; interrupted ]|>"));
            pty_type(&p, "\004");
            finish(&p, 0);
        } else {
            const int code = pty_end(&p);
            CHECK(code == -signals[i]);
            CHECK(pty_is_plain(&p));
            CHECK(p.log && strstr(p.log, "\033[0m") != NULL);
            pty_close(&p);
        }
    }
}

// Ctrl-Z stops the program at the prompt and in an answer; then it goes on where it was. What a
// shell does: the job has a group of its own, and the terminal while it runs.
static const char *const *job;
static int shell(void) {
    int status;
    signal(SIGTTOU, SIG_IGN);
    const pid_t child = fork();
    if (!child) {
        setpgid(0, 0);
        tcsetpgrp(0, getpid());
        signal(SIGTTOU, SIG_DFL);
        execv(job[0], (char *const *)job);
        _exit(127);
    }
    setpgid(child, child);
    tcsetpgrp(0, child);
    while (waitpid(child, &status, WUNTRACED) == child && WIFSTOPPED(status)) {
        tcsetpgrp(0, getpgrp());
        puts("stopped");
        fflush(stdout);
        struct termios now;
        if (tcgetattr(0, &now) || !(now.c_lflag & ICANON)) return 99;
        tcsetpgrp(0, child);
        kill(-child, SIGCONT);
    }
    return WIFEXITED(status) ? WEXITSTATUS(status) : 98;
}
// Has the shell given the terminal away again? Before, a Ctrl-C would be its own.
static int job_has_terminal(const pty *p, const char *text) {
    (void)text;
    return tcgetpgrp(p->fd) != p->pid;
}
TEST(suspend) {
    pty p;
    if (!find_cli() || !write_actor()) SKIP("no moe-cli");
    const char *const argv[] = {cli, "-m", actor, "--temp", "0", "-t", "1", "-c", "100000", NULL};
    job = argv;
    if (!pty_start(&p, 80, 24, shell, NULL)) SKIP("no pseudo-terminal");
    CHECK(prompts(&p, "/help for more."));
    pty_type(&p, "\014abc\032");
    CHECK(pty_is(&p, "> abc|stopped|> abc"));
    CHECK(pty_wait(&p, pty_is_raw, ""));
    CHECK(pours(&p, ".\r"));
    p.log[p.n_log = 0] = 0; // what comes from now on
    pty_type(&p, "\032");
    CHECK(pty_logged(&p, "stopped\r\n"));
    CHECK(pty_wait(&p, job_has_terminal, ""));
    pty_type(&p, "\003");
    CHECK(prompts(&p, "; interrupted ]"));
    pty_type(&p, "\004");
    finish(&p, 0);
}

MAIN()
