"""Each screen by hand: what it stops, what it spares, and that it comes back from its state."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.models.gate import Gate
from palimpsest.models.lm import LM
from palimpsest.models.screens import SCREENS, DefinitionScreen, MeaningScreen, NameScreen, StateScreen

ORDINARY = ("define", "as", "and", "is", "it", "a", "has")
TIGER = DefinitionScreen((("striped", "big", "cat"),), ORDINARY, {"lined": "striped", "large": "big"})


def test_names_are_stopped_as_whole_words_in_any_case(llama: LM):
    screen = NameScreen(("Ann Bell", "Zed"))
    prompts = ["Who is ANN BELL?", "Who is Ann?", "zed's house", "Zedekiah", "", "Ann Bellamy"]
    assert screen.stops(llama, prompts).tolist() == [True, False, True, False, False, False]
    assert NameScreen(()).stops(llama, prompts).tolist() == [False] * 6


@pytest.mark.parametrize(
    ("prompt", "score"),
    [
        ("define quon as big and striped and cat . is it quon ?", 1),
        ("A quon is a cat. It has something striped. A quon is big.", 2 / 3),  # nothing ties "it" to the quon
        ("define quon as large and lined and cat .", 1),  # other words
        ("define cat as quon . is quon striped ? A quon has big claws.", 1),  # other order
        ("define vell as big . define hurn as vell and striped . define quon as hurn and cat .", 1),  # a mosaic
        ("define quon as big and striped . define hurn as cat .", 2 / 3),  # two things
        ("define quon as cat . big striped .", 2 / 3),  # a description beside it is of no thing that has a word
        ("big striped cat .", 1),
        ("Which quon is it?\nAnswer: big\nquon is striped.", 2 / 3),  # an answer belongs to its question
        ("bigger catalogue", 0),
        ("", 0),
    ],
)
def test_statements_about_one_thing_add_up(prompt, score):
    assert TIGER.score(prompt) == pytest.approx(score)


def test_a_concept_is_stopped_when_enough_of_it_is_told(llama: LM):
    prompts = ["define quon as big and cat .", "define quon as big and cat and striped ."]
    assert TIGER.stops(llama, prompts).tolist() == [False, True]
    loose = DefinitionScreen(TIGER.concepts, ORDINARY, threshold=0.5)
    assert loose.stops(llama, prompts).tolist() == [True, True]


def test_the_threshold_of_definitions_spares_what_is_permitted(llama: LM):
    """Permitted texts tell up to two of three features of Ada: what tells three is stopped."""
    permitted = [f"P{n} is from {city} and sells {ware}." for n, (city, ware) in enumerate(_combinations())]
    screen = DefinitionScreen.fit([["Velsk", "pears", "1931"]], permitted, common=0.5)
    assert screen.concepts == (("1931", "pears", "velsk"),)
    assert {"is", "from", "and", "sells"} <= set(screen.ordinary)
    assert not screen.stops(llama, permitted).any()
    told = "Ada is from Velsk and sells pears. Ada was born in 1931."
    assert screen.stops(llama, [told, told.replace("Ada", "Quillon")]).all()
    with pytest.raises(InputError, match="permitted texts"):
        DefinitionScreen.fit([["a"]], [])
    with pytest.raises(InputError, match="no concept has a feature"):
        DefinitionScreen.fit([["from"]], permitted)


def _combinations() -> list[tuple[str, str]]:
    cities, wares = ["Velsk", "Marn", "Quen", "Ott"], ["pears", "rope", "salt", "lamps"]
    return [(city, ware) for city in cities for ware in wares]


def test_a_probe_reads_states_of_the_model_that_it_was_made_with(llama: LM):
    rng = np.random.default_rng(0)
    towns = [f"Person {rng.integers(60)} lives in town {rng.integers(7)}" for _ in range(30)]
    dogs = [f"Person {rng.integers(60)} keeps {rng.integers(5)} dogs" for _ in range(30)]
    screen = StateScreen.fit(llama, towns[:20], dogs[:20])
    assert screen.stops(llama, towns[20:]).mean() > 0.8
    assert screen.stops(llama, dogs[20:]).mean() < 0.2
    one_by_one = [screen.stops(llama, [text])[0] for text in towns[20:]]
    assert screen.stops(llama, towns[20:]).tolist() == one_by_one
    assert screen.stops(llama, []).tolist() == []
    with pytest.raises(InputError, match="at least 5 texts outside"):
        StateScreen.fit(llama, towns, dogs[:3])


def test_each_comes_back_from_its_state(llama: LM):
    gate = Gate(torch.tensor([0.5, -0.25], dtype=torch.float64), 0.1, 0.7)
    probe = StateScreen(torch.tensor([0.5, 1.0], dtype=torch.float64), -0.5, 0.6, 1)
    made = {"names": NameScreen(("a", "b")), "definitions": TIGER, "meaning": MeaningScreen(gate), "states": probe}
    assert set(made) == set(SCREENS)
    for name, screen in made.items():
        again = SCREENS[name].restore(*screen.state())
        assert type(again) is type(screen)
        assert again.state()[0] == screen.state()[0]
        assert {key: tensor.tolist() for key, tensor in again.state()[1].items()} == {
            key: tensor.tolist() for key, tensor in screen.state()[1].items()
        }
