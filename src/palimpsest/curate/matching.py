"""Which entries of a concept list occur in which texts: whole words only, half a million entries at once.

The rule is the official code's (Xu et al. 2023, `substr_matching`): put spaces around a text and around each of
``, . ; : ? ! ` `` in it, turn line ends and tabs into spaces, put a space on both sides of an entry; the entry matches
iff it occurs in the text.  Two differences, both told to the user in the docs: entries are spaced like texts, so that
"U.S." can match at all, and entries in scripts written without spaces (Chinese, Japanese, Thai, Lao, Khmer, Burmese,
Tibetan) match anywhere.

Under that rule a match begins and ends at spaces, so the search runs over tokens instead of characters: a hash table
from token to number, then a trie over numbers, both walked for all texts of a batch at once with array operations.
These let other threads run and stay in the processor's cache; an Aho-Corasick automaton over the characters of 500,000
entries does not (see benchmarks/metaclip_matching.py).  Entries without word borders do go through Aho-Corasick
(ahocorasick-rs).

Knows nothing of Daft, of counts or of sampling.  Shapes: M entries, N texts, L bytes, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.core.errors import InputError, MissingExtra

PUNCTUATION = ",.;:?!`"
WHITESPACE = "\t\n\r"
_CHUNK = 1 << 18  # bytes of text searched at once: the arrays of one chunk stay in the cache of the processor
_SEPARATOR = 0xFF  # after a text: no byte of UTF-8
_SEPARATED = b" \xff "
_UNSPACED = re.compile(
    "[\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff]"
)

Array = np.ndarray[Any, Any]


def spaced(text: str) -> str:
    """`text` as it is searched."""
    text = f" {text} "
    for mark in PUNCTUATION:
        text = text.replace(mark, f" {mark} ")
    for blank in WHITESPACE:
        text = text.replace(blank, " ")
    return text


def pattern(entry: str) -> str:
    """What must occur in a `spaced` text for `entry` to match it: the definition that `Matcher` is tested against."""
    return spaced(entry) if not _UNSPACED.search(entry) else spaced(entry)[1:-1]


class Matcher:
    """Finds the M `entries` (different, none blank) in batches of texts."""

    def __init__(self, entries: Sequence[str]):
        if not entries:
            raise InputError("the list of entries is empty; wanted at least one")
        blank = next((number for number, entry in enumerate(entries) if not entry.strip()), None)
        if blank is not None:
            raise InputError(f"entry {blank + 1} of the list is blank; wanted a word")
        unspaced = np.zeros(len(entries), bool)
        if _UNSPACED.search("\n".join(entries)):
            unspaced = np.array([bool(_UNSPACED.search(entry)) for entry in entries])
        words, parts = np.flatnonzero(~unspaced), np.flatnonzero(unspaced)
        self.size = len(entries)
        self._words = _Trie([entries[int(number)] for number in words], words) if len(words) else None
        self._parts = _Parts([entries[int(number)] for number in parts], parts) if len(parts) else None

    def __call__(self, texts: pa.Array) -> pa.ListArray:
        """(N,) strings -> (N,) lists of uint32: the entries that each text contains, once each, ascending; [] for
        null.
        """
        texts = texts.cast(pa.large_string()).fill_null("")
        found = [self._chunk(chunk) for chunk in _chunks(texts)]
        if not found:
            return pa.array([], pa.list_(pa.uint32()))
        return pa.concat_arrays(found)

    def _chunk(self, texts: pa.LargeStringArray) -> pa.ListArray:
        flat = _flat(texts)
        pairs = [search(flat) for search in (self._words, self._parts) if search is not None]
        keys = np.concatenate(
            [row * self.size + entry for row, entry in pairs]
        )  # row and entry in one number, to sort once
        keys.sort()
        keys = keys[np.diff(keys, prepend=-1) != 0]  # an entry counts once a text
        row, entry = np.divmod(keys, self.size)
        offsets = np.searchsorted(row, np.arange(len(texts) + 1)).astype(np.int32)
        return pa.ListArray.from_arrays(pa.array(offsets), pa.array(entry.astype(np.uint32)))


def _chunks(texts: pa.LargeStringArray) -> Iterator[pa.LargeStringArray]:
    """Consecutive slices of about `_CHUNK` bytes, at least one text each."""
    offsets = _offsets(texts)
    start = 0
    while start < len(texts):
        end = max(int(np.searchsorted(offsets, offsets[start] + _CHUNK, side="right")) - 1, start + 1)
        yield texts.slice(start, end - start)
        start = end


def _offsets(texts: pa.LargeStringArray) -> Array:
    """(N + 1,) where each text starts in the data buffer, and where the last one ends."""
    return np.frombuffer(texts.buffers()[1], np.int64, len(texts) + 1, texts.offset * 8)


_BLANKED = bytes.maketrans(
    WHITESPACE.encode() + b"\0", b" " * len(WHITESPACE) + b"\xfe"
)  # no token may hold a zero byte


def _bytes(text: str) -> bytes:
    return text.encode().translate(_BLANKED)


def _flat(texts: pa.LargeStringArray) -> bytes:
    """The `spaced` texts one after the other, each followed by the separator: ``" text \xff text \xff "``."""
    binary = texts.cast(pa.binary())
    joined = pc.binary_join(pa.ListArray.from_arrays([0, len(binary)], binary), _SEPARATED)[0].as_buffer().to_pybytes()
    for mark in PUNCTUATION:
        joined = joined.replace(mark.encode(), f" {mark} ".encode())
    return b"".join((b" ", joined.translate(_BLANKED), _SEPARATED))


@dataclass(frozen=True)
class _Table:
    """An open-addressing hash table from uint64 to int64 >= 0 that looks up whole arrays."""

    keys: Array  # (S,) uint64
    values: Array  # (S,) int64, -1 where the slot is free

    @staticmethod
    def build(keys: Array, values: Array) -> _Table:
        """From (K,) different keys and (K,) different values; at most half of the slots are taken."""
        size = 1 << max(4, int(2 * len(keys) - 1).bit_length())
        table = _Table(np.zeros(size, np.uint64), np.full(size, -1, np.int64))
        mask = np.uint64(size - 1)
        slots = _mixed(keys) & mask
        while len(keys):
            free = table.values[slots] < 0
            table.keys[slots[free]] = keys[free]  # of several claims to one slot the last stands
            table.values[slots[free]] = values[free]
            lost = table.values[slots] != values
            keys, values, slots = keys[lost], values[lost], (slots[lost] + np.uint64(1)) & mask
        return table

    def __call__(self, keys: Array) -> Array:
        """(K,) values, -1 where a key is not in the table."""
        mask = np.uint64(len(self.keys) - 1)
        slots = (_mixed(keys) & mask).view(np.int64)
        values = self.values.take(slots)
        other = np.flatnonzero(
            (values >= 0) & (self.keys.take(slots) != keys)
        )  # the slot holds another key: try the next
        slots = slots.take(other)
        while len(other):
            slots = (slots + 1) & (len(self.keys) - 1)
            found = self.values.take(slots)
            values[other] = found
            again = np.flatnonzero((found >= 0) & (self.keys.take(slots) != keys.take(other)))
            other, slots = other.take(again), slots.take(again)
        return values


def _mixed(keys: Array) -> Array:
    """Every bit of a key reaches every bit of the result (the finaliser of SplitMix64; Steele et al. 2014)."""
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


@dataclass(frozen=True)
class _Tokens:
    """Stretches of bytes of one buffer, none of them zero, compared 8 bytes at a time."""

    words: Array  # (L / 8 + 2,) the buffer as uint64
    starts: Array  # (T,) int64
    lengths: Array  # (T,) int64, bytes

    @staticmethod
    def of(flat: bytes, starts: Array, lengths: Array) -> _Tokens:
        return _Tokens(np.frombuffer(flat + bytes(16 - len(flat) % 8), "<u8"), starts, lengths)

    def select(self, which: Array) -> _Tokens:
        return _Tokens(self.words, self.starts.take(which), self.lengths.take(which))

    def block(self, number: int) -> Array:
        """(T,) uint64: bytes ``8 number`` to ``8 number + 7`` of each token, zero past its end."""
        start = self.starts + 8 * number
        place = start >> 3
        shift = ((start & 7) << 3).view(np.uint64)
        block = self.words.take(place) >> shift
        block |= (self.words.take(place + 1) << np.uint64(1)) << (np.uint64(63) - shift)
        block &= _FIRST_BYTES.take(self.lengths - 8 * number, mode="clip")
        return block

    def keys(self) -> Array:
        """(T,) uint64: of a token of up to 8 bytes the bytes themselves, of a longer one a hash."""
        keys = self.block(0)
        long = np.flatnonzero(self.lengths > 8)
        number = 1
        while len(long):
            keys[long] = _mixed(keys.take(long) * np.uint64(0x9E3779B97F4A7C15) ^ self.select(long).block(number))
            number += 1
            long = long[self.lengths.take(long) > 8 * number]
        return keys

    def equal(self, other: _Tokens) -> Array:
        """(T,) bool: whether each token is the same as the one of `other` in its place."""
        same = self.lengths == other.lengths
        left = np.flatnonzero(same)
        number = 0
        while len(left):
            same[left] = self.select(left).block(number) == other.select(left).block(number)
            number += 1
            left = left[same[left] & (self.lengths.take(left) > 8 * number)]
        return same


def _tokenised(flat: bytes) -> tuple[_Tokens, Array, Array]:
    """The tokens of `_flat` texts, (T,) which text each is of, and (T,) whether it is the separator after one."""
    buffer = np.frombuffer(flat, np.uint8)
    spaces = np.flatnonzero(buffer == ord(" "))
    starts = spaces[:-1] + 1
    separator = buffer.take(starts) == _SEPARATOR
    return _Tokens.of(flat, starts, np.diff(spaces) - 1), np.cumsum(separator), separator


_FIRST_BYTES = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)


class _Trie:
    """Entries with word borders: each a path of tokens."""

    def __init__(self, entries: Sequence[str], numbers: Array):
        flat = _flat(pa.array(entries, pa.large_string()))
        found, row, separator = _tokenised(flat)
        inside = np.flatnonzero(~separator)
        row = row.take(inside)
        tokens = self._index_tokens(found.select(inside))
        depth = np.bincount(row, minlength=len(entries))
        first = np.cumsum(depth) - depth
        node = np.full(len(entries), -1, np.int64)  # where each entry's path has got to
        steps, total = [], 0
        for level in range(int(depth.max())):
            inside = np.flatnonzero(depth > level)
            step = (node[inside] + 1) * len(self.tokens.starts) + tokens[
                first[inside] + level
            ]  # parent and token in one number
            different, child = np.unique(step, return_inverse=True)
            node[inside] = total + child
            steps.append(different)
            total += len(different)
        self.depth = len(steps)
        self.root = np.full(len(self.tokens.starts), -1, np.int64)  # (tokens,) the node of the first step
        self.root[steps[0]] = np.arange(len(steps[0]))
        later = np.concatenate([steps[0][:0], *steps[1:]])
        self.next = _Table.build(later.view(np.uint64), np.arange(len(steps[0]), total))
        self.inner = np.zeros(total, bool)  # (nodes,) a path goes on from here
        self.inner[later // len(self.root) - 1] = True
        self.entry = np.full(total, -1, np.int64)  # (nodes,) the entry whose path ends here
        self.entry[node] = numbers
        _refuse_twins(numbers, self.entry[node])

    def _index_tokens(self, tokens: _Tokens) -> Array:
        """Number the different words of the list, (T,) of them with repeats: those of up to 8 bytes first, which their
        keys tell apart without fail.
        """
        keys, first, number = np.unique(tokens.keys(), return_index=True, return_inverse=True)
        if not tokens.equal(tokens.select(first.take(number))).all():
            # a chance of 1e-8 at most; a wrong result must not pass in silence
            raise RuntimeError("two different words of the list have the same 64-bit key")
        long = tokens.lengths.take(first) > 8
        order = np.argsort(long, kind="stable")
        self.tokens = tokens.select(first.take(order))
        self.short = int((~long).sum())
        self.longest = int(self.tokens.lengths.max())
        self.numbers = _Table.build(keys.take(order), np.arange(len(keys)))
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        return place.take(number)

    def __call__(self, flat: bytes) -> tuple[Array, Array]:
        """(P,) texts and (P,) entries of all matches in the `_flat` texts; a pair may come more than once."""
        tokens, row, _ = _tokenised(flat)
        ids = self._numbered(tokens)
        place = np.flatnonzero(ids >= 0)  # where each path under way stands
        node = self.root.take(ids.take(place))
        rows, entries = [], []
        for _ in range(self.depth):
            alive = np.flatnonzero(node >= 0)
            place, node = place.take(alive), node.take(alive)
            entry = self.entry.take(node)
            ended = np.flatnonzero(entry >= 0)
            rows.append(row.take(place.take(ended)))
            entries.append(entry.take(ended))
            onward = np.flatnonzero(self.inner.take(node))
            place, node = place.take(onward) + 1, node.take(onward)
            token = ids.take(place)  # the separator after a text has no number, so no path leaves its text
            known = np.flatnonzero(token >= 0)
            place, node, token = place.take(known), node.take(known), token.take(known)
            node = self.next(((node + 1) * len(self.root) + token).view(np.uint64))
        return np.concatenate(rows), np.concatenate(entries)

    def _numbered(self, tokens: _Tokens) -> Array:
        """(T,) the number of each token, -1 if no entry has it."""
        numbers = self.numbers(tokens.keys())
        numbers[tokens.lengths > self.longest] = -1
        doubtful = np.flatnonzero((numbers >= 0) & ((tokens.lengths > 8) | (numbers >= self.short)))
        same = tokens.select(doubtful).equal(self.tokens.select(numbers.take(doubtful)))
        numbers[doubtful[~same]] = -1
        return numbers


class _Parts:
    """Entries without word borders: an automaton over bytes."""

    def __init__(self, entries: Sequence[str], numbers: Array):
        try:
            from ahocorasick_rs import BytesAhoCorasick
        except ModuleNotFoundError:
            raise MissingExtra("ahocorasick-rs", "curate") from None
        self.numbers = numbers
        self.automaton = BytesAhoCorasick([_bytes(pattern(entry)) for entry in entries])

    def __call__(self, flat: bytes) -> tuple[Array, Array]:
        """As `_Trie`."""
        matches = self.automaton.find_matches_as_indexes(flat, overlapping=True)
        found = np.array(matches, np.int64).reshape(-1, 3)  # pattern, start, end
        separators = np.flatnonzero(np.frombuffer(flat, np.uint8) == _SEPARATOR)
        return np.searchsorted(separators, found[:, 1]), self.numbers[found[:, 0]]


def _refuse_twins(numbers: Array, kept: Array) -> None:
    twins = np.flatnonzero(numbers != kept)
    if len(twins):
        a, b = sorted((int(numbers[twins[0]]), int(kept[twins[0]])))
        raise InputError(f"entries {a + 1} and {b + 1} of the list match the same texts; wanted different ones")
