#!/bin/bash
# moe-cli from outside: every flag, every kind of mistake, exit codes, and that standard output
# carries the text alone. Run from the repository root; the build folder is the argument.
# Ends with "N passed, N failed".
set -u
export LC_ALL=C
build=${1:-build}
cli=$build/moe-cli
dir=$build/tests/cli
rm -rf "$dir"
mkdir -p "$dir"
for tool in moe-cli moe-synth minimal tests/actor; do
    [ -x "$build/$tool" ] || { echo "$build/$tool was not built"; exit 1; }
done
. tests/check.sh

# ---- tools of the test ---------------------------------------------------------------------------

# run ARGUMENT...: standard output and error go to files, the exit code to $code
run() {
    "$cli" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
}
# gen ARGUMENT...: generates with the tiny model
# A seed, so that no choice ends the text early; a later -s counts instead.
gen() { run -m "$model" -p "$prompt" -s 7 "$@"; }

says() { exits 0 && grep -qe "$1" "$dir/err"; }       # on standard error, after success
shows() { exits 0 && grep -aqe "$1" "$dir/out"; }      # on standard output
fails() { exits 1 && [ ! -s "$dir/out" ] && grep -qe "$1" "$dir/err"; }
refuses() { exits 2 && [ ! -s "$dir/out" ] && grep -qe "$1" "$dir/err"; }
keep() { cp "$dir/out" "$dir/$1"; }
same() { exits 0 && cmp -s "$dir/out" "$dir/$1"; }    # the same text as the one kept
differs() { exits 0 && ! cmp -s "$dir/out" "$dir/$1"; }
n_tokens() { sed -n "s/^$1 .* \([0-9]*\) tokens.*/\1/p" "$dir/err"; }
generated() { exits 0 && [ "$(n_tokens generation)" = "$1" ]; }
prompted() { exits 0 && [ "$(n_tokens prompt)" = "$1" ]; }

model=$dir/tiny.gguf
prompt="Once upon a time"
code=0
for m in "qwen3moe_tiny $model" "micro_mla $dir/mla.gguf" "micro $dir/micro.gguf" \
    "micro $dir/ids.gguf --no-tokenizer"; do
    # shellcheck disable=SC2086
    "$build/moe-synth" $m >"$dir/err" 2>&1 || {
        echo "cannot write a model: moe-synth $m"
        cat "$dir/err"
        echo "0 passed, 1 failed"
        exit 1
    }
done

# ---- text and nothing else -----------------------------------------------------------------------

gen -n 20 --temp 0
keep greedy
check "generates" generated 20
check "generates text" test -s "$dir/out"
check "timing of loading" says '^load  *[0-9.]* s$'
check "timing of the prompt" says '^prompt  *[0-9.]* s, .* t/s$'
check "timing of generation" says '^generation .* t/s, [0-9.]* GB/s of weights read'
check "no progress bar without a terminal" test -z "$(grep -n $'\r' "$dir/err")"
check "standard output has the text alone" test -z "$(grep -E 't/s|moe-cli|load ' "$dir/out")"
run -m "$model" -p "$prompt" -n 100 --temp 0
keep long
"$build/minimal" "$model" "$prompt" >"$dir/minimal" 2>"$dir/minimal.err"
check "the same bytes as the library gives to examples/minimal.c" same minimal
check "a longer text goes on as the shorter one" \
    cmp -s -n "$(wc -c <"$dir/greedy")" "$dir/greedy" "$dir/long"
run -m "$dir/mla.gguf" -p "$prompt" -n 5 -s 7
check "deepseek2" generated 5

# ---- model and prompt ----------------------------------------------------------------------------

