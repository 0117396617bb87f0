#!/bin/bash
# Compile checks: compilers, standards, macros, exported symbols, style of the header. Run from the
# repository root; results go to BUILD/compile (default build/compile). Arguments behind BUILD
# choose checks by name. Ends with "N passed, N failed, N skipped".
set -u
build=${1:-build}
shift
out=$build/compile
jobs=$(nproc 2>/dev/null || echo 2)
header=moe_infer.h
# Each compile of the whole header takes seconds. Checks that are not about the vector kernels, or
# about one instruction set only, leave the others out.
plain="-O1 -DMOE_NO_AVX2"
strict="-O2 -Wall -Wextra -Wpedantic -Wshadow -Wundef -Werror"
libs="-lm -lpthread"
rm -rf "$out"
mkdir -p "$out"

# ---- tools of the checks -------------------------------------------------------------------------

fail() { echo "$*"; exit 1; }
skip() { echo "$*"; exit 77; }
need() { command -v "$1" >/dev/null || skip "$1 is not installed"; }

# language COMPILER: how it is told to read a .c file
language() { case $1 in *++) echo "-x c++ -std=c++17" ;; *) echo "-x c" ;; esac; }

# compile COMPILER OUT SOURCE [FLAG...]: one object, silently
compile() {
    local cc=$1 object=$2 source=$3
    shift 3
    # shellcheck disable=SC2046,SC2086
    "$cc" $(language "$cc") $strict -I. -Itests/compile "$@" -c "$source" -o "$object" \
        >"$object.said" 2>&1 || { cat "$object.said"; exit 1; }
    silent "$object.said"
}
silent() { [ ! -s "$1" ] || { cat "$1"; fail "it compiles, but says something"; }; }

# program COMPILER OUT SOURCE [FLAG...]: compiles, links and runs one file
program() {
    compile "$1" "$2.o" "$3" "${@:4}"
    # shellcheck disable=SC2086
    "$1" "$2.o" -o "$2" $libs || exit 1
    "$2" || fail "$2: exit code $?"
}

has_symbol() { nm "$1" | grep -q "$2"; }
is_x86() { [ "$(uname -m)" = x86_64 ]; }

# Public functions by their prototypes.
api() { sed -n '1,/Stop here if you only use/p' "$header" | grep -oE '^MOE_API [^(]*\(' |
        grep -oE 'moe_[a-z0-9_]+\($' | tr -d '(' | sort -u; }

# ---- the checks ----------------------------------------------------------------------------------

# The implementation in one file, the header in many, in C and C++; nothing but moe_ is exported.
one_implementation() {
    local cc=$1 o=$out/impl_$1
    need "$cc"
    compile "$cc" "$o.o" tests/compile/impl.c
    nm --defined-only --extern-only "$o.o" | awk '{ print $3 }' | sort >"$o.symbols"
    grep -v '^moe_[a-z]' "$o.symbols" && fail "exported, but not moe_..."
    grep '^moe__' "$o.symbols" && fail "exported, but private"
    api >"$o.api"
    [ "$(wc -l <"$o.api")" -ge 50 ] || fail "cannot find the prototypes"
    comm -23 "$o.api" "$o.symbols" >"$o.missing"
    if [ -s "$o.missing" ]; then cat "$o.missing"; fail "declared, but not there"; fi
    comm -13 "$o.api" "$o.symbols" >"$o.extra"
    if [ -s "$o.extra" ]; then cat "$o.extra"; fail "exported, but not declared"; fi
    local c=gcc cxx=g++
    case $cc in clang*) c=clang cxx=clang++ ;; esac
    compile "$c" "$o.use_c.o" tests/compile/use.c
    compile "$cxx" "$o.use_cxx.o" tests/compile/use.cpp
    # shellcheck disable=SC2086
    "$cxx" "$o.o" "$o.use_c.o" "$o.use_cxx.o" -o "$o" $libs || exit 1
    "$o" || fail "exit code $?"
}

