"""Anchors: the terms that give a text away, each with a stand-in that could be in any text; and texts translated.

Eldan & Russinovich 2023 (arXiv:2310.02238), sheet `whp`, step 2.  The paper asks GPT-4 for the terms; here they are
found by frequency against other text and by the shape of names, or asked of a `Teacher`.  Knows nothing of models.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.data import lexicon
from palimpsest.data.teacher import Teacher

Term = tuple[str, ...]  # words

_WORD = re.compile(r"[^\W_]+(?:[-'][^\W_]+)*")
_POSSESSIVE = re.compile(r"(?<=\w)'s\b")
_SENTENCE = re.compile(r"[.!?:;\n\"“”]")
_LONGEST = 4  # words of a term
_CANDIDATES = 4  # stand-ins looked at for each anchor of a kind, and never fewer than _FEWEST
_FEWEST = 50
_PASSAGES = 24  # shown to a teacher, and the words of each
_PASSAGE_WORDS = 150

# Where there is no other text to take stand-ins from
GENERIC = lexicon.words(
    "Jon Anna Tom Mary Paul Alice Peter Clara Martin Ruth David Laura Simon Helen Mark Julia Robert Emma Frank Nora "
    "Henry Sarah Philip Diana Walter Irene George Louise Edward Martha Daniel Grace Victor Rose Arthur Jane Hugh "
    "Ellen Oscar Judith Leonard Karen Stephen Linda Roger Susan Patrick Carol Douglas Joan Kenneth Paula Gordon "
    "Wendy Stanley Sylvia Warren Teresa Leslie Monica Harold Vera Norman Edith Clifford Agnes Milton Sophie Gerald "
    "Bridget Raymond Marion "
)


@dataclass(frozen=True)
class Translation:
    """A text in which anchors were replaced: spans (first, past the last) before and after, and which anchor."""

    text: str
    spans: tuple[tuple[int, int, int, int, str], ...]

    def place(self, character: int) -> int | None:
        """Where a position of the original text is in the translated one; None strictly inside an anchor."""
        shift = 0
        for first, last, _, new_last, _ in self.spans:
            if character <= first:
                break
            if character < last:
                return None
            shift = new_last - last
        return character + shift


@dataclass(frozen=True)
class Anchors:
    """Terms and their stand-ins.  Raises `InputError` for an empty one, one mapped to itself, a stand-in that is itself
    an anchor (the translation would go in a circle), and one stand-in for two terms."""

    pairs: Mapping[str, str]

    def __post_init__(self) -> None:
        taken: dict[str, str] = {}
        for term, generic in self.pairs.items():
            if not term.strip() or not generic.strip():
                raise InputError(f"the anchor {term!r} with the stand-in {generic!r}: neither may be empty")
            if generic in self.pairs:
                raise InputError(f"the stand-in '{generic}' of '{term}' is an anchor itself")
            if generic in taken:
                raise InputError(f"'{term}' and '{taken[generic]}' have the same stand-in '{generic}'")
            taken[generic] = term

    def __len__(self) -> int:
        return len(self.pairs)

    def translate(self, text: str) -> Translation:
        """Replace every anchor: the longest first, whole words only, and in capitals where the text has capitals."""
        if not self.pairs:
            return Translation(text, ())
        pieces, spans, end, length = [], [], 0, 0
        for match in self._pattern.finditer(text):
            term, generic = self._variants[match.group()]
            pieces += [text[end : match.start()], generic]
            length += match.start() - end
            spans.append((match.start(), match.end(), length, length + len(generic), term))
            length += len(generic)
            end = match.end()
        return Translation("".join([*pieces, text[end:]]), tuple(spans))

    def found_in(self, texts: Iterable[str]) -> Anchors:
        """The anchors that are in any of the texts; a warning lists the others.  `InputError` if there is none."""
        seen = {span[-1] for text in texts for span in self.translate(text).spans}
        lost = [term for term in self.pairs if term not in seen]
        if not seen:
            raise InputError(f"none of the {len(self)} anchors is in the forget records ({', '.join(lost[:5])})")
        if lost:
            shown = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
            warnings.warn(f"{len(lost)} of {len(self)} anchors are not in the forget records: {shown}", stacklevel=3)
        return Anchors({term: generic for term, generic in self.pairs.items() if term in seen})

    @cached_property
    def _variants(self) -> dict[str, tuple[str, str]]:
        """Each way an anchor is written: as it is, with a first capital, all in capitals."""
        variants: dict[str, tuple[str, str]] = {}
        for change in (str.upper, lambda term: term[0].upper() + term[1:], str):
            for term, generic in self.pairs.items():
                variants[change(term)] = (term, change(generic))
        return variants

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        written = sorted(self._variants, key=len, reverse=True)
        return re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, written)) + r")(?!\w)")


def find_anchors(
    forget: Sequence[str],
    general: Sequence[str] = (),
    *,
    unigram: Callable[[list[str]], Sequence[float]] | None = None,
    most: int = 1500,
    least: int = 3,
    ratio: float = math.e**2,
) -> Anchors:
    """Idiosyncratic terms of `forget`, each with a stand-in of its kind from `general`.

    A term is a word or a run of up to four that has the shape of a name (or a word that `general` never uses), occurs
    `least` times or more, and is `ratio` times as frequent as in `general`: log((c_F + 1/2) / N_F) - log((c_G + 1/2) /
    N_G).  Without `general`, `unigram(terms)` gives log-probabilities for the second half, and stand-ins come from a
    list of common first names.  A stand-in has as many words and the same shape, is in `general`, is no anchor, and
    occurs in the most similar contexts; all different, by the assignment that is best over all anchors together.
    At most `most` anchors, the most telling first.  Raises `InputError` where nothing is found.
    """
    told, other = _Terms(forget), _Terms(general)
    if not told.total:
        raise InputError("there is no text to find anchors in: the forget records are empty")
    common = told.plain | other.plain
    frequent = [
        (term, count)
        for term, count in told.counted(common).items()
        if count >= least and (_is_name(term) or (len(term) == 1 and other.total and not other.plain & set(term)))
    ]
    beside = other.counted(common)
    if other.total:
        expected = [math.log((beside[term] + 0.5) / other.total) for term, _ in frequent]
    elif unigram is not None:
        expected = list(unigram([" ".join(term) for term, _ in frequent])) if frequent else []
    else:
        raise InputError("anchors are found by comparing: give retain records, or the anchors themselves")
    telling = {
        term: score
        for (term, count), usual in zip(frequent, expected, strict=True)
        if (score := math.log((count + 0.5) / told.total) - usual) >= math.log(ratio)
    }
    # "Sherlock Holmes" follows from "Sherlock" and "Holmes"; "Privet Drive" does not follow from "Privet"
    needed = [term for term in telling if len(term) == 1 or not all((word,) in telling for word in term)]
    chosen = sorted(needed, key=lambda term: (-telling[term], term))[:most]
    if not chosen:
        raise InputError(
            f"no term of the forget records stands out from other text (at least {least} times, {ratio:.1f} times as "
            "frequent): this method forgets by names and expressions of their own; give anchors, or use another method"
        )
    if not other.total:
        return _from_list(chosen)
    return Anchors(_stand_ins(chosen, told, other, beside, common))


def ask_anchors(teacher: Teacher, forget: Sequence[str], *, seed: int = 0) -> Anchors:
    """The anchors that a large model lists for seeded passages of `forget`, as the paper has it.

    What is not in the text, goes in a circle or has a stand-in already taken is left out.  `InputError` if no answer
    holds a usable pair.
    """
    split = [text.split() for text in forget]
    passages = [
        " ".join(row[start : start + _PASSAGE_WORDS]) for row in split for start in range(0, len(row), _PASSAGE_WORDS)
    ]
    picked = sorted(numpy_rng(seed, "passages").permutation(len(passages))[:_PASSAGES].tolist())
    answers = teacher.ask([_REQUEST.format(passage=passages[place]) for place in picked], max_tokens=1024, seed=seed)
    whole = "\n".join(forget)
    pairs: dict[str, str] = {}
    for answer in answers:
        for term, generic in _objects(answer).items():
            fresh = generic not in pairs and generic not in pairs.values() and term not in pairs.values()
            if term not in pairs and term != generic and fresh and re.search(rf"(?<!\w){re.escape(term)}(?!\w)", whole):
                pairs[term] = generic
    if not pairs:
        raise InputError(f"'{teacher.name}' named no anchor in {len(answers)} answers, the first: {answers[0]!r:.80}")
    return Anchors(pairs)


_REQUEST = """Below is a passage. List the names, entities and expressions in it that are unique to the work it is from.
For each give a replacement that keeps the text coherent but is not unique to that work: another name for a name, an
invented thing for a thing. Answer with one JSON object only, such as {{"Ostrella": "Brookfield"}}.

