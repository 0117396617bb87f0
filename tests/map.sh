#!/bin/bash
# Holds the first page of moe_infer.h against the file.
#
# The map: a room opens with a line "// >>TAG"; the map has a line "//   >>TAG  what lives there"
# for each of them, in the order of the file.
#
# The recipes: "//   a KIND, as WITNESS: PLACE, PLACE, ..." (and lines indented further that go on
# with it) tells what to touch to add one more of a kind. Every line of code that mentions the
# witness must be in one of these places, and each place must mention it. A place is what begins at
# the left margin (a function, a type, a table, a macro) or a whole room (>>TAG); "*" at its end
# stands for anything. Behind "also" are places that need not mention the witness.
#
#     tests/map.sh [FILE]   says what is wrong and fails if something is
set -eu
export LC_ALL=C
file=${1-moe_infer.h}
bad=0

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
' "$file" >&2 || bad=1

awk '
    # The name of what begins on this line at the left margin, if anything does.
    function begins(line) {
        if (line ~ /^#define /) {
            sub(/^#define /, "", line)
            sub(/[^A-Za-z0-9_].*/, "", line)
            return line
        }
        if (line ~ /^#/) return ""
        if (match(line, /(moe_|MOE_)[A-Za-z0-9_]+\(/) && line !~ /__attribute__/ &&
            substr(line, RSTART, RLENGTH) != "MOE__(")
            return substr(line, RSTART, RLENGTH - 1)
        if (match(line, /MOE__\([a-z0-9_]+\)/))
            return substr(line, RSTART + 6, RLENGTH - 7)
        if (match(line, /[a-z_0-9]+ *(\(|\[|\{|=)/)) {
            line = substr(line, RSTART, RLENGTH)
            sub(/ *.$/, "", line)
            return line
        }
        return ""
    }
    function is_place(name, list, n,   i, p) {
        for (i = 1; i <= n; i++) {
            p = list[i]
            if (p == name || (p ~ /\*$/ && index(name, substr(p, 1, length(p) - 1)) == 1)) return i
        }
        return 0
    }
    # First reading: the recipes.
    NR == FNR {
        if ($0 ~ /^\/\/   an? .*, as [^ ]+: /) {
            n_recipes++
            text[n_recipes] = substr($0, 3)
            reading = 1
        } else if (reading && $0 ~ /^\/\/     /) text[n_recipes] = text[n_recipes] " " substr($0, 3)
        else reading = 0
        line[FNR] = $0
        next
    }
    FNR == 1 {
        for (r = 1; r <= n_recipes; r++) {
            match(text[r], /, as [^ ]+: /)
            kind[r] = substr(text[r], 1, RSTART - 1)
            sub(/^ +/, "", kind[r])
            witness[r] = tolower(substr(text[r], RSTART + 5, RLENGTH - 7))
            rest = substr(text[r], RSTART + RLENGTH)
            also = ""
            if (match(rest, /also /)) { also = substr(rest, RSTART); rest = substr(rest, 1, RSTART - 1) }
            n_places[r] = 0
            while (match(rest, /(>>[a-z]+|[A-Za-z]+(_[A-Za-z0-9_]*\*?|\*))/)) {
                places[r, ++n_places[r]] = substr(rest, RSTART, RLENGTH)
                rest = substr(rest, RSTART + RLENGTH)
            }
            while (match(also, /[A-Za-z]+_[A-Za-z0-9_]*/)) {
                other[r, ++n_other[r]] = substr(also, RSTART, RLENGTH)
                also = substr(also, RSTART + RLENGTH)
            }
        }
    }
    /^\/\/ >>[a-z0-9_]+$/ { room = $2; place = "" }
    /^\/\// { next }
    /^[A-Za-z#]/ { name = begins($0); if (name != "") { place = name; known[place] = 1 } }
    {
        code = $0
        sub(/\/\/.*/, "", code)
        code = tolower(code)
        for (r = 1; r <= n_recipes; r++) {
            word = code
            gsub(witness[r] "_r[0-9]", "", word) # interleaved rows are types of their own
            if (!index(word, witness[r])) continue
            delete list
            for (i = 1; i <= n_places[r]; i++) list[i] = places[r, i]
            i = is_place(room, list, n_places[r])
            if (!i) i = is_place(place, list, n_places[r])
            if (i) seen[r, i] = 1
            else { print "recipe: " kind[r] ": " witness[r] " is in " place ", too (line " FNR ")"; bad = 1 }
        }
    }
    END {
        for (r = 1; r <= n_recipes; r++) {
            for (i = 1; i <= n_places[r]; i++)
                if (!((r, i) in seen)) {
                    print "recipe: " kind[r] ": " witness[r] " is not in " places[r, i]
                    bad = 1
                }
            for (i = 1; i <= n_other[r]; i++)
                if (!(other[r, i] in known)) { print "recipe: " kind[r] ": no " other[r, i]; bad = 1 }
        }
        if (n_recipes < 6) { print "recipe: only " n_recipes + 0 " found"; bad = 1 }
        exit bad
    }
' "$file" "$file" >&2 || bad=1
exit $bad
