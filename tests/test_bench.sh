#!/bin/bash
# moe-bench from outside: the table, the JSON lines, every flag, mistakes and exit codes. Run from
# the repository root; the build folder is the argument. Ends with "N passed, N failed".
set -u
export LC_ALL=C
build=${1:-build}
bench=$build/moe-bench
dir=$build/tests/bench
rm -rf "$dir"
mkdir -p "$dir"
for tool in moe-bench moe-synth; do
    [ -x "$build/$tool" ] || { echo "$build/$tool was not built"; exit 1; }
done
. tests/check.sh
complain() { head -n 8 "$dir/out" "$dir/err" | sed 's/^/    /'; }

# run ARGUMENT...: without measuring roofs, which takes a second; with_roofs: as a user does
run() { with_roofs "$@" --no-roofs; }
with_roofs() {
    "$bench" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
}
shows() { exits 0 && grep -qe "$1" "$dir/out"; }
# rows REGEX N: so many lines of the output match
rows() { exits 0 && [ "$(grep -ce "$1" "$dir/out")" -eq "$2" ]; }
fails() { exits 1 && grep -qe "$1" "$dir/err"; }
refuses() { exits 2 && [ ! -s "$dir/out" ] && grep -qe "$1" "$dir/err"; }
# the tests of the output in order, with their threads: "pp4/1 tg3/1"
tests() {
    awk -F'|' '/± / { gsub(/ /, ""); printf "%s%s/%s", s, $(NF - 2), $6; s = " " }' "$dir/out"
}
runs() { exits 0 && [ "$(tests)" = "$1" ]; }
field() { grep -oE "\"$1\": [^,}]*" "$dir/out" | head -n 1 | sed 's/^[^:]*: //'; }

model=$dir/tiny.gguf
ids=$dir/ids.gguf
code=0
"$build/moe-synth" qwen3moe_tiny "$model" >"$dir/err" 2>&1 &&
    "$build/moe-synth" micro_mla "$ids" --no-tokenizer >>"$dir/err" 2>&1 || {
    echo "cannot write a model"
    cat "$dir/err"
    echo "0 passed, 1 failed"
    exit 1
}

# ---- the table -----------------------------------------------------------------------------------

run -m "$model" -p 8 -n 4 -r 2 -t 1
title='^| model                          |       size |     params | backend    | threads |'
title="$title            test |                  t/s |\$"
line='^| -* | -*: | -*: | -* | -*: | -*: | -*: |$'
check "the table's header" test "$(sed -n 1p "$dir/out" | grep -ce "$title")" = 1
check "the line below" test "$(sed -n 2p "$dir/out" | grep -ce "$line")" = 1
check "two tests" runs "pp8/1 tg4/1"
check "mean and deviation" rows ' | *[0-9]*\.[0-9][0-9] ± [0-9]*\.[0-9][0-9] |$' 2
widths=$(awk '/^\|/ { gsub(/±/, "+"); print length }' "$dir/out" | sort -u | wc -l)
check "columns are aligned" test "$widths" = 1
number='[0-9][0-9]*\.[0-9]*'
row="^| qwen3moe $number[MB] F32  *| *$number [MG]iB | *$number [MB] | CPU"
check "name of the model" rows "$row" 2
check "the build" shows '^build: moe_infer [0-9.]* ('
check "nothing on standard error without a terminal" test ! -s "$dir/err"
run --model "$model" --n-prompt 4,5 --n-gen 2,3 --threads 1,2 --repetitions 1
check "lists are multiplied" runs "pp4/1 pp5/1 tg2/1 tg3/1 pp4/2 pp5/2 tg2/2 tg3/2"
run -m "$model,$ids" -p 4 -n 2 -r 1 -t 1
check "a list of models" runs "pp4/1 tg2/1 pp4/1 tg2/1"
check "the second model" shows '^| deepseek2 '
run -m "$model" -p 0 -n 2 -r 1 -t 1
check "-p 0 leaves prompts out" runs "tg2/1"
run -m "$model" -p 3 -n 0 -r 1 -t 1
check "-n 0 leaves generation out" runs "pp3/1"
run -m "$model" -r 1 -t 2
check "defaults" runs "pp512/2 tg128/2"
run -m "$model" -p 4 -n 0 -r 1 -t -1
check "-t -1" rows '± ' 1
run -m "$model" -p 4 -n 0 -r 1 --isa scalar,avx2
check "--isa" rows '| scalar  ' 1
check "--isa: a row each" rows '± ' 2
run -m "$model" -p 4 -n 0 -r 1 --schedule sequential
check "--schedule" rows '| sequential |' 1
run -m "$model" -p 40 -n 0 -r 1 -b 16
check "-b" rows '|      16 |' 1
run -m "$model" -p 40 -n 0 -r 1 --batch-size 16
check "--batch-size" rows '|      16 |' 1
run -m "$model" -p 40 -n 0 -r 1 -b 16,32 -ub 8,64
check "-b and -ub: lists are multiplied" rows '± ' 4
check "-ub" rows '|      32 |       64 |' 1
run -m "$model" -p 40 -n 0 -r 1 --ubatch-size 8
check "--ubatch-size" rows '|        8 |' 1
run -m "$model" -p 0 -n 0 -r 1 -t 1 -pg 8,3 -pg 4,2 -gp 30,2
check "-pg and -gp" runs "pp8+tg3/1 pp4+tg2/1 tg2@pp30/1"
for value in 8 8,3,2 8, ,3 8,0 x,1; do
    run -m "$model" -pg "$value"
    check "-pg '$value'" exits 2
