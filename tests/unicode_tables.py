#!/usr/bin/env python3
"""Prints the table of character classes in the room >>text of moe_infer.h.

    python3 tests/unicode_tables.py                  print the C text
    python3 tests/unicode_tables.py --check FILE     exit 1 if FILE holds another table

Source: unicodedata of Python's standard library (its Unicode version is part of the output, so
a Python with another version reports a difference of versions, exit 2, not of tables).

Format: the code points from 0 up, cut into runs of one class. A run is written in one or more
characters. Each stands for a value v, its place in ALPHABET. v < 84 ends a run: class v / 6,
length 1 + v % 6 + 6 * (the number made of the characters before). 84 <= v < 91 are the base-7
digits of that number, most significant first. What lies behind the last run is "other".
"""
import sys
import unicodedata

ALPHABET = "".join(chr(c) for c in range(33, 127) if chr(c) not in "\"?\\")
CLASSES = ["other", "white", "Lu", "Ll", "Lt", "Lm", "Lo", "M", "N", "P", "S",
           "LuLl",    # upper and lower case in turns, an upper case letter first
           "Lu new",  # upper / lower case letters that are not in DEEPSEEK_CASED
           "Ll new"]
LENGTHS, DIGITS = 6, 7
WIDTH = 96

# White_Space of PropList.txt (stable; unicodedata does not have it).
WHITE_SPACE = {*range(0x09, 0x0E), 0x20, 0x85, 0xA0, 0x1680, *range(0x2000, 0x200B), 0x2028,
               0x2029, 0x202F, 0x205F, 0x3000}

# The letters that the pre-tokenizer of DeepSeek LLM / V2 lists one by one.
DEEPSEEK_CASED = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A
38C 38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF
1D00-1D2B 1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D
1F5F-1F7D 1F80-1FB4 1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4
1FF6-1FFC 2102 2107 210A-2113 2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F
2145-2149 214E 2183 2184 2C00-2C7B 2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F
A771-A787 A78B-A78E AB70-ABBF FB00-FB06 FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3
104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF 1E900-1E943
"""


def cased_set():
    letters = set()
    for item in DEEPSEEK_CASED.split():
        first, _, last = item.partition("-")
        letters.update(range(int(first, 16), int(last or first, 16) + 1))
    return letters


def class_of(code, cased):
    if code in WHITE_SPACE:
        return "white"
    category = unicodedata.category(chr(code))
    if category in ("Lu", "Ll") and code not in cased:
        return category + " new"
    if category in ("Lu", "Ll", "Lt", "Lm", "Lo"):
        return category
    return category[0] if category[0] in "MNPS" else "other"


def runs():
    cased = cased_set()
    names = [class_of(code, cased) for code in range(0x110000)]
    odd = [hex(c) for c in cased if names[c] not in ("Lu", "Ll", "Lt", "other")]
    assert not odd, "not cased letters: %s" % odd
    single = []
    for name in names:
        if single and single[-1][0] == name:
            single[-1][1] += 1
        else:
            single.append([name, 1])
    while single[-1][0] == "other":
        single.pop()
    merged, i = [], 0
    while i < len(single):
        j = i
        while j < len(single) and single[j] == [("Lu", "Ll")[(j - i) % 2], 1]:
            j += 1
        if j - i >= 3:
            merged.append(("LuLl", j - i))
            i = j
        else:
            merged.append(tuple(single[i]))
            i += 1
    return merged


def encode(name, length):
    high, low = divmod(length - 1, LENGTHS)
    text = ALPHABET[CLASSES.index(name) * LENGTHS + low]
    while high:
        high, digit = divmod(high, DIGITS)
        text = ALPHABET[len(CLASSES) * LENGTHS + digit] + text
    return text


def table():
    merged = runs()
    text = "".join(encode(*run) for run in merged)
    lines = [text[i:i + WIDTH - 7] for i in range(0, len(text), WIDTH - 7)]
    head = "// Unicode %s, %d runs; printed by tests/unicode_tables.py.\n" % (
        unicodedata.unidata_version, len(merged))
    head += "enum { MOE__TEXT_RUNS = %d };\n" % len(merged)
    head += "static const char *const moe__text_classes[] = {\n"
    return head + "".join('    "%s",\n' % line for line in lines) + "};\n"


def main():
    text = table()
    if len(sys.argv) == 1:
        sys.stdout.write(text)
        return 0
    if len(sys.argv) != 3 or sys.argv[1] != "--check":
        sys.exit(__doc__)
    with open(sys.argv[2], encoding="utf-8") as file:
        found = file.read()
    if text in found:
        print("character classes are up to date (Unicode %s)" % unicodedata.unidata_version)
        return 0
    if "// Unicode %s," % unicodedata.unidata_version not in found:
        print("cannot compare: this Python has Unicode %s" % unicodedata.unidata_version)
        return 2
    print("%s: the table of character classes differs from tests/unicode_tables.py" % sys.argv[2])
    return 1


if __name__ == "__main__":
    sys.exit(main())
