#!/bin/bash
# Three builds of the command line, one per schedule macro, give the same text; moe-bench --plan.
# usage: tests/test_schedules.sh [build folder]
set -u
cd "$(dirname "$0")/.." || exit 1
build=${1:-build}
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
. tests/check.sh

# ---- macros --------------------------------------------------------------------------------------

model=$dir/tiny.gguf
"$build/moe-synth" qwen3moe_tiny "$model" --seed 1 >/dev/null 2>&1
# generate NAME FLAG...: builds the command line with FLAG and keeps what it says
generate() {
    local name=$1
    shift
    ${CC:-cc} -O1 "$@" examples/moe_cli.c -o "$dir/$name" -lm -lpthread || return 1
    "$dir/$name" -m "$model" -p "Once upon a time" -n 30 --temp 0 -t 4 >"$dir/$name.text" \
        2>"$dir/$name.log"
}
says() { grep -q ", $2, seed" "$dir/$1.log"; }
same() { [ -s "$dir/$1.text" ] && cmp -s "$dir/sequential.text" "$dir/$1.text"; }
check "build without a macro" generate sequential
check "it is sequential" says sequential sequential
for name in parallel balanced; do
    macro=MOE_$(echo "$name" | tr '[:lower:]' '[:upper:]')_EXPERTS
    check "build with $macro" generate "$name" "-D$macro"
    check "it is $name" says "$name" "$name"
    check "$name: the same text" same "$name"
done

# ---- wrong code ----------------------------------------------------------------------------------

# PR #287's defect: with experts at the same time, down took the hidden vector of the wrong expert.
# A build with it must not be timed.
mkdir -p "$dir/wrong/bench" "$dir/wrong/examples"
cp bench/*.h bench/moe_bench.c bench/synth.c "$dir/wrong/bench"
cp examples/tool.h examples/output.h "$dir/wrong/examples"
right='moe__acts_gather(in, down, NULL, entry->hidden_row, 1, scratch->x);'
sed "s/$right/${right/entry->hidden_row/0}/" moe_infer.h >"$dir/wrong/moe_infer.h"
build_wrong() {
    ! cmp -s moe_infer.h "$dir/wrong/moe_infer.h" &&
        ${CC:-cc} -O0 "$dir/wrong/bench/moe_bench.c" -o "$dir/wrong/moe-bench" -lm -lpthread
}
# refused FLAG...: exit code 1, says why, prints no speed
refused() {
    "$dir/wrong/moe-bench" -m "$model" -p 4 -n 4 -r 1 -t 2 --no-roofs "$@" >"$dir/out" 2>"$dir/err"
    [ $? -eq 1 ] && grep -q 'sequential and parallel do not agree: not timed' "$dir/err" &&
        ! grep -q '± \|| parallel' "$dir/out"
}
check "a build with the wrong hidden vector" build_wrong
check "--compare refuses it" refused --compare
check "--check refuses it" refused --check --schedule parallel
check "--check refuses whatever is timed" refused --check

# ---- plan ----------------------------------------------------------------------------------------

# With rows placed by their owners, all schedules but the parallel one read from their own node only.
"$build/moe-bench" --plan -t 64,96 --detail >"$dir/plan" 2>/dev/null
all_local() {
    awk -F'[;:,]' '/^sequential: gate and up/ { n++
        if ($3 != 100 || $5 != 100 || $13 != 100 || $15 != 100) bad = 1 }
        END { exit bad || n < 16 }' "$dir/plan"
}
check "--plan: nothing is far away" all_local

echo "$passed passed, $failed failed"
[ $failed -eq 0 ]
