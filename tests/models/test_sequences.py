"""Sequence models: causality, many queries in one pass, state sizes, momentum, and the way to disk and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.models.sequences import SequenceConfig, build, load, save

CONFIGS = {
    "transformer": SequenceConfig(5, 2, width=16, heads=2, length=12),
    "without positions": SequenceConfig(5, 2, width=16, heads=2),
    "momentum": SequenceConfig(5, 2, width=16, heads=2, length=12, eta=0.5),
    "momentum of one step": SequenceConfig(5, 2, width=16, heads=2, length=12, eta=0.5, reach=1),
    "lstm": SequenceConfig(5, 2, "lstm", width=8, layers=2),
    "fast-weights": SequenceConfig(5, 2, "fast-weights", width=8),
    "vsml": SequenceConfig(5, 2, "vsml", width=4),
}
each = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def tokens(rows: int = 3, length: int = 8) -> torch.Tensor:
    drawn = torch.randn(rows, length, 5, generator=torch.Generator().manual_seed(0))
    drawn[:, 0, 3:] = 0
    return drawn


def perturbed(config: SequenceConfig):
    """A model whose every weight counts (some start at zero)."""
    model = build(config, seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model.eval()


@each
def test_no_answer_depends_on_what_comes_later(config: SequenceConfig) -> None:
    model, read = perturbed(config), tokens()
    with torch.no_grad():
        whole = model(read)
        assert whole.shape == (3, 8, 2)
        torch.testing.assert_close(model(read[:, :5]), whole[:, :5])
        other = read.clone()
        other[:, 4:] = 0
        assert not torch.allclose(model(other)[:, 5:], whole[:, 5:], atol=1e-4)


@each
@pytest.mark.parametrize("context", [0, 1, 5])
def test_many_queries_in_one_pass_are_each_alone_after_the_context(config: SequenceConfig, context: int) -> None:
    model, read = perturbed(config), tokens()
    with torch.no_grad():
        together = model(read, context=context)
        for query in range(context, 8):
            alone = model(torch.cat([read[:, :context], read[:, query : query + 1]], dim=1))
            torch.testing.assert_close(together[:, query], alone[:, -1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(together[:, :context], model(read)[:, :context], atol=1e-5, rtol=1e-5)


@each
def test_weights_come_from_the_seed_and_survive_the_disk(config: SequenceConfig, tmp_path: Path) -> None:
    torch.manual_seed(7)
    model, read = build(config, seed=3), tokens()
    torch.manual_seed(8)
    with torch.no_grad():
        assert torch.equal(build(config, seed=3)(read), model(read))
        assert not torch.equal(build(config, seed=4)(read), model(read))
        save(model, tmp_path / "model")
        loaded = load(tmp_path / "model")
        assert loaded.config == config
        assert torch.equal(loaded(read), model.eval()(read))


def test_momentum_adds_what_is_past_and_no_more() -> None:
    plain, read = perturbed(CONFIGS["transformer"]), tokens()
    answers = {}
    for name in ("momentum", "momentum of one step"):
        other = build(CONFIGS[name])
        other.load_state_dict(plain.state_dict())
        with torch.no_grad():
            answers[name] = other(read)
            torch.testing.assert_close(answers[name][:, 0], plain(read)[:, 0])
            assert not torch.allclose(answers[name][:, 1], plain(read)[:, 1], atol=1e-4)
    one, other = answers.values()
    torch.testing.assert_close(one[:, :2], other[:, :2])  # with a single token past there is nothing further back
    assert not torch.allclose(one[:, 2:], other[:, 2:], atol=1e-4)


def test_a_grid_is_blind_to_the_order_of_inputs_and_classes() -> None:
    model, read = perturbed(CONFIGS["vsml"]), tokens()
    with torch.no_grad():
        turned = model(read[:, :, [2, 0, 1, 4, 3]])
        torch.testing.assert_close(turned[:, :, [1, 0]], model(read))


def test_state_sizes() -> None:
    assert CONFIGS["transformer"].state_size(10) == 2 * 16 * 2 * 10
    assert CONFIGS["lstm"].state_size(10) == 2 * 8 * 2
    assert CONFIGS["fast-weights"].state_size(99) == 8 * 8 + 8
    assert CONFIGS["vsml"].state_size(99) == 2 * 4 * (3 * 2)


def test_bad_input_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean lstm"):
        SequenceConfig(5, 2, "lstn")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not a multiple of heads"):
        SequenceConfig(5, 2, width=10, heads=4)
    with pytest.raises(InputError, match="eta must be at least 0"):
        SequenceConfig(5, 2, eta=1.0)
    with pytest.raises(InputError, match=r"shape \(B, T, 5\), not \(3, 8, 4\)"):
        build(CONFIGS["lstm"])(tokens()[..., :4])
    with pytest.raises(InputError, match="13 tokens are more than the 12"):
        build(CONFIGS["transformer"])(tokens(1, 13))
    with pytest.raises(InputError, match="inputs must exceed outputs"):
        build(SequenceConfig(2, 2, "vsml"))
    with pytest.raises(InputError, match="holds no sequence model"):
        load(tmp_path)