done
run -m "$model" -p 4 -n 2 -r 2 -t 1,2 --schedule sequential,parallel,balanced --check --detail
check "several schedules" rows '| balanced   |' 4
check "--detail" shows '|   GB/s | barriers | % wait | imbalance |'
check "one thread does not wait" rows '|    0.0 |     1.000 |' 6
run -m "$model" -p 4 -n 2 -r 1 --pin --no-mmap --mlock --numa interleave
check "--pin --no-mmap --mlock" rows '± 0.00' 2
check "--numa" grep -q 'memory node.*placement' "$dir/err"
run -m "$model" -p 0 -n 2 -r 1 --pages copy --detail
check "--pages copy" rows '± 0.00' 1
check "--pages copy says what was done" grep -q 'copied to huge pages' "$dir/err"
run -m "$model" --pages small
check "--pages small" refuses "'small' is not one of"
run -m "$model" --numa everywhere
check "--numa everywhere" refuses "'everywhere' is not one of"
run -m "$model" -p 4 -n 0 -r 1 -ctk f32
check "-ctk" rows '|    f32 |' 1
run -m "$model" -p 4 -n 0 -r 1 -ctk q8_0 -ctv q8_0
case $code in 0) check "-ctk q8_0 -ctv q8_0" rows '|   q8_0 |' 1 ;; esac
run -m "$model" -p 4 -n 0 -r 1 --cache-type-k f16
check "--cache-type-k" rows '|    f16 |' 1
run -m "$model" -p 4 -n 0 -r 1 --cache-type-v f32
check "--cache-type-v" rows '|    f32 |' 1
run -m "$model" -p 4 -n 0 -r 1 -ctk f16 -ctv f32
check "-ctk f16 -ctv f32" exits 2
run -m "$model" -p 4 -n 2 -r 1 --no-warmup
check "--no-warmup" rows '± 0.00' 2
run -m "$model" -p 4 -n 2 -r 1 -o md
check "-o md" rows '± 0.00' 2
check "--no-roofs: no such column" rows '% roof' 0
with_roofs -m "$model" -p 4 -n 2 -r 1
check "% roof" rows '| % roof |            test |' 1
check "its values" rows '^| qwen3moe .* | *[0-9]*\.[0-9] | *[pt][pg][24] |' 2
widths=$(awk '/^\|/ { gsub(/±/, "+"); print length }' "$dir/out" | sort -u | wc -l)
check "columns are aligned" test "$widths" = 1
run -m "$model" -p 4 -n 2 -r 1 -d 0,30 -t 1
check "-d" runs "pp4/1 pp4@d30/1 tg2/1 tg2@d30/1"
run -m "$model" -p 2 -n 0 -r 1 --n-depth 600 -t 1
check "--n-depth" runs "pp2@d600/1"

# ---- several sequences, several tokens per call --------------------------------------------------

run -m "$model" -p 3 -n 4 -r 1 -t 1 -npl 1,3 -nd 1,2
check "-npl and -nd" runs "pp3/1 tg4/1 tg4by2/1 tg4x3/1 tg4x3by2/1"
run -m "$model" -p 0 -n 5 -r 1 -t 2 --n-parallel 2 --n-draft 9 -d 0,3
check "no more per call than there are" runs "tg5x2by5/2 tg5x2by5@d3/2"
run -m "$model" -p 0 -n 0 -r 1 -t 1 -gp 6,2 -pg 4,2 -npl 2
check "of -gp, not of -pg" runs "pp4+tg2/1 tg2x2@pp6/1"
run -m "$model" -p 4 -n 3 -r 2 -t 2 -npl 2 --schedule sequential,parallel,balanced -ctk f32 --detail
number=' *[0-9.]* |'
check "-npl: schedules, -ctk, --detail" rows "|$number$number$number$number *tg3 x2 | " 3
check "--detail: the header" shows '| imbalance | % attn | % recr |  % ffn |  MB/call |  experts |                   test |'
widths=$(awk '/^\|/ { gsub(/±/, "+"); print length }' "$dir/out" | sort -u | wc -l)
check "columns are aligned" test "$widths" = 1
run -m "$model" -p 0 -n 3 -r 1 -t 1 -npl 4 -b 2
check "-npl: more sequences than a batch holds" rows '± 0.00' 1
with_roofs -m "$model" -p 0 -n 3 -r 2 -t 1 -npl 2
check "-npl: % roof" rows '| *[0-9]*\.[0-9] | *tg3 x2 | ' 1
for value in 0 -1 257 x 1,,2; do
    run -m "$model" -npl "$value"
    check "-npl '$value'" refuses "-npl: '"