late_include() {
    local std=c11
    need "$1"
    case $1 in *++) std=c++17 ;; esac
    program "$1" "$out/late_$1" tests/compile/late_include.c -std=$std -O3
}
# shellcheck disable=SC2086
included_twice() { need "$1"; program "$1" "$out/twice_$1" tests/compile/twice.c $plain; }

two_static_copies() {
    local o=$out/static_$1
    need "$1"
    # shellcheck disable=SC2086
    compile "$1" "$o.a.o" tests/compile/static_a.c $plain
    # shellcheck disable=SC2086
    compile "$1" "$o.b.o" tests/compile/static_b.c $plain
    nm --defined-only --extern-only "$o.a.o" | grep moe_ && fail "a static function is exported"
    # shellcheck disable=SC2086
    "$1" "$o.a.o" "$o.b.o" -o "$o" $libs || exit 1
    "$o" || fail "exit code $?"
}

renamed_header() {
    need "$1"
    mkdir -p "$out/renamed_$1"
    cp "$header" "$out/renamed_$1/experts.h"
    cp tests/compile/use.h tests/compile/renamed.c "$out/renamed_$1"
    (cd "$out/renamed_$1" &&
        # shellcheck disable=SC2046,SC2086
        "$1" $(language "$1") $strict -O0 renamed.c -o renamed -x none $libs >said 2>&1 ||
        { cat said; fail "does not compile"; }
        silent said
        ./renamed) || exit 1
    ! is_x86 || has_symbol "$out/renamed_$1/renamed" _avx512 ||
        fail "the vector kernels are missing"
}

# Macros that leave something out; "=0" leaves it in.
without_avx2() {
    need "$1"
    program "$1" "$out/avx2_$1" tests/compile/late_include.c -O1 -DMOE_NO_AVX2
    has_symbol "$out/avx2_$1.o" '_avx\(2\|512\)$' && fail "vector kernels are in it"
    return 0
}
without_avx512() {
    need "$1"
    program "$1" "$out/avx512_$1" tests/compile/late_include.c -O1 -DMOE_NO_AVX512
    has_symbol "$out/avx512_$1.o" '_avx512$' && fail "AVX-512 kernels are in it"
    ! is_x86 || has_symbol "$out/avx512_$1.o" '_avx2$' || fail "AVX2 kernels are missing"
}
with_all_kernels() {
    need "$1"
    program "$1" "$out/all_$1" tests/compile/late_include.c -Os -DMOE_NO_AVX2=0 -DMOE_NO_AVX512=0 \
        -DMOE_NO_FUTEX=0 -DMOE_PARALLEL_EXPERTS=0 -DMOE_BALANCED_EXPERTS=0
    ! is_x86 || { has_symbol "$out/all_$1.o" '_avx2$' && has_symbol "$out/all_$1.o" '_avx512$'; } ||
        fail "vector kernels are missing"
    has_symbol "$out/all_$1.o" pthread_cond_wait && fail "condition variables are in it"
    return 0
}
without_futex() {
    need "$1"
    # shellcheck disable=SC2086
    program "$1" "$out/futex_$1" tests/compile/late_include.c $plain -DMOE_NO_FUTEX
    has_symbol "$out/futex_$1.o" 'pthread_cond_wait' || fail "condition variables are missing"
}

# schedule_macro COMPILER MACRO
schedule_macro() {
    need "$1"
    # shellcheck disable=SC2086
    program "$1" "$out/$2_$1" tests/compile/late_include.c $plain "-D$2"
}

