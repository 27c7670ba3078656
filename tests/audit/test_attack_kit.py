"""Each attack against what can be said by hand: rounding, savings, probes, the lens, steering, frames, membership."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.audit import outsider, sequence
from palimpsest.audit.attack import Side
from palimpsest.audit.facts import facts_of, known
from palimpsest.audit.probes import LinearProbe, LogitLens, _ridge, lens
from palimpsest.audit.prompting import Avoided, Demonstrations, Framed, Paraphrase, Samples
from palimpsest.audit.quantisation import Quantisation, quantised, rounded
from palimpsest.audit.relearning import Relearning, savings, steps_to
from palimpsest.audit.steering import Steering, layer_states
from palimpsest.core.errors import InputError
from palimpsest.models.lm import LM
from palimpsest.models.states import last_states


@pytest.fixture(scope="module")
def side(town) -> Side:
    request = town.request
    tables = (request.forget, request.retain, request.utility, request.holdout)
    facts, kept = (facts_of(table, tables) for table in (request.forget, request.retain))
    return Side(town.before, facts, kept)


@pytest.mark.parametrize(("bits", "steps"), [(2, 1), (4, 7), (8, 127)])
def test_rounding_is_to_the_nearest_of_a_grid_for_each_output_channel(bits, steps):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[1.0], [2], [3], [4], [1e-3]]
    )
    for channel, there in ((0, weight), (1, weight.T)):
        found = rounded(there, bits, channel)
        found = found if channel == 0 else found.T
        scale = weight.abs().amax(1, keepdim=True) / steps
        whole = found / scale
        torch.testing.assert_close(whole, whole.round(), atol=1e-4, rtol=0)
        assert ((found - weight).abs() <= scale / 2 * 1.0001).all()
    assert torch.equal(rounded(torch.zeros(2, 3), bits), torch.zeros(2, 3))


def test_only_matrices_between_embedding_and_head_are_rounded(side):
    found = quantised(side.lm, 4)
    changed = {
        name for name, p in found.model.named_parameters() if not torch.equal(p, side.lm.model.get_parameter(name))
    }
    assert changed == {name for name, p in side.lm.model.named_parameters() if ".layers." in name and p.ndim == 2}
    with pytest.raises(InputError, match="bits"):
        Quantisation(1)


def test_conv1d_has_its_channels_in_columns():
    texts = [f"{word} and {word}" for word in ("river", "stone", "copper", "window")]
    config = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    lm = LM.build(texts, config, vocab_size=280)
    weight = quantised(lm, 3).model.transformer.h[0].mlp.c_fc.weight
    assert max(len(column.unique()) for column in weight.T) <= 7
    assert max(len(row.unique()) for row in weight) > 7


def test_savings_are_the_steps_that_a_memory_spares():
    steps = np.array([0.0, 10, 20, 40])
    assert steps_to(np.array([0.0, 0.5, 1, 1]), steps, 0.75) == pytest.approx(15)
    assert steps_to(np.array([0.9, 1, 1, 1]), steps, 0.75) == 0
    assert steps_to(np.array([0.0, 0.1, 0.2, 0.3]), steps, 0.75) == np.inf
    fast, slow, never = np.array([0.0, 1, 1, 1]), np.array([0.0, 0, 0, 1]), np.zeros(4)
    assert savings(fast, fast, steps, 0.5) == 0
    assert savings(fast, slow, steps, 0.5) == pytest.approx(1 - 5 / 30)
    assert savings(slow, fast, steps, 0.5) < 0
    assert savings(fast, never, steps, 0.5) == pytest.approx(1 - 5 / 40)
    assert np.isnan(savings(never, never, steps, 0.5))


def test_relearning_shows_nothing_that_it_scores(side, monkeypatch):
    shown, encode = [], LM.encode
    monkeypatch.setattr(LM, "encode", lambda lm, rows, **more: (shown.append(rows), encode(lm, rows, **more))[1])
    reading = Relearning("few", looks=(1, 2), few=4)(side)
    assert reading.curve.shape == (3, len(side.facts))
    np.testing.assert_allclose(reading.curve[0], known(side.lm, side.facts), atol=1e-6)
    np.testing.assert_allclose(reading.values, reading.curve[1:].mean(0))
    trained_on = [rows for rows in shown if len(rows) == 4]
    for half, rows in enumerate(trained_on):
        there = dict(zip(side.facts.pairs, side.facts.fold, strict=True))
        assert {there[pair] for pair in rows} == {1 - half}
    before = side.lm.weights_sha256
    Relearning("benign", looks=(1,))(side)
    assert side.lm.weights_sha256 == before
    with pytest.raises(InputError, match="retain"):
        Relearning("benign")(replace(side, kept=None))
    with pytest.raises(InputError, match="ascending"):
        Relearning(looks=(5, 2))


def test_the_lens_of_the_last_layer_is_the_model_itself(side):
    values = lens(side.lm, side.facts)
    assert values.shape == (len(side.lm.model.model.layers) + 1, len(side.facts))
    np.testing.assert_allclose(values[-1], known(side.lm, side.facts), atol=1e-4)
    assert LogitLens()(side).values.mean() > 0.8


def test_states_do_not_depend_on_the_batch(side):
    prompts = list(side.facts.prompts[:5])
    together, alone = last_states(side.lm, prompts), [last_states(side.lm, [prompt]) for prompt in prompts]
    np.testing.assert_allclose(together, np.concatenate(alone, 1), atol=1e-4)
    hooked = layer_states(side.lm, prompts, 0)
    np.testing.assert_allclose(hooked.numpy(), together[1], atol=1e-4)


def test_ridge_is_ridge():
    rng = np.random.default_rng(0)
    states, labels = rng.normal(size=(60, 5)), rng.integers(3, size=60)
    found = _ridge(states, labels, 3, 0.1, states[:7])
    x = (states - states.mean(0)) / (states.std(0) + 1e-8)
    from sklearn.linear_model import Ridge

    reference = Ridge(alpha=6.0).fit(x, np.eye(3)[labels])
    np.testing.assert_allclose(found, reference.predict(x[:7]), atol=1e-8)


def test_a_probe_finds_what_is_there_and_not_what_was_shuffled(side, town):
    reading = LinearProbe()(side)
    assert np.nanmean(reading.values) > 0.6
    assert reading.trace["selectivity"][-1] > 0.4
    ignorant = LinearProbe()(replace(side, lm=town.reference))
    assert np.nanmean(ignorant.values) < 0.4
    own = tuple((f" {n}", *row[1:]) for n, row in enumerate(side.facts.options))
    unique = tuple((f" k{n}", *row[1:]) for n, row in enumerate(side.kept.options))
    diverse = replace(side, facts=replace(side.facts, options=own), kept=replace(side.kept, options=unique))
    with pytest.raises(InputError, match="recur"):
        LinearProbe()(diverse)


def test_steering_leaves_the_model_and_its_hooks_as_they_were(side):
    last_states(side.lm, ["Where?"])  # transformers leaves hooks of its own when it first gives out hidden states
    before, hooks = side.lm.weights_sha256, [len(module._forward_hooks) for module in side.lm.model.modules()]
    reading = Steering(strengths=(1.0,), most_layers=1)(side)
    assert reading.values.shape == (len(side.facts),)
    assert side.lm.weights_sha256 == before
    assert [len(module._forward_hooks) for module in side.lm.model.modules()] == hooks


def test_ways_of_asking(side):
    assert Paraphrase()(side).values.mean() > 0.7
    assert set(Framed(frames=("{}", "Well: {}"))(side).trace["frames"]) == {"{}", "Well: {}"}
    assert Demonstrations(shots=(1,))(side).values.shape == (len(side.facts),)
    leaks = Samples(3)(side).trace["leak_at"]
    assert leaks == sorted(leaks)
    assert leaks[0] > 0.6
    assert Avoided()(side).values.mean() < 0.05
    bare = replace(side, facts=replace(side.facts, phrasings=((),) * len(side.facts)))
    with pytest.raises(InputError, match="person"):
        Paraphrase()(bare)


def test_min_k_plus_plus_is_standardised_over_the_vocabulary(side, town):
    rows = town.request.holdout.select(range(3))
    found = outsider.standardised(side.lm, rows)
    encoded = side.lm.encode(rows)
    for row, values in enumerate(found):
        with torch.inference_mode():
            logits = side.lm.model(torch.as_tensor(encoded.ids[row])[None]).logits[0].double()
        logp = logits.log_softmax(-1)
        mean, square = (logp.exp() * logp).sum(-1), (logp.exp() * logp**2).sum(-1)
        start = max(encoded.starts[row], 1)
        ids = torch.as_tensor(encoded.ids[row][start:])
        places = torch.arange(start - 1, len(encoded.ids[row]) - 1)
        wanted = (logp[places, ids] - mean[places]) / (square - mean**2)[places].sqrt()
        np.testing.assert_allclose(values, wanted[: len(values)].numpy(), atol=1e-3)
        assert len(values) == len(ids) - 1  # without the end of the sequence


def test_every_membership_attack_sees_the_training_set(town):
    models = town
    found = outsider.aucs(models.before, outsider.members(models.request), models.reference)
    assert set(found) == {"loss", "zlib", "min-20%", "min-20%++", "reference"}
    assert all(interval.value < 0.3 for interval in found.values())
    ignorant = outsider.aucs(models.reference, outsider.members(models.request))
    assert all(0.25 < interval.value < 0.75 for interval in ignorant.values())
    assert outsider.members(replace(models.request, holdout=None)) == {}


def test_a_stream_of_requests_shows_what_comes_back(side, town):
    models = town
    turns = iter((models.reference, models.before, models.reference))
    found = sequence.stream(lambda lm, part: next(turns), models.before, models.request, side.kept, requests=3)
    assert len(found.known) == 4
    assert found.revival > 0.5  # the second request brought the first one's facts back
    assert found.slope == pytest.approx(np.polyfit(range(4), found.kept, 1)[0])
