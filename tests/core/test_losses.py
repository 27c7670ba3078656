"""Losses against plain softmax on the full logits in float64, and the properties that shares and shapes must have."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig, Qwen3Config

from palimpsest.core import losses
from palimpsest.core.reference import reference
from palimpsest.data.batches import IGNORE, Batch, Encoded, Packed

WORDS = 40
SIZES = {"vocab_size": WORDS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
GATED = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**GATED),
    "gpt2": GPT2Config(vocab_size=WORDS, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0),
    "qwen": Qwen3Config(**GATED, tie_word_embeddings=True),
    "gemma": Gemma2Config(**GATED, final_logit_softcapping=3.0),  # more than a linear head at the end
}


def build(family: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)  # predictions that depend on tokens and positions
    return model


def encode(lengths: list[int], starts: list[int], seed: int = 0) -> Encoded:
    rng = np.random.default_rng(seed)
    return Encoded(tuple(rng.integers(3, WORDS, size=length) for length in lengths), tuple(starts), 0)


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    return build("llama")


@pytest.fixture(scope="module")
def encoded() -> Encoded:
    return encode([9, 4, 13, 6], [1, 2, 5, 5])


def by_hand(model: nn.Module, encoded: Encoded, rows: list[int]) -> list[list[Tensor]]:
    """Each row's float64 log-probabilities over all words, at each token to score; one row at a time, no padding."""
    doubled = copy.deepcopy(model).double()
    found = []
    for row in rows:
        ids = torch.as_tensor(encoded.ids[row])[None]
        with torch.no_grad():
            logits = doubled(input_ids=ids).logits[0]
        logprobs = [line - torch.log(torch.exp(line - line.max()).sum()) - line.max() for line in logits]
        found.append([logprobs[t - 1] for t in range(max(encoded.starts[row], 1), ids.shape[1])])
    return found


def targets(encoded: Encoded, row: int) -> np.ndarray:
    return encoded.ids[row][max(encoded.starts[row], 1) :]


def true_logprobs(model: nn.Module, encoded: Encoded, rows: list[int]) -> list[np.ndarray]:
    return [
        np.array([float(line[word]) for line, word in zip(lines, targets(encoded, row), strict=True)])
        for row, lines in zip(rows, by_hand(model, encoded, rows), strict=True)
    ]


def gradient(model: nn.Module, value: Tensor) -> Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])


def test_token_logprobs_are_those_of_a_plain_softmax_in_float64(model: nn.Module, encoded: Encoded) -> None:
    rows = [2, 0, 1, 3]
    batch = encoded.batch(rows)
    found = losses.token_logprobs(model, batch)
    assert found.shape == (4, 12)
    assert found.dtype == torch.float32
    for line, labels, wanted in zip(found, batch.targets, true_logprobs(model, encoded, rows), strict=True):
        np.testing.assert_allclose(line[labels != IGNORE].detach(), wanted, rtol=2e-5, atol=2e-5)
        assert not line[labels == IGNORE].any()


def test_sums_and_means_divide_by_the_right_counts(model: nn.Module, encoded: Encoded) -> None:
    rows = [0, 1, 2, 3]
    batch = encoded.batch(rows)
    wanted = true_logprobs(model, encoded, rows)
    np.testing.assert_allclose(losses.sequence_logprobs(model, batch).detach(), [w.sum() for w in wanted], rtol=2e-5)
    np.testing.assert_allclose(losses.cross_entropy(model, batch).detach(), [-w.mean() for w in wanted], rtol=2e-5)
    assert losses.nll(model, batch).item() == pytest.approx(-np.concatenate(wanted).mean(), rel=2e-5)


def test_only_a_linear_head_is_applied_apart(model: nn.Module) -> None:
    is_gemma = type(model).__name__.startswith("Gemma")
    assert isinstance(losses.head_of(model), nn.Identity) == is_gemma


def test_kl_is_the_sum_over_words_in_float64(model: nn.Module, encoded: Encoded) -> None:
    torch.manual_seed(1)
    frozen = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in frozen.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    rows = [3, 0, 2]
    batch = encoded.batch(rows)
    wanted = []
    for lines, frozen_lines in zip(by_hand(model, encoded, rows), by_hand(frozen, encoded, rows), strict=True):
        wanted.append([float((p.exp() * (p - q)).sum()) for q, p in zip(lines, frozen_lines, strict=True)])
    states = reference(frozen, encoded, f"noisy {type(model).__name__}")
    found = losses.token_kl(model, batch, states)
    for line, labels, values in zip(found, batch.targets, wanted, strict=True):
        np.testing.assert_allclose(line[labels != IGNORE].detach(), values, rtol=1e-3, atol=1e-5)
    everything = [value for values in wanted for value in values]
    assert losses.kl(model, batch, states).item() == pytest.approx(np.mean(everything), rel=1e-4)
    assert min(everything) > 0


def test_kl_and_its_gradient_are_zero_at_the_start(model: nn.Module, encoded: Encoded) -> None:
    batch = encoded.batch([0, 1, 2])
    value = losses.kl(model, batch, reference(model, encoded, f"start {type(model).__name__}"))
    assert abs(value.item()) < 1e-6
    scale = gradient(model, losses.nll(model, batch)).norm()
    assert gradient(model, value).norm() < 1e-5 * scale