run --model "$model" --prompt "$prompt" --predict 20 --temp 0
check "--model --prompt --predict" same greedy
gen --n-predict 20 --temp 0
check "--n-predict" same greedy
printf '%s\n' "$prompt" >"$dir/prompt.txt"
"$cli" -m "$model" -p - -n 20 --temp 0 <"$dir/prompt.txt" >"$dir/out" 2>"$dir/err"
code=$?
check "-p - reads standard input" same greedy
run -m "$model" -f "$dir/prompt.txt" -n 20 --temp 0
check "-f" same greedy
run -m "$model" --file "$dir/prompt.txt" -n 20 --temp 0
check "--file" same greedy
gen -n 0
check "-n 0 evaluates the prompt alone" generated 0
check "-n 0 writes nothing" test ! -s "$dir/out"
gen -n -1 -c 64 --ignore-eos
check "-n -1 goes on until the context is full" says 'the context is full'
run -m "$model" -p 'a\nb' -n 5 --temp 0
keep escaped
run -m "$model" -p $'a\nb' -n 5 --temp 0
check "\\n is a newline" same escaped
run -m "$model" -e -p 'a\nb' -n 5 --temp 0
check "-e" same escaped
run -m "$model" --escape -p 'a\x0ab' -n 5 --temp 0
check "--escape, \\x0a" same escaped
run -m "$model" -p '\n\n\n' -n 0
check "three newlines" prompted 3
run -m "$model" --no-escape -p '\n\n\n' -n 0
check "--no-escape" prompted 6
run -m "$model" -p '<|end|>' -n 1
check "control tokens in the prompt" prompted 1
run -m "$model" -p '' -n 1
check "an empty prompt begins with the BOS token" prompted 1
head -c 5000 "$build/moe-synth" >"$dir/binary"
run -m "$model" -s 7 -f "$dir/binary" -c 8192 -n 2
check "any bytes are a prompt" generated 2

# ---- sampling ------------------------------------------------------------------------------------

gen -n 20 -s 7
keep seven
gen -n 20 --seed 7
check "the same seed, the same text" same seven
gen -n 20 -s 8
check "another seed, another text" differs seven
gen -n 20 -s 18446744073709551614
check "the largest seed" says 'seed 18446744073709551614$'
gen -n 20 -s -1
keep random
sleep 0.01
run -m "$model" -p "$prompt" -n 20
check "a seed from the clock" differs random
gen -n 20 --temp 0 -s 8
check "--temp 0 does not care for the seed" same greedy
gen -n 20 --temp 50 -s 7
check "--temp" differs seven
gen -n 20 --top-k 1 -s 8
check "--top-k 1 is greedy" same greedy
gen -n 20 --top-k 0 -s 7 --temp 3 --min-p 0 --top-p 1
keep all
gen -n 20 --top-k 2 -s 7 --temp 3 --min-p 0 --top-p 1
check "--top-k 2" differs all
gen -n 20 --top-p 0 -s 8
check "--top-p 0 is greedy" same greedy
gen -n 20 --top-p 0.3 --top-k 0 -s 7 --temp 3 --min-p 0
check "--top-p" differs all
gen -n 20 --min-p 1 -s 8
check "--min-p 1 is greedy" same greedy
gen -n 150 --temp 0 --ignore-eos
keep longer
gen -n 150 --temp 0 --ignore-eos --repeat-penalty 1000
check "--repeat-penalty" differs longer
keep penalty
gen -n 150 --temp 0 --ignore-eos --repeat-penalty 1000 --repeat-last-n 0
check "--repeat-last-n 0 switches it off" same longer
gen -n 150 --temp 0 --ignore-eos --repeat-penalty 1000 --repeat-last-n 64
check "--repeat-last-n 64 is the default" same penalty
gen -n 150 --temp 0 --ignore-eos --repeat-penalty 1000 --repeat-last-n -1
check "--repeat-last-n -1 is the whole context" differs penalty
# All 264 tokens are about equally likely.
wild() {
    run -m "$dir/micro.gguf" -p x -t 1 --temp 100000 --top-k 0 --top-p 1 --min-p 0 -s 3 -n 2500 "$@"
}
wild
check "ends where the model ends" says 'the model ended'
wild --ignore-eos
check "--ignore-eos" generated 2500
check "control tokens are not text" test -z "$(grep -a -e '<|[a-z]*|>' "$dir/out")"
wild --ignore-eos --special
check "--special" shows '<|pad|>'
wild --ignore-eos -sp
check "-sp" shows '<|pad|>'
check "text is UTF-8" iconv -f UTF-8 -t UTF-8 -o /dev/null "$dir/out"

# ---- running -------------------------------------------------------------------------------------