done
run -m "$model" -nd 0
check "-nd 0" refuses "-nd: '0'"
for mode in --compare --crowded --plan --start --sweep; do
    run -m "$model" -npl 2 $mode
    check "-npl $mode" refuses '-npl and -nd go with'
done

# ---- JSON ----------------------------------------------------------------------------------------

run -m "$model" -p 8 -n 4 -r 3 -t 2 -o jsonl
check "an object per line" rows '^{.*}$' 2
check "and nothing else" test "$(wc -l <"$dir/out")" = 2
check "test" shows '"test": "tg4"'
check "n_prompt and n_gen" rows '"n_prompt": 8, "n_gen": 0,\|"n_prompt": 0, "n_gen": 4,' 2
check "n_threads" rows '"n_threads": 2,' 2
check "samples_ts" rows '"samples_ts": \[[0-9.]*, [0-9.]*, [0-9.]*\]' 2
check "samples_ns" rows '"samples_ns": \[[0-9]*, [0-9]*, [0-9]*\]' 2
check "waiting per thread" rows '"wait_fractions": \[0\.[0-9]*, 0\.[0-9]*\]' 2
check "gbps of generation" rows '"gbps": [0-9.]*, "gbps_cache": [0-9.]*, ' 1
check "gmacs of both" rows '"gmacs": [0-9.]*, ' 2
check "no roofs" rows '"roof_gbps": null, "roof_gmacs": null, "roof_fraction": null, ' 2
check "no gbps of prompts" rows '"gbps": null, ' 1
for key in model_filename model_type model_size model_n_params isa schedule backends avg_ts \
    stddev_ts avg_ns stddev_ns test_time engine version n_batch n_ubatch type_k type_v n_barriers \
    bytes_token macs_token n_depth cpu_info use_mmap wait_fraction imbalance n_expert_groups \
    n_parallel n_draft page_state_found cached_fraction folio_2m_fraction pages pages_map_gbps \
    pages_copy_gbps \
    pages_copied_bytes pages_huge_bytes; do
    check "$key" rows "\"$key\": [^,}]" 2
done
samples=$(sed -n '1s/.*"samples_ts": \[\([^]]*\)\].*/\1/p' "$dir/out")
check "avg_ts and stddev_ts are those of the samples" awk -v samples="$samples" \
    -v mean="$(field avg_ts)" -v deviation="$(field stddev_ts)" 'BEGIN {
        n = split(samples, x, ", ")
        for (i = 1; i <= n; i++) sum += x[i]
        for (i = 1; i <= n; i++) squares += (x[i] - sum / n) ^ 2
        d = sqrt(squares / (n - 1))
        exit !((sum / n - mean) ^ 2 <= (1e-4 * mean) ^ 2 &&
               (d - deviation) ^ 2 <= (1e-3 * mean) ^ 2 && mean > 0)
    }'
if command -v python3 >/dev/null; then
    check "JSON lines that others can read" python3 -c '
import json, sys
for line in open(sys.argv[1]):
    assert json.loads(line)["avg_ts"] > 0' "$dir/out"
    run -m "$model,$ids" -p 8 -n 4 -r 1 -t 1 -o json
    check "a JSON array that others can read" python3 -c '
import json, sys
tests = json.load(open(sys.argv[1]))
assert [t["test"] for t in tests] == ["pp8", "tg4"] * 2
assert all(t["avg_ts"] > 0 for t in tests)' "$dir/out"
fi
cp "$model" "$dir/odd\"\\ name.gguf"
run -m "$dir/odd\"\\ name.gguf" -p 2 -n 0 -r 1 --output jsonl
check "quotes in file names" shows 'odd\\"\\\\ name.gguf", '
run -m "$dir/odd\"\\ name.gguf" -p 2 -n 0 -r 1 -o csv
check "quotes in CSV" shows 'odd""\\ name.gguf",'