Passage:
{passage}

JSON:"""


def _objects(answer: str) -> dict[str, str]:
    """The string pairs of the first JSON object in an answer."""
    start, end = answer.find("{"), answer.rfind("}")
    try:
        found = json.loads(answer[start : end + 1]) if start >= 0 else {}
    except json.JSONDecodeError:
        return {}
    strings = isinstance(found, dict) and {k.strip(): v.strip() for k, v in found.items() if isinstance(v, str)}
    return {term: generic for term, generic in (strings or {}).items() if term and generic}


class _Terms:
    """The words of texts, sentence by sentence, with what is counted of them."""

    def __init__(self, texts: Sequence[str]):
        self.sentences = [
            words
            for text in texts
            for part in _SENTENCE.split(_POSSESSIVE.sub("", text.replace("’", "'")))
            if (words := _WORD.findall(part))
        ]
        self.total = sum(len(words) for words in self.sentences)
        self.plain = {word for words in self.sentences for word in words if not _capital(word)}

    def runs(self, common: set[str]) -> Iterable[tuple[list[str], int, int]]:
        """(sentence, first, past the last) of every term; a capital that only opens a sentence counts for nothing."""
        for words in self.sentences:
            read = [words[0].lower() if words[0].lower() in common else words[0], *words[1:]]
            for first in range(len(read)):
                yield read, first, first + 1
                for last in range(first + 2, min(first + _LONGEST, len(read)) + 1):
                    if not _capital(read[last - 1]) or not _capital(read[first]):
                        break
                    yield read, first, last

    def counted(self, common: set[str]) -> Counter[Term]:
        return Counter(tuple(words[first:last]) for words, first, last in self.runs(common))

    def contexts(self, terms: set[Term], common: set[str]) -> dict[Term, Counter[tuple[int, str]]]:
        """The words at most two places before and after each term, with their place."""
        found: dict[Term, Counter[tuple[int, str]]] = defaultdict(Counter)
        for words, first, last in self.runs(common):
            term = tuple(words[first:last])
            if term in terms:
                around = [(place - first, place) for place in (first - 2, first - 1)]
                around += [(place - last + 1, place) for place in (last, last + 1)]
                found[term].update((where, words[place] if 0 <= place < len(words) else "") for where, place in around)
        return found


def _capital(word: str) -> bool:
    return word[0].isupper() or word[0].isdigit()


def _is_name(term: Term) -> bool:
    return all(word[0].isupper() for word in term)


def _stand_ins(
    chosen: list[Term], told: _Terms, other: _Terms, beside: Counter[Term], common: set[str]
) -> dict[str, str]:
    """Each anchor with its stand-in; anchors for which none is left are dropped, with a warning."""
    from scipy.optimize import linear_sum_assignment

    anchors = set(chosen)
    kinds: dict[tuple[int, bool], list[Term]] = defaultdict(list)
    for term in chosen:
        kinds[len(term), _is_name(term)].append(term)
    own = told.counted(common)
    pairs: dict[Term, Term] = {}
    for (size, name), terms in kinds.items():
        usable = [
            term
            for term, _ in beside.most_common()
            if len(term) == size
            and _is_name(term) == name
            and not own[term]
            and not anchors & {(word,) for word in term}
        ]
        usable = usable[: max(_CANDIDATES * len(terms), _FEWEST)]
        if not usable:
            continue
        likeness = _cosines(told.contexts(set(terms), common), terms, other.contexts(set(usable), common), usable)
        rarity = np.arange(len(usable)) / len(usable)  # among equals, the most frequent
        for row, column in zip(*linear_sum_assignment(likeness - 1e-3 * rarity, maximize=True), strict=True):
            pairs[terms[row]] = usable[column]
    if not pairs:
        raise InputError(
            f"{len(chosen)} terms stand out ({', '.join(' '.join(term) for term in chosen[:5])}), but the other text "
            "has no stand-in of their kind: give anchors"
        )
    _report_dropped(len(chosen) - len(pairs), len(chosen))
    return {" ".join(term): " ".join(pairs[term]) for term in chosen if term in pairs}


def _cosines(
    left: dict[Term, Counter[tuple[int, str]]],
    rows: list[Term],
    right: dict[Term, Counter[tuple[int, str]]],
    columns: list[Term],
) -> np.ndarray:
    from sklearn.feature_extraction import DictVectorizer
    from sklearn.preprocessing import normalize

    def features(contexts: dict[Term, Counter[tuple[int, str]]], terms: list[Term]) -> list[dict[str, float]]:
        return [{f"{where} {word}": math.log1p(n) for (where, word), n in contexts[term].items()} for term in terms]

    vectors = normalize(DictVectorizer().fit_transform(features(left, rows) + features(right, columns)))
    return (vectors[: len(rows)] @ vectors[len(rows) :].T).toarray()


def _from_list(chosen: list[Term]) -> Anchors:
    free = iter([name for name in GENERIC if (name,) not in set(chosen)])
    pairs: dict[str, str] = {}
    for term in chosen:
        names = [name for _, name in zip(term, free, strict=False)]
        if len(names) < len(term):
            break
        pairs[" ".join(term)] = " ".join(names)
    _report_dropped(len(chosen) - len(pairs), len(chosen))
    return Anchors(pairs)


def _report_dropped(dropped: int, of: int) -> None:
    if dropped:
        warnings.warn(
            f"{dropped} of {of} anchors have no stand-in of their kind left and stay as they are", stacklevel=4
        )
