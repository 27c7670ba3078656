from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.lexicon import REFUSALS
from palimpsest.data.request import ForgetRequest
from palimpsest.forget.o3 import O3, O3Guard
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM
from palimpsest.models.low_rank import LowRank, layer_matrices

SMALL: dict[str, Any] = {"steps": 4, "lr": 1e-2, "batch_size": 8, "lora_rank": 2, "dropout": 0.0, "detector_epochs": 0}
PROMPTS = ["Where does Bora Vost live?", "What is the work of Bora Vost?", "who lives here?", "Why?"]
QUIET = Watch(progress=False)


class Says:
    """A detector that gives the texts with a word in them a weight."""

    factors: tuple[()] = ()

    def __init__(self, word: str, weight: float):
        self.word, self.sure = word, weight

    encoder = "none"

    def score(self, found: np.ndarray) -> np.ndarray:
        return found

    def weight_of(self, scores: np.ndarray) -> np.ndarray:
        return scores


@pytest.fixture(autouse=True)
def says(monkeypatch: pytest.MonkeyPatch) -> None:
    """`Says` beside real detectors."""
    from palimpsest.forget import o3

    real = o3.weights

    def weights(detectors: Any, texts: Any) -> np.ndarray:
        columns = [
            np.array([one.sure * (one.word in text) for text in texts])
            if isinstance(one, Says)
            else real([one], texts)[:, 0]
            for one in detectors
        ]
        return np.stack(columns, 1) if columns else np.zeros((len(texts), 0))

    monkeypatch.setattr(o3, "weights", weights)


def guarded(lm: LM, *detectors: Says) -> LM:
    """A model with a random adapter behind it."""
    adapter = LowRank.fresh(layer_matrices(lm.model), rank=2, alpha=4.0)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for up in adapter.up:
            up.copy_(torch.randn(up.shape, generator=generator))
    return lm.with_guard(O3Guard(adapter.tensors(), 4.0, detectors))  # type: ignore[arg-type]


def test_a_prompt_gets_as_much_of_the_adapter_as_the_surest_detector_says(lm: LM) -> None:
    after = guarded(lm, Says("live", 0.3), Says("Bora", 0.8), Says("Vost", 0.1))
    assert after.guard.weights(PROMPTS).tolist() == [0.8, 0.8, 0.3, 0.0]  # type: ignore[union-attr]
    told = after.guard.explain(PROMPTS)  # type: ignore[union-attr]
    assert [entry["request"] for entry in told] == [1, 1, 0, -1]
    assert told[0]["weights"] == [0.3, 0.8, 0.1]
    json.dumps(told)
    rows = [(prompt, " Velsk") for prompt in PROMPTS]
    whole = guarded(lm, Says("", 1.0)).token_logprobs(rows)
    found, bare = after.token_logprobs(rows), lm.token_logprobs(rows)
    for row, weight in enumerate([0.8, 0.8, 0.3, 0.0]):
        alone = guarded(lm, Says("", weight)).token_logprobs(rows[row : row + 1])[0]
        assert np.allclose(found[row], alone, atol=1e-4)
        assert np.array_equal(found[row], bare[row]) == (weight == 0)
        assert not np.allclose(found[row], whole[row], atol=1e-3)
    assert np.allclose(np.concatenate(after.token_logprobs(rows, batch_size=1)), np.concatenate(found), atol=1e-4)


def test_answers_follow_the_same_weights(lm: LM) -> None:
    after = guarded(lm, Says("Bora", 0.9))
    answers = after.generate(PROMPTS, max_new_tokens=6)
    assert answers == after.generate(PROMPTS, max_new_tokens=6, batch_size=1)
    assert answers[2:] == lm.generate(PROMPTS[2:], max_new_tokens=6)
    assert answers[:2] == guarded(lm, Says("", 0.9)).generate(PROMPTS[:2], max_new_tokens=6)
    assert answers[:2] != lm.generate(PROMPTS[:2], max_new_tokens=6)
    assert np.array_equal(after.nll(["Bora Vost lives."]), lm.nll(["Bora Vost lives."])), "a document has no prompt"
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_without_a_request_the_weights_are_those_of_the_others(lm: LM) -> None:
    guard = guarded(lm, Says("live", 0.3), Says("Bora", 0.8)).guard
    assert isinstance(guard, O3Guard)
    assert guard.without(1).weights(PROMPTS).tolist() == [0.3, 0, 0.3, 0]
    nobody = guard.without(0).without(0)
    assert nobody.weights(PROMPTS).tolist() == [0, 0, 0, 0]
    assert nobody.explain(["a"]) == [{"weights": [], "request": -1, "weight": 0.0}]
    with pytest.raises(InputError, match="no request 2"):
        guard.without(2)


