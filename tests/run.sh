#!/bin/bash
# Runs test programs one after another and adds up what they report.
#
#     tests/run.sh BUILD PROGRAM...
#
# A program ends its output with "N passed, N failed" or "N passed, N failed, N skipped"; without
# that line, or with a bad exit code and no failure, it counts as one failure. Scripts get the build
# folder as their argument. The output of what fails is shown; all of it stays in BUILD/tests/.
# The last line is the sum of all.
set -u
build=$1
shift
passed=0 failed=0 skipped=0
mkdir -p "$build/tests"

for program; do
    name=$(basename "$program")
    log=$build/tests/${name%.sh}.log
    case $program in
        *.sh) command=("$program" "$build") ;;
        *) command=("$program") ;;
    esac
    begin=$(date +%s)
    rm -f "$log"
    # the outer redirection silences bash about programs that a signal ended
    { timeout -k 10 "${TEST_TIMEOUT:-900}" "${command[@]}" >"$log" 2>&1 </dev/null; } 2>/dev/null
    code=$?
    seconds=$(($(date +%s) - begin))
    note=
    result='^([0-9]+) passed, ([0-9]+) failed(, ([0-9]+) skipped)?$'
    if [[ $(tail -n 1 "$log") =~ $result ]]; then
        p=${BASH_REMATCH[1]} f=${BASH_REMATCH[2]} s=${BASH_REMATCH[4]:-0}
        if [ "$code" -ne 0 ] && [ "$f" -eq 0 ]; then
            f=1 note=", exit code $code"
        fi
    else
        p=0 f=1 s=0
        case $code in
            124) note=", took too long" ;;
            127) note=", was not built" ;;
            *) note=", no result, exit code $code" ;;
        esac
    fi
    passed=$((passed + p)) failed=$((failed + f)) skipped=$((skipped + s))
    printf '%-24s %4d passed, %d failed, %d skipped%s (%d s)\n' "$name" "$p" "$f" "$s" "$note" \
        "$seconds"
    if [ "$f" -gt 0 ]; then
        sed 's/^/    | /' "$log" | tail -n "${TEST_LINES:-200}"
    fi
done

line="$passed passed, $failed failed"
if [ "$skipped" -gt 0 ]; then line="$line, $skipped skipped"; fi
echo "$line"
[ "$failed" -eq 0 ]
