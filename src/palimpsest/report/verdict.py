"""The verdict in words, derived from the measurements by one stated rule and nothing else.

Knows nothing of how it is shown.  A verdict is only as good as its reference: without one, it says what cannot be said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from palimpsest.audit.cards import card
from palimpsest.core.records import Evidence, Measurement
from palimpsest.report.words import (
    given,
    interval,
    lower_first,
    missing,
    number,
    percent,
    places_of,
    reference_interval,
)

Level = Literal["good", "mixed", "bad", "unknown"]
Memory = Literal["reached", "above", "unchanged", "fell", "missing"]
Cost = Literal["kept", "cost", "destroyed", "missing"]
Privacy = Literal["quiet", "leaks", "wide", "missing"]

KEPT = 0.9  # of the value before: at least this much counts as kept
DESTROYED = 0.5  # below this much the model is broken rather than changed
GIBBERISH = 50.0  # percent of answers: above this the model is broken as well
WIDE = 25.0  # percent of leakage: an interval reaching further from zero than this cannot show that nothing leaks

RULE = (
    "A memory score (verbatim, knowledge) has reached the reference when it lies inside the reference's 95% interval "
    "or beyond it, seen from before, or when the reference lies inside the score's own interval; otherwise the "
    "distance is given.",
    f"Utility counts as kept from {KEPT:.0%} of its value before. Below {DESTROYED:.0%}, or when more than "
    f"{GIBBERISH:.0f}% of answers are gibberish, it counts as destroyed, and low memory scores then say nothing about "
    "forgetting. Where nothing can be asked, the likelihood of a true token stands for utility.",
    f"Privacy leakage shows when its 95% interval leaves out zero. When the interval holds zero but reaches beyond "
    f"{WIDE:.0f}%, "
    "it is too wide to tell.",
    "Without a reference model nobody can say whether a score is low enough, so the verdict does not.",
)
COURSES = {"scalability": "On the largest request", "sustainability": "After the last of the successive requests"}
PLAIN_RULE = (
    "A measurement is better or worse when its 95% interval leaves out the value before; otherwise no change is shown.",
)
BROKEN = " The model is broken for its other uses, and its low memory scores say nothing about forgetting."


@dataclass(frozen=True)
class Verdict:
    headline: str
    sentences: tuple[str, ...]
    level: Level
    rule: tuple[str, ...]  # by which it was made


def verdict(evidence: Evidence) -> Verdict:
    """What the measurements say, in words.  The rule comes with it, and the report prints it.

    Evidence without a memory score (nothing was to be forgotten) gets one sentence a measurement instead.
    """
    memories = _memories(evidence)
    if not memories:
        return _plain(evidence)
    memory_states, sentences = [], []
    for m in memories:
        state, sentence = _memory(m)
        memory_states.append(state)
        sentences.append(sentence)
    cost, kept, sentence = _cost(evidence)
    sentences.append(sentence)
    privacy, sentence = _privacy(evidence)
    sentences.append(sentence)
    sentences += _later_requests(evidence)
    babble = _babble(evidence, forget=True)
    if babble > GIBBERISH and cost != "destroyed":
        sentences.append(f"{number(babble, 0)}% of what it says about the forget set is gibberish.")
    if any(given(m.after) for m in memories) and not any(given(m.reference) for m in memories):
        sentences.append(
            "No reference model was given. A model trained without these records can guess some answers too, so "
            "whether these scores are low enough cannot be said; a retrained reference would say it."
        )
    headline, level = _headline(memories, memory_states, cost, kept, privacy, babble > GIBBERISH)
    return Verdict(headline, tuple(sentences), level, RULE)


def reading(m: Measurement) -> str:
    """A few words for one row of a table: how *after* stands to what it should be."""
    if not given(m.after):
        return "not measured"
    assert m.after is not None
    if m.better == "reference" and given(m.reference):
        gap, inside = _gap(m)
        if inside:
            return "within the reference's interval"
        return f"{number(abs(gap), places_of(m))} {'above' if gap > 0 else 'below'} the reference"
    if m.better == "zero":
        if not (given(m.low) and given(m.high)):
            return "no interval"
        assert m.low is not None
        assert m.high is not None
        return "zero lies in the interval" if m.low <= 0 <= m.high else f"{'above' if m.after > 0 else 'below'} zero"
    if m.better == "higher" and given(m.before) and m.before and m.before > 0:
        return f"{percent(m.after / m.before)} of before"
    change = _change(m)
    return f"{change} than before" if change in ("better", "worse") else change


def _memories(evidence: Evidence) -> list[Measurement]:
    """The scores of what is still known: verbatim and knowledge, or where neither was measured, others of that set."""
    named = [m for m in evidence.measurements if m.name in ("knowledge", "verbatim")]
    if any(given(m.after) for m in named):
        return named
    others = [m for m in evidence.measurements if m.group == "forget" and not m.name.endswith("gibberish")]
    return [m for m in others if given(m.after) and m.better in ("reference", "lower")] or named


def _memory(m: Measurement) -> tuple[Memory, str]:
    title = card(m.name).title
    if m.after is None or not given(m.after):
        return "missing", f"{title} was not measured. {missing(m)}"
    places = places_of(m)
    start = f"from {number(m.before, places)} to" if given(m.before) else "to"
    told = f"{title} went {start} {number(m.after, places)}{_in_brackets(m, places)}"
    unchanged = m.before is not None and given(m.before) and _holds(m, m.before)
    if m.reference is None or not given(m.reference):
        if unchanged:
            return "unchanged", f"{told}: no change shown."
        less = m.before is None or not given(m.before) or m.after < m.before
        return ("fell", f"{told}.") if less else ("unchanged", f"{told}: more than before.")
    gap, inside = _gap(m)
    bounds = reference_interval(m)
    brackets = f" (95% interval {interval(*bounds, places)})" if bounds else ""
    told += f"; a model trained without these records scores {number(m.reference, places)}{brackets}"
    away = f"{number(abs(gap), places)} {'above' if gap > 0 else 'below'}"
    if inside:
        return "reached", f"{told}: within the reference's interval."
    if unchanged:
        return "unchanged", f"{told}: no change shown, {away} the reference."
    if _passed(m):
        return "reached", f"{told}: {away} it, past what a model that never saw them shows."
    return "above", f"{told}: still {away} the reference."


def _cost(evidence: Evidence) -> tuple[Cost, float | None, str]:
    """The state, the share kept, and the sentence, of what should have stayed."""
    found = _first(evidence, ("utility", "retain_knowledge"), ("utility", "retain"), "higher")
    babble = _babble(evidence, forget=False)
    broken = babble > GIBBERISH
    aside = f" {number(babble, 0)}% of its answers are gibberish." if broken else ""
    if found is None or found.after is None or not given(found.after):
        likelihood = _first(evidence, ("utility_nll",), (), "lower")
        if likelihood is not None and given(likelihood.after) and given(likelihood.before):
            return _cost_in_likelihood(likelihood, broken, aside)
        told = f"What was kept was not measured. {missing(found, 'utility')}"
        return ("destroyed" if broken else "missing"), None, told + aside
    places, title = places_of(found), card(found.name).title
    if found.before is None or not given(found.before) or found.before <= 0:
        told = f"{title} is {number(found.after, places)}; there is no score before to hold it against."
        return ("destroyed" if broken else "missing"), None, told + aside
    kept = found.after / found.before
    between = ""
    if found.low is not None and found.high is not None and given(found.low) and given(found.high):
        between = f" (95% interval {percent(found.low / found.before)} to {percent(found.high / found.before)})"
    went = f"{title} went from {number(found.before, places)} to {number(found.after, places)}"
    told = f"{went}: {percent(kept)} is kept{between}."
    state: Cost = "destroyed" if broken or kept < DESTROYED else "cost" if kept < KEPT else "kept"
    if state == "destroyed":
        told += BROKEN
    return state, kept, told + aside


def _babble(evidence: Evidence, *, forget: bool) -> float:
    """The largest share of gibberish, in percent, about the forget set or about everything else.

    A model that spoke gibberish already before does not count: forgetting did not do that.
    """
    found = [m for m in evidence.measurements if m.name.endswith("gibberish") and (m.group == "forget") == forget]
    new = [m for m in found if m.before is None or m.before <= GIBBERISH]
    return max((m.after for m in new if m.after is not None and given(m.after)), default=0.0)


def _cost_in_likelihood(m: Measurement, broken: bool, aside: str) -> tuple[Cost, float | None, str]:
    """The same for texts without questions: exp(-rise of the mean loss) is how likely a true token still is."""
    assert m.before is not None
    assert m.after is not None
    kept = math.exp(min(0.0, m.before - m.after))
    places = places_of(m)
    went = f"{card(m.name).title} went from {number(m.before, places)} to {number(m.after, places)} nats per token"
    told = f"{went}: a true token is on average {percent(kept)} as likely as before."
    state: Cost = "destroyed" if broken or kept < DESTROYED else "cost" if kept < KEPT else "kept"
    return state, kept, told + (BROKEN if state == "destroyed" else "") + aside


def _privacy(evidence: Evidence) -> tuple[Privacy, str]:
    found = _first(evidence, ("privacy_leakage",), ("privacy",), "zero")
    if found is None or found.after is None or not given(found.after):
        return (
            "missing",
            f"Privacy leakage was not measured. {missing(found, 'privacy_leakage')}",
        )
    title, places = card(found.name).title, places_of(found)
    told = f"{title} is {number(found.after, places, sign=True)}{_in_brackets(found, places)}"
    if found.low is None or found.high is None or not (given(found.low) and given(found.high)):
        return "wide", f"{told}; without an interval nobody can say whether this is chance."
    if found.low <= 0 <= found.high:
        if max(-found.low, found.high) > WIDE:
            return "wide", f"{told}: zero is possible, but the interval is too wide to rule a leak out."
        return "quiet", f"{told}: an outsider cannot be shown to tell it from the reference."
    if found.after < 0:
        return "leaks", f"{told}: an outsider can tell that the records were trained on."
    return "leaks", f"{told}: the records look suspiciously unknown, so an outsider can tell that they were scrubbed."


def _later_requests(evidence: Evidence) -> list[str]:
    told = []
    for name, when in COURSES.items():
        for m in evidence.measurements:
            if m.name != name or m.after is None or not given(m.after):
                continue
            share = (
                f", {percent(m.after / m.before)} of before"
                if m.before is not None and given(m.before) and m.before > 0
                else ""
            )
            told.append(f"{when}, utility is {number(m.after, places_of(m))}{share}.")
    return told


def _headline(
    memories: list[Measurement], states: list[Memory], cost: Cost, kept: float | None, privacy: Privacy, babbling: bool
) -> tuple[str, Level]:
    measured = [state for state in states if state != "missing"]
    if cost == "destroyed":
        return "Utility destroyed", "bad"
    if not measured:
        return "Forgetting was not measured", "unknown"
    if all(_unknown_before(m) for m in memories if given(m.after)):
        return "There was nothing to forget: the model before knew no more than the reference", "unknown"
    if all(state == "unchanged" for state in measured):
        return "Nothing was forgotten", "bad"
    pairs = zip(memories, states, strict=True)
    far = [m for m, state in pairs if state in ("above", "unchanged") and given(m.reference)]
    if far:
        worst = max(far, key=lambda m: abs(_gap(m)[0]))
        gap = _gap(worst)[0]
        away = f"{number(abs(gap), places_of(worst))} {'above' if gap > 0 else 'below'}"
        return f"Not forgotten: {lower_first(card(worst.name).title)} is {away} the reference", "bad"
    if "fell" in measured or "unchanged" in measured:
        tail = f", and {kept:.0%} of utility is kept" if kept is not None else ""
        return f"Less is remembered{tail}; whether little enough needs a reference", "unknown"
    if cost == "missing":
        return "Forgotten; what it cost was not measured", "unknown"
    if cost == "cost" and kept is not None:
        return f"Forgotten, at a cost: {kept:.0%} of utility is kept", "mixed"
    if babbling:
        return "Forgotten and the rest kept, but its words about the forget set are gibberish", "mixed"
    return {
        "leaks": ("Forgotten and the rest kept, but an outsider can tell", "mixed"),
        "wide": ("Forgotten, and the rest is kept; privacy is undecided", "mixed"),
        "missing": ("Forgotten, and the rest is kept; privacy was not measured", "mixed"),
        "quiet": ("Forgotten, and the rest is kept", "good"),
    }[privacy]  # type: ignore[return-value]


def _plain(evidence: Evidence) -> Verdict:
    """Nothing was to be forgotten: say of each measurement whether it moved the right way."""
    sentences, moves = [], []
    for m in evidence.measurements:
        title, places = card(m.name).title, places_of(m)
        if m.after is None or not given(m.after):
            sentences.append(f"{title} was not measured. {missing(m)}")
            continue
        move = _change(m)
        moves.append(move)
        start = f"from {number(m.before, places)} to" if given(m.before) else "is"
        verb = "went " if given(m.before) else ""
        sentences.append(f"{title} {verb}{start} {number(m.after, places)}{_in_brackets(m, places)}: {move}.")
    better, worse = moves.count("better"), moves.count("worse")
    if not moves:
        return Verdict("Nothing was measured", tuple(sentences), "unknown", PLAIN_RULE)
    if not better and not worse:
        return Verdict("No change shown", tuple(sentences), "unknown", PLAIN_RULE)
    level: Level = "good" if not worse else "bad" if not better else "mixed"
    of = f" of {len(moves)}" if len(moves) > 1 else ""
    parts = [f"{count}{of} {word}" for count, word in ((better, "better"), (worse, "worse")) if count]
    return Verdict(f"Measurements after: {', '.join(parts)}", tuple(sentences), level, PLAIN_RULE)


def _change(m: Measurement) -> str:
    """better / worse / no change shown / no interval / nothing to compare with, by the interval of *after*."""
    if m.after is None or not given(m.after) or m.before is None or not given(m.before):
        return "nothing to compare with"
    if not (given(m.low) and given(m.high)):
        return "no interval"
    if _holds(m, m.before):
        return "no change shown"
    target = {"zero": 0.0, "reference": m.reference}.get(m.better)
    if m.better == "reference" and target is None:
        return "changed"
    if target is not None:
        return "better" if abs(m.after - target) < abs(m.before - target) else "worse"
    return "better" if (m.after < m.before) == (m.better == "lower") else "worse"


def _gap(m: Measurement) -> tuple[float, bool]:
    """After less reference, and whether the two cannot be told apart by either's interval."""
    assert m.after is not None
    assert m.reference is not None
    bounds = reference_interval(m)
    inside = (bounds is not None and bounds[0] <= m.after <= bounds[1]) or _holds(m, m.reference)
    return m.after - m.reference, inside or m.after == m.reference


