#!/bin/bash
# The examples run, and the README tells the truth about them, the commands and the macros. Run from
# the repository root; the build folder is the argument. Ends with "N passed, N failed".
set -u
export LC_ALL=C
build=${1:-build}
dir=$build/tests/examples
rm -rf "$dir"
mkdir -p "$dir"
tools="minimal branch resume tokens chat tests/actor moe-cli moe-quantize moe-synth"
command -v "${CXX:-c++}" >/dev/null && tools="$tools embed"
for tool in $tools; do
    [ -x "$build/$tool" ] || { echo "$build/$tool was not built"; exit 1; }
done
. tests/check.sh

model=$dir/tiny.gguf
"$build/moe-synth" qwen3moe_tiny "$model" >"$dir/log" 2>&1 || cat "$dir/log"

# ---- minimal.c -----------------------------------------------------------------------------------

"$build/minimal" "$model" "Once upon a time" >"$dir/out" 2>"$dir/err"
check "minimal: exit code" test $? -eq 0
check "minimal: text" test -s "$dir/out"
check "minimal: no complaint" test ! -s "$dir/err"
"$build/minimal" "$dir/none.gguf" >"$dir/out" 2>"$dir/err"
check "minimal: no model: exit code" test $? -eq 1
check "minimal: no model: sentence" grep -q 'none.gguf' "$dir/err"
"$build/minimal" "$model" "$(head -c 100000 /dev/zero | tr '\0' '~')" 2>"$dir/err" >"$dir/out"
check "minimal: too long a prompt: exit code" test $? -eq 1
check "minimal: too long a prompt: sentence" test -s "$dir/err"
"$build/moe-synth" micro "$dir/ids.gguf" --no-tokenizer >"$dir/log" 2>&1
"$build/minimal" "$dir/ids.gguf" 2>"$dir/err" >"$dir/out"
check "minimal: no vocabulary: exit code" test $? -eq 1
check "minimal: no vocabulary: sentence" test -s "$dir/err"
check "minimal: at most 40 lines" test "$(wc -l <examples/minimal.c)" -le 40

# ---- branch.c ------------------------------------------------------------------------------------

story=examples/storyteller/storyteller.gguf
"$build/branch" >"$dir/out" 2>"$dir/err"
check "branch: exit code" test $? -eq 0
check "branch: two texts" test "$(grep -cE '^[12]\. Once upon a time there was ' "$dir/out")" -eq 2
check "branch: that differ" test "$(cut -c4- "$dir/out" | grep . | sort -u | wc -l)" -eq 2
# 7 tokens of the beginning, and 60 behind it of which the last is not evaluated
check "branch: what was evaluated" grep -q '^125 tokens evaluated, the 7 of the beginning once' \
    "$dir/err"
"$build/branch" "$model" "Once upon a time" >"$dir/out" 2>"$dir/err"
check "branch: another model" test $? -eq 0
"$build/branch" "$dir/none.gguf" >"$dir/out" 2>"$dir/err"
check "branch: no model: exit code" test $? -eq 1
check "branch: no model: sentence" grep -q 'none.gguf' "$dir/err"
"$build/branch" "$model" "$(head -c 100000 /dev/zero | tr '\0' '~')" 2>"$dir/err" >"$dir/out"
check "branch: too long a prompt: exit code" test $? -eq 1
check "branch: too long a prompt: sentence" test -s "$dir/err"
check "branch: less than 80 lines" test "$(wc -l <examples/branch.c)" -lt 80

# ---- resume.c ------------------------------------------------------------------------------------

