#!/bin/sh
# Compiles the header at -O2 with each compiler that is there and looks at the loops of the vector
# kernels: dots, tile kernels and attention of every instruction set, found by the beginnings of
# their names. A spill is a whole vector register stored to the stack. Bad, and an exit code of 1:
#   - a call inside a loop
#   - a spill inside an innermost loop
#   - spills in the loops around those, which are paid once per superblock or block of keys: more
#     than one per 50 instructions of the function
# unless the list `allowed` says why it may be.
# usage: [COMPILERS="gcc clang"] tests/asm_check.sh [directory of moe_infer.h [pattern of names]]
dir=${1:-$(dirname "$0")/..}
pattern=${2:-'^moe__(dot|tile|attend|score|value|block)(_[a-z0-9_]+)?_avx[a-z0-9_]*$'}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

# What may be all the same: compiler or any; pattern of names; calls, innermost or around; reason.
cat >"$work/allowed" <<'END_ALLOWED'
any ^moe__tile_run_ calls it drives the others, once per superblock, panel and group of tokens
any ^moe__tile_run_ innermost the same: what clang inlines into it is not the multiplying loop
any ^moe__tile_run_ around the same
any ^moe__(tile|dot|tile_unpack)_blocks_avx calls they call what unpacks a block of a type
any ^moe__(tile|dot|tile_unpack)_blocks_avx innermost the same: outside the multiplying loops
any ^moe__(tile|dot|tile_unpack)_blocks_avx around the same
any ^moe__attend(_scores|_values|)_avx innermost Q8_0: converted values and scales beside the sums
any ^moe__attend_values_avx2$ around out and weights of a tile of queries, 16 registers
any ^moe__(attend_scores|attend_values|value_queries)(_q8_0)?_avx calls one per tile
any ^moe__tile_k_[2-6]_avx512$ calls where sums start, before the loops: gcc lays it between them
any ^moe__score_q8_0_[23]_avx2$ innermost 12 sums, 3 queries and a converted key, 16 registers
any ^moe__attend_avx calls one per query and block of keys, for the exponentials
any ^moe__tile_[kq]m?(_[468])?_[2-6]_avx(2|_vnni)$ innermost 16 registers: float sums lie on the stack
any ^moe__tile_[kq]m?(_[468])?_[2-6]_avx(2|_vnni)$ around the same
any ^moe__dot_q5_k_avx2$ around 8 constant indices beside the rest, 16 registers: once per row
any ^moe__dot_(q5_0|iq4_nl)_avx2$ innermost the ragged end of a row, once per row
any ^moe__tile_unpack_q6_k_avx(2|_vnni)$ innermost 12 turned vectors live at once, of 16 registers
END_ALLOWED

cat >"$work/all.c" <<'END_C'
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
const void *keep(int isa);
const void *keep(int isa) { return moe__kernels_get((moe_isa)isa); }
END_C
status=0 found=
for compiler in ${COMPILERS:-gcc clang}; do
    command -v "$compiler" >/dev/null 2>&1 || continue
    found=1
    $compiler -O2 -w -I"$dir" -S -o "$work/all.s" "$work/all.c" || { status=1; continue; }
    awk -v compiler="$compiler" -v pattern="$pattern" -v allowed="$work/allowed" '
    BEGIN {
        while ((getline < allowed) > 0)
            if ($1 == compiler || $1 == "any") {
                allowed_name[++n_allowed] = $2
                allowed_kind[n_allowed] = $3
            }
    }
    function may(kind,   i) {
        for (i = 1; i <= n_allowed; i++)
            if (allowed_kind[i] == kind && name ~ allowed_name[i]) return 1
        return 0
    }
    # Jumps back to a label make a loop of the lines from there to the last of them.
    function finish(   i, a, b, last, inner, loop, calls, deep, outer, marks, note) {
        if (!name) return
        for (i = 1; i <= count; i++)
            if (target[i] in label && label[target[i]] <= i) last[target[i]] = i
        for (a in last) {
            inner = 1
            for (b in last)
                if (a != b && label[a] <= label[b] && last[b] <= last[a] &&
                    last[b] - label[b] < last[a] - label[a]) inner = 0
            for (i = label[a]; i <= last[a]; i++)
                if (loop[i] < 1 + inner) loop[i] = 1 + inner
        }
        calls = deep = outer = 0
        for (i = 1; i <= count; i++) {
            if (!loop[i]) continue
            if (line[i] ~ /^call/) calls++
            if (line[i] ~ /^v?mov[a-z0-9]*[ \t]+%[xyz]mm[0-9]+, *-?[0-9]*\(%rsp\)/ ||
                (framed && line[i] ~ /^v?mov[a-z0-9]*[ \t]+%[xyz]mm[0-9]+, *-?[0-9]*\(%rbp\)/)) {
                if (loop[i] == 2) deep++
                else outer++
            }
        }
        marks = (calls && !may("calls")) || (deep && !may("innermost")) ||
                (outer * 50 > count && !may("around"))
        note = marks ? "  <-- BAD" : ""
        if (!marks && (calls || deep || outer * 50 > count)) note = "  (allowed)"
        printf("%-5s %-28s %5d instructions; in loops %2d calls, spills: %2d innermost, " \
               "%2d around%s\n", compiler, name, count, calls, deep, outer, note)
        kernels++
        if (marks) bad = 1
        name = ""
    }
    /^[A-Za-z_][A-Za-z0-9_.]*:/ {
        finish()
        split($1, part, ":")
        if (part[1] ~ pattern && !(part[1] in data)) {
            name = part[1]
            count = framed = 0
            split("", label); split("", target); split("", line)
        }
        next
    }
    /^[ \t]*\.type[ \t].*@object/ { split($2, part, ","); data[part[1]] = 1; next }
    !name { next }
    /^\.L[A-Za-z0-9_]*:/ { split($1, part, ":"); label[part[1]] = count + 1; next }
    /^[ \t]*\.cfi_endproc/ { finish(); next }
    /^[ \t]*[.#]/ { next }
    /^[ \t]+[a-z]/ {
        sub(/^[ \t]+/, "")
        line[++count] = $0
        if ($0 ~ /^movq[ \t]+%rsp, *%rbp/) framed = 1
        target[count] = $1 ~ /^j/ ? $2 : ""
    }
    END {
        finish()
        if (!kernels) { print compiler ": no kernel found"; bad = 1 }
        exit bad
    }' "$work/all.s" || status=1
done
[ -n "$found" ] || { echo "no compiler found"; status=1; }
exit $status
