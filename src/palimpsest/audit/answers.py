"""What an answer is worth: overlap with the truth, whether it is language at all, and how likely the model finds it.

The first half knows texts only.  The second half asks an `LM` and scores by likelihood: multiple choice, truth ratio,
and what the TOFU benchmark makes of them (Maini et al. 2024, arXiv:2401.06121; sheet `knowledge_unlearning`).
Shapes: N questions, O options of a question.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from palimpsest.core.errors import InputError

if TYPE_CHECKING:
    from palimpsest.models.lm import LM

STOPS = ("\n\n", "\nQuestion", "Question:")  # an answer ends at the first of these (MUSE)

_WORD = re.compile(r"[^\W_]+")
_STUTTER = re.compile(r"([^\W\d_]{1,4}?)\1{4,}")  # one to four letters, five times or more
_FOREIGN = re.compile(r"[^\W\d_a-zA-Z]")


def rouge_l(
    answers: Sequence[str], truths: Sequence[str], measure: Literal["fmeasure", "recall", "precision"] = "fmeasure"
) -> np.ndarray:
    """ROUGE-L of each answer, (N,) from 0 to 1, as the rouge_score library computes it (no stemming).

    The library drops every letter outside a-z, so a truth in another alphabet would score 0 whatever the answer; truths
    with such letters are compared on Unicode words instead.  `InputError` unless there are as many answers as truths.
    """
    if len(answers) != len(truths):
        raise InputError(f"{len(answers)} answers for {len(truths)} truths: each truth needs one answer")
    scored = [
        _scorer(bool(_FOREIGN.search(truth))).score(truth, answer)
        for answer, truth in zip(answers, truths, strict=True)
    ]
    return np.array([getattr(found["rougeL"], measure) for found in scored], dtype=np.float64)


def cut(answer: str, stops: Sequence[str] = STOPS) -> str:
    """The answer up to the first of `stops`, without the white space around it."""
    places = [place for stop in stops if (place := answer.find(stop)) >= 0]
    return answer[: min(places, default=len(answer))].strip()


def is_gibberish(text: str) -> bool:
    """Whether a generated text is empty or no language: mostly signs, a stutter, or the same few words in a circle.

    An answer that is wrong, or odd but varied, is not gibberish by this rule: it errs towards calling a text language.
    """
    words = _WORD.findall(text.casefold())
    visible = [letter for letter in text if not letter.isspace()]
    if not words or 2 * sum(letter.isalnum() for letter in visible) < len(visible):
        return True
    return bool(_STUTTER.search(text)) or _circles(words)


def _circles(words: list[str], longest: int = 12) -> bool:
    """Whether the last half of the words or more is one phrase said at least three times (a single word: four)."""
    for period in range(1, min(longest, len(words) // 3) + 1):
        repeats = 0
        while repeats + period < len(words) and words[-1 - repeats] == words[-1 - repeats - period]:
            repeats += 1
        tail = repeats + period
        if tail >= max(3 * period, 4) and 2 * tail >= len(words):
            return True
    return False


@cache
def _scorer(unicode_words: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False, tokenizer=_UnicodeWords() if unicode_words else None)


class _UnicodeWords:
    def tokenize(self, text: str) -> list[str]:
        """Words; in scripts without spaces between them, single characters."""
        return [part for word in _WORD.findall(text.casefold()) for part in (word if _unspaced(word) else [word])]


def _unspaced(word: str) -> bool:
    return any(
        "\u0e00" <= letter <= "\u0eff" or "\u3040" <= letter <= "\u30ff" or "\u3400" <= letter <= "\u9fff"
        for letter in word
    )


def probability(lm: LM, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """exp(-mean NLL a token) of each completion, (N,): its probability, normalised by length."""
    return np.exp(-np.asarray(lm.nll(list(pairs)), dtype=np.float64))


def option_scores(
    lm: LM, prompts: Sequence[str], options: Sequence[Sequence[str]], by: Literal["sum", "mean"] = "mean"
) -> np.ndarray:
    """(N, O) log-probability of each option after its prompt: summed over tokens, or a token ("mean").

    Every question must have the same number of options, at least two.
    """
    if len(prompts) != len(options):
        raise InputError(f"{len(prompts)} prompts for {len(options)} lists of options")
    widths = {len(row) for row in options}
    if len(widths) != 1 or min(widths) < 2:
        raise InputError(f"every question needs the same number of options, at least two; found {sorted(widths)}")
    pairs = [(prompt, option) for prompt, row in zip(prompts, options, strict=True) for option in row]
    tokens = lm.token_logprobs(pairs)
    scores = [values.sum(dtype=np.float64) / (len(values) if by == "mean" else 1) for values in tokens]
    return np.array(scores).reshape(len(prompts), -1)


def multiple_choice(
    lm: LM,
    prompts: Sequence[str],
    options: Sequence[Sequence[str]],
    right: Sequence[int],
    by: Literal["sum", "mean"] = "mean",
) -> np.ndarray:
    """(N,) 1 where the right option is the likeliest, else 0; t options equally likely at the top share the 1."""
    scores = option_scores(lm, prompts, options, by)
    best = scores >= scores.max(1, keepdims=True)
    return best[np.arange(len(scores)), np.asarray(right)] / best.sum(1)


def truth_ratio(lm: LM, true: Sequence[tuple[str, str]], wrong: Sequence[Sequence[tuple[str, str]]]) -> np.ndarray:
    """(N,) TR = exp(-mean CE of the wrong answers) / exp(-CE of the (paraphrased) true answer).

    The geometric mean over the wrong answers, as in TOFU.  Below 1 the truth is likelier than a wrong answer is.
    """
    if len(true) != len(wrong) or not all(wrong):
        raise InputError(
            f"a truth ratio needs wrong answers for each of the {len(true)} true ones; {len(wrong)} lists given"
        )
    true_nll = np.asarray(lm.nll(list(true)), dtype=np.float64)
    wrong_nll = np.asarray(lm.nll([pair for row in wrong for pair in row]), dtype=np.float64)
    ends = np.cumsum([len(row) for row in wrong])
    means = np.array([part.mean() for part in np.split(wrong_nll, ends[:-1])])
    return np.exp(true_nll - means)


def forget_quality(ratios: Sequence[float], reference: Sequence[float]) -> float:
    """p of the two-sample Kolmogorov-Smirnov test between truth ratios of the unlearned and of a never-taught model.

    Near 0 for a model that forgot nothing *and* for one that collapsed: never read it without utility.
    """
    from scipy import stats

    return float(stats.ks_2samp(np.asarray(ratios), np.asarray(reference)).pvalue)


def model_utility(scores: Sequence[float]) -> float:
    """The harmonic mean of scores (TOFU: probability, ROUGE and truth score on three sets); 0 if one is 0."""
    values = np.asarray(scores, dtype=np.float64)
    if len(values) == 0 or (values < 0).any():
        raise InputError("model utility needs scores that are not negative")
    return float(len(values) / (1 / values).sum()) if (values > 0).all() else 0.0
