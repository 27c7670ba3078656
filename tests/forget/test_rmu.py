"""RMU: what is moved, towards what, and what is left alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Encoded
from palimpsest.data.request import ForgetRequest
from palimpsest.forget import RMU
from palimpsest.forget.rmu import _start_states, misdirection, states_of
from palimpsest.models.anatomy import down_projection, feed_forward, layers
from palimpsest.models.lm import LM

QUICK = {"steps": 4, "batch_size": 8, "lr": 1e-3}


@pytest.fixture(scope="module")
def encoded(llama: LM, records: ForgetRequest) -> Encoded:
    return llama.encode(records.forget)


def test_states_are_the_layers_output_at_real_tokens(lm: LM, records: ForgetRequest) -> None:
    encoded = lm.encode(records.forget)
    batch = encoded.batch([0, 8, 11])
    for layer in range(2):
        wanted = []
        for row in (0, 8, 11):
            ids = torch.as_tensor(encoded.ids[row])[None]
            seen: list[torch.Tensor] = []
            hook = layers(lm.model)[layer].register_forward_hook(
                lambda m, i, o, seen=seen: seen.append(o[0] if isinstance(o, tuple) else o)
            )
            lm.model(input_ids=ids)
            hook.remove()
            wanted.append(seen[0][0])
        torch.testing.assert_close(states_of(lm.model, batch, layer), torch.cat(wanted), rtol=1e-4, atol=1e-5)


def test_the_distance_by_hand(encoded: Encoded) -> None:
    batch = encoded.batch([0, 8])
    lengths = [len(encoded.ids[row]) for row in (0, 8)]
    states = torch.randn(sum(lengths), 5, generator=torch.Generator().manual_seed(0))
    target = torch.arange(5.0)
    rows = np.split(states.double().numpy(), [lengths[0]])
    wanted = np.mean([((row - np.arange(5)) ** 2).mean(1).mean() for row in rows])
    assert misdirection(states, target, batch).item() == pytest.approx(wanted, rel=1e-5)
    apart = [misdirection(part, target, batch.share(n, 2)) for n, part in enumerate(states.split(lengths))]
    assert sum(apart).item() == pytest.approx(wanted, rel=1e-5)  # type: ignore[union-attr]


def test_the_start_is_kept_by_row(llama: LM, encoded: Encoded) -> None:
    kept = _start_states(llama, encoded, 0)
    batch = encoded.batch([9, 0, 9])
    torch.testing.assert_close(kept.of(batch), states_of(llama.model, batch, 0).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_only_down_projections_up_to_the_layer_change(
    lm: LM, records: ForgetRequest, watch: Watch, lora_rank: int
) -> None:
    after = RMU(layer=0, lora_rank=lora_rank, **QUICK)(lm, records, watch=watch)  # type: ignore[arg-type]
    start, end = lm.model.state_dict(), after.model.state_dict()
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    projection = down_projection(feed_forward(layers(lm.model)[0]))
    names = {id(p): name for name, p in lm.model.named_parameters()}
    allowed = {names[id(p)] for p in projection.parameters()}
    assert changed
    assert changed <= allowed


def test_forget_states_go_to_one_direction_more_than_the_others(
    taught: LM, records: ForgetRequest, watch: Watch
) -> None:
    method = RMU(layer=1, steering=3.0, steps=30, batch_size=8, lr=1e-2)
    after = method(taught, records, watch=watch)
    assert records.retain is not None
    kept, gone = taught.encode(records.retain), taught.encode(records.forget)
    target = method._target(_start_states(taught, kept, 1))
    mean_norm = _start_states(taught, kept, 1).values.norm(dim=1).mean()
    assert target.norm().item() == pytest.approx(3.0 * mean_norm.item(), rel=1e-4)
    assert (target > 0).all()  # u is drawn from U[0, 1)

    def distance_left(encoded: Encoded) -> float:
        batch = encoded.batch(range(12))
        now, then = (misdirection(states_of(lm.model, batch, 1), target, batch).item() for lm in (after, taught))
        return now / then

    assert distance_left(gone) < distance_left(kept) - 0.1
    assert after.nll(records.forget).mean() - taught.nll(records.forget).mean() > 0.2


def test_the_direction_follows_the_seed(llama: LM, records: ForgetRequest) -> None:
    assert records.retain is not None
    start = _start_states(llama, llama.encode(records.retain), 0)
    assert torch.equal(RMU(seed=1)._target(start), RMU(seed=1)._target(start))
    assert not torch.equal(RMU(seed=1)._target(start), RMU(seed=2)._target(start))
    assert RMU(relative=False, steering=2.0)._target(start).norm().item() == pytest.approx(2.0)


def test_the_papers_layer_by_default(llama: LM, records: ForgetRequest, watch: Watch) -> None:
    by_default = RMU(**QUICK)(llama, records, watch=watch)  # type: ignore[arg-type]
    assert by_default.sha256 == RMU(layer=0, **QUICK)(llama, records, watch=watch).sha256  # type: ignore[arg-type]  # 2 * 7 // 32
    with pytest.raises(InputError, match=r"layer must lie in 0\.\.1"):
        RMU(layer=2)(llama, records)


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"steering": 0.0}])
def test_what_cannot_be_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        RMU(**wrong)  # type: ignore[arg-type]


def test_retain_records_are_needed(llama: LM, records: ForgetRequest) -> None:
    with pytest.raises(InputError, match="needs retain records"):
        RMU()(llama, ForgetRequest(records.forget))
