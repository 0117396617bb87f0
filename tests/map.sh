#!/bin/bash
# Holds the map at the top of moe_infer.h against the file. A room opens with a line "// >>TAG";
# the map has a line "//   >>TAG  what lives there" for each of them, in the order of the file.
#
#     tests/map.sh [FILE]   says what is wrong and fails if the map is
set -eu
export LC_ALL=C
awk '
    /^\/\/ >>[a-z0-9_]+$/ {
        tag = substr($2, 3)
        if (tag in room) { print "map: two rooms are called >>" tag; bad = 1 }
        room[tag] = ++n_rooms
    }
    /^\/\/   >>[a-z0-9_]+ +[^ ]/ { mapped[++n_mapped] = substr($2, 3) }
    END {
        for (i = 1; i <= n_mapped; i++) {
            tag = mapped[i]
            if (!(tag in room)) { print "map: there is no room >>" tag; bad = 1 }
            else if (room[tag] != i) { print "map: >>" tag " is not in its place"; bad = 1 }
            in_map[tag] = 1
        }
        for (tag in room)
            if (!(tag in in_map)) { print "map: >>" tag " is missing"; bad = 1 }
        if (!n_rooms) { print "map: no room found"; bad = 1 }
        exit bad
    }
' "${1-moe_infer.h}" >&2
