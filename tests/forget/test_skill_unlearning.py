"""Skill unlearning: what is measured of neurons, how they are adjusted and pruned, and what must not change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy import stats

from palimpsest.core.errors import InputError
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget import KeySpaceDetection, NeuronAdjust, SelectivePruning
from palimpsest.forget.probing import Moments, mean_sizes
from palimpsest.forget.skill_unlearning import Adjustment, NeuronAdjuster, adjusting, differences, top
from palimpsest.models.anatomy import down_projection, feed_forward, layers, pre_activation, value_vectors
from palimpsest.models.lm import LM

PROMPTS = ["Who is Ann?", "Where does Bob live, and with whom?", "Say it."]


def adjustment(count: int, seed: int = 0, **changes: object) -> Adjustment:
    draw = np.random.default_rng(seed)
    values = {
        "layer": torch.zeros(count, dtype=torch.int64),
        "neuron": torch.arange(count),
        "mean_forget": torch.as_tensor(draw.normal(1, 1, count), dtype=torch.float32),
        "deviation_forget": torch.as_tensor(draw.uniform(0.5, 2, count), dtype=torch.float32),
        "mean_retain": torch.as_tensor(draw.normal(-1, 1, count), dtype=torch.float32),
        "deviation_retain": torch.as_tensor(draw.uniform(0.5, 2, count), dtype=torch.float32),
    }
    return Adjustment(**{**values, **changes})  # type: ignore[arg-type]


def inner(lm: LM, text: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each layer's pre-activations and keys, (T, F) float64, without the first position; from the modules by name."""
    seen: dict[str, np.ndarray] = {}
    names = ("gate_proj", "down_proj") if hasattr(lm.model, "model") else ("c_fc", "c_proj")
    handles = []
    for name, module in lm.model.named_modules():
        if "mlp." not in name or not name.endswith(names):
            continue
        before = name.endswith(names[0])

        def hook(m: object, i: tuple, o: torch.Tensor, name: str = name, before: bool = before) -> None:
            seen[name] = (o if before else i[0])[0, 1:].detach().double().numpy()

        handles.append(module.register_forward_hook(hook))
    lm.model(input_ids=torch.as_tensor(lm.encode([text]).ids[0])[None])
    for handle in handles:
        handle.remove()
    values = list(seen.values())
    return list(zip(values[::2], values[1::2], strict=True))


def test_moments_are_those_of_all_tokens_but_the_first(lm: LM) -> None:
    texts = ["one", "two and three", "a much longer text than the others are"]
    encoded = lm.encode(texts)
    moments, sizes = Moments.of(lm, encoded), mean_sizes(lm, encoded)
    rows = [inner(lm, text) for text in texts]
    for layer in range(2):
        before, keys = (np.concatenate([row[layer][part] for row in rows]) for part in (0, 1))
        np.testing.assert_allclose(moments.mean[layer], before.mean(0), atol=1e-4)
        np.testing.assert_allclose(moments.deviation[layer], before.std(0), atol=1e-4)
        np.testing.assert_allclose(sizes[layer], np.abs(keys).mean(0), atol=1e-4)


def test_the_pre_activation_is_what_the_architecture_activates(lm: LM) -> None:
    block = feed_forward(layers(lm.model)[0])
    module, place = pre_activation(block)
    wanted = block.gate_proj if hasattr(block, "gate_proj") else block.c_fc
    assert module is wanted
    assert place == slice(0, value_vectors(down_projection(block)).shape[0])


