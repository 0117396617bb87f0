#!/bin/bash
# What the tools write: files are replaced only when the new one is whole, links, pipes and devices
# stay what they are, interrupted runs leave nothing, and no failed write goes unnoticed. Run from
# the repository root; the build folder is the argument. Ends with "N passed, N failed".
set -u
export LC_ALL=C
build=${1:-build}
dir=$build/tests/output
rm -rf "$dir"
mkdir -p "$dir/place"
for tool in moe-cli moe-quantize moe-synth moe-bench minimal; do
    [ -x "$build/$tool" ] || { echo "$build/$tool was not built"; exit 1; }
done
. tests/check.sh
ulimit -c 0 # some of the signals below would leave an image of the memory

run() {
    "$@" >"$dir/out" 2>"$dir/err" </dev/null
    code=$?
}
says() { grep -qe "$1" "$dir/err"; }
fails() { exits 1 && says "$1"; }

model=$dir/tiny.gguf
{ "$build/moe-synth" qwen3moe_tiny "$model" && "$build/moe-synth" micro_oss "$dir/oss.gguf" &&
    "$build/moe-synth" qwen3moe_tiny "$dir/big.gguf" --vocab 200000 --no-tokenizer --type f16; } \
    >"$dir/err" 2>&1 || {
    echo "cannot write a model"
    cat "$dir/err"
    echo "0 passed, 1 failed"
    exit 1
}

# ---- the tools that write files ------------------------------------------------------------------

# write_TOOL FILE
write_cli() { run "$build/moe-cli" -m "$model" -p x -n 2 -s 7 -t 1 --expert-stats "$1"; }
write_quantize() { run "$build/moe-quantize" "$model" "$1" Q8_0; }
write_synth() { run "$build/moe-synth" micro "$1"; }
write_bench() {
    run "$build/moe-bench" -m "$model" --sweep -c 32 -ub 32 -t 1 --no-roofs --no-warmup --svg "$1"
}
write_compare() {
    run "$build/compare/compare" -m "$model" -t 1 -p 2 -n 2 -r 1 --svg "$1" one="$build/moe-bench"
}
is_whole() { # FILE: that a tool wrote
    [ -s "$1" ] || return
    [ "$(head -c 4 "$1")" = GGUF ] && [ "$(stat -c %s "$1")" -gt 100000 ] ||
        { [ "$(head -c 4 "$1")" = '<svg' ] && [ "$(tail -n 1 "$1")" = '</svg>' ]; }
}
# holds NAME...: the place has these files and no other
holds() { [ "$(ls -A "$place" | sort)" = "$(printf '%s\n' "$@" | sort)" ]; }
# A device of our own: what goes wrong must not hit the machine's. Not every system lets us.
has_device() {
    rm -f "$1"
    mknod "$1" c 1 "$2" 2>/dev/null && { : >"$1"; } 2>/dev/null
}
write_pipe() { # TOOL
    mkfifo "$place/pipe"
    cat "$place/pipe" >"$dir/piped" &
    "write_$1" "$place/pipe"
    # the reader ends with the writer, and never if there was none
    if [ ! -p "$place/pipe" ] || [ "$code" -ne 0 ]; then kill $! 2>/dev/null; fi
    wait $! 2>/dev/null
}

