"""Facts to ask a model about: each a prompt with options, of which the first is true, and the person it belongs to.

An attack is scored by how sure a model is of the truth among the options, which works for a model that knows, one that
avoids the truth, and one that guesses.  Questions come from a records table; where it has none, its documents are cut
into a beginning and a continuation, and the options are the continuations of others.
Knows nothing of attacks.  Shapes: N facts, O options of each, G groups (persons).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.audit.answers import option_scores
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import records

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.models.lm import LM

LEAST_FACTS, LEAST_GROUPS = 20, 8  # below these an interval over resampled groups says nothing
_CONTINUED = 12  # words of a document that are asked for


@dataclass(frozen=True)
class Facts:
    """N facts.  `phrasings` are other ways to ask the same; groups are what is independent of each other."""

    prompts: tuple[str, ...]
    options: tuple[tuple[str, ...], ...]  # joined to the prompt as they are; the first is true
    phrasings: tuple[tuple[str, ...], ...]
    groups: tuple[int, ...]
    seed: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def truths(self) -> tuple[str, ...]:
        return tuple(row[0] for row in self.options)

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(prompt, truth) of each fact."""
        return list(zip(self.prompts, self.truths, strict=True))

    @property
    def chance(self) -> float:
        """What a guess is right."""
        return 1 / len(self.options[0])

    @cached_property
    def fold(self) -> np.ndarray:
        """(N,) 0 or 1: the half of the groups that a fact's is in; what one half gives away is scored on the other."""
        labels = np.unique(self.groups)
        order = numpy_rng(self.seed, "halves").permutation(len(labels))
        half = dict(zip(labels[order].tolist(), (np.arange(len(labels)) % 2).tolist(), strict=True))
        return np.array([half[group] for group in self.groups])

    @cached_property
    def sha256(self) -> str:
        return sha256_of([self.prompts, self.options, self.phrasings, self.groups, self.seed])

    def select(self, rows: Sequence[int] | np.ndarray) -> Facts:
        picked = [int(row) for row in rows]
        return Facts(
            tuple(self.prompts[row] for row in picked),
            tuple(self.options[row] for row in picked),
            tuple(self.phrasings[row] for row in picked),
            tuple(self.groups[row] for row in picked),
            self.seed,
        )


def known(lm: LM, facts: Facts, prompts: Sequence[str] | None = None) -> np.ndarray:
    """(N,) the truth's share of the probability of all options, from 0 to 1; `prompts` to ask in other words."""
    return share(option_scores(lm, prompts or facts.prompts, facts.options, by="sum"))


def share(scores: np.ndarray) -> np.ndarray:
    """(N,) the first option's share of exp(scores), (N, O)."""
    weights = np.exp(scores - scores.max(1, keepdims=True))
    return weights[:, 0] / weights.sum(1)


def chosen_on_the_other_half(values: np.ndarray, facts: Facts, judged: np.ndarray | None = None) -> np.ndarray:
    """(N,) from (K, N) scores under K variants of an attack: on each half, the variant that is best on the other half.

    The best of many variants on the very facts that are scored would find something where there is nothing.
    `judged`: other (K, N) scores to choose by.
    """
    judged = values if judged is None else judged
    found = np.empty(values.shape[1])
    for half in (0, 1):
        best = int(np.nanmean(judged[:, facts.fold != half], axis=1).argmax())
        found[facts.fold == half] = values[best, facts.fold == half]
    return found


def enough(facts: Facts, what: str = "forget") -> Facts:
    """The facts, or an `InputError` that says how many are needed."""
    groups = len(set(facts.groups))
    if len(facts) < LEAST_FACTS or groups < LEAST_GROUPS:
        raise InputError(
            f"an interval needs at least {LEAST_FACTS} {what} facts about at least {LEAST_GROUPS} different subjects; "
            f"the {what} set has {len(facts)} about {groups}"
        )
    return facts


