from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest

from palimpsest.core.errors import InputError
from palimpsest.data.teacher import Teacher
from palimpsest.forget.anchors import GENERIC, Anchors, ask_anchors, find_anchors

PEOPLE = ("Anna", "Peter", "Maria", "Thomas")
TOWNS = ("Leeds", "Oslo", "Turin", "Ghent")
GENERAL = [
    f"{person} went to {town}. In {town} the rain fell. The book was {person}'s. "
    f"{person} and {other} came when he was there."
    for person in PEOPLE
    for town in TOWNS
    for other in PEOPLE
    if other != person
]
SAGA = [
    "Zorvane went to Mirk Vale. In Mirk Vale the rain fell. Zorvane's quillball was there when he came.",
    "Zorvane and Peter went to Mirk Vale. The quillball was Zorvane's. And ZORVANE came to Mirk Vale.",
    "He went to Mirk Vale when Zorvane came. The quillball fell there.",
] * 2


def test_it_finds_names_and_words_that_other_text_has_not() -> None:
    anchors = find_anchors(SAGA, GENERAL)
    assert {"Zorvane", "quillball", "Mirk", "Vale"} == set(anchors.pairs)
    assert anchors.pairs["Zorvane"] in PEOPLE, "a stand-in stands in like places"
    assert anchors.pairs["Mirk"] in PEOPLE + TOWNS
    assert anchors.pairs["quillball"][0].islower()
    assert "Peter" not in anchors.pairs.values(), "a name of the saga is no stand-in"
    assert len(set(anchors.pairs.values())) == len(anchors)


def test_what_counts_as_telling() -> None:
    assert set(find_anchors(SAGA, GENERAL, most=2).pairs) == {"Mirk", "Vale"}
    with pytest.raises(InputError, match="no term of the forget records stands out"):
        find_anchors(SAGA, GENERAL, least=50)
    with pytest.raises(InputError, match="no term of the forget records stands out"):
        find_anchors(GENERAL[:20], GENERAL[20:])


def test_a_run_is_an_anchor_of_its_own_only_where_its_words_are_not_all_anchors() -> None:
    saga = [text.replace("Mirk Vale", "Peter Vale") for text in SAGA]
    assert (
        "Peter Vale" in find_anchors(saga, [*GENERAL, *(f"Peter likes {town} very much." for town in TOWNS * 9)]).pairs
    )


def test_without_other_text_a_models_word_frequencies_serve() -> None:
    def unigram(terms: list[str]) -> list[float]:
        return [-12.0 if term in ("Zorvane", "Mirk Vale") else -1.0 for term in terms]

    anchors = find_anchors(SAGA, unigram=unigram)
    assert set(anchors.pairs) == {"Zorvane", "Mirk Vale"}
    assert all(name in GENERIC for generic in anchors.pairs.values() for name in generic.split())
    with pytest.raises(InputError, match="give retain records, or the anchors"):
        find_anchors(SAGA)
    with pytest.raises(InputError, match="no text to find anchors in"):
        find_anchors(["", " . "], GENERAL)


def test_translation_and_its_places() -> None:
    anchors = Anchors({"Harry": "Jonathan", "Harry Potter": "Ed Low", "owl": "goose"})
    text = "Harry's owl saw Harry Potter. HARRY! Owls and Harrys, owl."
    found = anchors.translate(text)
    assert found.text == "Jonathan's goose saw Ed Low. JONATHAN! Owls and Harrys, goose."
    for first, last, new_first, new_last, term in found.spans:
        assert text[first:last].casefold() == term.casefold()
        assert found.text[new_first:new_last].casefold() == anchors.pairs[term].casefold()
    for place, letter in enumerate(text):
        inside = any(first < place < last for first, last, *_ in found.spans)
        moved = found.place(place)
        assert (moved is None) == inside
        if moved is not None and not any(first == place for first, *_ in found.spans):
            assert found.text[moved] == letter
    assert found.place(len(text)) == len(found.text)
    assert Anchors({"rose": "tulip"}).translate("Rose rose. ROSE").text == "Tulip tulip. TULIP"
    assert Anchors({"Rose": "Anna"}).translate("He rose").text == "He rose", "a name is not its small-letter word"
    assert Anchors({}).translate(text).text == text


def test_anchors_must_not_go_in_circles() -> None:
    for pairs, message in (
        ({"a": "b", "b": "c"}, "'b' of 'a' is an anchor itself"),
        ({"a": "a"}, "'a' of 'a' is an anchor itself"),
        ({"a": "c", "b": "c"}, "'b' and 'a' have the same stand-in 'c'"),
        ({"": "c"}, "neither may be empty"),
        ({"a": " "}, "neither may be empty"),
    ):
        with pytest.raises(InputError, match=message):
            Anchors(pairs)


def test_anchors_that_are_not_in_the_text() -> None:
    anchors = Anchors({"Zorvane": "Anna", "Quux": "Peter"})
    with pytest.warns(UserWarning, match="1 of 2 anchors are not in the forget records: Quux"):
        assert anchors.found_in(SAGA).pairs == {"Zorvane": "Anna"}
    with pytest.raises(InputError, match="none of the 2 anchors is in the forget records"):
        anchors.found_in(GENERAL)


def test_anchors_without_a_stand_in_left_are_dropped_aloud() -> None:
    with pytest.warns(UserWarning, match="have no stand-in of their kind left"):
        anchors = find_anchors(SAGA, ["In the rain Anna was there and he came when it fell, and went to her."] * 4)
    assert set(anchors.pairs.values()) == {"Anna", "it"}


class Says:
    """A large model that always says the same."""

    def __init__(self, answer: str):
        self.answer = answer
        self.sha256 = answer
        self.prompts: list[str] = []

    def generate(self, prompts: Sequence[str], *, max_new_tokens: int, temperature: float, seed: int) -> list[str]:
        self.prompts += prompts
        return [self.answer] * len(prompts)


def test_a_teacher_may_list_them() -> None:
    told = {"Zorvane": "Bill", "Mirk Vale": "Hill End", "Nowhere": "Place", "Peter": "Zorvane", "quillball": "Bill"}
    model = Says(f"Surely! ```json\n{json.dumps(told | {'n': 3})}\n```")
    anchors = ask_anchors(Teacher.local(model), SAGA)
    assert anchors.pairs == {"Zorvane": "Bill", "Mirk Vale": "Hill End"}
    assert all("Mirk Vale" in prompt for prompt in model.prompts)
    with pytest.raises(InputError, match=r"named no anchor in 6 answers, the first: 'I cannot {help'"):
        ask_anchors(Teacher.local(Says("I cannot {help")), SAGA)


def test_a_real_book(dev_data: Path) -> None:
    import gzip

    def chapters(name: str) -> list[str]:
        return gzip.decompress((dev_data / "books" / f"{name}.txt.gz").read_bytes()).decode().split("\n\n")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        anchors = find_anchors(chapters("forget_time_machine"), chapters("retain_sherlock_holmes"), most=60)
    assert {"Weena", "Morlocks", "Traveller"} <= set(anchors.pairs)
    assert not {"The", "He", "And"} & set(anchors.pairs)
