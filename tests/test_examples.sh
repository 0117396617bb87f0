#!/bin/bash
# The examples run, and the README tells the truth about them, the commands and the macros. Run from
# the repository root; the build folder is the argument. Ends with "N passed, N failed".
set -u
export LC_ALL=C
build=${1:-build}
dir=$build/tests/examples
rm -rf "$dir"
mkdir -p "$dir"
tools="minimal moe-cli moe-synth"
command -v "${CXX:-c++}" >/dev/null && tools="$tools embed"
for tool in $tools; do
    [ -x "$build/$tool" ] || { echo "$build/$tool was not built"; exit 1; }
done
passed=0 failed=0 skipped=0

check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $name"
    fi
}

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

# ---- README --------------------------------------------------------------------------------------

# The first block of C, as it stands in minimal.c four columns to the right.
awk '/^```c$/ && !n { n = 1; next } /^```$/ && n == 1 { n = 2 } n == 1' README.md >"$dir/snippet"
sed 's/^    //' examples/minimal.c >"$dir/minimal.c"
check "README: there is a snippet" test "$(wc -l <"$dir/snippet")" -ge 10
check "README: the snippet is part of examples/minimal.c" awk '
    FNR == NR { want[++n] = $0; next }
    { have[++m] = $0 }
    END {
        for (i = 0; i + n <= m; i++) {
            for (k = 1; k <= n && have[i + k] == want[k]; k++);
            if (k > n) exit 0
        }
        exit 1
    }' "$dir/snippet" "$dir/minimal.c"
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