def test_of_a_matrix_that_holds_gate_and_up_the_first_half() -> None:
    config = {"model_type": "phi3", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    lm = LM.build(["some text"], config | {"num_attention_heads": 2, "num_key_value_heads": 2}, vocab_size=262)
    module, place = pre_activation(feed_forward(layers(lm.model)[0]))
    assert (value_vectors(module).shape[1], place) == (48, slice(0, 24))


def test_the_adjustment_against_densities_in_float64() -> None:
    rule = adjustment(5)
    draw = np.random.default_rng(1)
    x, coins = draw.normal(0, 2, (40, 5)), draw.uniform(size=(40, 5))
    found = rule(torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(coins), torch.arange(5)).double().numpy()
    names = ("mean_forget", "deviation_forget", "mean_retain", "deviation_retain")
    m_f, s_f, m_r, s_r = (getattr(rule, name).double().numpy() for name in names)
    p_f, p_r = stats.norm.pdf(x, m_f, s_f), stats.norm.pdf(x, m_r, s_r)
    replaced = (p_f >= p_r) & (coins < 1 - p_r / (p_r + p_f))
    assert replaced.any()
    assert not replaced.all()
    np.testing.assert_allclose(found, np.where(replaced, 2 * m_r - (m_r + s_r * (x - m_f) / s_f), x), atol=1e-5)


def test_far_out_where_densities_are_zero_the_odds_still_tell() -> None:
    rule = adjustment(1, mean_forget=torch.tensor([50.0]), deviation_forget=torch.ones(1), mean_retain=torch.zeros(1))
    rule = replace(rule, deviation_retain=torch.ones(1))
    coins = torch.full((2, 1), 0.999)
    assert rule(torch.tensor([[100.0], [-100.0]]), coins, torch.arange(1)).flatten().tolist() == [-50.0, -100.0]


def test_the_forget_mean_maps_to_the_retain_mean_and_equal_sets_are_mirrored() -> None:
    rule = adjustment(4, draw=False)
    rule = replace(rule, mean_forget=rule.mean_retain + 5)
    where = torch.arange(4)
    torch.testing.assert_close(rule(rule.mean_forget[None], torch.zeros(1, 4), where)[0], rule.mean_retain)
    same = replace(rule, mean_forget=rule.mean_retain, deviation_forget=rule.deviation_retain)
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(same(x, torch.zeros(3, 4), where), 2 * rule.mean_retain - x)
    mean = replace(rule, replacement="mean")
    torch.testing.assert_close(mean(rule.mean_forget[None], torch.zeros(1, 4), where)[0], rule.mean_retain)


def test_coins_are_uniform_and_pairwise_independent() -> None:
    tokens, own = adjustment(300).coins(400)
    coins = (tokens[:, None] + own).remainder(1.0).double().numpy()
    assert stats.kstest(coins[::7, ::5].ravel(), "uniform").statistic < 0.05
    neighbours = [coins[:, 0:299], coins[:, 1:300]]
    assert abs(np.corrcoef(neighbours[0].ravel(), neighbours[1].ravel())[0, 1]) < 0.1


def test_scores_and_the_neurons_of_the_highest() -> None:
    there = Moments([torch.tensor([1.0, -3.0]), torch.tensor([2.0])], [torch.ones(2), torch.ones(1) * 9])
    here = Moments([torch.zeros(2), torch.zeros(1)], [torch.ones(2), torch.ones(1)])
    assert top(differences(there, here, "signed"), 67) == ([0, 1], [0, 0])
    assert top(differences(there, here, "abs"), 67) == ([0, 1], [1, 0])
    assert top(differences(there, here, "standardised"), 67) == ([0, 0], [0, 1])
    assert top([torch.zeros(1000)], 0.001) == ([0], [0])  # at least one
    with pytest.raises(InputError, match="no skill to tell apart"):
        differences(here, here, "abs")


def test_no_neuron_no_change_and_no_hook_left(lm: LM) -> None:
    ids = torch.as_tensor(lm.encode(PROMPTS[:1]).ids[0])[None]
    plain = lm.model(input_ids=ids).logits
    with adjusting(lm, [adjustment(0)]):
        assert torch.equal(lm.model(input_ids=ids).logits, plain)
    with adjusting(lm, [adjustment(20, mean_forget=torch.zeros(20), draw=False)]):
        assert not torch.equal(lm.model(input_ids=ids).logits, plain)
    assert torch.equal(lm.model(input_ids=ids).logits, plain)


def test_neuron_adjust_guards_alone_as_among_others(lm: LM, asked: ForgetRequest, tmp_path: Path) -> None:
    sha256 = lm.sha256
    guarded = NeuronAdjust(percent=20)(lm, asked)
    assert lm.sha256 == sha256
    assert lm.guard is None
    assert isinstance(guarded.guard, NeuronAdjuster)
    chosen = guarded.guard.adjustments[0]
    total = sum(value_vectors(down_projection(feed_forward(layer))).shape[0] for layer in layers(lm.model))
    assert len(chosen.neuron) == round(total * 0.2)
    assert guarded.weights_sha256 == lm.weights_sha256
    pairs = [(prompt, " yes and no") for prompt in PROMPTS]
    together = guarded.nll(pairs)
    assert np.abs(together - lm.nll(pairs)).max() > 1e-3
    np.testing.assert_allclose(together, [guarded.nll([pair])[0] for pair in pairs], rtol=1e-4)
    answers = guarded.generate(PROMPTS, max_new_tokens=8)
    assert answers == [guarded.generate([prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    guarded.save(tmp_path / "model")
    loaded = LM.load(tmp_path / "model")
    assert loaded.sha256 == guarded.sha256
    assert loaded.generate(PROMPTS, max_new_tokens=8) == answers
    again = NeuronAdjust(percent=1)(guarded, asked)
    assert isinstance(again.guard, NeuronAdjuster)
    assert again.guard.adjustments[0] is chosen
    assert len(again.guard.adjustments) == 2


def test_pruning_cuts_what_is_large_on_the_forget_set(lm: LM, asked: ForgetRequest, tmp_path: Path) -> None:
    assert asked.retain is not None
    sha256 = lm.sha256
    pruned = SelectivePruning(percent=5)(lm, asked)
    assert lm.sha256 == sha256
    sizes = [mean_sizes(lm, lm.encode(table)) for table in (asked.forget, asked.retain)]
    importance = np.concatenate([(a / (b + 1e-8)).numpy() for a, b in zip(*sizes, strict=True)])
    cut = np.concatenate(
        [(value_vectors(down_projection(feed_forward(layer))) == 0).all(1).numpy() for layer in layers(pruned.model)]
    )
    wanted = np.zeros(len(importance), dtype=bool)
    wanted[np.argsort(-importance)[: round(len(importance) * 0.05)]] = True
    np.testing.assert_array_equal(cut, wanted)
    old, new = lm.model.state_dict(), pruned.model.state_dict()
    assert {name.split(".")[-2] for name in old if not torch.equal(old[name], new[name])} <= {"down_proj", "c_proj"}
    pruned.save(tmp_path / "model")
    assert LM.load(tmp_path / "model").sha256 == pruned.sha256


METHODS = [NeuronAdjust, SelectivePruning, KeySpaceDetection]


@pytest.mark.parametrize("method", METHODS)
def test_what_cannot_serve_is_refused(llama: LM, asked: ForgetRequest, world: World, method: type) -> None:
    few = replace(asked, forget=asked.forget.select(range(29)), train=None)
    with pytest.raises(InputError, match="29 forget records are too few"):
        method()(llama, few)
    with pytest.raises(InputError, match="needs retain records"):
        method()(llama, ForgetRequest(asked.forget))
    with pytest.raises(InputError, match="half or more"):
        method()(llama, replace(asked, train=asked.forget))
    with pytest.raises(InputError, match="a mixture of experts"):
        method()(LM.build(world.train, "mixtral-tiny", vocab_size=300), asked)
    twice = Dataset.from_dict({"prompt": ["a"] * 40, "completion": ["b"] * 40})
    with (
        pytest.warns(UserWarning, match="39 of 40 forget records are duplicates"),
        pytest.raises(InputError, match="1 forget records are too few"),
    ):
        method()(llama, replace(asked, forget=twice, train=None))


def test_another_guard_is_refused(llama: LM, asked: ForgetRequest) -> None:
    adjusted = NeuronAdjust()(llama, asked)
    with pytest.raises(InputError, match=r"another guard \(NeuronAdjuster\)"):
        KeySpaceDetection()(adjusted, asked)
    with pytest.raises(InputError, match="by a guard"):
        SelectivePruning()(adjusted, asked)


@pytest.mark.parametrize("percent", [0.0, -1.0, 100.5])
@pytest.mark.parametrize("method", [NeuronAdjust, SelectivePruning])
def test_a_share_that_is_none_is_refused(method: type, percent: float) -> None:
    with pytest.raises(InputError, match="percent must"):
        method(percent=percent)
