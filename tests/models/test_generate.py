from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.models import generate
from palimpsest.models.lm import LM

NEW = 24


@pytest.fixture(scope="module")
def prompts(texts: list[str]) -> list[str]:
    return [text[: 3 + 2 * (i % 12)] for i, text in enumerate(texts[:24])]


def transformers_greedy(lm: LM, ids: np.ndarray, new: int = NEW) -> list[int]:
    """transformers' own generate, one prompt at a time, up to the end-of-sequence token."""
    ends = lm.model.generation_config.eos_token_id
    found = lm.model.generate(
        torch.from_numpy(ids)[None], attention_mask=torch.ones(1, len(ids)), max_new_tokens=new, do_sample=False
    )
    tokens = found[0, len(ids) :].tolist()
    ends = ends if isinstance(ends, list) else [ends]
    return tokens[: min((tokens.index(end) for end in ends if end in tokens), default=len(tokens))]


def ids_of(lm: LM, prompt: str) -> np.ndarray:
    return np.array(lm.tokenizer(prompt)["input_ids"])


def test_equals_transformers_greedy(lm: LM, prompts: list[str]) -> None:
    ids = [ids_of(lm, prompt) for prompt in prompts]
    expected = [transformers_greedy(lm, row) for row in ids]
    assert len({tuple(answer) for answer in expected}) > 12, "the answers must differ for the test to mean something"
    assert [answer.tolist() for answer in lm.generate_ids(ids, max_new_tokens=NEW)] == expected
    texts = [lm.tokenizer.decode(answer, skip_special_tokens=True) for answer in expected]
    assert lm.generate(prompts, max_new_tokens=NEW) == texts


def test_rows_end_at_their_own_end_of_sequence(new_lm: Any, prompts: list[str]) -> None:
    lm = new_lm("llama")
    ids = [ids_of(lm, prompt) for prompt in prompts]
    free = [transformers_greedy(lm, row) for row in ids]
    frequent = np.bincount(np.concatenate(free)).argsort()[-12:]
    lm.model.generation_config.eos_token_id = [lm.tokenizer.eos_token_id, *frequent.tolist()]
    expected = [transformers_greedy(lm, row) for row in ids]
    assert len({len(answer) for answer in expected}) > 3, "rows must end at different steps"
    assert [answer.tolist() for answer in lm.generate_ids(ids, max_new_tokens=NEW)] == expected


@pytest.mark.parametrize("batch_size", [1, 7])
def test_independent_of_batch_size_and_order(lm: LM, prompts: list[str], batch_size: int) -> None:
    whole = lm.generate(prompts, max_new_tokens=NEW)
    assert lm.generate(prompts, max_new_tokens=NEW, batch_size=batch_size) == whole
    assert lm.generate(prompts[::-1], max_new_tokens=NEW)[::-1] == whole