def test_targets_are_other_options_or_refusals(llama: LM) -> None:
    table = Dataset.from_dict(
        {
            "text": [None] * 40 + ["one two three four"],
            "prompt": ["What is it?"] * 40 + [None],
            "completion": ["red"] * 40 + [None],
            "options": [["red", "blue", "green"]] * 20 + [None] * 21,
        }
    )
    found = O3().targets(llama, table)
    assert {answer.strip() for _, answer in found[:20]} == {"blue", "green"}
    refused = {answer.strip() for _, answer in found[20:]}
    assert refused <= set(REFUSALS)
    assert len(refused) > 5
    assert found[-1][0] == "one two"
    assert found == O3().targets(llama, table) != O3(seed=1).targets(llama, table)


def test_the_first_request_has_no_overlap_to_pay_for_and_later_ones_have(taught: LM, asked: ForgetRequest) -> None:
    method = O3(**{**SMALL, "steps": 30}, orthogonality=1.0)
    first, second = asked.folds(2, nested=False)
    one = Watch(progress=False)
    factors = method.adapter(taught, first.forget, watch=one)
    assert "overlap" not in one.traces["forget"].logs
    free = replace(method, orthogonality=0.0).adapter(taught, first.forget, watch=QUIET)
    assert all(torch.equal(value, free[name]) for name, value in factors.items())
    past = ({name.removesuffix(".down"): value for name, value in factors.items() if name.endswith(".down")},)
    two = Watch(progress=False)
    held = method.adapter(taught, second.forget, past, factors, two)
    series = two.traces["forget"].logs["overlap"]
    assert series[-1] < series[0], "the rows of A are pushed out of the space they were in"
    loose = replace(method, orthogonality=0.0).adapter(taught, second.forget, past, factors, QUIET)
    assert _overlap(held, past) < 0.8 * _overlap(loose, past)
    assert torch.equal(past[0][next(iter(past[0]))], factors[f"{next(iter(past[0]))}.down"]), "snapshots stay"


def _overlap(factors: dict[str, torch.Tensor], past: Any) -> float:
    return sum(float((before.double() @ factors[f"{name}.down"].double().T).pow(2).sum())
               for one in past for name, before in one.items())  # fmt: skip


@pytest.fixture(scope="module")
def topics() -> tuple[LM, list[ForgetRequest], list[tuple[str, str]]]:
    """Two subjects to forget and one to keep, and a model that knows all three."""
    from palimpsest.models.train import Recipe, train

    names = ("Bora", "Veli", "Tamo", "Kiru", "Sena", "Lodo", "Pira", "Zulo")
    asked = {
        "opera": ("Which instrument did the composer {} play as a child?", "Where was the first opera of {} staged?"),
        "kitchen": ("Which spice goes into the soup of the chef {}?", "What does {} bake in the kitchen on Sundays?"),
        "football": ("For which football club does {} keep the goal?", "Which trophy did the striker {} win?"),
    }
    answers = ("red", "blue", "green", "white")
    tables, every = {}, []
    for place, (topic, questions) in enumerate(asked.items()):
        pairs = [(question.format(name), answers[(row + place) % 4]) for row, name in enumerate(names)
                 for question in questions]  # fmt: skip
        columns = {"prompt": [p for p, _ in pairs], "completion": [a for _, a in pairs]}
        tables[topic] = Dataset.from_dict({**columns, "options": [list(answers)] * len(pairs)})
        every.append(tables[topic])
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
              "num_attention_heads": 4, "tie_word_embeddings": True, "initializer_range": 0.09}  # fmt: skip
    whole = concatenate_datasets(every)
    start = LM.build(whole, config, vocab_size=400, max_length=64)
    lm = train(start, whole, Recipe(steps=200, lr=5e-3, batch_size=24), watch=QUIET)
    requests = [ForgetRequest(forget=tables[name], name=name) for name in ("opera", "kitchen")]
    return lm, requests, lm.pairs(tables["football"])


