"""Sentences with two marked entities, as FewRel writes them, and views of them that keep the relation.

A semi-factual view keeps the label and changes what it should not depend on: the names of the entities, or a few of the
words between them.  Knows nothing of encoders.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng

DROPPED = 0.15  # share of the other words that a view leaves out
PLACEHOLDERS = ("someone", "something")  # words that stand for a head and a tail whose names are hidden


@dataclass(frozen=True)
class Relation:
    """A sentence in words; `head` and `tail` are spans of them, (first, one past the last), and do not overlap."""

    words: tuple[str, ...]
    head: tuple[int, int]
    tail: tuple[int, int]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def mentions(self) -> tuple[str, str]:
        return " ".join(self.words[slice(*self.head)]), " ".join(self.words[slice(*self.tail)])


def parse(row: Mapping[str, Any], where: str) -> Relation:
    """From ``{"tokens": [...], "head": [name, id, [[positions]]], "tail": ...}`` (or "h" and "t").

    Of an entity mentioned several times the first mention counts.  Raises InputError, beginning with `where`.
    """
    words = row.get("tokens")
    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
        raise InputError(f"{where}: 'tokens' must be a list of words")
    spans = []
    for name, short in (("head", "h"), ("tail", "t")):
        entity = row.get(name, row.get(short))
        try:
            places = [int(place) for place in entity[2][0]]
        except (TypeError, IndexError, KeyError, ValueError):
            raise InputError(f"{where}: '{name}' must be [name, id, [[positions of its words]]]") from None
        if not places or min(places) < 0 or max(places) >= len(words):
            raise InputError(f"{where}: '{name}' has the positions {places} in a sentence of {len(words)} words")
        spans.append((min(places), max(places) + 1))
    head, tail = spans
    if head[0] < tail[1] and tail[0] < head[1]:
        raise InputError(f"{where}: head and tail are the same words, or overlap ({head} and {tail})")
    return Relation(tuple(words), head, tail)


def renamed(relation: Relation, head: Sequence[str], tail: Sequence[str]) -> Relation:
    """The sentence with other words for its two mentions."""
    first, second = sorted([(relation.head, tuple(head), "head"), (relation.tail, tuple(tail), "tail")])
    words: list[str] = list(relation.words[: first[0][0]])
    spans = {}
    for (span, new, name), end in ((first, second[0][0]), (second, len(relation.words))):
        spans[name] = (len(words), len(words) + len(new))
        words += [*new, *relation.words[span[1] : end]]
    return Relation(tuple(words), spans["head"], spans["tail"])


def hidden(relation: Relation) -> Relation:
    """Both names replaced by words that say nothing."""
    return renamed(relation, PLACEHOLDERS[:1], PLACEHOLDERS[1:])


def thinned(relation: Relation, rng: np.random.Generator, share: float = DROPPED) -> Relation:
    """Each word outside the mentions left out with probability `share`."""
    inside = np.zeros(len(relation.words), dtype=bool)
    for span in (relation.head, relation.tail):
        inside[slice(*span)] = True
    return only(relation, inside | (rng.random(len(relation.words)) >= share))


def only(relation: Relation, kept: np.ndarray) -> Relation:
    """The words where `kept` (one a word) is true; both mentions must be among them."""
    new = np.concatenate([[0], np.cumsum(kept)])
    words = tuple(word for word, keep in zip(relation.words, kept, strict=True) if keep)
    (a, b), (c, d) = relation.head, relation.tail
    return Relation(words, (int(new[a]), int(new[b])), (int(new[c]), int(new[d])))


def semifactuals(relations: Sequence[Relation], *, seed: int = 0) -> list[tuple[Relation, Relation, Relation]]:
    """Three views of each: other names, hidden names, and a thinner sentence.

    The other names come, head for head and tail for tail, from another of `relations` at random: no types are known.
    """
    rng = numpy_rng(seed, "semifactuals")
    others = rng.permutation(len(relations))
    found = []
    for relation, other in zip(relations, others, strict=True):
        donor = relations[int(other)]
        head, tail = (donor.words[slice(*span)] for span in (donor.head, donor.tail))
        found.append((renamed(relation, head, tail), hidden(relation), thinned(relation, rng)))
    return found