# What one token needs, counted by hand from the shape: width 64, 8 heads of 32, 2 of them with
# keys, 4 layers, 8 of 32 experts of width 32, 512 tokens, all f32; bytes have the norms, too.
macs=$((4 * (64 * 256 * 2 + 64 * 64 * 2 + 64 * 32 + 8 * 3 * 64 * 32) + 512 * 64))
bytes=$((4 * (macs + 64 + 64 + 4 * (64 * 2 + 32 * 2)))) # with a row of the embedding
with_roofs -m "$model" -p 8 -n 4 -r 2 -t 1 -d 100 -o jsonl
check "macs_token" rows "\"macs_token\": $macs," 2
check "bytes_token" rows "\"bytes_token\": $bytes," 2
check "roofs" rows '"roof_gbps": [1-9][0-9.]*, "roof_gmacs": [1-9][0-9.]*, ' 2
check "roof_fraction" rows '"roof_fraction": [0-9.]*, ' 2
run -m "$model" -p 0 -n 4 -r 1 -t 1 -d 100 -o jsonl
check "gbps and gbps_cache are those of the speed" awk -v ts="$(field avg_ts)" -v bytes="$bytes" \
    -v gbps="$(field gbps)" -v cache="$(field gbps_cache)" 'BEGIN {
        row = 4 * 2 * (32 + 32) * 2 # layers, heads, key and value, f16
        exit !((gbps * 1e9 / (ts * bytes) - 1) ^ 2 < 1e-6 &&
               (cache - ts * row * 102.5e-9) ^ 2 < (ts * row * 102.5e-12 + 1e-4) ^ 2)
    }'

# call_reads TOKENS ROWS: of each of the 4 layers the experts that were touched, all else once, a
# row of the embedding per token; so many positions of keys and values, over layers and sequences.
call_reads() {
    awk -v ts="$(field avg_ts)" -v gbps="$(field gbps)" -v cache="$(field gbps_cache)" \
        -v bytes="$(field bytes_eval)" -v experts="$(field experts_eval)" -v tokens="$1" \
        -v rows="$2" -v row=256 -v expert="$expert" -v once="$once" '
        function near(x, y) { # 4 digits are printed
            y *= 1e-9
            return (x - y) ^ 2 < (1e-3 * y + 1e-4) ^ 2
        }
        BEGIN {
        weights = once + tokens * 4 * 64 + 4 * experts * expert
        calls = ts / tokens
        exit !((bytes / (weights + rows * row) - 1) ^ 2 < 1e-8 &&
               near(gbps, calls * weights) && near(cache, calls * rows * row))
    }'
}
between() {
    awk -v x="$(field "$1")" -v low="$2" -v high="$3" 'BEGIN { exit !(x >= low && x <= high) }'
}
expert=$((4 * 3 * 64 * 32))
once=$((bytes - 4 * 64 - 4 * 8 * expert))
run -m "$model" -p 0 -n 4 -r 1 -t 1 -d 100 -o jsonl -npl 1
check "one sequence: experts" test "$(field experts_eval)" = 8.0000
check "one sequence: bytes_eval" call_reads 1 $((4 * 410 / 4))
for schedule in sequential parallel balanced; do
    run -m "$model" -p 0 -n 4 -r 1 -t 2 -d 100 -o jsonl -npl 3 --schedule $schedule
    check "$schedule: n_parallel" rows '"n_depth": 100, "n_parallel": 3, "n_draft": 1,' 1
    check "$schedule: experts" between experts_eval 8.5 24
    check "$schedule: bytes_eval" call_reads 3 $((3 * 4 * 410 / 4))
    echo "$(field experts_eval) $(field bytes_eval)" >>"$dir/touched"
done
check "the same experts with every schedule" test "$(sort -u "$dir/touched" | wc -l)" = 1
run -m "$model" -p 0 -n 6 -r 1 -t 2 -d 100 -o jsonl -nd 3
check "drafts: n_draft" rows '"n_parallel": 1, "n_draft": 3, "test": "tg6 by 3 @ d100",' 1
check "drafts: experts" between experts_eval 8.5 24
check "drafts: bytes_eval" call_reads 3 $((4 * (103 + 106) / 2))
run -m "$model" -p 0 -n 2 -r 2 -t 1 -o jsonl -npl 64
check "many sequences touch all experts" between experts_eval 30 32

# Windows: of 3 layers the first and last see 6 positions (a call's rows together one more).
oss=$dir/oss.gguf
"$build/moe-synth" micro_oss "$oss" --no-tokenizer >/dev/null
run -m "$oss" -p 0 -n 4 -r 1 -t 1 -d 10 -o jsonl -npl 2 -nd 2
check "windows: gbps_cache" awk -v ts="$(field avg_ts)" -v cache="$(field gbps_cache)" 'BEGIN {
        rows = 2 * ((12 + 14) / 2 + 2 * 7) # sequences; layers without and with a window
        expected = ts / 4 * rows * (16 + 16) * 2 * 1e-9
        exit !((cache - expected) ^ 2 < (1e-3 * expected + 1e-4) ^ 2) # 4 digits are printed
    }'
