"""The token-weighted ascents against float64 by hand."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Encoded
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import CEU, UNDIAL, WGA, GradDiff, SatImp, losses
from palimpsest.models.lm import LM


@pytest.fixture(scope="module")
def encoded(llama: LM, records: ForgetRequest) -> Encoded:
    return llama.encode(records.forget)


@pytest.fixture(scope="module")
def batch(encoded: Encoded) -> Batch:
    return encoded.batch([0, 7, 9, 12])


@pytest.fixture(scope="module")
def logits(llama: LM, batch: Batch) -> list[list[tuple[np.ndarray, int]]]:
    """Each row's (logits over all words, true word) at its labelled tokens, in float64."""
    with torch.no_grad():
        found = copy.deepcopy(llama.model).double()(input_ids=batch.input_ids).logits[:, :-1].numpy()
    return [
        [(line, int(word)) for line, word in zip(lines, words, strict=True) if word >= 0]
        for lines, words in zip(found, batch.targets.numpy(), strict=True)
    ]


def softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()


def cross_entropy(wanted: np.ndarray, logits: np.ndarray) -> float:
    return -float((wanted * np.log(softmax(logits))).sum())


@pytest.mark.parametrize(("a", "b"), [(0.0, 0.0), (1.0, 0.0), (5.0, 1.0)])
def test_weighted_ascent(llama: LM, batch: Batch, logits: list, a: float, b: float) -> None:
    found = losses.weighted_ascent(llama.model, batch, lambda p: p**a * (1 - p) ** b)
    probabilities = np.array([softmax(line)[word] for row in logits for line, word in row])
    wanted = np.mean(probabilities**a * (1 - probabilities) ** b * np.log(probabilities))
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_the_weight_carries_no_gradient(llama: LM, batch: Batch) -> None:
    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(llama.model.parameters()))])

    constant = losses.token_logprobs(llama.model, batch).exp().detach()
    wanted = gradient(losses.over_tokens(constant * losses.token_logprobs(llama.model, batch), batch))
    torch.testing.assert_close(gradient(losses.weighted_ascent(llama.model, batch, lambda p: p)), wanted)


def test_undial(llama: LM, encoded: Encoded, batch: Batch, logits: list) -> None:
    start = losses.reference(llama.model, encoded, llama.sha256)
    for strength in (0.5, 10.0):
        wanted = []
        for line, word in (pair for row in logits for pair in row):
            lowered = line.copy()
            lowered[word] -= strength
            wanted.append(cross_entropy(softmax(lowered), line))
        assert losses.undial(llama.model, batch, start, strength).item() == pytest.approx(np.mean(wanted), rel=1e-4)


def test_ce_u_leaves_out_the_first_token_of_each_row(llama: LM, batch: Batch, logits: list) -> None:
    wanted = []
    for line, word in (pair for row in logits for pair in row[1:]):
        without = line.copy()
        without[word] = -np.inf
        wanted.append(cross_entropy(softmax(without), line))
    assert losses.ce_u(llama.model, batch).item() == pytest.approx(np.mean(wanted), rel=1e-4)


def test_shares_add_up(llama: LM, encoded: Encoded, batch: Batch) -> None:
    start = losses.reference(llama.model, encoded, llama.sha256)
    for loss in (losses.ce_u, lambda m, b: losses.undial(m, b, start, 3.0)):
        parts = [loss(llama.model, batch.share(index, 2)) for index in range(2)]
        torch.testing.assert_close(sum(parts), loss(llama.model, batch), rtol=1e-5, atol=1e-5)


def test_no_weighting_is_gradient_difference(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    budget = {"steps": 2, "batch_size": 8, "lr": 1e-3}
    weighted = WGA(beta=0.0, **budget)(llama, records, watch=watch)  # type: ignore[arg-type]
    plain = GradDiff(**budget)(llama, records, watch=watch)  # type: ignore[arg-type]
    for one, other in zip(weighted.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [WGA, SatImp, UNDIAL, CEU])
def test_the_true_tokens_become_less_likely(method: type, taught: LM, records: ForgetRequest, watch: Watch) -> None:
    after = method(steps=8, batch_size=8, lr=1e-2, retain_loss="none")(taught, records, watch=watch)
    assert after.nll(records.forget).mean() > taught.nll(records.forget).mean() + 0.3


@pytest.mark.parametrize(
    ("method", "wrong"), [(WGA, {"beta": -1.0}), (SatImp, {"beta2": -1.0}), (UNDIAL, {"strength": 0.0})]
)
def test_what_cannot_be_is_refused(method: type, wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        method(**wrong)