gen -n 5 -c 40
check "-c" says 'context 40,'
gen -n 5 --ctx-size 40
check "--ctx-size" says 'context 40,'
gen -n 5
check "default context" says 'context 4096,'
gen -n 5 -c 0
check "-c 0: the model's own" says 'context 32768,'
gen -n 5 -c 40000
check "a context longer than trained" says 'warning.* 32768 '
gen -n 1 -c 8
check "a prompt that does not fit" fails 'holds 8 '
gen -n 20 --temp 0 -t 1
check "-t 1" says ', 1 threads,'
check "-t 1: the same text" same greedy
gen -n 20 --temp 0 --threads 3
check "--threads" says ', 3 threads,'
check "--threads 3: the same text" same greedy
gen -n 5 -t 1 -tb 2
check "-tb" says '1 threads (prompt 2)'
gen -n 5 -t 2 --threads-batch 1
check "--threads-batch" says '2 threads (prompt 1)'
gen -n 5 -t -1 --ignore-eos
check "-t -1" generated 5
run -m "$model" --info -b 7
check "-b" shows ', 7 at once'
gen -n 5 --batch-size 2
check "--batch-size" generated 5
run -m "$model" --info -c 1000
f16=$(sed -n 's/^  keys and values  *\([0-9]*\).*/\1/p' "$dir/out")
run -m "$model" --info -c 1000 -ctk f32
f32=$(sed -n 's/^  keys and values  *\([0-9]*\).*/\1/p' "$dir/out")
check "-ctk f32 takes twice the memory" test "${f32:-1}" -gt "$((${f16:-1} * 3 / 2))"
gen -n 5 --cache-type-k f32
check "--cache-type-k f32" generated 5
gen -n 5 -ctk q8_0
case $code in
    0) check "-ctk q8_0" generated 5 ;;
    *) check "-ctk q8_0 is refused by name" fails 'kv_type' ;; # heads of other widths than 32 n
esac
gen -n 5 -ctk f32 -ctv f32
check "-ctk f32 -ctv f32" generated 5
run -m "$model" --info -c 1000 -ctv f32
check "-ctv alone" test "$(sed -n 's/^  keys and values  *\([0-9]*\).*/\1/p' "$dir/out")" = "$f32"
gen -n 5 -ctk f32 --cache-type-v f16
check "-ctk f32 -ctv f16" refuses "same type"
gen -n 20 --temp 0 --no-mmap
check "--no-mmap: the same text" same greedy
run -m "$model" --info --no-mmap
check "--no-mmap" shows '(copied: of this process alone)'
check "--no-mmap: --info says what was done" shows 'pages .* copied to huge pages'
for pages in auto map copy; do
    gen -n 20 --temp 0 --pages $pages
    check "--pages $pages: the same text" same greedy
    check "--pages $pages says what was done" says 'moe-cli: .*iB \(mapped\|copied to huge pages\)'
done
gen -n 5 --pages large
check "--pages large" refuses "'large' is not one of"
gen -n 20 --temp 0 --prefault --mlock --pin -t 2
check "--prefault --mlock --pin: the same text" same greedy
check "--mlock says what it got" says 'memory node.* locked'
gen -n 20 --temp 0 --no-mmap --numa owner
check "--no-mmap --numa owner: the same text" same greedy
gen -n 20 --temp 0 --numa interleave
check "--numa interleave: the same text" same greedy
check "--numa says what it got" says 'memory node.* in place'
gen -n 5 --numa nowhere
check "--numa nowhere" refuses "'nowhere' is not one of"
for isa in scalar avx2 avx512 avx-vnni best; do
    gen -n 5 --isa $isa
    check "--isa $isa" generated 5
done
gen -n 1 --isa scalar
check "--isa scalar says so" says ', scalar,'
gen -n 20 --temp 0 --schedule sequential
check "--schedule sequential" same greedy
check "--schedule sequential says so" says ', sequential,'
for schedule in parallel balanced; do
    gen -n 20 --temp 0 --schedule $schedule
    check "--schedule $schedule: the same text" same greedy
    check "--schedule $schedule says so" says ", $schedule,"
done

rm -f "$dir/experts.svg"
gen -n 5 --expert-stats "$dir/experts.svg"
check "--expert-stats: a picture" grep -q '</svg>' "$dir/experts.svg"
check "--expert-stats: a cell for each expert of each layer" \
    test "$(grep -c '<title>layer' "$dir/experts.svg")" -ge 8
gen -n 5 --expert-stats "$dir/none/experts.svg"
check "--expert-stats: nowhere to write" grep -q "cannot write .*none/experts.svg" "$dir/err"

# ---- the prompt cache ----------------------------------------------------------------------------