def _unknown_before(m: Measurement) -> bool:
    """Did the model before score like the reference?"""
    if m.before is None or m.reference is None or not (given(m.before) and given(m.reference)):
        return False
    bounds = reference_interval(m) or (m.reference, m.reference)
    return bounds[0] <= m.before <= bounds[1]


def _passed(m: Measurement) -> bool:
    """Does the reference lie between before and after?  (High is remembered, where there is no before.)"""
    assert m.after is not None
    assert m.reference is not None
    fell_to_reference = m.before is None or not given(m.before) or m.before >= m.reference
    return m.after < m.reference if fell_to_reference else m.after > m.reference


def _holds(m: Measurement, value: float) -> bool:
    if m.low is None or m.high is None or not (given(m.low) and given(m.high)):
        return m.after == value
    return m.low <= value <= m.high


def _in_brackets(m: Measurement, places: int) -> str:
    between = interval(m.low, m.high, places)
    return f" (95% interval {between})" if between else ""


def _first(evidence: Evidence, names: tuple[str, ...], groups: tuple[str, ...], better: str) -> Measurement | None:
    """The measurement by name, else the first of a group that points the right way; one with a number goes first."""
    named = [m for name in names for m in evidence.measurements if m.name == name]
    grouped = [m for m in evidence.measurements if m.group in groups and m.better == better and m.name not in COURSES]
    found = [*named, *grouped]
    return next((m for m in found if given(m.after)), found[0] if found else None)