run -m "$model" -p 0 -n 4 -r 1 -t 2 -o csv -npl 1,2
check "-npl: CSV" shows ',n_depth,n_parallel,n_draft,test,'

# ---- CSV -----------------------------------------------------------------------------------------

run -m "$model,$ids" -p 8 -n 4 -r 1 -t 1 -o csv
check "a line of names and one per test" test "$(wc -l <"$dir/out")" = 5
check "names" test "$(sed -n 1p "$dir/out" | grep -c '^engine,.*,gbps,gbps_cache,gmacs,')" = 1
check "values" test "$(grep -c '^"moe_infer.h",' "$dir/out")" = 4
check "all values stand in quotes" test "$(sed 1d "$dir/out" | grep -vcE '^("[^"]*",)*"[^"]*"$')" = 0
columns=$(sed 's/"[^"]*"/x/g' "$dir/out" | awk -F, '{ print NF }' | sort -u | wc -l)
check "as many of them" test "$columns" = 1

# ---- speed against depth, crowds -----------------------------------------------------------------

run -m "$model" --sweep -c 100 -ub 32 -t 1 --svg "$dir/sweep.svg"
check "--sweep" rows '^|    32 |      8 |     [ 36][0-9] | *[0-9.]* | *[0-9.]* | *[0-9.]* | *[0-9.]* |$' 3
header='^|    PP |     TG |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |$'
check "--sweep: the header" test "$(sed -n 1p "$dir/out" | grep -ce "$header")" = 1
line='^|-------|--------|--------|----------|----------|----------|----------|$'
check "--sweep: the line below" test "$(sed -n 2p "$dir/out" | grep -ce "$line")" = 1
check "--sweep: nothing else" test "$(wc -l <"$dir/out")" = 5
check "--sweep: the settings" grep -q '^main: n_kv_max = 100, .* n_ubatch = 32, ' "$dir/err"
check "--svg" grep -q '</svg>' "$dir/sweep.svg"
check "--svg: three points in each panel" test "$(grep -c '<circle' "$dir/sweep.svg")" = 6
run -m "$model" --sweep --ctx-size 64 -ub 32 -t 1 -o jsonl
check "--sweep -o jsonl" rows '^{"n_kv_max": 64, .*"pp": 32, "tg": 8, "n_kv": [0-9]*, "t_pp": ' 2
run -m "$model" --sweep -c 10 -ub 32
check "--sweep in too small a context" refuses 'holds no batch'
run -m "$model" --svg "$dir/x.svg"
check "--svg alone" refuses 'goes with --sweep'
run -m "$model" --sweep -c 32 -ub 32 --svg "$dir/none/x.svg"
check "a picture that cannot be written" fails 'none/x.svg'
run -m "$model" --crowded -n 20 -r 1
check "--crowded: beside a neighbour" rows '^| neighbour    | .* | *[0-9.]* |  *[0-9.]* | [0-9. -]* |$' 1
check "--crowded: with more threads" rows '^| more threads | ' 1
run -m "$model" --crowded -n 20 -r 1 -o jsonl
check "--crowded -o jsonl" rows '^{"situation": ".*"ratio_high": [0-9.]*}$' 2
printf '%s' "$model" >"$dir/pattern" # in a file: it would find itself in the command line
check "the neighbours are gone" test -z "$(grep -alsf "$dir/pattern" /proc/[0-9]*/cmdline)"
run -m "$model" --crowded --sweep
check "two modes" refuses 'one at a time'

# ---- pages of the file in the system's cache ----------------------------------------------------

# What the system allows differs: a state is reached, or a sentence says why not.
# state WORD FRACTION: its name, and what cached_fraction then is
state() {
    case $code in
        0) [ "$(field cached_fraction)" = "$2" ] && grep -qe "cached" "$dir/err" ;;
        *) fails "page state $1: " ;;
    esac
}
run -m "$model" -p 2 -n 0 -r 1 -o jsonl --page-state cold
check "--page-state cold" state cold 0.0000
check "no folios of what is not cached" test "$code" != 0 -o "$(field folio_2m_fraction)" = null
run -m "$model" -p 2 -n 0 -r 1 -o jsonl --page-state small
check "--page-state small" state small 1.0000
check "... has no large folios" test "$code" != 0 -o "$(field folio_2m_fraction)" = 0.0000
run -m "$model" -p 2 -n 2 -r 1 -o csv
check "pages in CSV" shows ',page_state_found,cached_fraction,folio_2m_fraction,'
run -m "$model" -p 2 -n 0 -r 1 --detail
check "--detail: pages" grep -qE 'tiny.gguf: .* of 3.9[0-9] MiB cached|page cache unknown' "$dir/err"
run -m "$model" -p 2 -n 0 --page-state warm
check "--page-state warm" refuses "'warm' is not one of"
run -m "$dir/none.gguf" --page-state cold
check "--page-state of no file" fails 'none.gguf: cannot open'