place=$dir/place
for tool in cli quantize synth bench compare; do
    if [ $tool = compare ] && [ ! -x "$build/compare/compare" ]; then continue; fi
    rm -rf "$place"
    mkdir -p "$place/folder"
    write_$tool "$place/new"
    check "$tool: a new file" is_whole "$place/new"
    check "$tool: nothing beside it" holds folder new

    echo before >"$place/old"
    echo kept >"$place/old.tmp"
    chmod 640 "$place/old"
    echo kept >"$dir/other"
    ln -s ../other "$place/new.tmp"
    ln "$place/old" "$place/same"
    write_$tool "$place/old"
    check "$tool: an old file is replaced" is_whole "$place/old"
    check "$tool: and not written into" grep -qx before "$place/same"
    check "$tool: its permissions stay" test "$(stat -c %a "$place/old")" = 640
    write_$tool "$place/new"
    check "$tool: files of other names stay" grep -sqx kept "$place/old.tmp"
    check "$tool: so do links of other names" test "$(readlink "$place/new.tmp")" = ../other
    check "$tool: and what they lead to" grep -qx kept "$dir/other"

    # More than the limit is an error that is said, not the end of the program.
    echo before >"$place/old"
    (ulimit -f 1; write_$tool "$place/old"; exit $code)
    code=$?
    check "$tool: half a file is an error" fails ': File too large'
    check "$tool: what was there stays" grep -qx before "$place/old"
    check "$tool: no half file is left" holds folder new new.tmp old old.tmp same

    rm -f "$place"/*.tmp "$place/same"
    echo before >"$place/folder/far"
    ln -s far "$place/folder/second"
    ln -s folder/second "$place/link"
    ln -s nothing "$place/dangling"
    write_$tool "$place/link"
    check "$tool: a link stays a link" test "$(readlink "$place/link")" = folder/second
    check "$tool: also the second one" test "$(readlink "$place/folder/second")" = far
    check "$tool: what they lead to is written" is_whole "$place/folder/far"
    write_$tool "$place/dangling"
    check "$tool: a link to nothing stays" test "$(readlink "$place/dangling")" = nothing
    check "$tool: and leads to the file now" is_whole "$place/nothing"
    ln -s loop "$place/loop"
    write_$tool "$place/loop"
    check "$tool: links in a circle" fails 'symbolic links'
    write_$tool "$place/folder"
    check "$tool: a folder" fails 'Is a directory'
    write_$tool "$place/none/x"
    check "$tool: no such folder" fails 'No such file'

    write_pipe $tool
    check "$tool: a pipe stays one" test -p "$place/pipe"
    check "$tool: and gets the file" is_whole "$dir/piped"
    if has_device "$place/null" 3; then
        write_$tool "$place/null"
        check "$tool: a device stays one" test -c "$place/null"
        check "$tool: and can be written to" exits 0
        ln -s null "$place/to_null"
        write_$tool "$place/to_null"
        check "$tool: also behind a link" test -c "$place/null" -a -h "$place/to_null"
        has_device "$place/full" 7
        write_$tool "$place/full"
        check "$tool: a full device" fails 'No space left'
        check "$tool: is still there" test -c "$place/full"
    else
        skip "$tool: devices cannot be made here"
    fi
done

# ---- standard output as a file -------------------------------------------------------------------

# As /dev/stdout is, but a link of our own: what goes wrong must not hit the machine's.
stdout=$dir/stdout
ln -s /proc/self/fd/1 "$stdout"
write_quantize "$dir/q8.gguf"
cp "$dir/q8.gguf" "$dir/q8.kept"
"$build/moe-quantize" "$model" "$stdout" Q8_0 2>"$dir/err" | cat >"$dir/out"
check "quantize: to standard output, a pipe" cmp -s "$dir/out" "$dir/q8.gguf"
run "$build/moe-quantize" "$model" "$stdout" Q8_0
check "quantize: to standard output, a file" cmp -s "$dir/out" "$dir/q8.gguf"
run "$build/moe-synth" qwen3moe_tiny "$stdout"
check "synth: to standard output, a file" cmp -s "$dir/out" "$model"
write_cli "$stdout"
check "cli: the picture stands behind the text" test "$(grep -c '</svg>' "$dir/out")" -eq 1 -a \
    "$(head -c 4 "$dir/out")" != '<svg'
check "standard output: its link stays" test -h "$stdout"

# ---- input and output ----------------------------------------------------------------------------

cp "$model" "$dir/x.gguf.tmp"
run "$build/moe-quantize" "$dir/x.gguf.tmp" "$dir/x.gguf" Q8_0
check "quantize X.tmp X" exits 0
check "quantize X.tmp X: the input stays" cmp -s "$dir/x.gguf.tmp" "$model"
check "quantize X.tmp X: the output" cmp -s "$dir/x.gguf" "$dir/q8.gguf"
cp "$model" "$dir/in.gguf"
ln "$dir/in.gguf" "$dir/hard.gguf"
ln -s in.gguf "$dir/soft.gguf"
for out in in hard soft; do
    run "$build/moe-quantize" "$dir/in.gguf" "$dir/$out.gguf" Q8_0
    check "quantize: onto itself ($out): refused" exits 2
    check "quantize: onto itself ($out): the reason" says 'are the same file'
    check "quantize: onto itself ($out): nothing happened" cmp -s "$dir/in.gguf" "$model"
done
check "quantize: onto itself: links stay" test -h "$dir/soft.gguf"
run "$build/moe-cli" -m "$dir/in.gguf" -p x -n 1 --expert-stats "$dir/soft.gguf"
check "cli: no picture instead of the model" exits 2
echo x >"$dir/prompt"
run "$build/moe-cli" -m "$model" -f "$dir/prompt" -n 1 --expert-stats "$dir/prompt"
check "cli: no picture instead of the prompt" exits 2
run "$build/moe-bench" -m "$dir/in.gguf" --sweep -c 32 -ub 32 -t 1 --no-roofs --svg "$dir/in.gguf"
check "bench: no picture instead of the model" exits 2
check "nothing happened to the model" cmp -s "$dir/in.gguf" "$model"

# ---- interrupted ---------------------------------------------------------------------------------

# interrupt SIGNAL COMMAND...: sent when there is a draft in the place. Jobs of a shell that
# controls them do not ignore SIGINT.
interrupt() {
    local signal=$1
    shift
    set -m
    "$@" >"$dir/out" 2>"$dir/err" </dev/null &
    set +m
    until ls "$place"/*.tmp* >/dev/null 2>&1 || ! kill -0 $! 2>/dev/null; do :; done
    kill "-$signal" $! 2>/dev/null
    wait $! 2>/dev/null
    code=$?
}
rm -rf "$place"
mkdir "$place"
for signal in INT TERM HUP QUIT; do
    number=$((128 + $(kill -l $signal)))
    echo before >"$place/x.gguf"
    interrupt $signal "$build/moe-quantize" "$dir/big.gguf" "$place/x.gguf" IQ4_NL
    check "quantize: SIG$signal ends it" exits $number
    check "quantize: SIG$signal: no draft is left" holds x.gguf
    check "quantize: SIG$signal: what was there stays" grep -qx before "$place/x.gguf"
    rm -f "$place"/*.tmp*
    interrupt $signal "$build/moe-synth" qwen3-30b-a3b "$place/x.gguf" --layers 2 --type q4_0
    check "synth: SIG$signal ends it" exits $number
    check "synth: SIG$signal: no draft is left" holds x.gguf
    check "synth: SIG$signal: what was there stays" grep -qx before "$place/x.gguf"
    rm -f "$place"/*.tmp*
done

# ---- what moe-quantize changes -------------------------------------------------------------------

run "$build/moe-quantize" "$dir/oss.gguf" "$dir/oss8.gguf" Q8_0
check "quantize: nothing to say of rows that fit" test ! -s "$dir/err"
run "$build/moe-cli" -m "$dir/oss8.gguf" --info
# q, k, v, output; experts' gate, up, down; embedding and output. Biases of experts are 2-D, too.
check "quantize: weights alone" grep -q "^  Q8_0  *$((3 * 7 + 2)) " "$dir/out"
run "$build/moe-quantize" "$dir/oss.gguf" "$dir/oss8b.gguf" Q8_0 bias=Q4_0
check "quantize: no rule is for biases" cmp -s "$dir/oss8.gguf" "$dir/oss8b.gguf"
run "$build/moe-quantize" "$model" "$dir/q4.gguf" Q4_K attn_output=F16
check "quantize: rows that do not fit" exits 0
check "quantize: it says of which" \
    says '^moe-quantize: token_embd.weight: Q8_0 instead of Q4_K, .* rows of 64$'
check "quantize: not of those that fit" test "$(grep -c attn_output "$dir/err")" -eq 0
run "$build/moe-cli" -m "$dir/q4.gguf" --info
others=$(awk '/^  Q8_0 / { print $2 }' "$dir/out")
run "$build/moe-quantize" "$model" "$dir/q4.gguf" Q4_K attn_output=F16
check "quantize: of all of them" test "$(grep -c 'Q8_0 instead' "$dir/err")" = "$others"
check "quantize: how many" grep -q "; $others tensors of another type\$" "$dir/out"

# ---- a full disk ---------------------------------------------------------------------------------

if [ -w /dev/full ]; then
    # full COMMAND...
    full() {
        "$@" >/dev/full 2>"$dir/err" </dev/null
        code=$?
        check "no room: $(basename "$1") ${*:2:1}" fails 'cannot write'
    }
    for tool in moe-cli moe-bench moe-synth compare/compare engines kernels; do
        # an old build of a tool that the tests do not make says nothing
        [ -x "$build/$tool" ] && [ "$build/$tool" -nt examples/output.h ] || continue
        full "$build/$tool" --help
        full "$build/$tool" -h
    done
    full "$build/moe-cli" --version
    full "$build/moe-bench" --version
    full "$build/moe-synth" --list
    full "$build/moe-cli" --info -m "$model"
    full "$build/moe-bench" --plan -m "$model" -t 1
    full "$build/moe-bench" --sweep -m "$model" -c 32 -ub 32 -t 1 --no-roofs --no-warmup
    full "$build/moe-bench" --compare -m "$model" -p 2 -n 2 -r 1 -t 1 --no-roofs
    full "$build/moe-synth" micro "$dir/y.gguf"
    full "$build/moe-quantize" "$model" "$dir/y.gguf" F16
    if [ -x "$build/embed" ]; then full "$build/embed" "$model" x; fi
    "$build/minimal" "$model" x >/dev/full 2>"$dir/err"
    code=$?
    check "no room: minimal" exits 1
else
    skip "there is no /dev/full"
fi

rm -rf "$place" "$dir/big.gguf"
line="$passed passed, $failed failed"
if [ "$skipped" -gt 0 ]; then line="$line, $skipped skipped"; fi
echo "$line"
[ "$failed" -eq 0 ]
