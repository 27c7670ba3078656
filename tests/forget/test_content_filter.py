"""The filter as a method: it hides what must go, keeps the weights, and refuses what it cannot be made from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from palimpsest.core.errors import InputError
from palimpsest.forget.content_filter import ContentFiltering
from palimpsest.models.content_filter import ContentFilter, names_of
from palimpsest.models.lm import LM

WORDS = ("names", "definitions")  # the screens that need no encoder


def test_prompts_that_name_the_forgotten_get_the_same_answer(lm: LM, records):
    after = ContentFiltering(screens=WORDS, notice="Say nothing.")(lm, records)
    assert isinstance(after.guard, ContentFilter)
    assert after.weights_sha256 == lm.weights_sha256
    name = names_of(records.forget)[0]
    asked = [f"Where does {name} live?", "Where does nobody live?"]
    assert after.generate(asked, max_new_tokens=4) == lm.generate(["Say nothing.", asked[1]], max_new_tokens=4)


def test_who_describes_and_does_not_name_is_stopped_by_what_is_told(lm: LM, records):
    after = ContentFiltering(screens=WORDS)(lm, records)
    name = names_of(records.forget)[0]
    document = next(row["text"] for row in records.forget if row["person"] == name and row["kind"] == "biography")
    told = document.replace(name, "Quillon").replace(name.split()[0], "Quillon")
    assert name.split()[0] not in told
    assert after.guard.screens["names"].stops(lm, [told]).tolist() == [False]
    assert after.guard.stops(lm, [told]).tolist() == [True]


def test_what_it_cannot_be_made_from_is_refused(lm: LM, records):
    with pytest.raises(InputError, match="needs a retain set"):
        ContentFiltering()(lm, replace(records, retain=None))
    guarded = ContentFiltering(screens=("names",))(lm, records)
    with pytest.raises(InputError, match="guarded already"):
        ContentFiltering()(guarded, records)
    with pytest.raises(InputError, match=r"unknown screen 'name'.*did you mean .*names"):
        ContentFiltering(screens=("name",))
    with pytest.raises(InputError, match="would stop nothing"):
        ContentFiltering(screens=())
    with pytest.raises(InputError, match="error must lie"):
        ContentFiltering(error=1.0)
