"""UOE: which expert is trained, that nothing else is, and what holds the router."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import NPO, UOE
from palimpsest.forget.uoe import Anchored, OneExpert, anchor_loss, confined
from palimpsest.models.experts import affinity, mixtures, overlap, selections
from palimpsest.models.lm import LM

QUICK = {"steps": 3, "batch_size": 8, "lr": 1e-3}
CONFIGS = {
    "qwen": {"model_type": "qwen2_moe", "num_experts": 6, "moe_intermediate_size": 24}
    | {"shared_expert_intermediate_size": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "intermediate_size": 24},
}
COMMON = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def moe(request: pytest.FixtureRequest, world: World) -> LM:
    config = CONFIGS[request.param] | COMMON | {"num_experts_per_tok": 2, "initializer_range": 0.1}
    return LM.build(world.train, config, vocab_size=300, max_length=256, seed=3)


def changed(before: LM, after: LM) -> dict[str, set[int]]:
    """The parameters that changed; of stacked experts, which of them."""
    old = before.model.state_dict()
    found = {}
    for name, new in after.model.state_dict().items():
        if not torch.equal(new, old[name]):
            moved = (new != old[name]).flatten(1).any(1).nonzero().flatten().tolist()
            found[name] = set(moved) if new.ndim == 3 else set()
    return found


@pytest.mark.parametrize(
    "loss",
    ["npo", "gradient-ascent", "grad-diff", "rmu", "simnpo", "undial", "kl-min"],
)
def test_one_expert_and_its_router_change_under_any_loss(
    moe: LM, asked: ForgetRequest, watch: Watch, loss: str
) -> None:
    sha256 = moe.sha256
    method = UOE(loss=loss, **QUICK)  # type: ignore[arg-type]
    (layer, expert), _ = method.attribute(moe, asked)[0][0], None
    after = method(moe, asked, watch=watch)
    assert moe.sha256 == sha256
    assert not any(p.grad is not None for p in moe.model.parameters())
    assert all(p.requires_grad for p in after.model.parameters())
    places = changed(moe, after)
    stem = f"model.layers.{layer}.mlp"
    assert places == {
        f"{stem}.gate.weight": set(),
        f"{stem}.experts.gate_up_proj": {expert},
        f"{stem}.experts.down_proj": {expert},
    }
    logs = watch.traces["forget"].logs
    assert {"anchor", "affinity", "overlap"} <= logs.keys()
    assert logs["overlap"][0] == pytest.approx(1.0)


def test_the_expert_of_the_largest_affinity_is_chosen(moe: LM, asked: ForgetRequest) -> None:
    targets, table = UOE(experts=2).attribute(moe, asked)
    wanted = affinity(moe.model, moe.encode(asked.forget))
    torch.testing.assert_close(table, wanted)
    order = np.argsort(-wanted.numpy().ravel())[:2]
    assert list(targets) == [(int(place) // 6, int(place) % 6) for place in order]


def test_the_anchor_by_hand(moe: LM, asked: ForgetRequest) -> None:
    batch = moe.encode(asked.forget).batch([0, 5])
    shape = (2, batch.input_ids.shape[1], 6)
    probabilities = torch.rand(shape, generator=torch.Generator().manual_seed(0)).softmax(-1)
    values = probabilities.double().numpy()
    lengths = batch.attention_mask.sum(1).tolist()  # type: ignore[union-attr]
    rows = [((row[:length] - np.eye(6)[2]) ** 2).sum(1).mean() for row, length in zip(values, lengths, strict=True)]
    found = anchor_loss(probabilities.flatten(0, 1), [2], batch)
    assert found.item() == pytest.approx(np.mean(rows), rel=1e-5)
    shares = [batch.share(number, 2) for number in range(2)]
    parts = [
        anchor_loss(line[: share.input_ids.shape[1]], [2], share)
        for line, share in zip(probabilities, shares, strict=True)
    ]
    assert float(sum(parts)) == pytest.approx(found.item(), rel=1e-5)


def test_the_anchor_reads_the_forget_rows_alone(moe: LM, asked: ForgetRequest) -> None:
    assert asked.retain is not None
    encoded, kept = moe.encode(asked.forget), moe.encode(asked.retain)
    batch = {"forget": encoded.batch(range(4)), "retain": kept.batch(range(4))}
    found = mixtures(moe.model)
    for order in (("forget", "retain"), ("retain", "forget")):

        def loss(model: torch.nn.Module, rows: dict, order: tuple[str, ...] = order) -> torch.Tensor:
            return sum(losses.nll(model, rows[name]) for name in order)  # type: ignore[return-value]

        rule = Anchored(found, [(found[1], 4)], 0.5, loss, selections(moe.model, encoded))
        value, logs = rule(moe.model, batch)
        seen = moe.model(**losses.inputs_of(batch["forget"]), output_router_logits=True).router_logits[1]
        wanted = anchor_loss(seen.double().softmax(-1), [4], batch["forget"])
        assert logs["anchor"].item() == pytest.approx(wanted.item(), rel=1e-4)
        assert logs["overlap"] == pytest.approx(1.0)
        assert value.item() == pytest.approx(loss(moe.model, batch).item() + 0.5 * wanted.item(), rel=1e-4)


def test_the_gradient_of_one_expert_is_the_free_one(moe: LM, asked: ForgetRequest) -> None:
    batch = moe.encode(asked.forget).batch(range(4))
    model = moe.copy().model
    found = mixtures(model)
    losses.nll(model, batch).backward()
    free = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with confined(model, [(found[0], 1), (found[0], 3)]):
        losses.nll(model, batch).backward()
        masked = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert masked.keys() == {
        f"model.layers.0.mlp.{part}" for part in ("gate.weight", "experts.gate_up_proj", "experts.down_proj")
    }
    for name, gradient in masked.items():
        wanted = free[name].clone()
        if gradient.ndim == 3:
            wanted[[0, 2, 4, 5]] = 0
        torch.testing.assert_close(gradient, wanted)
    model.zero_grad()
    losses.nll(model, batch).backward()
    again = dict(model.named_parameters())["model.layers.0.mlp.experts.down_proj"].grad
    torch.testing.assert_close(again, free["model.layers.0.mlp.experts.down_proj"])  # nothing stays behind


def test_the_anchor_draws_the_forget_set_to_its_expert(moe: LM, asked: ForgetRequest, watch: Watch) -> None:
    encoded = moe.encode(asked.forget)
    target = (1, 5)
    found = {}
    for weight in (0.0, 30.0):
        method = UOE(loss="gradient-ascent", targets=(target,), anchor=weight, steps=15, batch_size=8, lr=1e-2)
        after = method(moe, asked, watch=watch)
        found[weight] = affinity(after.model, encoded, "softmax")[target].item()
        logs = watch.traces["forget"].logs
        measured = overlap(selections(after.model, encoded), selections(moe.model, encoded))
        assert abs(logs["overlap"][-1] - measured) < 0.2
    assert found[30.0] > found[0.0]
    assert found[30.0] > affinity(moe.model, encoded, "softmax")[target].item() + 0.2


def test_shares_of_a_batch_add_up(moe: LM, asked: ForgetRequest) -> None:
    found = []
    for pieces in (1, 2):
        watch = Watch(progress=False)
        UOE(loss="grad-diff", micro_batches=pieces, **QUICK)(moe, asked, watch=watch)  # type: ignore[arg-type]
        found.append(watch.traces["forget"])
    np.testing.assert_allclose(found[0].losses, found[1].losses, rtol=1e-4)
    np.testing.assert_allclose(found[0].logs["anchor"], found[1].logs["anchor"], rtol=1e-4)
    np.testing.assert_allclose(found[0].logs["affinity"], found[1].logs["affinity"], rtol=1e-4)


def test_a_configured_method_under_the_watch_is_the_same(moe: LM, asked: ForgetRequest, watch: Watch) -> None:
    named = UOE(loss="npo", settings={"beta": 0.5}, targets=((0, 2),), **QUICK)(moe, asked, watch=watch)  # type: ignore[arg-type]
    around = OneExpert(progress=False, targets=((0, 2),), original=moe.model)
    assert NPO(beta=0.5, **QUICK)(moe, asked, watch=around).sha256 == named.sha256  # type: ignore[arg-type]


def test_the_result_survives_the_disk_and_a_killed_run_goes_on(moe: LM, asked: ForgetRequest, tmp_path: Path) -> None:
    method = UOE(loss="grad-diff", warmup_epochs=0.0, **QUICK)  # type: ignore[arg-type]
    whole = method(moe, asked, watch=Watch(progress=False))
    whole.save(tmp_path / "model")
    assert LM.load(tmp_path / "model").sha256 == whole.sha256
    folder = tmp_path / "checkpoint"
    replace(method, steps=2)(moe, asked, watch=Watch(checkpoint=folder, progress=False))
    assert method(moe, asked, watch=Watch(checkpoint=folder, progress=False)).sha256 == whole.sha256


def test_few_calibration_tokens_are_said(moe: LM, asked: ForgetRequest, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        UOE().attribute(moe, asked)
    assert "the choice may not be stable" in caplog.text


def test_a_dense_model_is_refused(llama: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match=r"LlamaForCausalLM is dense: .* needs a mixture of experts"):
        UOE()(llama, asked)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lora_rank": 2}, "lora_rank and weight_decay at 0"),
        ({"weight_decay": 0.1}, "lora_rank and weight_decay at 0"),
        ({"anchor": -1.0}, "anchor"),
        ({"experts": 0}, "experts"),
    ],
)
def test_what_cannot_be_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        UOE(**wrong)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "nop"}, "did you mean npo"),
        ({"loss": "in-context"}, "no method that trains weights"),
        ({"loss": "uoe"}, "no method that trains weights"),
        ({"loss": "eul"}, "parts beside the weights"),
        ({"loss": "task-vector"}, "cannot be confined to one"),
        ({"settings": {"lr": 1.0}}, "lr belongs to the budget"),
        ({"settings": {"bta": 1.0}}, "did you mean beta"),
        ({"targets": ((0, 6),)}, "no expert 6 in layer 0: this model has layers 0, 1 with experts 0 to 5"),
        ({"targets": ((1, 0),), "loss": "rmu", "settings": {"layer": 0}}, "never takes the forget records through"),
    ],
)
def test_what_does_not_fit_is_refused(moe: LM, asked: ForgetRequest, settings: dict, message: str) -> None:
    sha256 = moe.sha256
    with pytest.raises(InputError, match=message):
        UOE(**{**QUICK, **settings})(moe, asked, watch=Watch(progress=False))
    assert moe.sha256 == sha256


def test_half_of_the_training_data_is_too_much(moe: LM, asked: ForgetRequest) -> None:
    with pytest.raises(InputError, match="half or more"):
        UOE()(moe, replace(asked, train=asked.forget, holdout=None))