cache=$dir/prompt.cache
cached() { gen -n 20 --temp 0 --prompt-cache "$cache" "$@"; }
reused() { says "^prompt .*, $1 more reused\$"; }
tokens=$(gen -n 0; n_tokens prompt)
longer="$prompt there was a girl"
gen -n 20 --temp 0 -p "$longer"
keep longer_prompt
all_tokens=$(n_tokens prompt)
cached
check "--prompt-cache: the same text" same greedy
check "--prompt-cache: nothing is there yet" reused 0
check "--prompt-cache: all of the prompt is evaluated" prompted "$tokens"
cp "$cache" "$dir/kept.cache"
cached
check "--prompt-cache: again, the same text" same greedy
check "--prompt-cache: nothing is evaluated" prompted 0
check "--prompt-cache: everything is there" reused "$tokens"
check "--prompt-cache: the file stays" cmp -s "$cache" "$dir/kept.cache"
cached -n 0
check "--prompt-cache -n 0" prompted 0
cached -p "$longer" --prompt-cache-ro
check "--prompt-cache-ro: the same text" same longer_prompt
check "--prompt-cache-ro: a beginning is there" reused "$tokens"
check "--prompt-cache-ro: the rest is evaluated" prompted $((all_tokens - tokens))
check "--prompt-cache-ro: the file stays" cmp -s "$cache" "$dir/kept.cache"
cached -p "$longer" -t 3 -b 2 -c 50
check "--prompt-cache: other options, the same text" same longer_prompt
cached -p "$longer"
check "--prompt-cache: the longer prompt is there" reused "$all_tokens"
cached
check "--prompt-cache: a shorter one costs a token" reused $((tokens - 1))
check "--prompt-cache: and gives the same text" same greedy
cp "$dir/kept.cache" "$cache"
cached --prompt-cache-all
check "--prompt-cache-all: the same text" same greedy
check "--prompt-cache-all: there is more" test "$(wc -c <"$cache")" -gt "$(wc -c <"$dir/kept.cache")"
story=examples/storyteller/storyteller.gguf
run -m $story -p "$prompt" -n 20 --temp 0 --prompt-cache "$dir/story.cache" --prompt-cache-all
run -m $story -p "$prompt$(cat "$dir/out")" -n 5 --temp 0 --prompt-cache "$dir/story.cache"
check "--prompt-cache-all: generated tokens are there" test "$(sed -n \
    's/^prompt .*, \([0-9]*\) more reused$/\1/p' "$dir/err")" -ge 20
rm "$cache"
gen -n 20 -s 7 --prompt-cache "$cache" --repeat-penalty 1.3
keep drawn
gen -n 20 -s 7 --prompt-cache "$cache" --repeat-penalty 1.3
check "--prompt-cache: the same draws" same drawn
gen -n 20 -s 7 --repeat-penalty 1.3
check "--prompt-cache: as without" same drawn
# What cannot be used is said and replaced.
unused() { # NAME SENTENCE COMMAND...
    local name=$1 sentence=$2
    shift 2
    "$@"
    check "--prompt-cache: $name: a warning" says "warning: .*is not used: $sentence"
    check "--prompt-cache: $name: the prompt is evaluated" reused 0
    cached
    check "--prompt-cache: $name: then it is whole" reused "$tokens"
}
printf x | dd of="$cache" bs=1 seek=300 conv=notrunc 2>/dev/null
unused "damaged" "it is damaged" cached
head -c 3000 "$dir/kept.cache" >"$cache"
unused "cut short" "it ends too early" cached
: >"$cache"
unused "empty" "it ends too early" cached
echo "this is my diary, which is no saved session, and it is long enough to be read as one: $(
    seq 40)" >"$cache"
