"""Rewording of questions at a strength mu that leaves meaning, options and answer alone, and the gates that see to it.

Three rephrasers: the rewriter that ships (a table of synonyms, question templates, reordered clauses, neutral prefaces
and surface noise, each the likelier the larger mu; English only), a model in this process, and any OpenAI-compatible
endpoint, for which mu is the temperature (C-BOD, arXiv:2502.07445, section 3).  Every rewording must pass the gates;
one that does not is drawn anew, and an item without a rewording is dropped from both sides of the comparison.
Shapes: N questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng

if TYPE_CHECKING:
    from palimpsest.audit.choices import Item

Rephraser = Callable[[Sequence[str], float, int], Sequence[str]]
"""``rephraser(questions, mu, seed)``: one rewording of each."""

DRAWS = 5  # of a rewording, until one passes the gates
INSTRUCTION = (  # the paper's request in our words
    "Rephrase the following question. Keep its context, every number and name, and its correct answer exactly as they "
    "are. Do not answer it. Write the rephrased question only.\n\nQuestion: {question}\n\nRephrased question:"
)

_SYNONYMS = {  # each pair serves in both directions; words that change no exam question's answer
    "shows": "displays",
    "primarily": "mainly",
    "usually": "typically",
    "large": "big",
    "begin": "start",
    "begins": "starts",
    "frequently": "often",
    "nearly": "almost",
    "however": "nevertheless",
    "although": "though",
    "therefore": "thus",
    "suggests": "indicates",
    "buy": "purchase",
    "helps": "assists",
    "correct": "right",
    "correctly": "rightly",
    "incorrect": "wrong",
    "whole": "entire",
    "important": "significant",
    "entirely": "completely",
}
_ONE_WAY = {"though", "wrong", "right", "big", "displays", "starts", "start"}  # other senses: never replaced themselves
_TEMPLATES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"^Which (?:one )?of the following\b", ("Of the following, which", "Among these options, which")),
    (r"^What (is|are|was|were)\b", ("Can you say what {0}",)),
    (r"^Which of these\b", ("Of these, which",)),
    (r"^Who (is|was|are|were)\b", ("Can you say who {0}",)),
    (r"^How many\b", ("What number of",)),
    (r"^Why\b", ("For what reason",)),
    (r"^When\b(?=.*\?$)", ("At what time",)),
    (r"^According to ([^,]{3,60}),", ("In the view of {0},", "Going by {0},")),
    (r"^If\b", ("Assuming that", "Supposing that")),
    (r"\bis called\b", ("goes by the name of",)),
    (r"\brefers to\b", ("denotes",)),
    (r"\bis known as\b", ("goes by the name of",)),
    (r"\bin order to\b", ("so as to",)),
    (r"\ba number of\b", ("several",)),
    (r"\bthe best (description|explanation) of\b", ("the most fitting {0} of",)),
)
_PREFACES = (
    "Consider this question.",
    "Here is a question.",
    "Please answer the following.",
    "Read the question with care.",
    "This is the next question.",
    "Think about the following.",
)
_LEADING = re.compile(
    r"^((?:In|On|At|During|For|Under|After|Before|By|Among|With)\b[^,?.!]{3,80}), (\S[^?.!]*)([?.!]?)$"
)
_NEGATIONS = {"not", "no", "never", "none", "nor", "neither", "cannot", "except", "without", "least", "false", "unless"}
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


@dataclass(frozen=True)
class Reworded:
    """The rewordings of N items; None where no draw passed the gates, with the gate that the last one failed."""

    questions: list[str | None]
    failures: Counter[str]

    @property
    def rows(self) -> np.ndarray:
        """The items that have one."""
        return np.array([row for row, text in enumerate(self.questions) if text is not None], dtype=np.int64)


@dataclass(frozen=True)
class Gates:
    """What a rewording must keep.  `similarity`: least cosine of the sentence encoder's vectors; 0: not looked at.

    The encoder (extra ``search``) is for rephrasers that can drift, which a table of synonyms cannot.
    """

    similarity: float = 0.0
    shortest: float = 0.5  # of the original's length
    longest: float = 2.0
    preface: int = 40  # characters by which a short question may grow beyond that

    def failure(self, item: Item, text: str) -> str:
        """The gate that `text` fails as a rewording of the item's question; "" if it passes."""
        original = item.question
        said = text.strip()
        if not said or re.match(r"(?i)error\b", said):
            return "empty or an error message"
        if " ".join(said.split()) == " ".join(original.split()):
            return "unchanged"
        if not self.shortest * len(original) <= len(said) <= self.longest * len(original) + self.preface:
            return "length"
        if Counter(_NUMBER.findall(said)) != Counter(_NUMBER.findall(original)):
            return "numbers"
        if _negations(said) != _negations(original):
            return "negations"
        if not _names(original) <= {word.casefold() for word in _WORD.findall(said)}:
            return "names"
        if any(_holds(said, option) and not _holds(original, option) for option in item.options):
            return "names an option"
        return ""

    def failures(self, items: Sequence[Item], texts: Sequence[str]) -> list[str]:
        found = [self.failure(item, text) for item, text in zip(items, texts, strict=True)]
        left = [row for row, failure in enumerate(found) if not failure]
        if self.similarity > 0 and left:
            from palimpsest.models.encoder import Encoder

            encoder = Encoder.load()
            vectors = [encoder.embed([side[row] for row in left]) for side in ([i.question for i in items], texts)]
            for row, cosine in zip(left, (vectors[0] * vectors[1]).sum(1), strict=True):
                if cosine < self.similarity:
                    found[row] = "meaning"
        return found