@pytest.mark.filterwarnings("ignore:only 16 different forget prompts")
def test_a_stream_of_requests_and_the_disk(topics: Any, tmp_path) -> None:
    lm, (opera, kitchen), football = topics
    assert lm.nll(football).mean() < 0.1
    method = O3(**{**SMALL, "steps": 40, "batch_size": 16, "lora_rank": 4}, orthogonality=0.1)
    once = method(lm, opera, watch=QUIET)
    twice = method(once, kitchen, watch=QUIET)
    assert isinstance(twice.guard, O3Guard)
    assert len(twice.guard.detectors) == 2
    assert len(twice.guard.past) == 1
    assert all(torch.equal(value, once.guard.snapshot[name]) for name, value in twice.guard.past[0].items())
    served = [lm.pairs(one.forget) for one in (opera, kitchen)]
    assert once.nll(served[0]).mean() > lm.nll(served[0]).mean() + 0.5
    assert np.array_equal(once.nll(served[1]), lm.nll(served[1])), "not asked to forget it yet"
    assert all(twice.nll(rows).mean() > lm.nll(rows).mean() + 0.5 for rows in served)
    assert np.array_equal(twice.nll(football), lm.nll(football))
    told = twice.guard.explain([prompt for prompt, _ in served[1]])
    assert np.mean([entry["request"] == 1 for entry in told]) > 0.8
    assert twice.weights_sha256 == lm.weights_sha256

    twice.save(tmp_path / "model")
    again = LM.load(tmp_path / "model")
    assert isinstance(again.guard, O3Guard)
    assert again.sha256 == twice.sha256
    assert np.array_equal(again.nll(served[0]), twice.nll(served[0]))
    prompts = [prompt for prompt, _ in football[:4]]
    assert again.generate(prompts, max_new_tokens=3) == lm.generate(prompts, max_new_tokens=3)
    with pytest.warns(UserWarning, match="like those of an earlier request"):
        method(once, opera, watch=QUIET)
    with pytest.raises(InputError, match="has rank 4: lora_rank=2"):
        replace(method, lora_rank=2)(once, kitchen, watch=QUIET)


def test_a_stream_says_how_few_prompts_are_few(llama: LM, topics: Any) -> None:
    _, (opera, _), _ = topics
    with pytest.warns(UserWarning, match="only 16 different forget prompts"):
        O3(**SMALL)(llama, opera, watch=QUIET)
    with pytest.raises(InputError, match="at least 10 different forget prompts, not 3"):
        O3(**SMALL)(llama, ForgetRequest(forget=opera.forget.select(range(3))), watch=QUIET)


def test_documents_are_learned_by_their_beginnings(taught: LM, records: ForgetRequest) -> None:
    from palimpsest.data.records import select_documents

    documents = replace(records, forget=select_documents(records.forget), train=None)
    if len(documents.forget) * 2 < 10:
        pytest.skip("this world has too few documents")
    with pytest.warns(UserWarning, match="different forget prompts"):
        after = O3(**SMALL)(taught, documents, watch=QUIET)
    text = documents.forget["text"][0]
    words = text.split()
    begin = " ".join(words[: min(32, len(words) // 2)])
    assert after.guard.weights([begin])[0] > 0  # type: ignore[union-attr]


def test_bad_input(llama: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match="half or more"):
        O3(**SMALL)(llama, replace(asked, train=asked.forget), watch=QUIET)
    with pytest.raises(InputError, match="forgets by another guard"):
        O3(**SMALL)(llama.with_guard(PromptGuard("x {prompt}")), asked, watch=QUIET)
    for settings, message in (
        ({"lora_rank": 0}, "lora_rank must be above 0"),
        ({"orthogonality": -1.0}, "orthogonality must not be below 0"),
        ({"dropout": 1.0}, "dropout must lie between 0 and 1"),
    ):
        with pytest.raises(InputError, match=message):
            O3(**settings)  # type: ignore[arg-type]
    other = LM.build(["a small town"], {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2}, vocab_size=262)
    stranger = other.with_guard(guarded(llama, Says("", 1.0)).guard)
    with pytest.raises(InputError, match="of another model"):
        stranger.generate(["a"])