def test_a_shared_beginning_is_read_once(lm: LM, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    shared = "Two examples: Anna lives in town 3, Bnna in town 4. "
    ids = [ids_of(lm, shared + prompt) for prompt in prompts]
    expected = [transformers_greedy(lm, row, 8) for row in ids]
    seen = []
    inner = lm.model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        seen.append(tuple(kwargs["input_ids"].shape))
        return inner(*args, **kwargs)

    counting.__signature__ = generate.inspect.signature(inner)  # type: ignore[attr-defined]
    monkeypatch.setattr(lm.model, "forward", counting)
    assert [answer.tolist() for answer in lm.generate_ids(ids, max_new_tokens=8)] == expected
    assert seen[0][0] == 1
    assert seen[0][1] >= generate.SHARED
    assert seen[1][0] == len(ids)


def test_identical_prompts(llama: LM) -> None:
    answers = llama.generate(["a person called Anna lives in a town"] * 3, max_new_tokens=5)
    assert answers == llama.generate(["a person called Anna lives in a town"], max_new_tokens=5) * 3


@pytest.mark.parametrize("config", [{"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}])
def test_sliding_windows(new_lm: Any, texts: list[str], prompts: list[str], config: dict[str, Any]) -> None:
    fields = {**new_lm("qwen2").model.config.to_dict(), **config}
    del fields["layer_types"]
    lm = LM.build(texts, fields, vocab_size=320)
    assert set(lm.model.config.layer_types) == {"full_attention", "sliding_attention"}
    with torch.no_grad():
        for parameter in lm.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    ids = [ids_of(lm, prompt) for prompt in prompts]
    expected = [transformers_greedy(lm, row) for row in ids]
    assert [answer.tolist() for answer in lm.generate_ids(ids, max_new_tokens=NEW)] == expected


def test_stop_strings_cut_the_answer(llama: LM, prompts: list[str]) -> None:
    free = llama.generate(prompts, max_new_tokens=NEW)
    said = Counter(text[i : i + 2] for text in free for i in range(1, len(text) - 1))
    stops = [pair for pair, _ in said.most_common() if pair.isascii() and len(pair) == 2][:4]
    stopped = llama.generate(prompts, max_new_tokens=NEW, stop=stops)
    assert stopped != free
    for text, cut in zip(free, stopped, strict=True):
        ends = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
        assert cut == (text[: min(ends)[1]] if ends else text)
    assert llama.generate(prompts, max_new_tokens=NEW, stop=stops, batch_size=1) == stopped
    assert llama.generate(prompts, max_new_tokens=NEW, stop=stops[0]) == [text.split(stops[0])[0] for text in free]


def test_rows_leave_when_they_stop(llama: LM, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    forward = generate._Batch._forward
    monkeypatch.setattr(
        generate._Batch, "_forward", lambda self, ids, *rest: steps.append(ids.shape) or forward(self, ids, *rest)
    )
    letters = sorted(set("".join(llama.generate(prompts, max_new_tokens=NEW))))
    steps.clear()
    assert llama.generate(prompts, max_new_tokens=NEW, stop=letters) == [""] * len(prompts)
    assert len(steps) <= generate.STOP_EVERY + 1


def test_samples_depend_on_seed_prompt_and_sample_only(lm: LM, prompts: list[str]) -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "temperature": 1.5}
    found = lm.generate(prompts, samples=3, seed=1, **options)
    assert lm.generate(prompts, samples=3, seed=1, batch_size=2, **options) == found
    assert lm.generate(prompts[:5], samples=3, seed=1, **options) == found[:5]
    assert lm.generate(prompts, samples=2, seed=1, **options) == [group[:2] for group in found]
    assert lm.generate(prompts, seed=1, **options) == [group[0] for group in found]
    assert lm.generate(prompts, samples=3, seed=2, **options) != found
    assert sum(len(set(group)) > 1 for group in found) > len(found) / 2


def test_samples_follow_the_model_distribution(new_lm: Any) -> None:
    lm = new_lm("llama")
    with torch.no_grad():
        for parameter in lm.model.parameters():
            parameter.div_(4)
    prompt = ids_of(lm, "person")
    with torch.no_grad():
        probabilities = (lm.model(torch.from_numpy(prompt)[None]).logits[0, -1].double() / 0.7).softmax(-1).numpy()
    count = 4000
    found = lm.generate_ids([prompt] * count, max_new_tokens=1, temperature=0.7)
    tokens = [int(answer[0]) if len(answer) else lm.tokenizer.eos_token_id for answer in found]
    frequencies = np.bincount(tokens, minlength=len(probabilities)) / count
    error = np.sqrt(probabilities * (1 - probabilities) / count)
    assert (np.abs(frequencies - probabilities) < 5 * error + 2 / count).all()


def test_long_prompts_keep_their_end(lm: LM) -> None:
    prompt = "ab cd " * 60 + "Anna lives"
    ids = ids_of(lm, prompt)
    assert len(ids) > lm.max_length
    kept = np.concatenate([ids[:1], ids[-(lm.max_length - NEW - 1) :]])
    assert lm.generate_ids([ids], max_new_tokens=NEW)[0].tolist() == transformers_greedy(lm, kept)
    expected = lm.tokenizer.decode(transformers_greedy(lm, kept), skip_special_tokens=True)
    assert lm.generate([prompt], max_new_tokens=NEW) == [expected]


def test_no_prompts_and_empty_prompts(llama: LM) -> None:
    assert llama.generate([]) == []
    assert llama.generate_ids([]) == []
    start = np.array([llama.tokenizer.bos_token_id])
    assert llama.generate_ids([start], max_new_tokens=5)[0].tolist() == transformers_greedy(llama, start, 5)
    assert len(llama.generate([""], max_new_tokens=5)) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": 96}, "leaves no room for a prompt in 96 tokens"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"samples": 0, "temperature": 1.0}, "samples must be at least 1"),
        ({"samples": 2}, "set temperature above 0"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"stop": ["\n", ""]}, "must not be empty"),
    ],
)
def test_bad_options(llama: LM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        llama.generate(["a"], **options)


def test_bad_prompts(llama: LM) -> None:
    with pytest.raises(InputError, match="wants a list of texts"):
        llama.generate("a")
    with pytest.raises(InputError, match="wants a list of texts"):
        llama.generate([1])  # type: ignore[list-item]
    with pytest.raises(InputError, match="prompt 1 has shape"):
        llama.generate_ids([np.array([1, 2]), np.array([])])


def test_recurrent_models_are_refused(texts: list[str]) -> None:
    lm = LM.build(
        texts, {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, vocab_size=270
    )
    with pytest.raises(InputError, match="recurrent state"):
        lm.generate(["a"])