saved=$dir/story.state
"$build/resume" "$saved" 60 >"$dir/whole" 2>"$dir/err"
check "resume: exit code" test $? -eq 0
check "resume: it says what it saved" grep -q "^67 tokens are in $saved" "$dir/err"
rm "$saved"
for n in 1 20 2 37; do "$build/resume" "$saved" $n; done >"$dir/out" 2>"$dir/err"
check "resume: four runs tell what one does" cmp -s "$dir/whole" "$dir/out"
check "resume: the prompt stands there once" test "$(grep -c 'Once upon' "$dir/out")" -eq 1
"$build/resume" "$saved" 500 >"$dir/out" 2>"$dir/err"
check "resume: the end of the story" grep -q '^the model ended: the next run begins anew' "$dir/err"
check "resume: then nothing is left" test ! -e "$saved"
"$build/resume" "$saved" 5 "$story" "The old fisherman" >"$dir/out" 2>"$dir/err"
check "resume: another beginning" grep -q '^The old fisherman ' "$dir/out"
cp "$saved" "$dir/kept.state"
"$build/resume" "$saved" 5 "$model" >"$dir/out" 2>"$dir/err"
check "resume: another model: exit code" test $? -eq 1
check "resume: another model: sentence" grep -q 'saved with another model' "$dir/err"
check "resume: another model: the file stays" cmp -s "$saved" "$dir/kept.state"
printf x | dd of="$saved" bs=1 seek=2000 conv=notrunc 2>/dev/null
"$build/resume" "$saved" 5 >"$dir/out" 2>"$dir/err"
check "resume: a damaged file: exit code" test $? -eq 1
check "resume: a damaged file: sentence" grep -q 'it is damaged' "$dir/err"
"$build/resume" "$dir/none/story.state" 5 >"$dir/out" 2>"$dir/err"
check "resume: nowhere to write: exit code" test $? -eq 1
"$build/resume" "$saved" 5 "$dir/none.gguf" >"$dir/out" 2>"$dir/err"
check "resume: no model" test $? -eq 1
check "resume: less than 80 lines" test "$(wc -l <examples/resume.c)" -lt 80

# ---- tokens.c ------------------------------------------------------------------------------------

"$build/tokens" >"$dir/out" 2>"$dir/err"
check "tokens: exit code" test $? -eq 0
check "tokens: no complaint" test ! -s "$dir/err"
check "tokens: a line per token, and their sum" test "$(wc -l <"$dir/out")" -eq 11
check "tokens: what was chosen is the likeliest" awk -F '\t' '
    NR <= 10 { sub(/^ */, "", $1); if (index($2, "| " $1 ",") != 1) exit 1 }' "$dir/out"
