#!/bin/bash
# Keeps the map at the top of moe_infer.h true. The map is made of comment lines such as
#
#     /*  >>pool      3105  a team of threads: park, wake, barrier */
#
# A room opens with a line that holds "// >>TAG". This writes the room's line behind each tag of the
# map, as wide as the number (or the question mark) that stood there if it fits.
#
#     tests/map.sh FILE           rewrites the map
#     tests/map.sh --check FILE   says what is wrong and fails if the map is stale
set -eu
export LC_ALL=C
check=
if [ "${1-}" = --check ]; then check=1; shift; fi
file=${1-moe_infer.h}
new=$(mktemp)
trap 'rm -f "$new"' EXIT

awk '
    # First reading: where the rooms are. Lines of the map have no "// " before the tag.
    NR == FNR {
        if (match($0, /\/\/ >>[a-z0-9_]+/)) {
            tag = substr($0, RSTART + 5, RLENGTH - 5)
            if (tag in line) { print "map: two rooms are called >>" tag > "/dev/stderr"; bad = 1 }
            line[tag] = FNR
            n_rooms++
        }
        next
    }
    # Second reading: the lines of the map.
    match($0, /^[\/ ]\*? *>>[a-z0-9_]+ +([0-9]+|\?)/) && !/\/\/ >>/ {
        head = substr($0, 1, RLENGTH); tail = substr($0, RLENGTH + 1)
        match(head, />>[a-z0-9_]+/); tag = substr(head, RSTART + 2, RLENGTH - 2)
        match(head, / +([0-9]+|\?)$/); width = RLENGTH
        if (tag in line) {
            $0 = substr(head, 1, RSTART - 1) sprintf(" %" (width - 1) "d", line[tag]) tail
            mapped[tag] = 1
            n_mapped++
        } else { print "map: there is no room >>" tag > "/dev/stderr"; bad = 1 }
    }
    { print }
    END {
        for (tag in line)
            if (!(tag in mapped)) { print "map: >>" tag " is missing" > "/dev/stderr"; bad = 1 }
        if (!n_rooms) { print "map: no room found" > "/dev/stderr"; bad = 1 }
        exit bad
    }
' "$file" "$file" >"$new"

if cmp -s "$new" "$file"; then exit 0; fi
if [ "$check" ]; then
    echo "map: the lines of the map in $file are stale; run make map" >&2
    diff "$file" "$new" | head -20 >&2
    exit 1
fi
cat "$new" >"$file"