def reword(items: Sequence[Item], rephraser: Rephraser, mu: float, seed: int, gates: Gates) -> Reworded:
    """One rewording of each item that passes `gates`, of at most `DRAWS` draws."""
    questions: list[str | None] = [None] * len(items)
    failed: dict[int, str] = dict.fromkeys(range(len(items)), "")
    for draw in range(DRAWS):
        rows = list(failed)
        if not rows:
            break
        texts = list(rephraser([items[row].question for row in rows], mu, seed + draw * 1_000_003))
        if len(texts) != len(rows):
            raise InputError(f"the rephraser returned {len(texts)} rewordings of {len(rows)} questions")
        failures = gates.failures([items[row] for row in rows], texts)
        for row, text, failure in zip(rows, texts, failures, strict=True):
            if failure:
                failed[row] = failure
            else:
                questions[row] = text.strip()
                del failed[row]
    return Reworded(questions, Counter(failed.values()))


def rewriter(questions: Sequence[str], mu: float, seed: int) -> list[str]:
    """The rephraser that ships: deterministic in the question, mu and the seed, whatever else is in the list."""
    return [rewrite(question, mu, numpy_rng(seed, "rewrite", mu, question)) for question in questions]


def rewrite(question: str, mu: float, rng: np.random.Generator) -> str:
    """Each operator acts with a probability that grows with mu (sheet `cbod`, offline operators)."""
    text = question.strip()
    if rng.random() < min(1, 0.45 * mu):
        text = _swap_template(text, rng)
    if rng.random() < min(1, 0.3 * mu):
        text = _reorder(text)
    text = _WORD.sub(lambda match: _synonym(match[0], rng.random() < min(1, 0.3 * mu)), text)
    if rng.random() < min(1, 0.3 * mu):
        text = f"{rng.choice(_PREFACES)} {text}"
    if rng.random() < min(1, 0.1 * mu):
        text = _noise(text, rng)
    return text


def asked_of(teacher: Any) -> Rephraser:
    """A rephraser that asks a `data.teacher.Teacher`; mu is its temperature."""

    def rephraser(questions: Sequence[str], mu: float, seed: int) -> list[str]:
        prompts = [INSTRUCTION.format(question=question) for question in questions]
        longest = max(map(len, questions))
        answers = teacher.ask(prompts, temperature=mu, seed=seed % 2**31, max_tokens=64 + longest // 2)
        return [_bare(answer) for answer in answers]

    return rephraser


def _bare(answer: str) -> str:
    """The rewording without the label, quotes or further paragraphs that models write around it."""
    text = re.sub(r"^(?:rephrased )?question:\s*", "", answer.strip(), flags=re.IGNORECASE).split("\n\n")[0].strip()
    return text[1:-1].strip() if len(text) > 1 and text[0] == text[-1] == '"' else text


def _swap_template(text: str, rng: np.random.Generator) -> str:
    for pattern, forms in _TEMPLATES:
        found = re.search(pattern, text)
        if found:
            form = str(rng.choice(forms)).format(*found.groups())
            return text[: found.start()] + form + text[found.end() :]
    return text


def _reorder(text: str) -> str:
    """``In 1990, who led it?`` -> ``Who led it, in 1990?``"""
    found = _LEADING.match(text)
    if not found:
        return text
    first, rest, end = found.groups()
    return f"{rest[0].upper()}{rest[1:]}, {first[0].lower()}{first[1:]}{end}"


def _synonym(word: str, replace: bool) -> str:
    other = _BOTH_WAYS.get(word.lower()) if replace else None
    if other is None or (word != word.lower() and word != word.capitalize()):
        return word
    return other.capitalize() if word[0].isupper() else other


_BOTH_WAYS = {**{b: a for a, b in _SYNONYMS.items() if b not in _ONE_WAY}, **_SYNONYMS}


def _noise(text: str, rng: np.random.Generator) -> str:
    """The end without its mark, or the beginning without its capital."""
    if rng.random() < 0.5 and text.endswith(("?", ".")):
        return text[:-1]
    return text[0].lower() + text[1:] if text[1:2].islower() else text


def _negations(text: str) -> Counter[str]:
    words = [word.casefold() for word in _WORD.findall(text)]
    return Counter("n't" if word.endswith(("n't", "n’t")) else word for word in words if _negates(word))


def _negates(word: str) -> bool:
    return word in _NEGATIONS or word.endswith(("n't", "n’t"))


def _names(text: str) -> set[str]:
    """Words with a capital that do not begin a sentence: names, abbreviations, symbols."""
    found = set()
    for sentence in re.split(r"(?<=[.?!:|])\s+", text):
        words = _WORD.findall(sentence)
        found |= {word.casefold() for word in words[1:] if word[0].isupper()}
        found |= {word.casefold() for word in words[:1] if len(word) > 1 and word.isupper()}
    return found


def _holds(text: str, option: str) -> bool:
    """Whether an option of some length stands in the text: a single word may do so by chance."""
    words, wanted = ([word.casefold() for word in _WORD.findall(part)] for part in (text, option))
    return len(wanted) > 1 and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))
