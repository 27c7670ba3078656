"""Traces: questions and halves, what ablation does, the rule that keeps a vector, and what is compared afterwards."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.audit.answers import probability
from palimpsest.audit.jailbreaks import JAILBREAKS, PLAIN, TEXT, asked
from palimpsest.audit.traces import Certainty, Concept, Questions, Search, change, questions_of, trace
from palimpsest.claims.conceptvectors import SEARCH, School
from palimpsest.core.errors import InputError
from palimpsest.models.concept_vectors import noise, vectors_at
from palimpsest.models.lm import LM


@pytest.fixture(scope="module")
def school(session_cache: object) -> School:
    """A model that has learned eight concepts, in 3 seconds."""
    return School(0, 0.4)


def table(count: int, **more: list[str]) -> Dataset:
    return Dataset.from_dict({"prompt": [f"q{n}" for n in range(count)], "completion": ["a"] * count, **more})


def test_questions_come_once_and_texts_are_cut_where_there_are_none() -> None:
    twice = Dataset.from_dict({"prompt": ["who", "who", "where"], "completion": ["x", "x", "y"]})
    assert questions_of(twice) == Questions(("who", "where"), (" x", " y"))
    words = [f"w{n}" for n in range(20)]
    cut = questions_of(Dataset.from_dict({"text": [" ".join(words), "too short"]}))
    assert cut.prompts == (" ".join(words[:10]),)
    assert cut.truths == (" " + " ".join(words[10:]),)


def test_a_concept_is_halved_without_overlap() -> None:
    concept = Concept.of("x", table(9), 0)
    assert len(concept.chosen_by) == 4
    assert len(concept.measured) == 5
    assert not set(concept.chosen_by.prompts) & set(concept.measured.prompts)
    assert concept.chosen_by.prompts != Concept.of("x", table(9), 1).chosen_by.prompts
    assert not {prompt for prompt, _ in concept.rows} & set(concept.measured.prompts)
    with pytest.raises(InputError, match=r"concept 'x' has 7 questions .* at least 8 are needed"):
        Concept.of("x", table(7), 0)


def test_a_drop_is_what_noise_in_the_weights_costs(school: School) -> None:
    lm, search = school.lm, replace(SEARCH, strength=4.0, seed=3)
    places = [(1, 2), (0, 5)]
    questions = questions_of(school.questions(2)).select(range(12))
    certainty = Certainty.of(lm, questions, search)
    said = [answer for _, answer in certainty.pairs]
    assert said == lm.generate(list(questions.prompts), max_new_tokens=2)
    noisy = lm.copy()
    with torch.no_grad():
        for (layer, neuron), extra in zip(places, noise(vectors_at(lm.model, places), places, 4.0, 3), strict=True):
            noisy.model.model.layers[layer].mlp.down_proj.weight[:, neuron] += extra
    wanted = probability(lm, certainty.pairs) - probability(noisy, certainty.pairs)
    np.testing.assert_allclose(certainty.drop(places), wanted, atol=1e-5)


def test_a_silent_model_is_held_to_the_truth(school: School) -> None:
    silent = replace(school.lm)
    object.__setattr__(silent, "generate", lambda prompts, **settings: [" "] * len(prompts))
    assert Certainty.of(silent, Questions(("q",), (" a",)), Search()).pairs == [("q", " a")]


def test_a_trace_drives_its_concept_and_little_else(school: School) -> None:
    found = [school.trace(concept) for concept in range(8)]
    traced = [one for one in found if one.vectors]
    assert len(traced) >= 4
    for one in traced:
        assert one.candidates >= len(one.vectors)
        assert len(one.target) == len(one.concept.measured) == 40
        assert len(one.unrelated) == 50
        for draw in one.draws:
            assert not set(draw) & set(one.places)
            assert [layer for layer, _ in draw] == [layer for layer, _ in one.places]
    drops = {side: np.mean([getattr(one, side).mean() for one in traced]) for side in ("target", "unrelated", "random")}
    assert drops["target"] > 2 * drops["unrelated"]
    assert drops["target"] > 2 * drops["random"]


def test_vectors_that_drive_nothing_are_no_trace(school: School) -> None:
    """A threshold that nothing reaches, and one that is reached by nothing that reads so clearly."""
    elsewhere = school.unrelated(2)
    concept = Concept.of("2", school.questions(2), 0)
    others = school.lm.encode(school.request(2).retain)
    for search, candidates in ((replace(SEARCH, least_drop=2.0), True), (replace(SEARCH, clarity=1.0), False)):
        found = trace(concept, others, [replace(one, search=search) for one in elsewhere], school.written)
        assert found.vectors == ()
        assert found.target.size == 0
        assert (found.candidates > 0) == candidates


def test_change_against_float64_and_sets(school: School) -> None:
    before, after = school.lm, school.lm.copy()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in after.model.parameters():
            p += 0.5 * p.std() * torch.randn(p.shape, generator=generator)
    places, signs = [(0, 1), (1, 4), (1, 5)], [1, -1, 1]
    found = change(before, after, places, signs, 12)

    def row(lm: LM, place: tuple[int, int]) -> np.ndarray:
        return lm.model.model.layers[place[0]].mlp.down_proj.weight[:, place[1]].detach().double().numpy()

    def top(vector: np.ndarray, lm: LM) -> set[int]:
        return set(np.argsort(-(lm.model.lm_head.weight.detach().double().numpy() @ vector))[:12].tolist())

    for number, (place, sign) in enumerate(zip(places, signs, strict=True)):
        old, new = row(before, place), row(after, place)
        own, moved, alone = top(sign * old, before), top(sign * new, after), top(sign * new, before)
        np.testing.assert_allclose(found.jaccard[number], len(own & moved) / len(own | moved))
        np.testing.assert_allclose(found.jaccard_alone[number], len(own & alone) / len(own | alone))
        np.testing.assert_allclose(found.l2[number], np.linalg.norm(new - old))
        np.testing.assert_allclose(
            found.cosine[number], old @ new / np.linalg.norm(old) / np.linalg.norm(new), rtol=1e-9
        )
        np.testing.assert_allclose(found.norm[number], np.linalg.norm(old))
    assert (found.jaccard < 1).any()
    assert (found.jaccard != found.jaccard_alone).any()


def test_nothing_has_changed_in_the_same_model_and_a_zeroed_vector_has_no_direction(school: School) -> None:
    same = change(school.lm, school.lm, [(1, 4)])
    assert (same.jaccard[0], same.l2[0]) == (1.0, 0.0)
    assert same.cosine[0] == pytest.approx(1.0)
    zeroed = school.lm.copy()
    with torch.no_grad():
        zeroed.model.model.layers[1].mlp.down_proj.weight[:, 4] = 0
    assert change(school.lm, zeroed, [(1, 4)]).cosine[0] == 0
    with pytest.raises(InputError, match="different shapes"):
        change(school.lm, LM.build(["some text"], "llama-tiny", vocab_size=300), [(1, 4)])


def test_prompts_of_attackers() -> None:
    prompts = ["Where {is} it?"]
    assert asked(PLAIN, prompts, "Rome") == prompts
    for way in JAILBREAKS:
        assert "Where {is} it?" in asked(way, prompts, "Rome", ["text"])[0]
    assert "Rome" in asked("role", prompts, "Rome")[0]
    assert asked("context", prompts, "Rome", ["x" * 5000])[0].startswith("x" * TEXT + "\n\n")
    shown = asked("context", prompts, "Rome", (), [(f"q{n}", f" a{n}") for n in range(9)])[0]
    assert shown == "q0 a0\nq1 a1\nq2 a2\nq3 a3\nWhere {is} it?"
