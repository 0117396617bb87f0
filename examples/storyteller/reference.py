"""Counts how well stories keep to what they introduced: names, jobs, things and relatives that come
back must be those that were there before. An empty line stands between two stories.

    python3 grammar.py --seed 7 --count 100 | python3 reference.py
    for s in $(seq 100); do make -s run SEED=$s; done 2>/dev/null | python3 reference.py [--show]

--show prints each story with a mistake and what it is; with --least P less than P % of the mentions
right are an error (exit code 1).
"""
import argparse
import re
import sys

import words as w


def one_of(choices):
    return "(" + "|".join(sorted(map(re.escape, choices), key=lambda c: (-len(c), c))) + ")"


NAME = re.compile(r"\b(named )?" + one_of(w.GIRLS + w.BOYS + w.PETS) + r"\b")
JOB = re.compile(r"\b([Aa]n? )?((?:old |young )?" + one_of(w.ELDERS) + r")\b( said that this was)?")
LOOK = one_of(w.COLOURS + w.FINE + w.WORN)
THING = re.compile(r"\b([Tt]he|[Mm]y|an?|pair of) (?:" + LOOK + " )?" +
                   one_of(w.THINGS + w.PAIRS) + r"\b")
NO_THINGS = "against the trunk|the key under|play(ing)? the flute|" + one_of(w.HIDING)
RELATIVE = re.compile(r"\b(?:[Hh]is|[Hh]er) " + one_of(w.KIN) + r"\b")


def mentions(story):
    """(what, right) of each time something comes back."""
    story = re.sub(NO_THINGS, "", story)
    known = set()
    for m in NAME.finditer(story):
        if m[1]:
            known.add(m[2])
        else:
            yield m[2], m[2] in known
    for m in JOB.finditer(story):
        if m[1] or story[: m.start()] == "The ":
            known.add(m[2])
        elif not m[4]:  # the judge of a contest comes from nowhere
            yield m[2], m[2] in known
    looks = {}
    for m in THING.finditer(story):
        article, look, noun = m[1].lower(), m[2], m[3]
        if article not in ("the", "my"):
            looks[noun] = looks.get(noun, set()) | {look}
        else:
            yield "%s %s" % (look, noun), noun in looks and (not look or look in looks[noun])
    kin = [m[1] for m in RELATIVE.finditer(story)]
    for relative in kin[1:]:
        yield relative, relative == kin[0]


def main():
    parser = argparse.ArgumentParser(description="Counts mistaken references in stories.")
    parser.add_argument("--show", action="store_true")
    parser.add_argument("--least", type=float, default=0)
    options = parser.parse_args()
    stories = [" ".join(s.split()) for s in re.split(r"\n\s*\n", sys.stdin.read()) if s.strip()]
    n, right, whole = 0, 0, 0
    for story in stories:
        found = list(mentions(story))
        wrong = [what for what, good in found if not good]
        n, right, whole = n + len(found), right + len(found) - len(wrong), whole + (not wrong)
        if wrong and options.show:
            print(story + "\n    mistaken: " + ", ".join(wrong) + "\n")
    print("%d of %d mentions right (%.1f %%), %d of %d stories without a mistake" % (
        right, n, 100 * right / max(n, 1), whole, len(stories)))
    if not n or 100 * right < options.least * n:
        sys.exit(1)


if __name__ == "__main__":
    main()