check "tokens: four of them, in order, none above 0" awk -F '\t' '
    NR <= 10 {
        n = gsub(/, -?[0-9]/, "&", $2)
        if (n != 3) exit 1
        last = 0
        while (match($2, /-?[0-9]+\.[0-9]+ "/)) {
            x = substr($2, RSTART, RLENGTH) + 0
            if (x > last) exit 1
            last = x
            $2 = substr($2, RSTART + RLENGTH)
        }
    }' "$dir/out"
check "tokens: the sum is the sum" awk '
    NR <= 10 { sum += $1; next }
    { exit !($1 - sum < 0.001 && sum - $1 < 0.001) }' "$dir/out"
check "tokens: why it stopped" grep -q ' together; as many tokens as asked for$' "$dir/out"
"$build/tokens" "$story" "Once upon a time there was a" 1 >"$dir/one" 2>/dev/null
check "tokens: one token" cmp -s <(head -n 1 "$dir/out") <(head -n 1 "$dir/one")
"$build/tokens" "$story" "Once upon a time there was a" 500 >"$dir/out" 2>/dev/null
check "tokens: the end token is the last" test "$(grep -c '(the end)$' "$dir/out")" -eq 1
check "tokens: and the reason" grep -q ' together; the model ended$' "$dir/out"
"$build/tokens" "$model" "Once" >"$dir/out" 2>"$dir/err"
check "tokens: another model" test $? -eq 0
check "tokens: it prints ASCII" test -z "$(tr -d '\t\n -~' <"$dir/out")"
"$build/tokens" "$dir/none.gguf" >"$dir/out" 2>"$dir/err"
check "tokens: no model: exit code" test $? -eq 1
check "tokens: no model: sentence" grep -q 'none.gguf' "$dir/err"
"$build/tokens" "$model" "$(head -c 100000 /dev/zero | tr '\0' '~')" 2>"$dir/err" >"$dir/out"
check "tokens: too long a prompt: exit code" test $? -eq 1
check "tokens: too long a prompt: sentence" test -s "$dir/err"
check "tokens: less than 80 lines" test "$(wc -l <examples/tokens.c)" -lt 80

# ---- chat.c --------------------------------------------------------------------------------------

# The actor calls a tool where a question ends so, and tells with what digit its result ends.
"$build/tests/actor" "$dir/actor.gguf"
printf 'What is 17 and 25?\nThank you\n3\n' | "$build/chat" "$dir/actor.gguf" >"$dir/out" 2>"$dir/err"
check "chat: exit code" test $? -eq 0
check "chat: the tool is called, its result is read, the dialogue goes on" test "$(cat "$dir/out")" = \
    '[add {"a": 17, "b": 25} = 42]
It ends with 2.
I see.
It ends with 3.'
check "chat: no complaint" test ! -s "$dir/err"
echo x | "$build/chat" "$story" >"$dir/out" 2>"$dir/err"
check "chat: no template: exit code" test $? -eq 1
check "chat: no template: sentence" grep -q 'template' "$dir/err"
"$build/chat" "$dir/none.gguf" </dev/null >"$dir/out" 2>"$dir/err"
check "chat: no model: exit code" test $? -eq 1
check "chat: no model: sentence" grep -q 'none.gguf' "$dir/err"
check "chat: less than 80 lines" test "$(wc -l <examples/chat.c)" -lt 80

# ---- embed.cpp -----------------------------------------------------------------------------------

if [ -x "$build/embed" ]; then
"$build/embed" "$model" "Once upon a time" "Twice" >"$dir/out" 2>"$dir/err"
check "embed: exit code" test $? -eq 0
check "embed: two texts" test "$(grep -c 'tokens, ' "$dir/err")" -eq 2
"$build/embed" "$model" "Once upon a time" >"$dir/once" 2>/dev/null
check "embed: the first text does not depend on the second" \
    cmp -s -n "$(wc -c <"$dir/once")" "$dir/once" "$dir/out"
"$build/embed" "$dir/none.gguf" x >"$dir/out" 2>"$dir/err"
check "embed: no model: exit code" test $? -eq 1
check "embed: no model: sentence" grep -q 'MOE_ERROR_IO' "$dir/err"
"$build/embed" >"$dir/out" 2>"$dir/err"
check "embed: usage" test $? -eq 2
else
    echo "skipped: embed.cpp: there is no C++ compiler"
    skipped=1
fi

# ---- quantize.c ----------------------------------------------------------------------------------

quantize() { "$build/moe-quantize" "$@" >"$dir/out" 2>"$dir/err"; }
greedy() { "$build/moe-cli" -m "$1" -p "Once upon a time" -n 20 --temp 0 2>/dev/null; }
quantize "$model" "$dir/f32.gguf" F32
check "quantize: to the same type: exit code" test $? -eq 0
check "quantize: to the same type: the same file" cmp -s "$model" "$dir/f32.gguf"
quantize "$model" "$dir/q8.gguf" q8_0 token_embd=f16 attn_q.=Q4_0
check "quantize: exit code" test $? -eq 0
"$build/moe-cli" -m "$dir/q8.gguf" --info >"$dir/info" 2>&1
check "quantize: the first type" grep -q '^  Q8_0  *[1-9]' "$dir/info"
check "quantize: a type for some" grep -q '^  Q4_0  *4 ' "$dir/info"
check "quantize: and for one" grep -q '^  F16  *1 ' "$dir/info"
check "quantize: the router stays" grep -q '^  F32  *[1-9]' "$dir/info"
check "quantize: it generates" test -n "$(greedy "$dir/q8.gguf")"
cp "$dir/q8.gguf" "$dir/kept.gguf"
quantize "$dir/none.gguf" "$dir/kept.gguf" F16
check "quantize: no such file: exit code" test $? -eq 1
quantize "$model" "$dir/kept.gguf" IQ2_XXS
check "quantize: a type that cannot be made: exit code" test $? -eq 1
check "quantize: it says why" grep -q "IQ2_XXS can be read, but not made" "$dir/err"
check "quantize: what was there stays" grep -q GGUF "$dir/kept.gguf"
check "quantize: no draft is left" test -z "$(ls "$dir" | grep '\.tmp')"
quantize "$model" "$dir/none/x.gguf" F16
check "quantize: nowhere to write" test $? -eq 1
quantize "$model" "$dir/x.gguf" Q9_Z
check "quantize: no such type" test $? -eq 2
quantize "$model" "$dir/x.gguf"
check "quantize: usage" test $? -eq 2

# ---- the storyteller -----------------------------------------------------------------------------

check "storyteller: at most 8 MB" test "$(stat -c %s "$story")" -le 8000000
make -s run "B=$build" >"$dir/out" 2>"$dir/err"
check "make run: exit code" test $? -eq 0
check "make run: begins with the prompt" grep -q '^Once upon a time there was ' "$dir/out"
check "make run: a whole story" test "$(wc -w <"$dir/out")" -gt 60
check "make run: the model ended it" grep -q '; the model ended$' "$dir/err"
check "make run: with a full stop" test "$(tr -d '\n' <"$dir/out" | tail -c 1)" = .
make -s run "B=$build" PROMPT="The old fisherman" >"$dir/out" 2>"$dir/err"
check "make run PROMPT=" grep -qE '^The old fisherman (lived|was very) ' "$dir/out"
if command -v python3 >/dev/null; then
    (cd examples/storyteller && python3 grammar.py --seed 424242 --count 24) >"$dir/held_out"
    check "storyteller: the held-out stories are the grammar's" \
        cmp -s "$dir/held_out" examples/storyteller/held_out.txt
    # Names, jobs, things and relatives that come back are those that were introduced.
    reference() { python3 examples/storyteller/reference.py "$@"; }
    check "reference: the grammar's stories have no mistake" reference --least 100 \
        <examples/storyteller/held_out.txt
    sed 's/ named [A-Z][a-z]*/ named Nobody/' examples/storyteller/held_out.txt |
        reference --least 99 >"$dir/out"
    check "reference: who was not introduced is a mistake" test $? -eq 1
    for seed in $(seq 20); do make -s run "B=$build" SEED="$seed"; done 2>/dev/null >"$dir/out"
    check "storyteller: a story per seed" test "$(grep -c '^Once upon' "$dir/out")" -eq 20
    check "storyteller: 9 of 10 mentions are right" reference --least 90 <"$dir/out"
    check "storyteller: the grammar has 1500 words or more" test "$(cd examples/storyteller &&
        python3 grammar.py --count 5000 | grep -oE "[A-Za-z'-]+" | sort -u | wc -l)" -ge 1500
