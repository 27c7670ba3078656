"""Concept lists ("metadata") for balancing: read from a file, put together from the paper's four kinds of sources, or
made from the pool's own text.

Xu et al. 2023, section 3.1: all WordNet lemmas, English Wikipedia words seen at least 100 times, its bigrams with a
pointwise mutual information of at least 30, titles of articles that are read; in this order, case-sensitive, up to
500,000. The authors found lists made from the captions themselves worse than these; such a list is for pools that no
list fits. Needs nothing but the files; `from_pool` needs Daft.
"""

from __future__ import annotations

import gzip
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_text
from palimpsest.curate import pool
from palimpsest.curate.matching import PUNCTUATION, WHITESPACE, spaced

LIMIT = 500_000
_CHANGED = re.compile(f"[{PUNCTUATION}{WHITESPACE}]")  # what `spaced` changes inside an entry


def load(path: str | Path) -> list[str]:
    """The entries of a ``.txt`` (one a line) or ``.json`` (a list of strings) file, ``.gz`` or not; twins are merged.

    Entries that would match exactly the same texts ("New\\tYork" and "New York") are twins: the first stands for all.
    """
    path = Path(path)
    if path.name.removesuffix(".gz").endswith(".json"):
        try:
            found = json.loads(_text(path))
        except json.JSONDecodeError as error:
            raise InputError(f"{path}:{error.lineno}: not valid JSON ({error.msg})") from error
        if not isinstance(found, list) or not all(isinstance(entry, str) for entry in found):
            raise InputError(f"{path}: wanted a list of strings")
    else:
        found = _text(path).splitlines()
    entries = _different(found)
    if not entries:
        raise InputError(f"{path}: the list of entries is empty; wanted at least one")
    return entries


def save(entries: Iterable[str], path: str | Path) -> None:
    """Write entries one a line."""
    write_text(path, "".join(f"{entry}\n" for entry in entries))


def build(
    *,
    lemmas: str | Path | None = None,
    unigrams: str | Path | None = None,
    bigrams: str | Path | None = None,
    titles: str | Path | None = None,
    unigram_count: int = 100,
    bigram_pmi: float = 30.0,
    title_views: float = 70.0,
    limit: int = LIMIT,
) -> list[str]:
    """A concept list from files: `lemmas` one a line, underscores meaning spaces, as in WordNet's ``index.*`` files
    (what follows a space and lines that begin with one are left out); the others ``entry TAB number`` with the count,
    PMI or views.

    The numbers "0" to "99" are added, bare punctuation is dropped, and the list ends at `limit` entries.
    """
    if (lemmas, unigrams, bigrams, titles) == (None,) * 4:
        raise InputError("wanted at least one of lemmas, unigrams, bigrams and titles")
    found: list[str] = []
    if lemmas is not None:
        lines = _text(Path(lemmas)).splitlines()
        found += [line.split(" ")[0].replace("_", " ") for line in lines if not line.startswith(" ")]
    found += [str(number) for number in range(100)]
    for path, least in ((unigrams, unigram_count), (bigrams, bigram_pmi), (titles, title_views)):
        if path is not None:
            found += [entry for entry, number in _numbered(Path(path)) if number >= least]
    entries = [entry for entry in _different(found) if any(character.isalnum() for character in entry)]
    return entries[:limit]


def from_pool(
    sources: Any,
    *,
    text: str = "text",
    unigram_count: int = 100,
    bigram_count: int = 100,
    bigram_pmi: float = 8.0,  # base 2, of pools far smaller than Wikipedia, where 30 cannot be reached
    limit: int = LIMIT,
) -> list[str]:
    """A concept list from the pool's own text: words seen at least `unigram_count` times, most frequent first, then
    pairs of neighbours seen at least `bigram_count` times whose mutual information log2(p(ab) / (p(a) p(b))) is at
    least `bigram_pmi`.

    `sources`: as `pool.shards` takes them, or shards.  Read one at a time; of a shard with more than a million
    different words (or pairs) those that it shows only once are not counted, so that memory holds what recurs.
    """
    words: dict[str, int] = {}
    pairs: dict[str, int] = {}
    shards = list(sources) if not isinstance(sources, str | Path) else []
    if not shards or not all(isinstance(shard, pool.Shard) for shard in shards):
        shards = pool.shards(sources)
    for shard in shards:
        for table, total in ((_grams(shard, text, 1), words), (_grams(shard, text, 2), pairs)):
            for gram, count in zip(*(table[name].to_pylist() for name in ("gram", "count")), strict=True):
                total[gram] = total.get(gram, 0) + count
    tokens = sum(words.values())
    frequent = sorted(
        (word for word, count in words.items() if count >= unigram_count), key=lambda word: (-words[word], word)
    )
    bound = []
    for pair, count in pairs.items():
        first, second = pair.split(" ")
        if count >= bigram_count and first in words and second in words:
            information = math.log2(count * tokens / (words[first] * words[second]))
            if information >= bigram_pmi:
                bound.append((-information, pair))
    entries = [entry for entry in _different([*frequent, *(pair for _, pair in sorted(bound))]) if _is_word(entry)]
    if not entries:
        raise InputError(
            f"no word of the pool is seen {unigram_count} times; lower unigram_count or give a list of entries"
        )
    return entries[:limit]


def _grams(shard: pool.Shard, text: str, size: int) -> pa.Table:
    """(gram, count) of a shard's word sequences of a length; those seen once in a shard of many rows are left out."""
    from palimpsest.curate.engine import text_column

    daft = pool.require_daft()

    @daft.func.batch(return_dtype=daft.DataType.list(daft.DataType.string()), use_process=False)
    def grams(column: Any) -> Any:
        rows = ([word for word in spaced(value or "").split(" ") if word] for value in column.to_pylist())
        return [[" ".join(row[i : i + size]) for i in range(len(row) - size + 1)] for row in rows]

    frame = shard.frame()
    found = frame.select(grams(text_column(frame, text)).alias("gram")).explode("gram").drop_null("gram")
    table = found.groupby("gram").agg(daft.col("gram").count().alias("count")).to_arrow()
    return table.filter(pc.greater(table["count"], 1)) if table.num_rows > 1_000_000 else table


def _is_word(entry: str) -> bool:
    return any(character.isalnum() for character in entry) and not any(mark in entry for mark in PUNCTUATION)


def _different(found: Sequence[str]) -> list[str]:
    """In order, without blank entries and twins."""
    seen: dict[str, str] = {}
    for entry in found:
        entry = entry.strip("\r\n")
        if entry.strip():
            seen.setdefault(spaced(entry)[1:-1] if _CHANGED.search(entry) else entry, entry)
    return list(seen.values())


def _numbered(path: Path) -> Iterator[tuple[str, float]]:
    for number, line in enumerate(_text(path).splitlines(), 1):
        entry, tab, value = line.rpartition("\t")
        try:
            if not tab:
                raise ValueError
            yield entry, float(value)
        except ValueError:
            raise InputError(f"{path}:{number}: found {line[:60]!r}; wanted 'entry TAB number'") from None


def _text(path: Path) -> str:
    try:
        raw = gzip.decompress(path.read_bytes()) if path.name.endswith(".gz") else path.read_bytes()
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); wanted UTF-8 text") from error
    except (OSError, EOFError) as error:
        raise InputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