# Without root only "cold" can be had, for a file of one's own.
plain=
if [ "$(id -u)" -ne 0 ]; then
    plain=$(mktemp -d)
    as_user() { "$@"; }
elif command -v setpriv >/dev/null && setpriv --reuid 65534 --clear-groups true 2>/dev/null; then
    plain=$(mktemp -d)
    as_user() { setpriv --reuid 65534 --clear-groups "$@"; }
fi
if [ -n "$plain" ]; then
    cp "$bench" "$model" "$plain"
    chmod 755 "$plain"
    for want in huge large small; do
        (cd "$plain" && as_user ./moe-bench -m tiny.gguf --page-state $want --no-roofs) \
            >"$dir/out" 2>"$dir/err"
        code=$?
        check "--page-state $want needs root" fails 'needs root'
    done
    (cd "$plain" && as_user ./moe-bench -m tiny.gguf -p 2 -n 0 -r 1 --no-roofs -o jsonl) \
        >"$dir/out" 2>"$dir/err"
    code=$?
    check "folios are unknown without root" shows '"folio_2m_fraction": null'
    rm -r "$plain"
fi

# ---- what a user of moe-cli meets ----------------------------------------------------------------

run -m "$model" --start -t 1 -o jsonl
check "--start" rows '"test": "start", "n_prompt": 16, "n_gen": 251, "n_ctx": 4096, "n_threads": 1,' 1
for key in open_seconds session_seconds first_token_seconds first_50_ts next_200_ts pss_bytes \
    peak_bytes rss_anon_bytes rss_file_bytes cached_fraction; do
    check "--start: $key" rows "\"$key\": \([0-9]\|null\)" 1
done
check "--start: pages" shows '"pages": "[^"]*mapped'
check "--start: the first token comes after opening" awk -v open="$(field open_seconds)" \
    -v session="$(field session_seconds)" -v token="$(field first_token_seconds)" \
    'BEGIN { exit !(open > 0 && session > 0 && token > open + session) }'
run -m "$model,$ids" --start -p 5 -o csv
check "--start -o csv" test "$(wc -l <"$dir/out")" = 3
check "--start -p 5" shows '"start","5","251",'
columns=$(sed 's/"[^"]*"/x/g' "$dir/out" | awk -F, '{ print NF }' | sort -u | wc -l)
check "--start: as many values as names" test "$columns" = 1
run -m "$model,$ids" --start
check "--start: a table" rows '^| qwen3moe .* cached.*|$\|^| deepseek2 .*|$' 2
columns=$(sed -n 1,4p "$dir/out" | awk -F'|' '{ print NF }' | sort -u | wc -l)
check "--start: as many columns" test "$columns" = 1
run -m "$model" --start -o json
check "--start -o json" test "$(sed -n '1p;$p' "$dir/out" | tr -d '\n')" = '[]'
run -m "$model" --start -p 4000 -b 256 -t 2 -o jsonl
check "--start: a context for a long prompt" shows '"n_prompt": 4000, .*"n_ctx": 4250,'
for value in 0 8,16; do
    run -m "$model" --start -p "$value"
    check "--start -p $value" refuses '--start takes one prompt'
done

# ---- builds in turns (make compare) --------------------------------------------------------------

if [ -x "$build/compare/compare" ]; then
    "$build/compare/compare" -m "$model" -t 1,2 -p 8 -n 8 -r 1 --svg "$dir/compare.svg" \
        one="$bench" two="$bench" >"$dir/out" 2>"$dir/err"
    code=$?
    check "compare" rows '^|       [12] | \(one\|two\)  *|' 4
    check "compare: the first is 1" rows '| one .*| 1.000 |.*| 1.000 |$' 2
    check "compare: a picture" grep -q '>two</text>' "$dir/compare.svg"
    "$build/compare/compare" -m "$model" one=/nonexistent >"$dir/out" 2>"$dir/err"
    code=$?
    check "compare: no such program" fails '/nonexistent'
    "$build/compare/compare" -m "$model" >"$dir/out" 2>"$dir/err"
    code=$?
    check "compare: nothing to compare" refuses 'NAME=PROGRAM'
fi

# ---- engines in turns (make rivals) --------------------------------------------------------------