unused "another file" "it is no saved session" cached
run -m "$dir/mla.gguf" -p "$prompt" -n 1 -s 7 --prompt-cache "$cache"
check "--prompt-cache: another model: a warning" says "is not used: it was saved with another model"
unused "from another model" "it was saved with another model" cached
cached -ctk f32
check "--prompt-cache: another cache: a warning" says "is not used: it was saved with keys"
unused "from another cache" "it was saved with keys and values in F32" cached
cached -p "$longer"
gen -n 1 -c $((all_tokens - 1)) --prompt-cache "$cache" --prompt-cache-ro
check "--prompt-cache: too small a context: a warning" says "is not used: .* do not fit"
gen -n 2 -c 4 -p "$longer" --prompt-cache "$cache"
check "--prompt-cache: too long a prompt" fails "the context holds 4 "
# Where it cannot be written the text comes, and the exit code tells.
gen -n 20 --temp 0 --prompt-cache "$dir/none/cache"
check "--prompt-cache: nowhere to write" grep -q 'none/cache: cannot create the file' "$dir/err"
check "--prompt-cache: nowhere to write: the text is there" cmp -s "$dir/out" "$dir/greedy"
check "--prompt-cache: nowhere to write: exit code" exits 1
check "--prompt-cache: no draft is left" test -z "$(ls "$dir" | grep '\.tmp$')"
ln -s prompt.cache "$dir/cache.link"
gen -n 1 -p 'another' --prompt-cache "$dir/cache.link"
check "--prompt-cache: a link stays one" test -L "$dir/cache.link"
gen -n 1 -p 'another' --prompt-cache "$cache"
check "--prompt-cache: and leads to it" prompted 0
gen --prompt-cache-all
check "--prompt-cache-all alone" refuses 'need --prompt-cache'
gen --prompt-cache-ro
check "--prompt-cache-ro alone" refuses 'need --prompt-cache'
cached --prompt-cache-all --prompt-cache-ro
check "--prompt-cache-all --prompt-cache-ro" refuses 'not both'
gen --prompt-cache "$model"
check "--prompt-cache: the model" refuses 'would replace'
run -m "$model" -f "$dir/prompt.txt" --prompt-cache "$dir/prompt.txt"
check "--prompt-cache: the prompt" refuses 'would replace'

# ---- dialogues -----------------------------------------------------------------------------------

# The actor's answers are known (tests/actor.c). ask QUESTIONS ARGUMENT...: through a pipe.
actor=$dir/actor.gguf
"$build/tests/actor" "$actor"
ask() {
    printf "$1" >"$dir/in"
    "$cli" -m "${asked:-$actor}" -s 7 "${@:2}" <"$dir/in" >"$dir/out" 2>"$dir/err"
    code=$?
}
answers() { exits 0 && [ "$(cat "$dir/out")" = "$(printf "$1")" ]; }
ask 'hello\nseven 7\n'
check "a model with a template, no prompt: a dialogue" answers 'I see.\nIt ends with 7.'
check "the line about tokens and speed" says '^\[ prompt 6 new tokens, 0 reused, .*; the model ended \]$'
check "only new tokens are evaluated" says '^\[ prompt 10 new tokens, 7 reused, '
ask 'hello\n' --no-show-timings
check "--no-show-timings" test -z "$(grep '^\[' "$dir/err")"
ask 'hello\n' --no-show-timings --show-timings
check "--show-timings" says '^\[ prompt '
ask 'well!\n' --no-show-timings
check "through a pipe goes the answer alone" answers 'Yes, indeed.'
for flag in --reasoning -rea; do
    ask 'well!\n' $flag off
    check "$flag off" answers 'I see.'
    ask 'well!\n' $flag on
    check "$flag on" answers 'Yes, indeed.'
    ask 'x\n' $flag maybe
    check "$flag maybe" refuses "'maybe' is not one of"
done
ask 'one\\\ntwo 2\n'
check "a backslash: two lines, one answer" answers 'It ends with 2.'
ask 'x' -n 0
check "-n 0" exits 0
for flag in -cnv --conversation; do
    ask 'then 1\n' $flag -p 'first 3'
    check "$flag -p" answers 'It ends with 3.\nIt ends with 1.'
done
for flag in -no-cnv --no-conversation; do
    ask 'x' $flag
    check "$flag without a prompt" refuses 'no prompt'
    ask 'x' $flag -p 'call 4' --temp 0
    check "$flag -p" answers 'It ends with 4.'
done
ask 'x' -p 'call 4' --temp 0
check "-p alone: no dialogue" answers 'It ends with 4.'
ask 'x' -cnv -no-cnv
check "-cnv -no-cnv" refuses 'not both'
for flag in -st --single-turn; do
    ask 'one 1\ntwo 2\n' $flag
    check "$flag" answers 'It ends with 1.'