def test_chunks_change_neither_values_nor_gradients(
    model: nn.Module, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = encoded.batch([0, 1, 2, 3])
    states = reference(model, encoded, f"chunks {type(model).__name__}")

    def both() -> tuple[Tensor, Tensor]:
        value = losses.nll(model, batch) + 0.5 * losses.token_kl(model, batch, states).square().sum()
        return value.detach(), gradient(model, value)

    whole, whole_gradient = both()
    monkeypatch.setattr(losses, "WHOLE_ELEMENTS", 5 * WORDS)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * WORDS)
    monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
    cut, cut_gradient = both()
    torch.testing.assert_close(cut, whole)
    torch.testing.assert_close(cut_gradient, whole_gradient, rtol=1e-4, atol=1e-6)


def test_no_more_logits_are_held_than_allowed(
    llama: nn.Module, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(losses, "WHOLE_ELEMENTS", 5 * WORDS)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 5 * WORDS)
    monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
    seen: list[int] = []
    assert isinstance(losses.head_of(llama), nn.Linear)
    handle = llama.get_output_embeddings().register_forward_hook(lambda *call: seen.append(call[2].numel()))  # type: ignore[operator]
    losses.nll(llama, encoded.batch([0, 1, 2, 3])).backward()
    handle.remove()
    llama.zero_grad()
    assert max(seen) <= 5 * WORDS
    assert len(seen) == 2 * 4  # 19 labelled tokens in 4 chunks, forward and again backward


MEANS: dict[str, Callable[[nn.Module, Batch], Tensor]] = {
    "nll": losses.nll,
    "npo": lambda m, b: losses.over_rows(
        losses.npo(losses.sequence_logprobs(m, b), torch.full((len(b),), -9.0), 0.3), b
    ),
    "simnpo": lambda m, b: losses.over_rows(losses.simnpo(losses.cross_entropy(m, b), 2.0, 0.5), b),
    "squares": lambda m, b: losses.over_tokens(losses.token_logprobs(m, b).square(), b),
}


@pytest.mark.parametrize("name", MEANS)
@given(rows=st.lists(st.tuples(st.integers(2, 7), st.integers(0, 6)), min_size=3, max_size=7), shares=st.integers(2, 3))
@settings(max_examples=8, deadline=None)
def test_shares_add_up_to_the_whole(name: str, rows: list[tuple[int, int]], shares: int) -> None:
    table = encode([length for length, _ in rows], [min(start, length - 1) for length, start in rows])
    batch = table.batch(range(len(rows)))
    model = small()
    whole = MEANS[name](model, batch)
    parts = [MEANS[name](model, batch.share(index, shares)) for index in range(shares)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-5, atol=1e-5)
    whole_gradient = gradient(model, whole)
    parts_gradient = sum(gradient(model, part) for part in parts)
    torch.testing.assert_close(parts_gradient, whole_gradient, rtol=1e-3, atol=1e-5 * float(whole_gradient.norm()))


_small: list[nn.Module] = []


def small() -> nn.Module:
    if not _small:
        _small.append(build("llama"))
    return _small[0]


LOGPROBS = st.floats(-60, -0.01)


@given(now=LOGPROBS, start=LOGPROBS, beta=st.floats(0.01, 2.0))
@settings(deadline=None)
def test_npo_and_its_weight_have_their_closed_forms(now: float, start: float, beta: float) -> None:
    variable = torch.tensor([now], dtype=torch.float64, requires_grad=True)
    value = losses.npo(variable, torch.tensor([start], dtype=torch.float64), beta)
    assert value.item() == pytest.approx(2 / beta * math.log1p(math.exp(beta * (now - start))), rel=1e-9)
    value.backward()
    ratio = math.exp(beta * (now - start))
    assert variable.grad is not None
    assert variable.grad.item() == pytest.approx(2 * ratio / (1 + ratio), rel=1e-9)  # W = 2 pi^b / (pi^b + ref^b)


def test_npo_at_the_start_is_the_constant_and_its_gradient_is_ascents(llama: nn.Module, encoded: Encoded) -> None:
    batch = encoded.batch([0, 2, 3])
    for beta in (0.05, 0.1, 0.5):
        now = losses.sequence_logprobs(llama, batch)
        values = losses.npo(now, now.detach(), beta)
        np.testing.assert_allclose(values.detach(), 2 / beta * math.log(2), rtol=1e-6)
        ascent = losses.over_rows(losses.sequence_logprobs(llama, batch), batch)
        torch.testing.assert_close(gradient(llama, losses.over_rows(values, batch)), gradient(llama, ascent))


def test_npo_becomes_ascent_as_beta_goes_to_zero() -> None:
    now, start = torch.tensor([-3.0, -20.0]).double(), torch.tensor([-5.0, -2.0]).double()
    beta = 1e-6
    values = losses.npo(now, start, beta) - 2 / beta * math.log(2)
    torch.testing.assert_close(values, now - start, rtol=1e-4, atol=1e-4)