# An engine that prints the next line of NAME.speeds, "prompts generation", as llama-bench prints it
# (ik_llama.cpp's: over many lines), and notes its name and arguments.
cat >"$dir/stub" <<'END'
#!/bin/bash
name=$(basename "$0")
dir=$(dirname "$0")
printf '%s' "$name" >>"$dir/calls"
printf '<%s>' "$@" >"$dir/$name.arguments"
read -r pp tg <"$dir/$name.speeds" || exit 3
sed -i 1d "$dir/$name.speeds"
[ "$pp" = signal ] && kill -KILL $$
[ "$pp" = exit ] && exit "$tg"
echo 'noise: "'
test() {
    printf '  {\n    "build_commit": "c0ffee",\n    "model_type": "stub {\\"7\\"} B",\n'
    printf '    "n_prompt": %s,\n    "n_gen": %s,\n    "avg_ts": %s,\n' "$1" "$2" "$3"
    printf '    "samples_ts": [ %s ]\n  }' "$3"
}
printf '[\n'
[ "$pp" = none ] || test 512 0 "$pp"
printf ',\n'
test 0 128 "$tg"
printf '\n]\n'
END
chmod +x "$dir/stub"
for name in A B; do cp "$dir/stub" "$dir/$name"; done
engines() {
    : >"$dir/calls"
    "$build/engines" "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
}
speeds() { printf '%s\n' "${@:2}" >"$dir/$1.speeds"; }
if [ -x "$build/engines" ]; then
    speeds A '100 10' '300 30' '200 50' '500 50' '400 40'
    speeds B '100 20' '100 20' '100 20' '100 20' '100 20'
    engines -m "$model" -t 3 -p 7 -n 9 --engines "A=$dir/A ; the  other=$dir/B -x 1 y\\ z \\; \\\\;"
    row='| A  *| c0ffee  *| *300.0 | *200.0 - *400.0 | *1.00 | *40.0 | *30.0 - *50.0 | *1.00 |$'
    check "engines: medians and quartiles" rows "^$row" 1
    row='| the  other  *| c0ffee  *| *100.0 | *100.0 - *100.0 | *3.00 |'
    check "engines: ratios of the same turn" rows "^$row *20.0 | *20.0 - *20.0 | *2.00 |\$" 1
    check "engines: forth and back" test "$(cat "$dir/calls")" = ABBAABBAAB
    check "engines: the model" shows '^stub {.*: prompts of 7 tokens, 9 generated, 3 threads; '
    check "engines: the machine" shows ' cores that we may use, Linux '
    common="<-m><$model><-t><3><-p><7><-n><9><-r><1><-o><json>"
    check "engines: arguments" test "$(cat "$dir/A.arguments")" = "$common"
    check "engines: own arguments" test "$(cat "$dir/B.arguments")" = "$common<-x><1><y z><;><\\>"
    check "engines: every sample" rows '^|    [1-5] | .* | *[0-9.]* | *[0-9.]* | .*cache.* |$' 10
    for wrong in "signal 9|signal 9" "exit 5|exit code 5" "none 7|not one speed of prompts"; do
        speeds A '100 10' '100 10'
        speeds B '100 10' "${wrong%|*}"
        engines -m "$model" -r 2 --engines "A=$dir/A; B=$dir/B"
        check "engines: ${wrong%|*}" fails "B (.*/B) failed: .*${wrong#*|}"
        check "engines: no half table" test ! -s "$dir/out"
    done
    engines -m "$model" -r 1 --engines "A=/nonexistent/engine"
    check "engines: no such program" fails 'cannot run /nonexistent/engine'
    engines -m "$dir/none.gguf" -r 1 --page-state cold --engines "A=$dir/A"
    check "engines: no such file" fails 'none.gguf: cannot open'
    engines -m "$model" --rounds 1 --threads 1 --n-prompt 4 --n-gen 3 --page-state cold \
        --engines "ours=$bench --no-roofs"
    case $code in 0) check "engines: ours, cold" rows '| ours .*| 0 B of 3.9[0-9] MiB cached |$' 1 ;; esac
    for list in '' ' ; ' '=x' 'A' 'A=' 'A= ;'; do
        engines -m "$model" --engines "$list"
        check "engines '$list'" refuses 'engines: --engines: '
    done
    engines --engines "A=$dir/A"
    check "engines: no model" refuses 'are needed'
    engines -h
    check "engines -h" shows '^usage: .* --engines LIST'
    if [ -w /dev/full ]; then
        speeds A '100 10'
        "$build/engines" -m "$model" -r 1 --engines "A=$dir/A" >/dev/full 2>"$dir/err"
        code=$?
        check "engines: nowhere to write" fails 'cannot write'
    fi
fi

# ---- single kernels, if `make bench` has built them --------------------------------------------

