#!/bin/bash
# README's table of architectures stands between two marks. tests/readme.sh BUILD compares it with
# the header's table of families and the reference results: with the references every line, without
# them the architectures alone. tests/readme.sh BUILD --write writes it anew.
set -e
table=$("$1"/tests/families_table)
begin='<!-- families: written by make readme-tables -->'
end='<!-- families end -->'
now=$(sed -n "/^$begin\$/,/^$end\$/p" README.md | sed '1d;$d')
if [ "$2" != --write ]; then
    if [ ! -d ../shared/golden/archs ]; then
        table=$(cut -d'|' -f2-4 <<< "$table")
        now=$(cut -d'|' -f2-4 <<< "$now")
    fi
    if [ "$table" = "$now" ]; then
        echo "1 passed, 0 failed, 0 skipped"
        exit 0
    fi
    diff <(echo "$now") <(echo "$table") || true
    echo "README's table of architectures is not what make readme-tables writes"
    echo "0 passed, 1 failed, 0 skipped"
    exit 1
fi
awk -v begin="$begin" -v end="$end" -v table="$table" '
    $0 == begin { print; print table; skip = 1 }
    $0 == end { skip = 0 }
    !skip && $0 != begin { print }' README.md > README.md.new
mv README.md.new README.md
