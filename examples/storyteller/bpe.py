"""Byte-level byte-pair encoding: learning a vocabulary, and encoding with it as GPT-2 does."""
import collections
import re

# GPT-2's pieces, for ASCII text.
PIECES = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")


def byte_letters():
    """The letter by which byte-level BPE writes each byte."""
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    hidden = [b for b in range(256) if b not in shown]
    return {**{b: chr(b) for b in shown}, **{b: chr(256 + i) for i, b in enumerate(hidden)}}


LETTERS = byte_letters()


class Vocabulary:
    def __init__(self, merges, specials):
        self.merges = merges  # pairs of texts, in the order in which they were learned
        self.tokens = [LETTERS[b] for b in range(256)] + [a + b for a, b in merges] + specials
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.id = {token: i for i, token in enumerate(self.tokens)}
        self.cache = {}

    def encode(self, text):
        out = []
        for piece in PIECES.findall(text):
            if piece not in self.cache:
                self.cache[piece] = self.encode_piece(piece)
            out += self.cache[piece]
        return out

    def encode_piece(self, piece):
        symbols = [LETTERS[b] for b in piece.encode()]
        while len(symbols) > 1:
            ranks = [self.rank.get(pair, 1 << 30) for pair in zip(symbols, symbols[1:])]
            best = min(ranks)
            if best == 1 << 30:
                break
            at = ranks.index(best)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
        return [self.id[s] for s in symbols]


def learn(texts, n_merges, whole=()):
    """The merges that shorten the texts most, one after another; ties go to the smaller pair. The
    pieces in `whole` count 30 times, so that most become a single token: who is named once can be
    named again by copying one token."""
    count = collections.Counter(piece for text in texts for piece in PIECES.findall(text))
    for piece in whole:
        count[piece] *= 30
    pieces = [([LETTERS[b] for b in piece.encode()], n) for piece, n in sorted(count.items())]
    merges = []
    for _ in range(n_merges):
        pairs = collections.Counter()
        for symbols, n in pieces:
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += n
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for symbols, _ in pieces:
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges
