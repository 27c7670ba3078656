from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.models.guard import (
    Prepared,
    PromptGuard,
    load_guard,
    register_guard,
    save_guard,
)
from palimpsest.models.lm import LM

TEMPLATE = "Anna keeps no dogs. {prompt}"


@register_guard("test-shift")
@dataclass(frozen=True, eq=False)
class ShiftGuard:
    """Adds to the embeddings of prompt tokens a vector times a row's own strength: the length of its prompt."""

    shift: Tensor
    scale: float = 1.0
    seen: list[tuple[list[int], tuple[int, ...]]] = field(default_factory=list)

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        strength = torch.tensor([len(prompt) * self.scale for prompt in prompts])

        @contextmanager
        def active(rows: np.ndarray, prompt: Tensor) -> Iterator[None]:
            self.seen.append((rows.tolist(), tuple(prompt.shape)))

            def add(module: Any, args: Any, output: Tensor) -> Tensor:
                assert len(output) == len(rows), "the pass does not hold the rows it was announced with"
                assert prompt.shape == output.shape[:2] or not prompt.any()
                strengths = strength[rows][:, None, None] * prompt[..., None]
                return output + strengths * self.shift

            handle = lm.model.get_input_embeddings().register_forward_hook(add)
            try:
                yield
            finally:
                handle.remove()

        return Prepared(prompts, active)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        return {"scale": self.scale}, {"shift": self.shift}

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> ShiftGuard:
        return cls(tensors["shift"], settings["scale"])


def shift_guard(lm: LM) -> ShiftGuard:
    generator = torch.Generator().manual_seed(0)
    return ShiftGuard(torch.randn(lm.model.config.hidden_size, generator=generator) * 0.02)


@pytest.fixture(scope="module")
def rows(texts: list[str]) -> list[tuple[str, str]]:
    return [(text[: 5 * (i % 5)], text[5 * (i % 5) :]) for i, text in enumerate(texts[:15])]


def test_prompt_guard_rewrites_prompts_everywhere(lm: LM, rows: list[tuple[str, str]]) -> None:
    guarded = lm.with_guard(PromptGuard(TEMPLATE))
    before = TEMPLATE.split("{prompt}")[0]
    rewritten = [(before + prompt, completion) for prompt, completion in rows]
    assert np.array_equal(guarded.nll(rows), lm.nll(rewritten))
    assert not np.allclose(guarded.nll(rows), lm.nll(rows))
    prompts = [prompt for prompt, _ in rows]
    assert guarded.generate(prompts, max_new_tokens=6) == lm.generate([p for p, _ in rewritten], max_new_tokens=6)
    ids = [np.array(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]
    answers = guarded.generate_ids(ids, max_new_tokens=6)
    texts = [lm.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    assert texts == guarded.generate(prompts, max_new_tokens=6)


def test_a_document_is_the_completion_of_the_empty_prompt(llama: LM) -> None:
    guarded = llama.with_guard(PromptGuard(TEMPLATE))
    assert guarded.nll(["Bnna lives"]) == llama.nll([("Anna keeps no dogs. ", "Bnna lives")])


def shifted_logits(lm: LM, guard: ShiftGuard, ids: np.ndarray, span: tuple[int, int], strength: float) -> Tensor:
    """The logits of one row without any of the guard's or the batch's machinery, (T, V)."""
    with torch.no_grad():
        embedded = lm.model.get_input_embeddings()(torch.from_numpy(ids)[None]).clone()
        embedded[0, span[0] : span[1]] += strength * guard.shift
        return lm.model(inputs_embeds=embedded).logits[0].double()


def test_a_guard_inside_the_model_knows_its_rows(lm: LM, rows: list[tuple[str, str]]) -> None:
    guard = shift_guard(lm)
    guarded = lm.with_guard(guard)
    encoded = lm.encode(rows)
    found = guarded.token_logprobs(rows)
    for (prompt, _), ids, start, values in zip(rows, encoded.ids, encoded.starts, found, strict=True):
        logprobs = shifted_logits(lm, guard, ids, (1, start), len(prompt)).log_softmax(-1)
        expected = [float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids))]
        assert np.allclose(values, expected, atol=1e-3, rtol=1e-4)
    assert np.allclose(guarded.nll(rows, batch_size=4), guarded.nll(rows), atol=1e-4, rtol=1e-5)
    assert not np.allclose(guarded.nll(rows), lm.nll(rows), atol=1e-2)