done
ask '/help\n'
check "/help" says '^  /regen '
ask '/frob\nx 5\n'
check "an unknown command" says 'unknown command /frob; /help lists them'
check "and the dialogue goes on" answers 'It ends with 5.'
ask ' /frob 5\n'
check "a blank before / sends it" answers 'It ends with 5.'
ask 'one 1\ntwo 2\n/undo\n/regen\n/save %s\n/clear\n/undo\n' -sys 'Be brief.' --no-show-timings
sed -i "s|/save .*|/save $dir/talk.json|" "$dir/in"
"$cli" -m "$actor" -sys 'Be brief.' <"$dir/in" >"$dir/out" 2>"$dir/err"
code=$?
check "/undo, /regen" answers 'It ends with 1.\nIt ends with 2.\nIt ends with 1.'
check "/clear: nothing to undo" says 'nothing to undo'
tr -d '\n' <"$dir/talk.json" >"$dir/talk.line"
check "/save" grep -qx '{"messages": \[  {"role": "system", "content": "Be brief."},  {"role": "user", "content": "one 1"},  {"role": "assistant", "content": "It ends with 1."}  \]}' "$dir/talk.line"
ask "/save $actor\\n"
check "/save does not replace the model" says 'would replace the model'
ask "x\\n/save $dir/none/talk.json\\n"
check "/save: nowhere to write" says 'cannot write .*none/talk.json'
printf 'Be brief.\n' >"$dir/system.txt"
n_new() { sed -n 's/^\[ prompt \([0-9]*\) new.*/\1/p' "$dir/err"; }
ask 'x\n'
plain=$(n_new)
for flag in -sys --system-prompt; do
    ask 'x\n' $flag 'Be brief.'
    check "$flag" test "$(n_new)" = $((plain + 10))
done
for flag in -sysf --system-prompt-file; do
    ask 'x\n' $flag "$dir/system.txt"
    check "$flag" test "$(n_new)" = $((plain + 10))
done
ask 'x' -sys a -sysf "$dir/system.txt"
check "-sys -sysf" refuses 'not both'
ask 'x' -sys a -p b
check "-sys -p" refuses 'are for dialogues'
ask 'well?\n'
check "without tools a call is text" answers '<tool_call>\n{"name": "add", "arguments": {"a": 17, "b": 25}}\n</tool_call>'
printf '[{"type": "function", "function": {"name": "add"}}]\n' >"$dir/tools.json"
ask 'well?\n42\nx\n' --tools "$dir/tools.json"
check "--tools: the call, and what follows its result" \
    answers '[calls add {"a": 17, "b": 25}]\nIt ends with 2.\nI see.'
