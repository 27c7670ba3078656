"""C-BOD: is a benchmark score skill, or is the model tuned to the benchmark's own wording?

Cohen-Inger et al. 2025 (arXiv:2502.07445; EMNLP 2025).  Every question is reworded at strength mu, meaning, options and
answer kept; the same model answers both wordings, and McNemar's test says whether it does worse on the new one.  Needs
one model and one multiple-choice set; no training data.  It cannot tell tuning from wording that the model cannot read
(unknown words), nor judge a model that hardly beats guessing: then the verdict says "underpowered".

Ours beside the paper: the exact test where few items change, Holm's correction over strengths, effect sizes with
intervals, the power that the test had, and a null control that sets two rewordings against each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from palimpsest.audit.choices import (
    LETTERS,
    Answering,
    Item,
    answered,
    chance,
    distinct,
    items_sha256,
    sample,
)
from palimpsest.audit.mcnemar import Paired, fewest, needed, share_interval
from palimpsest.audit.rephrase import Gates, Rephraser, Reworded, asked_of, reword, rewriter
from palimpsest.core.errors import InputError
from palimpsest.core.files import sha256_of
from palimpsest.core.methods import config_of, info_of, method
from palimpsest.core.records import Evidence, Measurement
from palimpsest.core.seeds import derive
from palimpsest.core.statistics import holm

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

REWRITER = "rewriter"
ABOVE_CHANCE = 0.05  # of right answers: nearer to guessing, nothing can be lost by rewording
POWER = 0.8  # that a test should have
_CHANGING = 0.2  # the share of items that change with the wording, where none was measured yet

Outcome = Literal["flagged", "not flagged", "underpowered"]


@dataclass(frozen=True, eq=False)
class Wordings:
    """What the test compares: (N,) scores of the items on their own wording and on two rewordings drawn apart."""

    mu: float
    items: list[Item]
    questions: list[str]  # of the first rewording
    paired: Paired  # original against the first rewording
    null: Paired  # the second rewording against the first
    dropped: int
    failures: dict[str, int]


@method(verb="audit", paper="cbod")
@dataclass(frozen=True, kw_only=True)
class CBOD:
    """Rewords a benchmark and tests, item by item, whether the model's score depends on the benchmark's own wording."""

    job: ClassVar[str] = "audit-benchmark"  # what the command line gives it: one model and one file

    mu: float = 1.0  # how strongly to reword: about 0.1 synonyms, 1 rewording, 1.5 reformulation
    grid: tuple[float, ...] = ()  # further strengths; the correction counts them
    rephraser: str = REWRITER  # or a model's folder, or with base_url the name of a model there
    base_url: str = ""  # of an OpenAI-compatible endpoint
    answer: Answering = "likelihood"  # or "letter": the model writes one (the paper's way; for instructed models)
    by: Literal["sum", "mean"] = "mean"  # an option's likelihood: of the whole, or a token
    alpha: float = 0.05
    drop: float = 5.0  # points: the power to see such a drop is stated
    similarity: float = 0.8  # least cosine of a model's rewording to the original; 0: not looked at
    samples: int = 0  # items drawn; 0: all
    examples: int = 6  # items that changed, to be shown
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if min(self.strengths) < 0 or not 0 < self.alpha < 1 or not 0 < self.drop < 100 or self.samples < 0:
            raise InputError(
                f"mu={self.mu:g}, grid={self.grid}, alpha={self.alpha:g}, drop={self.drop:g}, samples={self.samples}: "
                "wanted strengths of at least 0, alpha between 0 and 1, a drop between 0 and 100 points"
            )
        if self.base_url and self.rephraser == REWRITER:
            raise InputError("base_url is of an endpoint: name its model with rephraser")

    @property
    def strengths(self) -> tuple[float, ...]:
        return (self.mu, *(mu for mu in self.grid if mu != self.mu))

    def __call__(self, lm: LM, items: Sequence[Item], rephraser: Rephraser | None = None) -> Evidence:
        """The evidence on one model and one benchmark.

        `rephraser` is used in place of the one named in the fields; its rewordings pass the same gates.  Raises
        `InputError` for fewer items than any test could decide on, and for contradicting copies of an item.
        """
        began = time.monotonic()
        tested, copies = distinct(items)
        tested = sample(tested, self.samples, self.seed)
        self._refuse_too_few(len(tested), "items are")
        original = answered(lm, tested, [item.question for item in tested], self.answer, self.by)
        compared = [self._compare(lm, tested, original, mu, rephraser) for mu in self.strengths]
        corrected = holm([one.paired.p for one in compared])
        outcomes = [self.outcome(one, p) for one, p in zip(compared, corrected, strict=True)]
        main, p = compared[0], float(corrected[0])
        info = info_of(self)
        return Evidence(
            kind="audit",
            measurements=tuple(self._measurements(main, p)),
            method={"name": info.name, "paper": info.paper, "config": config_of(self)},
            model={"before": {"source": lm.source, "sha256": lm.sha256}},
            data={
                "benchmark": {"rows": len(tested), "sha256": items_sha256(tested)},
                "reworded": {"rows": len(main.items), "sha256": sha256_of(main.questions)},
            },
            seconds=time.monotonic() - began,
            extras={
                "audit": {"name": info.name, "paper": info.paper, "config": config_of(self)},
                "outcome": outcomes[0],
                "verdict": self.words(main, outcomes[0], p),
                "asked": self._asked(main, copies),
                "table": self._table(compared, corrected, outcomes),
                "examples": self._flipped(main),
            },
        )

    def outcome(self, wordings: Wordings, p: float) -> Outcome:
        """The decision rule: flagged where p < alpha and the model does worse on the rewording."""
        if wordings.paired.first.mean() <= chance(wordings.items) + ABOVE_CHANCE:
            return "underpowered"
        return "flagged" if p < self.alpha and wordings.paired.b > wordings.paired.c else "not flagged"

    def words(self, wordings: Wordings, outcome: Outcome, p: float) -> str:
        """The verdict in words, with the power that it rests on."""
        paired, drop = wordings.paired, self.drop / 100
        had = paired.power(drop, self.alpha)
        told = (
            f"of {paired.n} items {paired.b} were lost and {paired.c} won by rewording (mu {wordings.mu:g}, p {p:.3g})"
        )
        rest = f"a drop of {self.drop:g} points would have been seen with a chance of {had:.0%}"
        if outcome == "underpowered":
            return (
                f"Underpowered: the model answers {paired.first.mean():.1%}, guessing {chance(wordings.items):.1%}, so "
                "there is nothing that rewording could lose."
            )
        if outcome == "flagged":
            return f"Flagged: the score depends on the benchmark's own wording; {told}; {rest}."
        more = "" if had >= POWER else f"; for {POWER:.0%} it takes {paired.needed(drop, self.alpha)} items"
        return f"Not flagged: no dependence on the wording is shown; {told}; {rest}{more}."

    def _compare(
        self, lm: LM, items: list[Item], original: np.ndarray, mu: float, rephraser: Rephraser | None
    ) -> Wordings:
        drawn = [self._reworded(items, mu, draw, rephraser) for draw in ("first", "second")]
        rows = np.intersect1d(drawn[0].rows, drawn[1].rows)
        left = [items[row] for row in rows]
        failures = drawn[0].failures + drawn[1].failures
        why = ", ".join(f"{count} {name}" for name, count in failures.most_common(3))
        self._refuse_too_few(len(left), f"of {len(items)} items could be reworded at mu {mu:g} ({why}), which are")
        texts = [[str(one.questions[row]) for row in rows] for one in drawn]
        scores = [answered(lm, left, questions, self.answer, self.by) for questions in texts]
        return Wordings(
            mu,
            left,
            texts[0],
            Paired(original[rows], scores[0]),
            Paired(scores[1], scores[0]),
            len(items) - len(left),
            dict(failures),
        )

    def _reworded(self, items: list[Item], mu: float, draw: str, rephraser: Rephraser | None) -> Reworded:
        built = rephraser or self._rephraser()
        drifts = rephraser is None and self.rephraser != REWRITER
        return reword(items, built, mu, derive(self.seed, draw), Gates(similarity=self.similarity if drifts else 0.0))

    def _rephraser(self) -> Rephraser:
        if self.rephraser == REWRITER:
            return rewriter
        from palimpsest.data.teacher import Teacher

        if self.base_url:
            return asked_of(Teacher.endpoint(self.rephraser, base_url=self.base_url))
        if not Path(self.rephraser).is_dir():
            raise InputError(
                f"{self.rephraser}: no such model folder; wanted '{REWRITER}', a model's folder, or --base-url with it"
            )
        from palimpsest.models.lm import LM

        return asked_of(Teacher.local(LM.load(self.rephraser), name=self.rephraser))

    def _refuse_too_few(self, n: int, what: str) -> None:
        least = fewest(self.alpha)
        if n < least:
            wanted = needed(self.drop / 100, max(_CHANGING, self.drop / 100), self.alpha, POWER)
            raise InputError(
                f"{n} {what} too few: a paired test at alpha {self.alpha:g} needs at least {least}, and about {wanted} "
                f"to see a drop of {self.drop:g} points with a chance of {POWER:.0%}"
            )

    def _measurements(self, main: Wordings, p: float) -> list[Measurement]:
        paired, null = main.paired, main.null
        low, high = share_interval(paired.second)
        drop, noise, relative, effect = (
            paired.drop_interval(),
            null.drop_interval(),
            paired.relative(self.seed),
            paired.g(),
        )
        test = "exact test" if paired.exact else f"chi-squared {paired.chi2:.2f}"
        note = (
            f"b {paired.b}, c {paired.c}, {test}, p {paired.p:.3g}, corrected for {len(self.strengths)} tests {p:.3g}"
        )
        return [
            Measurement(
                "reworded_accuracy",
                "benchmark",
                100 * float(paired.first.mean()),
                100 * float(paired.second.mean()),
                low=_percent(low),
                high=_percent(high),
                n=paired.n,
                better="higher",
                note=f"guessing answers {100 * chance(main.items):.1f}",
                values=tuple((100 * paired.second).tolist()),
                before_values=tuple((100 * paired.first).tolist()),
            ),
            _measurement("wording_drop", drop, paired.n, 100, note),
            _measurement("wording_drop_relative", relative, paired.n, 100),
            _measurement("wording_effect", effect, paired.b + paired.c, 1),
            _measurement("wording_noise", noise, null.n, 100, f"b {null.b}, c {null.c}, p {null.p:.3g}"),
        ]

    def _asked(self, main: Wordings, copies: list[int]) -> str:
        who = self.rephraser + (f" at {self.base_url}" if self.base_url else "")
        told = f"reworded by {who}, answered by {self.answer}"
        if main.dropped:
            why = ", ".join(f"{count} {name}" for name, count in main.failures.items())
            told += f"; {main.dropped} items without a good rewording left out of both sides ({why})"
        if copies:
            told += f"; {len(copies)} copies of items left out (rows {', '.join(map(str, copies[:20]))})"
        return told

    def _table(self, compared: list[Wordings], corrected: np.ndarray, outcomes: list[Outcome]) -> list[dict[str, Any]]:
        """A row a strength, then a row a group of items at the main strength."""
        rows = []
        for one, p, outcome in zip(compared, corrected, outcomes, strict=True):
            rows.append({"items": "all", **_row(one.mu, one.paired), "p": float(p), "outcome": outcome})
            rows[-1]["power"] = round(one.paired.power(self.drop / 100, self.alpha), 3)
        groups: dict[str, list[int]] = {}
        for row, item in enumerate(compared[0].items):
            groups.setdefault(item.group, []).append(row)
        if len(groups) > 1:
            for name, members in sorted(groups.items()):
                paired = Paired(compared[0].paired.first[members], compared[0].paired.second[members])
                rows.append({"items": name or "no group", **_row(compared[0].mu, paired), "p": paired.p})
        return rows

    def _flipped(self, main: Wordings) -> list[dict[str, Any]]:
        """Items that changed, lost ones first, to be read: drift of the meaning looks like tuning."""
        change = main.paired.second - main.paired.first
        rows = [row for row in np.argsort(change, kind="stable") if change[row]][: self.examples]
        told = {1: "right", 0: "wrong"}
        shown = []
        for row in rows:
            item = main.items[row]
            listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, item.options, strict=False))
            shown.append(
                {
                    "set": "lost by rewording" if change[row] < 0 else "won by rewording",
                    "prompt": f"{item.question}\n{listed}",
                    "truth": item.options[item.right],
                    "before": f"{told[round(main.paired.first[row])]} as the benchmark has it",
                    "after": f"{told[round(main.paired.second[row])]} when asked: {main.questions[row]}",
                }
            )
        return shown


def _row(mu: float, paired: Paired) -> dict[str, Any]:
    drop = paired.drop_interval()
    return {
        "mu": mu,
        "n": paired.n,
        "original": 100 * float(paired.first.mean()),
        "reworded": 100 * float(paired.second.mean()),
        "drop": 100 * drop.value,
        "low": _percent(drop.low),
        "high": _percent(drop.high),
        "b": paired.b,
        "c": paired.c,
        "drop beyond chance": 100 * paired.beyond_chance(),
    }


def _measurement(name: str, found: Any, n: int, scale: float, note: str = "") -> Measurement:
    low, high = (None if bound is None else scale * bound for bound in (found.low, found.high))
    told = "; ".join(part for part in (note, f"interval: {found.method}") if part)
    return Measurement(name, "benchmark", None, scale * found.value, low=low, high=high, n=n, better="zero", note=told)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value
