#!/bin/sh
# Compiles the header at -O2 with each compiler that is there and looks at the decoding kernels:
# prints instructions, calls and spills (vector stores to the stack inside innermost loops) of each
# and fails on any call or spill.
# usage: tests/asm_check.sh [directory of moe_infer.h] [pattern of kernel names]
dir=${1:-$(dirname "$0")/..}
pattern=${2:-'^moe__dot_.*_avx'}
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
cat >"$work/all.c" <<'END'
#define MOE_INFER_IMPLEMENTATION
#include "moe_infer.h"
const void *keep(int isa);
const void *keep(int isa) { return moe__kernels_get((moe_isa)isa); }
END
status=0
for compiler in gcc clang; do
    command -v $compiler >/dev/null 2>&1 || continue
    $compiler -O2 -w -I"$dir" -S -o "$work/all.s" "$work/all.c" || { status=1; continue; }
    awk -v compiler=$compiler -v pattern="$pattern" '
    # Jumps back to a label make a loop of the lines from there to the last of them.
    function finish(   i, a, b, last, inner, inside, calls, spills, n) {
        if (!name) return
        for (i = 1; i <= count; i++)
            if (target[i] in label && label[target[i]] <= i) last[target[i]] = i
        for (a in last) {
            inner = 1
            for (b in last)
                if (a != b && label[a] <= label[b] && last[b] <= last[a]) inner = 0
            if (inner)
                for (i = label[a]; i <= last[a]; i++) inside[i] = 1
        }
        calls = spills = n = 0
        for (i = 1; i <= count; i++) {
            n++
            if (line[i] ~ /^call/) calls++
            if (i in inside &&
                line[i] ~ /^v?mov[a-z0-9]*[ \t]+%[xyz]mm[0-9]+, *-?[0-9]*\(%r[sb]p\)/)
                spills++
        }
        printf "%-5s %-28s %5d instructions, %d calls, %d spills%s\n", compiler, name, n, calls,
               spills, calls + spills ? "  <-- BAD" : ""
        kernels++
        if (calls + spills) bad = 1
        name = ""
    }
    /^[A-Za-z_][A-Za-z0-9_.]*:/ {
        finish()
        split($1, part, ":")
        if (part[1] ~ pattern) {
            name = part[1]
            count = 0
            split("", label); split("", target); split("", line)
        }
        next
    }
    !name { next }
    /^\.L[A-Za-z0-9_]*:/ { split($1, part, ":"); label[part[1]] = count + 1; next }
    /^[ \t]*\.cfi_endproc/ { finish(); next }
    /^[ \t]*[.#]/ { next }
    /^[ \t]+[a-z]/ {
        sub(/^[ \t]+/, "")
        line[++count] = $0
        target[count] = $1 ~ /^j/ ? $2 : ""
    }
    END {
        finish()
        if (!kernels) { print compiler ": no kernel found"; bad = 1 }
        exit bad
    }' "$work/all.s" || status=1
done
exit $status