ask 'x\n' --tools "$dir/in"
check "--tools: no JSON" exits 1
check "--tools: it says so" grep -q 'cannot answer' "$dir/err"
ask '<|end|>5\n'
check "what a user types is text" says '^\[ prompt 9 new'
# Templates: one of llama.cpp's names, a text, a file. The storyteller has none.
asked=$story
ask 'x\n'
check "neither prompt nor template" refuses 'no prompt, and the model has no chat template: give -p'
ask 'x\n' -cnv
check "-cnv without a template" exits 1
template='{%% for m in messages %%}{{ m.content }}{%% endfor %%}'
template=${template//%%/%}
told='Once upon a time there\n'
ask "$told" --chat-template "$template" -n 6 --temp 0 --jinja
keep told
check "--chat-template TEXT, --jinja" shows '^was a '
printf '%s\n' "$template" >"$dir/template.txt"
ask "$told" --chat-template-file "$dir/template.txt" -n 6 --temp 0
check "--chat-template-file" same told
ask "$told" --chat-template "$template" --chat-template-file "$dir/template.txt"
check "both" refuses 'not both'
ask "$told" --chat-template nonsense
check "--chat-template nonsense" refuses "'nonsense' is no template, nor the name of one: chatml, "
ask "$told" --chat-template '{% for'
check "a broken template" exits 1
check "a broken template: its line" grep -q 'cannot answer: .*line 1' "$dir/err"
ask "$told" --chat-template "{{ raise_exception('I will not') }}"
check "a template that raises" grep -q 'I will not' "$dir/err"
names=$("$cli" --help | sed -n '/--chat-template NAME/,/another one of/p' | tr -cs 'a-z0-9-' '\n' |
        grep -xE 'chat(ml|glm4)|command-r|deepseek[23]|gemma|granite|hunyuan-moe|kimi-k2|llama[34]|mistral-v.*|phi3|zephyr')
check "names of templates" test "$(wc -l <<<"$names")" -eq 17
for name in $names; do
    run -m "$story" --tokens -cnv --chat-template "$name" -sys SYS -p ASK
    tr -d '\n' <"$dir/out" | sed "s/' *[0-9]* -> '//g" >"$dir/flat"
    check "--chat-template $name" grep -q 'SYS.*ASK' "$dir/flat"
done
asked=

# ---- tokens, log-probabilities, perplexity -------------------------------------------------------

run -m "$actor" --tokens -p 'a<|end|>'
check "--tokens" shows "^ *97 -> 'a'\$"
check "--tokens: control tokens" shows "^ *262 -> '<|end|>'\$"
run -m "$actor" --tokens -cnv -p 'a<|end|>'
check "--tokens -cnv: what the template adds" shows "^ *[0-9]* -> '<|user|>'\$"
check "--tokens -cnv: and no more" test "$(wc -l <"$dir/out")" -eq 9
run -m "$actor" --tokens -p 'a' --info
check "--tokens --info" refuses 'give one of'
run -m "$story" -p "$prompt" -n 5 --temp 0 --logprobs 3
check "--logprobs: a line a token" test "$(wc -l <"$dir/out")" -eq 5
check "--logprobs: what is in it" test "$(grep -cE \
    '^\{"id": [0-9]+, "token": ".*", "logprob": -?[0-9.e-]+, "bytes": \[[0-9, ]*\], "top_logprobs": \[(\{"id": [^{]*\}(, )?){3}\]\}$' \
    "$dir/out")" -eq 5
run -m "$story" -p "$prompt" -n 1 --temp 0 --logprobs 0
check "--logprobs 0" shows '"top_logprobs": \[\]}$'
run -m "$story" -p "$prompt" --logprobs 1000
check "--logprobs 1000" refuses "'1000'"
held=examples/storyteller/held_out.txt
run -m "$story" --perplexity -f $held -c 128 --chunks 3
check "--perplexity" shows '^\[1\][0-9.]*,\[2\][0-9.]*,\[3\][0-9.]*,$'
check "--perplexity: the estimate" shows '^Final estimate: PPL = [0-9]*\.[0-9]\{4\} +/- [0-9.]*$'
keep perplexity
run -m "$story" --perplexity -f $held -c 128 --chunks 3 -t 3
check "--perplexity: by any number of threads" same perplexity
run -m "$story" --perplexity -p 'too short'
check "--perplexity: too short a text" fails 'needs at least 1024 tokens'
run -m "$story" --perplexity
check "--perplexity without a text" refuses 'no prompt'
run -m "$story" --perplexity -p x --chunks -2
check "--chunks -2" refuses "'-2'"

# ---- instead of generating -----------------------------------------------------------------------

for flag in --help -h; do
    run $flag
    check "$flag" shows '^usage: '
done
tested=$(sed 's/^ *#.*//' "$0")
missing=
for name in $(sed -n 's/^  \(-.*\)/\1/p' "$dir/out" | sed 's/  .*//' | tr ', ' '\n\n' |
              grep '^-'); do
    grep -qe "[^a-z-]$name[^a-z-]" <<<"$tested" || missing="$missing $name"
done
check "every flag of the help is tested here; missing:$missing" test -z "$missing"
run --version
check "--version" shows '^moe-cli (moe_infer [0-9]*\.[0-9]*\.[0-9]*)'
run -m "$model" --info
check "--info" shows '^  general.architecture  *"qwen3moe"$'
check "--info: tensors by type" shows '^  F32  *[0-9]*  *[0-9]*  '
check "--info: parameters" shows '^  parameters  *[0-9]'
check "--info: memory" shows '^  together  *[0-9]'
check "--info: bytes of tensors add up" test "$(awk '/^  F32 /{print $3}' "$dir/out")" = \
    "$(awk '/^  weights /{print $2; exit}' "$dir/out")"
run -m "$dir/ids.gguf" --info
check "--info without a vocabulary" shows '^  together'

# ---- wrong usage: 2 ------------------------------------------------------------------------------

run
check "no arguments" refuses '-m'
run -p x
check "no model" refuses 'no model'
run -m "$model"
check "no prompt" refuses 'no prompt'
run -m "$model" -p x -f "$dir/prompt.txt"
check "-p and -f" refuses 'not both'
gen --frobnicate
check "an unknown flag is named" refuses "'--frobnicate'"
gen -N 5
check "flags have one case" refuses "'-N'"
gen --temp=1
check "--flag=value" refuses "'--temp=1'"
gen word
check "a stray argument is named" refuses "'word'"
for flag in -m --model -p --prompt -f --file -n --predict --n-predict -s --seed --temp --top-k \
    --top-p --min-p --repeat-penalty --repeat-last-n -c --ctx-size -b --batch-size -t --threads \
    -tb --threads-batch -ctk --cache-type-k -ctv --cache-type-v --schedule --isa; do
    gen $flag
    check "$flag without a value" refuses "$flag needs a value"
done
for flag in -n --predict -c -b -t -tb --top-k --repeat-last-n -s; do
    for value in 12x x '' ' 5' '5 ' 1.5 0x10 1e3 99999999999999999999 -99999999999999999999 -- \
        -2; do
        gen $flag "$value"
        check "$flag '$value'" refuses "$flag: '$value' is not"
    done
done
for flag in --temp --top-p --min-p --repeat-penalty; do
    for value in 0.5x x '' ' 1' '1 ' nan NAN inf -inf 1e999 0x1p3 1,5 . - -1; do
        gen $flag "$value"
        check "$flag '$value'" refuses "$flag: '$value' is not"
    done
done
gen -t 5000
check "too many threads" refuses "'5000'"
gen -b 0
check "-b 0" refuses "'0'"
gen --top-p 1.5
check "--top-p 1.5" refuses "'1.5'"
gen --repeat-penalty 0
check "--repeat-penalty 0" refuses "'0'"
gen -n 1 --temp 1e-40
check "a tiny number is a number" generated 1
for flag in -ctk --schedule --isa; do
    gen $flag nonsense
    check "$flag nonsense" refuses "$flag: 'nonsense' is not one of"
    gen $flag ''
    check "$flag ''" refuses "$flag: '' is not one of"
done

# ---- errors: 1 -----------------------------------------------------------------------------------

run -m "$dir/no_such_model.gguf" -p x
check "no such model" fails 'no_such_model.gguf'
run -m "$dir" -p x
check "a folder as model" fails "$dir"
run -m "$0" -p x
check "not a GGUF" fails "$0"
run -m "$0" --info
check "--info: not a GGUF" fails "$0"
head -c 3000 "$model" >"$dir/cut.gguf"
run -m "$dir/cut.gguf" -p x
check "a truncated model" fails 'cut.gguf'
run -m "$dir/no_such_model.gguf" --info
check "--info: no such model" fails 'no_such_model.gguf'
run -m "$model" -f "$dir/no_such_prompt.txt"
check "no such prompt" fails 'no_such_prompt.txt: No such file'
run -m "$model" -f "$dir"
check "a folder as prompt" fails "$dir: Is a directory"
run -m "$dir/ids.gguf" -p x
check "a model without a vocabulary" fails 'no vocabulary'
if [ -w /dev/full ]; then
    "$cli" -m "$model" -p x -n 5 --ignore-eos >/dev/full 2>"$dir/err"
    code=$?
    : >"$dir/out"
    check "nowhere to write" fails 'cannot write'
fi

# ---- Ctrl-C --------------------------------------------------------------------------------------

# wait_for FILE: until there is something in it
wait_for() {
    for _ in $(seq 200); do
        [ -s "$1" ] && return
        sleep 0.05
    done
}
"$cli" -m "$model" -p x -n -1 -c 1000000 --ignore-eos >"$dir/out" 2>"$dir/err" &
wait_for "$dir/out"
kill -INT $!
wait $!
code=$?
check "Ctrl-C ends with 130" exits 130
check "Ctrl-C: the summary says so" grep -q '^generation .*interrupted' "$dir/err"
check "Ctrl-C: the text is there" test -s "$dir/out"

# A full pipe holds the program up in its first write: the second Ctrl-C must end it.
mkfifo "$dir/pipe"
exec 3<>"$dir/pipe"
head -c 65536 /dev/zero >&3
"$cli" -m "$model" -p x -n 1000 --ignore-eos >&3 2>"$dir/err" &
wait_for "$dir/err"
sleep 0.3
kill -INT $!
sleep 0.3
check "the first Ctrl-C waits for the reader" kill -0 $!
kill -INT $!
wait $! 2>/dev/null
code=$?
check "the second Ctrl-C quits" exits 130
exec 3>&-

# ---- a terminal ----------------------------------------------------------------------------------

if command -v script >/dev/null && script --version 2>/dev/null | grep -q util-linux; then
    script -qec "$cli -m $model -p x -n 3 --ignore-eos --no-mmap" /dev/null >"$dir/out" 2>&1 </dev/null
    code=$?
    check "a progress bar on a terminal" shows $'\rloading \[####'
else
    skip "a progress bar on a terminal: no script(1)"
fi

line="$passed passed, $failed failed"
if [ "$skipped" -gt 0 ]; then line="$line, $skipped skipped"; fi
echo "$line"
[ "$failed" -eq 0 ]
