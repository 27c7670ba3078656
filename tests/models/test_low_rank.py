from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from palimpsest.core.errors import InputError
from palimpsest.models.anatomy import value_vectors
from palimpsest.models.lm import LM
from palimpsest.models.low_rank import LowRank, layer_matrices, overlap

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    | {"num_hidden_layers": 2},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2},
    "mixture": {"model_type": "qwen2_moe", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    | {"num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    | {"shared_expert_intermediate_size": 8, "intermediate_size": 8},
}


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def lm(request: pytest.FixtureRequest) -> LM:
    return LM.build(["a small town by the sea"], FAMILIES[request.param], vocab_size=262, max_length=32)


def random(lm: LM, seed: int = 0, rank: int = 3) -> LowRank:
    made = LowRank.fresh(layer_matrices(lm.model), rank=rank, alpha=6.0, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for up in made.up:
            up.copy_(0.3 * torch.randn(up.shape, generator=generator))
    return made.eval()


def logits(lm: LM, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return lm.model(input_ids=ids).logits


def test_it_is_the_model_with_the_product_added_to_its_weights(lm: LM) -> None:
    adapter, merged, ids = random(lm), lm.copy(), torch.tensor([[5, 9, 12, 30], [7, 7, 20, 41]])
    with torch.no_grad():
        for name, down, up in zip(adapter.names, adapter.down, adapter.up, strict=True):
            value_vectors(merged.model.get_submodule(name)).add_(6.0 / 3 * (up @ down).T)
    with adapter.attached(lm.model):
        found = logits(lm, ids)
    assert torch.allclose(found, logits(merged, ids), atol=1e-5)
    assert not torch.allclose(found, logits(lm, ids), atol=1e-2)
    assert {name.rpartition(".")[0].split(".")[-2] for name in adapter.names} >= {"0", "1"}, "both layers"
    assert not any(part in name for name in adapter.names for part in ("lm_head", "embed", "experts", "mlp.gate."))


def test_each_row_gets_its_own_strength(lm: LM) -> None:
    adapter, ids = random(lm), torch.tensor([[5, 9, 12], [5, 9, 12], [5, 9, 12], [8, 2, 2]])
    strength = torch.tensor([0.0, 0.4, 1.0, 0.7])
    with adapter.attached(lm.model, strength):
        together = logits(lm, ids)
    for row, one in enumerate(strength):
        with adapter.attached(lm.model, one[None]):
            assert torch.allclose(together[row], logits(lm, ids[row : row + 1])[0], atol=1e-5)
    assert torch.equal(together[0], logits(lm, ids)[0]), "no strength: the very same numbers"
    assert not torch.allclose(together[1], together[2], atol=1e-3)


def test_a_block_that_lays_all_positions_in_one_line() -> None:
    """What reaches a router: (B * T, D), a row's positions side by side."""
    layer = torch.nn.Linear(4, 5)
    adapter = LowRank({"0": torch.randn(2, 4)}, {"0": torch.randn(5, 2)}, alpha=2.0)
    seen, strength = torch.randn(3, 2, 4), torch.tensor([0.0, 0.5, 1.0])
    model = torch.nn.Sequential(layer)
    with torch.no_grad(), adapter.attached(model, strength):
        assert torch.allclose(model(seen.reshape(6, 4)), model(seen).reshape(6, 5), atol=1e-6)


def test_it_does_nothing_at_first_and_takes_only_its_own_hooks_away(lm: LM) -> None:
    ids = torch.tensor([[5, 9, 12]])
    name = next(iter(layer_matrices(lm.model)))
    mine = lm.model.get_submodule(name).register_forward_hook(lambda module, inputs, output: None)
    try:
        adapter = LowRank.fresh(layer_matrices(lm.model), rank=2, alpha=4.0, dropout=0.5).eval()
        with adapter.attached(lm.model):
            assert torch.equal(logits(lm, ids), logits(lm, ids))
            assert len(lm.model.get_submodule(name)._forward_hooks) == 2
        assert len(lm.model.get_submodule(name)._forward_hooks) == 1
        bound = 1 / adapter.down[0].shape[1] ** 0.5
        assert 0.8 * bound < adapter.down[0].abs().max() <= bound
    finally:
        mine.remove()


def test_overlap_against_float64_and_its_gradient(lm: LM) -> None:
    now, once, before = random(lm, 0), random(lm, 1), random(lm, 2)
    earlier = [dict(zip(one.names, one.down, strict=True)) for one in (once, before)]
    found = overlap(now, earlier)
    expected = sum(
        (snapshot[name].double() @ down.double().T).pow(2).sum().item()
        for snapshot in earlier
        for name, down in zip(now.names, now.down, strict=True)
    )
    assert found.item() == pytest.approx(expected, rel=1e-5)
    found.backward()
    assert all(p.grad is not None for p in now.down)
    assert all(p.grad is None for one in (once, before) for p in one.down)
    assert overlap(now, []).item() == 0


def test_orthogonal_rows_do_not_overlap() -> None:
    rows = torch.linalg.qr(torch.randn(6, 6))[0]
    one, other = rows[:3], rows[3:]
    adapter = LowRank({"x": one}, {"x": torch.zeros(2, 3)}, alpha=1.0)
    assert overlap(adapter, [{"x": other}]).item() == pytest.approx(0, abs=1e-10)
    assert overlap(adapter, [{"x": one}]).item() == pytest.approx(3, rel=1e-5)


def test_saved_factors_make_the_same_again(lm: LM) -> None:
    adapter, ids = random(lm), torch.tensor([[5, 9, 12]])
    again = LowRank.of(dict(reversed(adapter.tensors().items())), alpha=6.0).eval()
    with adapter.attached(lm.model):
        expected = logits(lm, ids)
    with again.attached(lm.model):
        assert torch.equal(logits(lm, ids), expected)


def test_factors_of_another_model_are_refused(lm: LM) -> None:
    wide = {**FAMILIES["llama"], "hidden_size": 32, "intermediate_size": 48}
    other = LM.build(["a small town"], wide, vocab_size=262)
    with pytest.raises(InputError, match="of another model"):
        random(other).attached(lm.model)