if [ -x "$build/kernels" ]; then
    moe_bench=$bench
    bench=$build/kernels
    with_roofs -T Q4_K -i scalar -a MLA -n 512 -s 1
    check "kernels: a type" rows '^| Q4_K     | scalar   |\( *[0-9.]* *[0-9]* |\)\{9\}$' 1
    check "kernels: attention" shows '^| token, MLA'
    with_roofs -T none -a 'd 64' -i best -s 1 -t 2 -o csv
    check "kernels: a line of names" rows '^kernel,what,place,isa,threads,tokens,unit,' 1
    check "kernels: CSV" shows '^attend,"prompt, .*",cache,[A-Za-z0-9-]*,2,0,gmacs,[0-9.,]*$'
    with_roofs -T f32 -i scalar -a none -n 32 -l 16 -s 1 -o json
    check "kernels: JSON" rows '^{"kernel": "\(dot\|tile\)", "what": "F32", .*}$' 9
    with_roofs -T Q9_Z -a none
    check "kernels: an unknown type" fails 'no type of that name'
    with_roofs -n 31
    check "kernels: -n 31" refuses "'31'"
    bench=$moe_bench
fi

# ---- help, mistakes ------------------------------------------------------------------------------

for flag in -h --help; do
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
check "--version" shows '^moe-bench (moe_infer '
run
check "no model" refuses 'no model'
run -m "$model" -x
check "an unknown flag" refuses "'-x'"
with_roofs -m
check "a missing value" refuses '-m needs a value'
for value in 1x '' , 1, ,1 1,,2 1.5 -2 99999999999 '1 2' 0x10; do
    run -m "$model" -p "$value"
    check "-p '$value'" refuses "-p: '"
done
run -m "$model" -r 0
check "-r 0" refuses "'0'"
run -m "$model" -o xml
check "-o xml" refuses "'xml' is not one of"
run -m "$model" --isa scalar,mmx
check "--isa scalar,mmx" refuses "'mmx' is not one of"
run -m "$model" -p 0 -n 0
check "nothing to do" refuses 'nothing to time'
run -m "$dir/none.gguf"
check "no such model" fails 'none.gguf'
run -m "$0"
check "not a GGUF" fails "$0"
run --plan -t 1,32 -d 0
check "--plan needs no model" rows '^| [A-Z].* |      32 |     2 |\( *[0-9]*\.[0-9] |\)\{6\} ' 11
check "--plan: gpt-oss" rows '^| gpt-oss-[12]*0b .* |      32 |     2 |' 2
check "--plan: one thread" rows '^| .* |       1 |     1 |\( *100\.0 |\)\{6\}  *|  *|$' 13
run --plan -m "$model,$ids" -t 1,8,64 -d 100 --detail
check "--plan -m: nodes" rows '^| .*gguf |      64 |     [12] |' 4
check "--plan -m: steps" rows '^| gate_exps up_exps ' 16
# of 64 rows, 16 of a thread: half of 8 threads; 8 experts of 2 times 16 rows: all of them
check "--plan: rows that few threads share" awk '
    / 8 threads, 1 node, token, / { on = 1 }
    on && /^\| attn_output / { n += / \|   50 \| / }
    on && /^\| gate_exps / { n += / \|  100 \| / }
    /^\| repeated / { on = 0 }
    END { exit n < 2 }' "$dir/out"
# what is useful, idle and repeated adds up to all of the time
check "--plan: it adds up" awk '
    / threads, .* node.*: [0-9.]* %$/ { sum = $(NF - 1); steps = 0 }
    /^\| .* \| +[0-9]+\.[0-9] \|$/ && sum { sum += $(NF - 1); steps++ }
    /^\| repeated / { n++; bad += (sum - 100) ^ 2 > (0.05 * steps + 0.11) ^ 2; sum = 0 }
    END { exit !(n == 16 && !bad) }' "$dir/out"
run --plan -m "$model" -t 8 --schedule balanced
check "--plan --schedule" rows '^| .*gguf |       8 |     1 | *[0-9.]* | *[0-9.]* | ' 1
run --plan -m "$dir/none.gguf"
check "--plan: no such model" fails 'none.gguf'
run --plan --sweep
check "--plan --sweep" refuses 'one at a time'
run -m "$model" -p 8 -n 4 -r 2 -t 1,2 --compare
check "--compare" rows '| sequential |' 2
check "--compare: parallel" rows '| parallel   |' 2
check "--compare: balanced" rows '| balanced   |' 2
run -m "$model" -p 8 -n 4 -r 1 -t 2 --compare --schedule balanced,sequential
check "--compare --schedule: the first is 1" rows '| balanced   .*| 1.000 |.*| 1.000 |' 1
run -m "$model" -p 4 -n 0 -r 1 --schedule balanced
check "--schedule balanced" rows '| balanced   |' 1
if [ -w /dev/full ]; then
    "$bench" -m "$model" -p 2 -n 0 -r 1 >/dev/full 2>"$dir/err"
    code=$?
    check "nowhere to write" fails 'cannot write'
fi

echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
