"""The audit on models whose truth is known: untouched behind a filter, ablated, and unlearned by gradients."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from palimpsest.audit import ConceptVectors
from palimpsest.audit.answers import rouge_l
from palimpsest.audit.cards import CARDS
from palimpsest.audit.jailbreaks import JAILBREAKS
from palimpsest.claims.conceptvectors import SEARCH, WORDS, School
from palimpsest.claims.sok_unlearning import Filter
from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import GradDiff, Needle
from palimpsest.models.lm import LM

AUDIT = ConceptVectors(words=WORDS, keep=1.0, clarity=SEARCH.clarity, answer_tokens=2, unrelated=60)
FORGOTTEN = (2, 3, 4)


@pytest.fixture(scope="module")
def school(session_cache: object) -> School:
    return School(0, 0.4)


@pytest.fixture(scope="module")
def request_of_three(school: School) -> ForgetRequest:
    return ForgetRequest(school.questions(*FORGOTTEN), school.questions(0, 1), school.questions(5, 6, 7), name="three")


@pytest.fixture(scope="module")
def filtered(school: School, request_of_three: ForgetRequest) -> Evidence:
    """The same weights behind a guard that takes every forgotten name out of a prompt."""
    names = [school.name(concept, alias) for concept in FORGOTTEN for alias in range(8)]
    return AUDIT(school.lm, school.lm.with_guard(Filter(tuple(names))), request_of_three)


@pytest.fixture(scope="module")
def ablated(school: School, request_of_three: ForgetRequest, filtered: Evidence) -> Evidence:
    """The very vectors that the audit finds, damaged."""
    places = [(one["layer"], one["neuron"]) for told in filtered.extras["concepts"] for one in told["vectors"]]
    return AUDIT(school.lm, Needle(targets=tuple(places))(school.lm, request_of_three), request_of_three)


def test_a_filter_silences_and_leaves_the_trace(filtered: Evidence) -> None:
    assert (filtered["trace_jaccard"].before, filtered["trace_jaccard"].after) == (1.0, 1.0)
    assert filtered["trace_cosine"].after == pytest.approx(1.0)
    assert filtered["trace_l2"].after == 0.0
    assert filtered["target_answers"].before == 100
    assert filtered["target_answers"].after < 60
    assert filtered["unrelated_answers"].after == 100
    assert filtered["clear_vectors"].before == filtered["clear_vectors"].after
    assert filtered.extras["verdict"].startswith("The trace is left: ")
    # the names are asked for in every attack, so the filter catches all
    assert all(filtered[f"jailbreak_{way}"].after < 60 for way in JAILBREAKS)


def test_ablation_takes_the_trace_away_and_spares_the_rest(ablated: Evidence) -> None:
    assert ablated["trace_jaccard"].after < 0.5
    assert ablated["trace_cosine"].after < 0.5
    assert ablated.extras["verdict"].startswith("The trace is gone: ")
    assert ablated["unrelated_answers"].after > ablated["target_answers"].after + 20
    # the audit's own ablation is the same as this unlearner's
    row = ablated.extras["table"][0]
    assert row["asked"] == "plain"
    assert row["after"] == row["ablated"]
    assert row["before"] == 100


def test_gradients_leave_more_of_it(school: School, request_of_three: ForgetRequest, ablated: Evidence) -> None:
    def gone(step: int, model: object) -> bool:
        asked = request_of_three.forget
        pairs = list(zip(asked["prompt"], asked["completion"], strict=True))
        return step % 5 == 0 and school.right(replace(school.lm, model=model), pairs) <= 0.1

    method = GradDiff(steps=60, lr=1e-3, warmup_epochs=0.0)
    after = method(school.lm, request_of_three, watch=Watch(until=gone, progress=False))
    found = AUDIT(school.lm, after, request_of_three, reference=school.lm)
    assert found["target_answers"].after < 40
    assert found["trace_jaccard"].after > ablated["trace_jaccard"].after + 0.2
    assert found["trace_cosine"].after > 0.9
    assert found["target_answers"].reference == 100
    assert found["clear_vectors"].reference == found["clear_vectors"].before


def test_numbers_can_be_had_again_from_the_answers(
    school: School, request_of_three: ForgetRequest, ablated: Evidence
) -> None:
    for one in ablated.measurements:
        assert one.name in CARDS
        if one.values:
            assert one.after == pytest.approx(np.mean(one.values))
            assert one.low is not None
            assert one.low <= one.after <= one.high
    shown = ablated.extras["examples"]
    assert len(shown) == AUDIT.examples
    known = dict(zip(*(request_of_three.forget[side] for side in ("prompt", "completion")), strict=True))
    for example in shown:
        assert example["truth"] == known[example["prompt"]].strip()
        assert example["before"] == school.lm.generate([example["prompt"]], max_new_tokens=2)[0].strip()
    hits = [100 * rouge_l([example["after"]], [example["truth"]])[0] for example in shown]
    assert set(hits) <= set(ablated["concept_knowledge"].values)
    json.dumps(ablated.to_json(), allow_nan=False)


def test_no_trace_is_said_and_proves_nothing(school: School, request_of_three: ForgetRequest) -> None:
    after = Needle(targets=((0, 0),))(school.lm, request_of_three)
    found = replace(AUDIT, least_drop=2.0)(school.lm, after, request_of_three)
    assert found.extras["verdict"].startswith("No trace found: in none of 3 concepts")
    assert {told["status"] for told in found.extras["concepts"]} == {"no trace found"}
    assert found["trace_jaccard"].after is None
    assert "no trace" in found["trace_jaccard"].note
    assert found["target_answers"].n == 120
    assert "ablated" not in found.extras["table"][0]


def test_only_so_many_concepts(school: School, request_of_three: ForgetRequest) -> None:
    found = replace(AUDIT, concepts=2)(school.lm, school.lm.with_guard(Filter(("x",))), request_of_three)
    assert len(found.extras["concepts"]) == 2


def test_bad_input(school: School, request_of_three: ForgetRequest) -> None:
    lm, wanted = school.lm, request_of_three
    few = wanted.forget.select(range(5))
    with pytest.raises(InputError, match=r"concept '2' has 5 questions .* at least 8 are needed"):
        AUDIT(lm, lm, replace(wanted, forget=few))
    with pytest.raises(InputError, match="records about other things"):
        AUDIT(lm, lm, ForgetRequest(wanted.forget))
    with pytest.raises(InputError, match=r"6 questions .* too few: at least 8"):
        AUDIT(lm, lm, replace(wanted, utility=wanted.utility.select(range(6))))
    with pytest.raises(InputError, match="different vocabularies"):
        AUDIT(lm, LM.build(["other words"], "llama-tiny", vocab_size=300), wanted)
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16, "hidden_size": 32}
    mixture |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    sparse = LM.build(wanted.forget, mixture, vocab_size=300)
    with pytest.raises(InputError, match="not addressable"):
        AUDIT(sparse, sparse, wanted)
    for settings in ({"keep": 0}, {"clarity": 2}, {"strength": 0}, {"unrelated": 3}, {"tried": 0}):
        with pytest.raises(InputError):
            replace(AUDIT, **settings)
