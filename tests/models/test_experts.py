"""Experts: found whatever the architecture calls them, and what is read from their routers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from palimpsest.core.errors import InputError
from palimpsest.data.world import World
from palimpsest.models.experts import (
    affinity,
    concentration,
    mixture_in,
    mixtures,
    most_responsible,
    overlap,
    routing,
    row_means,
    sample_of,
    selections,
)
from palimpsest.models.lm import LM

TEXTS = ["the cat sat", "on the mat there was a long line of cats", "a dog", "four more words here"]


@pytest.fixture(scope="module", params=["qwen-moe-tiny", "mixtral-tiny"])
def moe(request: pytest.FixtureRequest) -> LM:
    return LM.build(World(people=10, facts=4, seed=1).train, request.param, vocab_size=300, max_length=128)


def by_hand(lm: LM, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each layer's softmax (T, E) and choices (T, k), in float64 from transformers' own router logits."""
    ids = torch.as_tensor(lm.encode([text]).ids[0])[None]
    with torch.no_grad():
        logits = lm.model(input_ids=ids, output_router_logits=True).router_logits
    found = []
    for layer in logits:
        values = layer.double().numpy()
        softmax = np.exp(values - values.max(1, keepdims=True))
        softmax /= softmax.sum(1, keepdims=True)
        found.append((softmax, np.argsort(-softmax, axis=1)[:, : lm.model.config.num_experts_per_tok]))
    return found


def test_mixtures_are_found(moe: LM) -> None:
    found = mixtures(moe.model)
    assert [(one.layer, one.count, one.kept, one.stacked) for one in found] == [(0, 8, 2, True), (1, 8, 2, True)]
    assert len(found[0].weights_of(3)) == 2
    assert all(p.shape[0] == 8 for p in found[0].weights_of(3))


def test_affinity_is_the_mean_gate_over_tokens_then_rows(moe: LM) -> None:
    renormalised = getattr(moe.model.config, "norm_topk_prob", True)
    wanted = {"softmax": np.zeros((2, 8)), "kept": np.zeros((2, 8))}
    for text in TEXTS:
        for layer, (softmax, chosen) in enumerate(by_hand(moe, text)):
            gates = np.zeros_like(softmax)
            np.put_along_axis(gates, chosen, np.take_along_axis(softmax, chosen, 1), 1)
            if renormalised:
                gates /= gates.sum(1, keepdims=True)
            wanted["softmax"][layer] += softmax.mean(0) / len(TEXTS)
            wanted["kept"][layer] += gates.mean(0) / len(TEXTS)
    encoded = moe.encode(TEXTS)
    for kind, table in wanted.items():
        np.testing.assert_allclose(affinity(moe.model, encoded, kind).numpy(), table, atol=1e-5)  # type: ignore[arg-type]


def test_selections_are_those_of_every_row_alone(moe: LM) -> None:
    rows = selections(moe.model, moe.encode(TEXTS))
    for text, row in zip(TEXTS, rows, strict=True):
        for layer, (_, chosen) in enumerate(by_hand(moe, text)):
            assert torch.equal(row[:, layer].sort(1).values, torch.from_numpy(np.sort(chosen, 1)))
    assert overlap(rows, rows) == 1.0


def test_overlap_by_hand() -> None:
    start = [torch.tensor([[[0, 1]], [[2, 3]]])]
    now = [torch.tensor([[[1, 4]], [[3, 2]]])]
    assert overlap(now, start) == 0.75


def test_a_router_that_returns_logits_alone_and_experts_in_a_list() -> None:
    block = nn.Module()
    block.gate = nn.Linear(4, 3, bias=False)
    block.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    block.top_k = 2  # type: ignore[assignment]
    mixture = mixture_in(block)
    assert mixture is not None
    assert (mixture.count, mixture.kept, mixture.stacked) == (3, 2, False)
    assert mixture.weights_of(1) == list(block.experts[1].parameters())
    hidden = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    with routing([mixture]) as seen:
        block.gate(hidden)
    wanted = (hidden.double() @ block.gate.weight.double().T).softmax(1)
    routed = seen[0][0]
    torch.testing.assert_close(routed.probabilities.double(), wanted, atol=1e-6, rtol=1e-5)
    gates = torch.where(wanted >= wanted.topk(2).values[:, 1:], wanted, 0.0)
    torch.testing.assert_close(routed.gates().double(), gates, atol=1e-6, rtol=1e-5)
    block.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    assert mixture_in(block) is None


def test_the_most_responsible_over_all_layers() -> None:
    table = torch.tensor([[0.1, 0.9], [0.8, 0.2]])
    assert most_responsible(table, [3, 7], 3) == [(3, 1), (7, 0), (7, 1)]
    with pytest.raises(InputError, match="4 experts, so 5"):
        most_responsible(table, [3, 7], 5)
    assert concentration(table) == pytest.approx(1.8)


def test_means_leave_padding_out(moe: LM) -> None:
    batch = moe.encode(TEXTS).batch([0, 1])
    lengths = batch.attention_mask.sum(1)  # type: ignore[union-attr]
    values = torch.arange(batch.input_ids.numel(), dtype=torch.float32)
    wanted = [values[: lengths[0]].mean(), values[batch.input_ids.shape[1] :][: lengths[1]].mean()]
    torch.testing.assert_close(row_means(values, batch), torch.stack(wanted))


def test_calibration_rows_reach_the_tokens_asked_for(moe: LM) -> None:
    encoded = moe.encode(TEXTS * 10)
    few = sample_of(encoded, 60, seed=0)
    assert 60 <= few.lengths.sum() < 60 + encoded.lengths.max()
    assert len(sample_of(encoded, 10**6, seed=0)) == len(encoded)
    assert [ids.tolist() for ids in sample_of(encoded, 60, seed=0).ids] == [ids.tolist() for ids in few.ids]


@pytest.mark.parametrize("config", ["llama-tiny", "gpt2-tiny"])
def test_a_dense_model_is_refused(config: str) -> None:
    dense = LM.build(TEXTS, config, vocab_size=270)
    with pytest.raises(InputError, match=r"is dense: none of its 2 feed-forward blocks \(\w+MLP\) has a router"):
        mixtures(dense.model)


@pytest.mark.parametrize(("experts", "kept"), [(1, 1), (2, 2)])
def test_experts_that_all_serve_are_refused(experts: int, kept: int) -> None:
    config = {"model_type": "mixtral", "num_local_experts": experts, "num_experts_per_tok": kept}
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    lm = LM.build(TEXTS, config | small | {"num_key_value_heads": 2}, vocab_size=270)
    with pytest.raises(InputError, match=f"{kept} of {experts} experts serve a token in layer 0"):
        mixtures(lm.model)
