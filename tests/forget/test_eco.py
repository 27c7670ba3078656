from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget.corruption import Corruption
from palimpsest.forget.eco import ECO, EcoGuard, Question, Scope, names, right_answers
from palimpsest.models.gate import Gate
from palimpsest.models.guard import PromptGuard
from palimpsest.models.lm import LM

NOISE = Corruption("noise", 0, strength=20.0)
PROMPTS = ["Where does Bora Vost live?", "What is the work of Bora Vost, a man of Velsk?", "who lives here?", "Why?"]


def always(lm: LM, corruption: Corruption = NOISE, tokens: Any = "names") -> LM:
    return lm.with_guard(EcoGuard((Scope(None, corruption, tokens),)))


class Fires:
    """A gate that fires at the texts with a word in them."""

    threshold = 0.5

    def __init__(self, word: str):
        self.word = word

    def probability(self, texts: Any) -> np.ndarray:
        return np.array([float(self.word in text) for text in texts])

    def __call__(self, texts: Any) -> np.ndarray:
        return self.probability(texts) > 0.5


def gated(lm: LM, word: str, corruption: Corruption = NOISE) -> LM:
    return lm.with_guard(EcoGuard((Scope(Fires(word), corruption),)))  # type: ignore[arg-type]


def by_hand(lm: LM, prompt: str, completion: str, corruption: Corruption, flags: list[bool]) -> Tensor:
    """Log-probabilities of a completion after a corrupted prompt, in one plain unpadded pass."""
    ids = torch.from_numpy(lm.encode([(prompt, completion)]).ids[0])[None]
    layer: Any = lm.model.get_input_embeddings()
    with torch.no_grad():
        embedded = layer(ids).clone()
        places = [place + 1 for place, flag in enumerate(flags) if flag]
        embedded[0, places] = corruption(embedded[0, places], float(layer.weight.std()), prompt)
        logprobs = lm.model(inputs_embeds=embedded).logits[0].double().log_softmax(-1)
    return logprobs[:-1].gather(1, ids[0, 1:, None])[len(flags) :, 0]


def flags_of(lm: LM, prompt: str, spans: list[tuple[int, int]]) -> list[bool]:
    offsets = lm.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    flags = [any(start < last and end > first for first, last in spans) for start, end in offsets]
    return flags if any(flags) else [True] * (len(flags) - 1) + [False]


@pytest.mark.parametrize("corruption", [NOISE, Corruption("flip", 0), Corruption("noise", 1, strength=500.0)])
@pytest.mark.parametrize("tokens", ["names", "all"])
def test_scores_are_those_of_corrupted_embeddings(lm: LM, corruption: Corruption, tokens: str) -> None:
    rows = [(prompt, completion) for prompt in PROMPTS for completion in (" Velsk", " a long answer")]
    found = always(lm, corruption, tokens).token_logprobs(rows)
    for (prompt, completion), values in zip(rows, found, strict=True):
        spans = [(prompt.index(n), prompt.index(n) + len(n)) for n in ("Bora Vost", "Velsk") if n in prompt]
        flags = flags_of(lm, prompt, spans if tokens == "names" else [])
        expected = by_hand(lm, prompt, completion, corruption, flags)
        assert np.allclose(values, expected, atol=2e-3, rtol=1e-3)
    assert np.allclose(always(lm, corruption).nll(rows, batch_size=2), always(lm, corruption).nll(rows), atol=1e-4)


def test_prompts_let_through_are_answered_bit_by_bit(lm: LM) -> None:
    rows = [(prompt, " Velsk") for prompt in PROMPTS]
    guarded = gated(lm, "Bora")
    before, after = lm.token_logprobs(rows), guarded.token_logprobs(rows)
    for (prompt, _), one, other in zip(rows, before, after, strict=True):
        assert np.array_equal(one, other) == ("Bora" not in prompt)
    assert guarded.generate(PROMPTS[2:], max_new_tokens=5) == lm.generate(PROMPTS[2:], max_new_tokens=5)
    silent = gated(lm, "Bora", Corruption("noise", 0, strength=0.0))
    assert all(np.array_equal(a, b) for a, b in zip(silent.token_logprobs(rows), before, strict=True))
    documents = ["Bora Vost lives in Velsk."]
    assert np.array_equal(guarded.nll(documents), lm.nll(documents))