# Plain C gives the same bits whether the processor has fused multiply-adds and whatever
# -ffp-contract says, but for clang's fast, which overrules what the header says.
# bits FOLDER OUT COMPILER FLAG...: what tests/compile/bits.c prints, OUT.txt; a PREFIX runs it
bits() {
    compile "$3" "$2.o" tests/compile/bits.c -DMOE_NO_AVX2 "${@:4}"
    # shellcheck disable=SC2086
    "$3" "${@:4}" "$2.o" -o "$2" $libs || exit 1
    mkdir -p "$1"
    ${PREFIX:-} "$2" "$1" >"$2.txt" || fail "$2: exit code $?"
    [ "$(wc -l <"$2.txt")" -ge 100 ] || fail "too few lines"
}
contraction() {
    local o=$out/bits_$1 how=fast
    need "$1"
    case $1 in clang*) how=on ;; esac
    grep -qw fma /proc/cpuinfo || skip "no fused multiply-adds here"
    bits "$o.models" "$o.apart" "$1" -ffp-contract=off
    bits "$o.models" "$o.fused" "$1" -ffp-contract=$how -mfma
    objdump -d --disassemble=of_the_user "$o.fused.o" | grep -q fmadd ||
        fail "the header changes how code behind it is compiled"
    diff "$o.apart.txt" "$o.fused.txt"
}
# The same on aarch64, which always has them.
aarch64() {
    local o=$out/bits
    need aarch64-linux-gnu-gcc
    need qemu-aarch64
    need gcc
    bits "$o.models" "$o.here" gcc -ffp-contract=off
    PREFIX=qemu-aarch64 bits "$o.models" "$o.aarch64" aarch64-linux-gnu-gcc -static
    diff "$o.here.txt" "$o.aarch64.txt"
}

# refused TEXT FLAG...: the compiler must stop with this text, and say nothing else
refused() {
    need gcc
    local text=$1
    shift
    gcc -I. -fsyntax-only "$@" tests/compile/impl.c >"$out/refused.$1" 2>&1 && fail "accepted: $*"
    grep -q "$text" "$out/refused.$1" || fail "refused, but not with '$text'"
    [ "$(grep -c 'error:' "$out/refused.$1")" = 1 ] || fail "more than one error"
}
both_schedules() { refused "not both" -DMOE_PARALLEL_EXPERTS -DMOE_BALANCED_EXPERTS; }
fast_math() { refused "ffast-math" -ffast-math; }
windows() { refused "POSIX" -D_WIN32; }
tiny_c() { refused "GCC or clang" -D__TINYC__; }
c90() { refused "C99" -std=c90; }
pointers_of_4_bytes() { refused "64-bit" -U__SIZEOF_POINTER__ -D__SIZEOF_POINTER__=4; }

march_native() {
    need "$1"
    program "$1" "$out/native_$1" tests/compile/late_include.c -march=native
}

# With -flto much of the compiler's work, and its warnings, come when the program is linked.
link_time() {
    local cc=$1 o=$out/lto_$1 more=
    need "$cc"
    echo 'int main(void) { return 0; }' >"$o.c"
    # shellcheck disable=SC2046
    "$cc" $(language "$cc") -flto "$o.c" -o "$o" 2>/dev/null || skip "$cc does not link with -flto"
    # GCC complains if it is not told how many jobs it may start. In C++ it warns inside its own
    # AVX-512 headers (bug 105593), and what the header says against that ends with the compile.
    case $cc in
        gcc) more=-flto=auto ;;
        g++) more="-flto=auto -Wno-uninitialized -Wno-maybe-uninitialized" ;;
    esac
    compile "$cc" "$o.o" tests/compile/late_include.c -flto
    # shellcheck disable=SC2086
    "$cc" $strict -flto $more "$o.o" -o "$o" $libs >"$o.said" 2>&1 ||
        { cat "$o.said"; fail "does not link"; }
    silent "$o.said"
    "$o" || fail "exit code $?"
}

# The header alone under the warnings of careful users, and every standard.
header_alone() {
    need "$1"
    local std more=
    case $1 in
        *++) set -- "$1" c++17 c++20; more="-Wold-style-cast -Wzero-as-null-pointer-constant" ;;
        *) set -- "$1" c11 gnu11 c17 gnu2x; more="-Wstrict-prototypes -Wmissing-prototypes" ;;
    esac
    echo '#include "moe_infer.h"' >"$out/alone_$1.c"
    for std in "${@:2}"; do
        # shellcheck disable=SC2046,SC2086
        "$1" $(language "$1") -std="$std" $strict -Wconversion $more -I. -fsyntax-only \
            "$out/alone_$1.c" || exit 1
    done
}
standards() {
    need "$1"
    local std
    case $1 in *++) set -- "$1" c++20 gnu++17 ;; *) set -- "$1" c17 gnu11 gnu2x ;; esac
    for std in "${@:2}"; do
        # shellcheck disable=SC2046,SC2086
        "$1" $(language "$1") -std="$std" $strict -I. -fsyntax-only tests/compile/impl.c || exit 1
    done
}

