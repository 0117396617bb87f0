# Counts of a test script, for scripts to read (`. tests/check.sh`).
passed=0 failed=0 skipped=0
code= # of the command that is being looked at, where a script sets it

# check NAME COMMAND...: the command must succeed; complain says more if it does not, and
# may be defined anew
check() {
    local name=$1
    shift
    if "$@"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        echo "FAILED: $name${code:+ (exit code $code)}"
        complain
    fi
}
complain() { [ ! -e "$dir/err" ] || sed 's/^/    stderr: /' "$dir/err" | head -n 5; }
skip() { skipped=$((skipped + 1)); echo "skipped: $*"; }
exits() { [ "$code" -eq "$1" ]; }