@pytest.mark.parametrize("samples", [1, 2])
def test_a_guard_follows_rows_through_generation(new_lm: Any, texts: list[str], samples: int) -> None:
    lm = new_lm("llama")
    prompts = [text[: 4 + i % 9] for i, text in enumerate(texts[:12])]
    guard = shift_guard(lm)
    guarded = lm.with_guard(guard)
    free = guarded.generate_ids([np.array(lm.tokenizer(p)["input_ids"]) for p in prompts], max_new_tokens=12)
    lm.model.generation_config.eos_token_id = np.bincount(np.concatenate(free)).argsort()[-8:].tolist()
    options: dict[str, Any] = {"max_new_tokens": 12, "samples": samples, "temperature": float(samples > 1)}
    guard.seen.clear()
    whole = guarded.generate(prompts, **options)
    assert len(guard.seen) > 3, "the batch must have shrunk"
    assert guard.seen[0][0] == guard.seen[1][0][::samples]
    assert all(shape == (len(batch), 1) for batch, shape in guard.seen[1:])
    assert guarded.generate(prompts, batch_size=1, **options) == whole
    assert lm.generate(prompts, **options) != whole
    if samples == 1:
        for prompt, answer in zip(prompts, guarded.generate_ids(_ids(lm, prompts), max_new_tokens=1), strict=True):
            ids = np.array(lm.tokenizer(prompt)["input_ids"])
            token = int(shifted_logits(lm, guard, ids, (1, len(ids)), len(prompt))[-1].argmax())
            ends = [*lm.model.generation_config.eos_token_id, lm.tokenizer.eos_token_id]
            assert answer.tolist() == ([] if token in ends else [token])


def _ids(lm: LM, prompts: list[str]) -> list[np.ndarray]:
    return [np.array(lm.tokenizer(prompt)["input_ids"]) for prompt in prompts]


def test_tokens_cannot_be_scored_past_a_guard(llama: LM) -> None:
    guarded = llama.with_guard(PromptGuard(TEMPLATE))
    with pytest.raises(InputError, match="scores texts, not tokens"):
        guarded.nll(llama.encode(["text"]))
    assert guarded.with_guard(None).nll(llama.encode(["text"])) == llama.nll(["text"])


def test_a_guard_that_loses_prompts_is_an_error(llama: LM) -> None:
    class Loses(PromptGuard):
        def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
            return Prepared(prompts[1:])

    with pytest.raises(ValueError, match="returned 1 prompts for 2"):
        llama.with_guard(Loses(TEMPLATE)).generate(["a", "b"])


def test_save_and_restore_beside_the_weights(llama: LM, tmp_path) -> None:
    for guard in (PromptGuard(TEMPLATE), shift_guard(llama)):
        guarded = llama.with_guard(guard)
        guarded.save(tmp_path / "model")
        again = LM.load(tmp_path / "model")
        assert type(again.guard) is type(guard)
        assert again.sha256 == guarded.sha256 != llama.sha256
        assert again.weights_sha256 == llama.weights_sha256
        rows = [("Anna", " lives here")]
        assert np.array_equal(again.nll(rows), guarded.nll(rows))
    assert list(load_file(tmp_path / "model" / "guard.safetensors")) == ["shift"]
    llama.save(tmp_path / "model")
    assert LM.load(tmp_path / "model").guard is None  # the old guard went with the old folder


def test_bad_guards(tmp_path) -> None:
    with pytest.raises(InputError, match="exactly once"):
        PromptGuard("no place for it")
    with pytest.raises(InputError, match="exactly once"):
        PromptGuard("{prompt} {prompt}")
    assert load_guard(tmp_path) is None
    (tmp_path / "guard.json").write_text("{")
    with pytest.raises(InputError, match="not a saved guard"):
        load_guard(tmp_path)
    (tmp_path / "guard.json").write_text(json.dumps({"guard": "promt", "settings": {}}))
    with pytest.raises(InputError, match="unknown guard 'promt': did you mean prompt"):
        load_guard(tmp_path)
    (tmp_path / "guard.json").write_text(json.dumps({"guard": "prompt", "settings": {"tmplate": "x"}}))
    with pytest.raises(InputError, match=r"guard\.json: not a saved guard"):
        load_guard(tmp_path)


def test_registration() -> None:
    with pytest.raises(ValueError, match="two guards are called prompt"):

        @register_guard("prompt")
        class Other:
            pass

    class Unregistered(PromptGuard):
        pass

    with pytest.raises(InputError, match="not a registered guard"):
        save_guard(Unregistered(TEMPLATE), "nowhere")