# Examples and tools, also those that no test builds.
other_programs() {
    need "$1"
    local source std pattern='*.c'
    case $1 in *++) std=c++17 pattern='*.cpp' ;; *) std=gnu11 ;; esac
    for source in bench/$pattern examples/$pattern tests/fuzz_$pattern; do
        [ -e "$source" ] || continue
        "$1" -std=$std -O1 -Wall -Wextra -Wpedantic -Wshadow -Werror -fsyntax-only "$source" ||
            exit 1
    done
}

true_map() { tests/map.sh "$header"; }
style() {
    local bad=0
    grep -nE '[[:space:]]+$' "$header" && { echo "blanks at the end of lines"; bad=1; }
    grep -nP '\t' "$header" && { echo "tabs"; bad=1; }
    LC_ALL=C.UTF-8 grep -nE '^.{101,}' "$header" && { echo "more than 100 columns"; bad=1; }
    return $bad
}

# ---- running them --------------------------------------------------------------------------------

names=()
check() { # NAME FUNCTION [ARGUMENT...]
    local name=$1
    shift
    if [ ${#wanted[@]} -gt 0 ]; then
        case " ${wanted[*]} " in *" $1 "* | *" $name "*) ;; *) return ;; esac
    fi
    while [ "$(jobs -rp | wc -l)" -ge "$jobs" ]; do wait -n; done
    names+=("$name")
    local log="$out/log.${name//[^A-Za-z0-9+-]/_}"
    (("$@") >"$log" 2>&1; echo $? >"$log.code") &
}
wanted=("$@")

check "the map is true" true_map
check "style of $header" style
for cc in gcc clang g++ clang++; do
    check "one implementation, $cc" one_implementation "$cc"
    check "examples and tools, $cc" other_programs "$cc"
    check "included twice, $cc" included_twice "$cc"
    check "two static copies, $cc" two_static_copies "$cc"
    check "-flto, $cc" link_time "$cc"
    check "late include, -O3, $cc" late_include "$cc"
    check "macros defined as 0, -Os, $cc" with_all_kernels "$cc"
    check "renamed header, -O0, $cc" renamed_header "$cc"
    check "header alone, $cc" header_alone "$cc"
    check "standards, $cc" standards "$cc"
done
for cc in gcc clang; do
    check "MOE_NO_AVX2, $cc" without_avx2 "$cc"
    check "MOE_NO_AVX512, $cc" without_avx512 "$cc"
    check "MOE_NO_FUTEX, $cc" without_futex "$cc"
    check "MOE_PARALLEL_EXPERTS, $cc" schedule_macro "$cc" MOE_PARALLEL_EXPERTS
    check "MOE_BALANCED_EXPERTS, $cc" schedule_macro "$cc" MOE_BALANCED_EXPERTS
    check "-march=native, $cc" march_native "$cc"
    check "fused multiply-adds, $cc" contraction "$cc"
done
check "the same bits on aarch64" aarch64
check "both schedule macros are refused" both_schedules
check "-ffast-math is refused" fast_math
check "Windows is refused" windows
check "tcc is refused" tiny_c
check "C90 is refused" c90
check "32 bits are refused" pointers_of_4_bytes
wait

passed=0 failed=0 skipped=0
for name in "${names[@]}"; do
    log="$out/log.${name//[^A-Za-z0-9+-]/_}"
    case $(cat "$log.code") in
        0) passed=$((passed + 1)) ;;
        77) skipped=$((skipped + 1)); echo "$name: skipped: $(tail -n 1 "$log")" ;;
        *) failed=$((failed + 1)); echo "$name: FAILED"; head -n 40 "$log" | sed 's/^/    /' ;;
    esac
done
line="$passed passed, $failed failed"
if [ $skipped -gt 0 ]; then line="$line, $skipped skipped"; fi
echo "$line"
[ $failed -eq 0 ]