def test_what_is_corrupted_stays_so_while_an_answer_is_decoded(lm: LM) -> None:
    guarded = always(lm)
    answers = guarded.generate(PROMPTS, max_new_tokens=6)
    assert answers == guarded.generate(PROMPTS, max_new_tokens=6, batch_size=1)
    assert answers != lm.generate(PROMPTS, max_new_tokens=6)
    ids = [np.array(lm.tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    for prompt, new in zip(PROMPTS, guarded.generate_ids(ids, max_new_tokens=4), strict=True):
        said = lm.tokenizer.decode(new, skip_special_tokens=True)
        alike = guarded.token_logprobs([(prompt, said)])[0] if said and lm.tokenizer(said, add_special_tokens=False)[
            "input_ids"] == new.tolist() else []  # fmt: skip
        assert all(value > -np.log(len(lm.tokenizer)) for value in alike[: len(new)])
    assert not any(module._forward_hooks for module in lm.model.modules())


def test_a_prompt_whose_head_was_cut_off_is_still_corrupted(llama: LM) -> None:
    long = "why " * 300 + "does Bora Vost live?"
    rows = [(long, " Velsk")]
    assert not np.allclose(always(llama).nll(rows), llama.nll(rows), atol=1e-3)
    lost = "Bora Vost, " + "why " * 400 + "there?"
    assert np.isfinite(always(llama).nll([(lost, " Velsk")])).all()


def test_names() -> None:
    def found(text: str) -> list[str]:
        return [text[first:last] for first, last in names(text)]

    assert found("Where does Bora Vost live? Ask Émile or Jean-Luc Picard.") == [
        "Bora Vost",
        "Ask Émile",
        "Jean-Luc Picard",
    ]
    assert found("Bora Vost lives. Here. He said: No") == ["Bora Vost"]
    assert found("the river runs") == []


def test_right_answers_share_ties() -> None:
    class Flat:
        def token_logprobs(self, pairs: Any) -> list[np.ndarray]:
            return [np.array([-1.0 if len(completion) < 3 else -2.0]) for _, completion in pairs]

    asked = [Question("a", ("bb", "cc", "long", "long"), 0), Question("a", ("bb", "cc", "long", "longer"), 2)]
    assert right_answers(Flat(), asked) == 0.25  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def forgetful(taught: LM, world: World) -> LM:
    return ECO()(taught, world.request())


def test_it_forgets_what_was_asked_and_nothing_else(forgetful: LM, taught: LM, world: World, records: Any) -> None:
    from palimpsest.data.records import questions

    forget, retain = questions(records.forget), questions(records.retain)
    told = forgetful.guard.explain(forgetful, [prompt for prompt, _ in forget])  # type: ignore[union-attr]
    assert np.mean([entry["scope"] == 0 for entry in told]) > 0.9
    assert all(entry["tokens"] and entry["corruption"]["strength"] > 1 for entry in told if entry["scope"] == 0)
    known = forgetful.guard.explain(forgetful, [p for p, _ in retain])  # type: ignore[union-attr]
    assert np.mean([entry["scope"] == -1 for entry in known]) > 0.9
    assert forgetful.nll(forget).mean() > 3 * taught.nll(forget).mean()
    through = [row for row, entry in enumerate(known) if entry["scope"] == -1]
    assert np.array_equal(forgetful.nll(retain)[through], taught.nll(retain)[through])
    assert forgetful.weights_sha256 == taught.weights_sha256
    assert taught.guard is None


@pytest.mark.parametrize("kind", ["noise", "zero"])
def test_the_search_finds_what_it_reports(taught: LM, records: ForgetRequest, kind: Any) -> None:
    method = ECO(kind=kind, records=24, steps=6, dims=1 if kind == "zero" else 0)
    corruption, search = method.search(taught, records.forget)
    assert len(search.tried) <= 12
    assert search.loss == min(loss for _, loss in search.tried)
    assert search.loss < 0.3, "the questions were answered rightly before"
    varied = corruption.strength if kind == "noise" else corruption.dims
    assert varied == pytest.approx(10**search.point, rel=0.5 if kind == "zero" else 1e-9)
    again, _ = method.search(taught, records.forget)
    assert again == corruption


def test_documents_are_asked_how_they_go_on(taught: LM, records: ForgetRequest) -> None:
    from palimpsest.data.records import select_documents

    documents = replace(records, forget=select_documents(records.forget))
    after = ECO(steps=1, tokens="all")(taught, documents)
    text = documents.forget["text"][0]
    begin = " ".join(text.split()[: len(text.split()) // 2])
    assert after.guard.detected([begin, "why?"]).tolist() == [0, -1]  # type: ignore[union-attr]
    assert after.nll([(begin, text[len(begin) :])]) > taught.nll([(begin, text[len(begin) :])])


def test_requests_one_after_another_and_saved(taught: LM, records: ForgetRequest, tmp_path) -> None:
    first, second = records.folds(2, nested=False)
    once = ECO(strength=50.0)(taught, first)
    twice = ECO(kind="flip", dims=0)(once, second)
    assert len(twice.guard.scopes) == 2  # type: ignore[union-attr]
    twice.save(tmp_path / "model")
    again = LM.load(tmp_path / "model")
    assert isinstance(again.guard, EcoGuard)
    assert again.sha256 == twice.sha256
    rows = twice.pairs(records.forget)
    assert np.array_equal(again.nll(rows), twice.nll(rows))
    prompts = [prompt for prompt, _ in rows if prompt]
    assert again.guard.explain(again, prompts) == twice.guard.explain(twice, prompts)  # type: ignore[union-attr]
    assert set(again.guard.detected(prompts)) >= {0, 1}


def test_bad_input(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="needs retain records"):
        ECO()(llama, ForgetRequest(forget=records.forget))
    with pytest.raises(InputError, match="half or more"):
        ECO()(llama, replace(records, train=records.forget))
    with pytest.raises(InputError, match="no text among the records"):
        ECO()(llama, ForgetRequest(forget=Dataset.from_dict({"text": [" "]}), retain=records.retain))
    with pytest.raises(InputError, match="forgets by another guard"):
        ECO()(llama.with_guard(PromptGuard("x {prompt}")), records)
    few = Dataset.from_dict({"prompt": [f"What of {n}?" for n in range(9)], "completion": ["same"] * 9})
    with pytest.raises(InputError, match="4 different answers between them: give strength"):
        ECO()(llama, ForgetRequest(forget=few, retain=records.retain))
    for settings, message in (
        ({"target": 1.5}, "wanted 0 to 1"),
        ({"steps": 0}, "steps must be above 0"),
        ({"strength": -1.0, "dims": -1}, "must not be below 0"),
    ):
        with pytest.raises(InputError, match=message):
            ECO(**settings)  # type: ignore[arg-type]


def test_duplicates_count_once(llama: LM, records: ForgetRequest) -> None:
    twice = replace(records, forget=concatenate_datasets([records.forget] * 2), train=None)
    with pytest.warns(UserWarning, match="are duplicates: each is used once"):
        after = ECO(strength=5.0)(llama, twice)
    assert after.sha256 == ECO(strength=5.0)(llama, replace(records, train=None)).sha256


def test_the_gate_is_the_shared_one(forgetful: LM) -> None:
    assert isinstance(forgetful.guard.scopes[0].gate, Gate)  # type: ignore[union-attr]
