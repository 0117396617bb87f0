// moe-cli's dialogue as a person has it: on a pseudo-terminal, with the model in the box.
#include "pty.h"
#include "test.h"

static const char *const story = "examples/storyteller/storyteller.gguf";
// One role per line, as ChatML has it, with the model's own control tokens.
static const char *const marks =
    "{% for m in messages %}<|begin|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}";
// What is asked is gone on with: the model tells stories.
static const char *const goes_on = "<|begin|>{{ messages[-1].content }}";

// The program beside the folder of the tests, and a file there.
static char cli[4200], saved[4200];
static int find_cli(void) {
    char self[4096];
    const ssize_t n = readlink("/proc/self/exe", self, sizeof self - 1);
    if (n <= 0) return 0;
    self[n] = 0;
    if (!strrchr(self, '/')) return 0;
    *strrchr(self, '/') = 0;
    snprintf(saved, sizeof saved, "%s/talk.json", self);
    snprintf(cli, sizeof cli, "%s/../moe-cli", self);
    if (getenv("MOE_CLI")) snprintf(cli, sizeof cli, "%s", getenv("MOE_CLI"));
    return access(cli, X_OK) == 0 && access(story, R_OK) == 0;
}

// Runs it with a template and more arguments, and waits for its prompt.
static int begin(pty *p, int columns, const char *chat_template, const char *const *more) {
    char *argv[32] = {cli, (char *)"-m", (char *)story, (char *)"--temp", (char *)"0",
                      (char *)"-t", (char *)"1", (char *)"--chat-template", (char *)chat_template};
    int n = 9;
    while (*more && n < 31) argv[n++] = (char *)*more++;
    argv[n] = NULL;
    if (!find_cli() || !pty_start(p, columns, 24, NULL, argv)) return 0;
    if (!pty_logged(p, "/help for more.")) return 0;
    return pty_sees(p, "|>");
}
#define BEGIN(columns, chat_template, ...)                                        \
    pty p;                                                                        \
    static const char *const more[] = {__VA_ARGS__, NULL};                        \
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

TEST(answers) {
    BEGIN(80, goes_on, "-n", "6");
    pty_type(&p, "\014Once upon a time therr\177e\r"); // Ctrl-L: an empty screen
    CHECK(prompts(&p, "]|>"));
    CHECK(strstr(pty_screen(&p), "> Once upon a time there| was ") != NULL);
    pty_type(&p, "\033[A was\r"); // the line again, and more
    CHECK(prompts(&p, "> Once upon a time there was| a"));
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
    char command[4300];
    snprintf(command, sizeof command, "\014/save %s\r", saved);
    pty_type(&p, command);
    CHECK(prompts(&p, "1 turns are in"));
    pty_type(&p, "\014/clear\r");
    CHECK(prompts(&p, "begins anew"));
    pty_type(&p, "/exit\r");
    finish(&p, 0);
    char text[1024] = "";
    FILE *f = fopen(saved, "r");
    if (f) text[fread(text, 1, sizeof text - 1, f)] = 0, fclose(f);
    CHECK(strstr(text, "{\"role\": \"system\", \"content\": \"You tell stories.\"}"));
    CHECK(strstr(text, "{\"role\": \"user\", \"content\": \"one\"}"));
    CHECK(strstr(text, "{\"role\": \"assistant\", \"content\": \""));
    CHECK(!strstr(text, "two"));
    remove(saved);
}

// What came of an answer stays, and the dialogue goes on behind it.
TEST(interrupt) {
    BEGIN(80, marks, "-n", "-1", "-c", "1000000", "--ignore-eos");
    pty_type(&p, "Once\r");
    CHECK(pty_sees(&p, "> Once|"));
    for (size_t before = p.n_log; p.n_log < before + 60 && !p.is_gone;) pty_read(&p, 20);
    pty_type(&p, "\003");
    CHECK(pty_sees(&p, "; interrupted ]|>"));
    char command[4300];
    snprintf(command, sizeof command, "/save %s\r", saved);
    pty_type(&p, command);
    CHECK(prompts(&p, "1 turns are in"));
    FILE *f = fopen(saved, "r");
    static char text[1 << 16];
    if (f) text[fread(text, 1, sizeof text - 1, f)] = 0, fclose(f);
    const char *answer = strstr(text, "\"assistant\", \"content\": \"");
    CHECK(answer && strlen(answer) > 60);
    remove(saved);
    pty_type(&p, "\014more\r");
    CHECK(pty_sees(&p, "> more|"));
    for (size_t before = p.n_log; p.n_log < before + 60 && !p.is_gone;) pty_read(&p, 20);
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
    CHECK(prompts(&p, "> Once upon a time t|here| was a"));
    pty_type(&p, "\004");
    finish(&p, 0);
}

TEST(several_lines) {
    BEGIN(80, marks, "-n", "4", "--no-show-timings");
    char command[4300];
    pty_type(&p, "\014one\\\rtwo\033\rthree\r");
    CHECK(prompts(&p, "> one|  two|  three|"));
    snprintf(command, sizeof command, "/save %s\r", saved);
    pty_type(&p, command);
    CHECK(prompts(&p, "1 turns are in"));
    char text[1024] = "";
    FILE *f = fopen(saved, "r");
    if (f) text[fread(text, 1, sizeof text - 1, f)] = 0, fclose(f);
    CHECK(strstr(text, "\"one\\ntwo\\nthree\"") != NULL);
    remove(saved);
    pty_type(&p, "\004");
    finish(&p, 0);
}

// Killed at the prompt and while it answers: the terminal is what it was.
TEST(killed) {
    static const int signals[] = {SIGTERM, SIGHUP, SIGINT};
    for (int i = 0; i < 3; i++) {
        BEGIN(80, marks, "-n", "-1", "-c", "1000000", "--ignore-eos");
        pty_type(&p, "typed");
        CHECK(pty_sees(&p, "> typed"));
        kill(p.pid, signals[i]);
        finish(&p, -signals[i]);
        if (!begin(&p, 80, marks, more)) return;
        pty_type(&p, "Once\r");
        CHECK(pty_sees(&p, "> Once|"));
        for (size_t before = p.n_log; p.n_log < before + 60 && !p.is_gone;) pty_read(&p, 20);
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

MAIN()