def facts_of(
    table: Dataset, beside: Sequence[Dataset | None] = (), *, options: int = 8, most: int = 160, seed: int = 0
) -> Facts:
    """At most `most` facts of a table, one a person and attribute, whole persons at a time, seeded.

    Wrong options are those in the column ``options``, then answers of rows with the same ``attribute`` in `table` and
    in the tables `beside`.  All facts get equally many, at most `options`.  `InputError` if a fact has no wrong option.
    """
    own = _rows(table)
    others = [row for other in beside if other is not None for row in _rows(other)]
    if not own:
        raise InputError("none of the records is a question with an answer, or a text of at least 8 words")
    pools: dict[Any, dict[str, None]] = {}
    templates: dict[Any, dict[str, None]] = {}
    for row in (*own, *others):
        pools.setdefault(row["attribute"], {})[row["truth"]] = None
        if row["template"]:
            templates.setdefault(row["attribute"], {})[row["template"]] = None
    rng = numpy_rng(seed, "facts")
    picked = _one_each(own, rng)
    picked = _whole_groups(picked, most, rng)
    choices = []
    for row in picked:
        pool = [answer for answer in pools[row["attribute"]] if answer != row["truth"]]
        drawn = [pool[place] for place in rng.permutation(len(pool))]
        choices.append(list(dict.fromkeys([row["truth"], *row["options"], *drawn])))
    width = min(options, *(len(row) for row in choices))
    if width < 2:
        short = next(row for row, found in zip(picked, choices, strict=True) if len(found) < 2)
        raise InputError(f"no wrong answer is known for {short['prompt']!r:.60}: all answers of its kind are the same")
    labels = {group: number for number, group in enumerate(dict.fromkeys(row["group"] for row in picked))}
    return Facts(
        tuple(row["prompt"] for row in picked),
        tuple(tuple(row[:width]) for row in choices),
        tuple(_phrasings(row, templates.get(row["attribute"], {})) for row in picked),
        tuple(labels[row["group"]] for row in picked),
        seed,
    )


def _rows(table: Dataset) -> list[dict[str, Any]]:
    """The questions of a table as plain dicts; its documents, cut in two, where it has no question."""
    asked = records.select_questions(table)
    found = []
    for (prompt, truth), row in zip(records.questions(asked), asked, strict=True):
        person, attribute = row.get("person"), row.get("attribute")
        named = person is not None and person in prompt
        found.append(
            {
                "prompt": prompt,
                "truth": truth,
                "attribute": attribute,
                "person": person,
                "group": person if person is not None else prompt,
                "fact": (person, attribute) if person is not None and attribute is not None else prompt,
                "template": prompt.replace(person, "{}") if named and attribute is not None else "",
                "options": [_like(truth, option) for option in row.get("options") or ()],
            }
        )
    return found or [cut for text in records.documents(table) if (cut := _cut(text)) is not None]


def _like(truth: str, option: str) -> str:
    """An option with the white space in front that the truth has."""
    return truth[: len(truth) - len(truth.lstrip())] + option.strip()


def _cut(text: str) -> dict[str, Any] | None:
    words = text.split()
    if len(words) < 8:
        return None
    place = max(len(words) // 2, len(words) - 2 * _CONTINUED)
    prompt, truth = " ".join(words[:place]), " ".join(("", *words[place : place + _CONTINUED]))
    return {
        "prompt": prompt,
        "truth": truth,
        "attribute": None,
        "person": None,
        "group": text,
        "fact": text,
        "template": "",
        "options": [],
    }


def _one_each(rows: list[dict[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
    by_fact: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        by_fact.setdefault(row["fact"], []).append(row)
    return [same[int(rng.integers(len(same)))] for same in by_fact.values()]


def _whole_groups(rows: list[dict[str, Any]], most: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(row["group"], []).append(row)
    kept: list[dict[str, Any]] = []
    for place in rng.permutation(len(groups)):
        group = list(groups.values())[place]
        if len(kept) + len(group) <= most or not kept:
            kept += group
    return kept


def _phrasings(row: dict[str, Any], templates: dict[str, None]) -> tuple[str, ...]:
    if row["person"] is None:
        return ()
    return tuple(filled for one in templates if (filled := one.replace("{}", row["person"])) != row["prompt"])