fi

# ---- README --------------------------------------------------------------------------------------

# Blocks of C stand, four columns to the right, in examples: the first one in minimal.c, the second
# one in chat.c.
part_of() { # NUMBER FILE
    awk -v wanted="$1" '/^```c$/ { n++; inside = 1; next } /^```$/ { inside = 0 }
        inside && n == wanted' README.md >"$dir/snippet"
    sed 's/^    //' "$2" >"$dir/file.c"
    [ "$(wc -l <"$dir/snippet")" -ge 6 ] && awk '
        FNR == NR { want[++n] = $0; next }
        { have[++m] = $0 }
        END {
            for (i = 0; i + n <= m; i++) {
                for (k = 1; k <= n && have[i + k] == want[k]; k++);
                if (k > n) exit 0
            }
            exit 1
        }' "$dir/snippet" "$dir/file.c"
}
check "README: the first snippet is part of examples/minimal.c" part_of 1 examples/minimal.c
check "README: the second one is part of examples/chat.c" part_of 2 examples/chat.c
for target in $(grep -oE '`make [a-z-]+|^make [a-z-]+' README.md | sed 's/.*make //' | sort -u); do
    check "README: make $target exists" grep -q "^$target:" Makefile
done
for file in $(grep -oE '`(examples|bench|tests)/[a-z_./]+`' README.md | tr -d '`' | sort -u); do
    check "README: $file exists" test -e "$file"
done
config=$(sed -n '/\/\/ >>config/,/^#endif/p' moe_infer.h |
         grep -oE '^(/\*|//|   ) *MOE_[A-Z0-9_]+' | grep -oE 'MOE_[A-Z0-9_]+' | sort -u)
check "config: there are macros" test "$(wc -w <<<"$config")" -ge 8
for macro in $config; do
    check "README: $macro is explained" grep -q "^| \`$macro" README.md
done
flags=$("$build/moe-cli" --help | sed -n 's/^  \(-.*\)/\1/p' | sed 's/  .*//; s/,.*//; s/ .*//')
for flag in $flags; do
    check "README: $flag is there" grep -qe "\`$flag[ \`]" README.md
done

echo "$passed passed, $failed failed$([ $skipped -gt 0 ] && echo ", $skipped skipped")"
[ "$failed" -eq 0 ]