@given(ce=st.floats(0, 12), beta=st.floats(0.1, 6), delta=st.floats(-1, 2))
@settings(deadline=None)
def test_simnpo_by_hand(ce: float, beta: float, delta: float) -> None:
    wanted = -2 / beta * math.log(1 / (1 + math.exp(-(beta * ce - delta))))
    assert losses.simnpo(torch.tensor([ce], dtype=torch.float64), beta, delta).item() == pytest.approx(
        wanted, rel=1e-9, abs=1e-12
    )


def test_dpo_by_hand_and_at_the_start() -> None:
    chosen, chosen_start, bad, bad_start = torch.tensor(
        [[-2.0, -9.0], [-3.0, -9.0], [-7.0, -1.0], [-5.0, -1.0]]
    ).double()
    margin = 0.1 * ((-2 + 3) - (-7 + 5))
    values = losses.dpo(chosen, chosen_start, bad, bad_start, 0.1)
    assert values[0].item() == pytest.approx(20 * math.log(1 + math.exp(-margin)))
    assert values[1].item() == pytest.approx(20 * math.log(2))


def test_a_row_does_not_depend_on_its_neighbours(model: nn.Module, encoded: Encoded) -> None:
    together = losses.sequence_logprobs(model, encoded.batch([0, 1, 2, 3]))
    alone = torch.cat([losses.sequence_logprobs(model, encoded.batch([row])) for row in range(4)])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_documents_in_a_pack_do_not_see_each_other(llama: nn.Module) -> None:
    table = encode([6, 5, 5], [1, 1, 1])
    packed = Packed(table, batch_size=1, length=16)(0)
    found = losses.token_logprobs(llama, packed)[0]
    wanted = np.sort(np.concatenate(true_logprobs(llama, table, [0, 1, 2])))
    np.testing.assert_allclose(np.sort(found[packed.targets[0] != IGNORE].detach()), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_a_model_with_adapters_is_scored_with_them(encoded: Encoded) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    adapter = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(build("llama"), adapter).eval()
    batch = encoded.batch([0, 1, 2])
    assert isinstance(losses.head_of(adapted), nn.Linear)
    merged = copy.deepcopy(adapted).merge_and_unload()
    found = losses.sequence_logprobs(adapted, batch)
    wanted = true_logprobs(merged, encoded, [0, 1, 2])
    np.testing.assert_allclose(found.detach(), [w.sum() for w in wanted], rtol=1e-4)
    assert (found - losses.sequence_logprobs(build("llama"), batch)).abs().min() > 1e-3


def test_a_batch_without_labels_is_zero_not_nan(llama: nn.Module) -> None:
    batch = encode([4, 5], [4, 5]).batch([0, 1])
    assert losses.nll(llama, batch).item() == 0.0
    assert losses.cross_entropy(llama, batch).tolist() == [0.0, 0.0]


def test_a_reference_of_another_table_is_refused(llama: nn.Module, encoded: Encoded) -> None:
    other = reference(llama, encode([5, 5, 5, 5], [1, 1, 1, 1]), "another table")
    with pytest.raises(ValueError, match="another table"):
        losses.kl(llama, encoded.batch([0, 1]), other)


def test_evaluating_gives_back_every_parts_mode(llama: nn.Module) -> None:
    llama.train()
    norm = next(module for name, module in llama.named_modules() if name.endswith("norm"))
    norm.eval()
    before = [module.training for module in llama.modules()]
    with losses.evaluating(llama):
        assert not any(module.training for module in llama.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in llama.modules()] == before
    llama.eval()


@pytest.mark.parametrize("cached", [losses.CACHED_ELEMENTS, 2 * WORDS])
def test_log_probabilities_have_a_right_gradient_of_every_order(cached: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CACHED_ELEMENTS", cached)  # some rows at once, or all
    torch.manual_seed(0)
    logits = torch.randn(5, WORDS, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(0, WORDS, (5,))

    def picked(logits: Tensor) -> Tensor:
        return losses._LogProbability.apply(logits, targets)[0]

    def both(logits: Tensor) -> tuple[Tensor, Tensor]:
        return losses._LogProbability.apply(logits, targets)

    assert torch.autograd.gradcheck(picked, logits)
    assert torch.autograd.gradcheck(both, logits)
    assert torch.autograd.gradgradcheck(picked, logits)
    (plain,) = torch.autograd.grad((-F.cross_entropy(logits, targets, reduction="none")).pow(3).sum(), logits)
    (ours,) = torch.autograd.grad(picked(logits).pow(3).sum(), logits)
    torch.testing.assert_close(ours, plain)
    stacked = torch.stack([logits.detach(), 2 * logits.detach()])
    for_each = torch.func.vmap(torch.func.grad(lambda one: picked(one).pow(3).sum()))(stacked)
    torch.testing.assert_close(for_each[0], plain)


def test_a_gradient_taken_twice_is_the_same() -> None:
    logits, targets = torch.randn(3, WORDS, requires_grad=True), torch.tensor([1, 2, 3])
    total = losses._LogProbability.apply(logits, targets)[0].sum()
    first, second = (torch.autograd.grad(total, logits, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
