"""Meta-optimizers: the identities in float64, the conditions against plain passes, and momentum attention."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.projections import BaseSet, Projections
from palimpsest.learn.incontext import conditions, meta_optimizers
from palimpsest.learn.incontext.gpicl import GPICL
from palimpsest.learn.incontext.meta_optimizers import (
    MomentumAttention,
    best_rate,
    compare,
    descent_as_attention,
    dual_form,
    linear_attention,
)
from palimpsest.models.anatomy import layers
from palimpsest.models.attention import attention_modules
from palimpsest.models.lm import LM

WORDS = {"red": ["apple", "cherry", "brick"], "green": ["leaf", "moss", "lime"]}
DEMONSTRATIONS = [(word, label) for place in range(2) for label, words in WORDS.items() for word in words[place:][:1]]
QUERIES = [("brick", "red"), ("lime", "green"), ("a leaf", "green")]
CONFIGS = {
    "llama": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.3},
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def lm(request: pytest.FixtureRequest) -> LM:
    texts = [f"{word} Label: {label}" for label, words in WORDS.items() for word in words]
    return LM.build(texts, CONFIGS[request.param], vocab_size=300, max_length=96, seed=1)


def test_linear_attention_is_a_weight_update_and_softmax_attention_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        w_value, w_key = (torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        shown, rest = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (6, 3))
        query = torch.randn(5, generator=generator, dtype=torch.float64)
        start, update = dual_form(w_value, w_key, shown, rest)
        both = torch.cat([shown, rest])
        values, keys = both @ w_value.T, both @ w_key.T
        linear = linear_attention(values, keys, query)
        torch.testing.assert_close((start + update) @ query, linear, rtol=0, atol=1e-9)
        alone = linear_attention(rest @ w_value.T, rest @ w_key.T, query)
        torch.testing.assert_close(start @ query, alone, rtol=0, atol=1e-9)
        softmax = values.T @ (keys @ query).softmax(0)
        assert (softmax - linear).norm() / linear.norm() > 1e-2


def test_gradient_steps_of_a_linear_layer_are_linear_attention() -> None:
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    inputs, targets = (torch.randn(5, n, generator=generator, dtype=torch.float64) for n in (4, 3))
    trained = w.clone().requires_grad_()
    (0.5 * (inputs @ trained.T - targets).square().sum()).backward()
    errors = -0.1 * (inputs @ w.T - targets)  # minus the rate times the output gradients
    query = torch.randn(4, generator=generator, dtype=torch.float64)
    left, right = descent_as_attention(w, errors, inputs, query)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-12)
    torch.testing.assert_close(left, (w - 0.1 * trained.grad) @ query, rtol=0, atol=1e-12)


def encoded(lm: LM, text: str) -> list[int]:
    return list(lm.tokenizer(text, add_special_tokens=False)["input_ids"])


def prompts(lm: LM) -> tuple[int, list[int], list[list[int]]]:
    """The first token, all demonstrations in a line, and the queries."""
    shown = [i for word, label in DEMONSTRATIONS for i in encoded(lm, f" {word} Label:") + encoded(lm, f" {label}")]
    return lm.tokenizer.bos_token_id, shown, [encoded(lm, f" {text} Label:") for text, _ in QUERIES]


def attention_outputs(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """(L, D): of the last token, each scaled to length 1."""
    seen: list[torch.Tensor] = []
    hooks = [m.register_forward_hook(lambda _, i, o: seen.append(o[0][0, -1])) for m in attention_modules(model)]
    with torch.no_grad():
        model(input_ids=torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return F.normalize(torch.stack(seen), dim=-1)


def trained_by_hand(lm: LM, lr: float) -> torch.nn.Module:
    """One epoch of plain SGD on key and value projections, by autograd and slicing alone."""
    model = copy.deepcopy(lm.model)
    start = lm.tokenizer.bos_token_id
    for word, label in DEMONSTRATIONS:
        ids = torch.tensor([[start, *encoded(lm, f" {word} Label:"), *encoded(lm, f" {label}")]])
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "k_proj" in name or "v_proj" in name:
                    parameter -= lr * parameter.grad
                elif "c_attn" in name:
                    parameter[..., 16:] -= lr * parameter.grad[..., 16:]
    return model


def test_the_change_of_outputs_and_the_answers_are_those_of_plain_passes(lm: LM) -> None:
    start, shown, queries = prompts(lm)
    tuned = trained_by_hand(lm, 0.3)
    before = lm.sha256
    found = compare(lm, DEMONSTRATIONS, QUERIES, lr=0.3)
    assert lm.sha256 == before
    cosines, answers = [], {"zero-shot": [], "in-context": [], "fine-tuned": []}
    labels = [encoded(lm, f" {label}") for label in ("red", "green")]
    for query, (_, gold) in zip(queries, QUERIES, strict=True):
        zero = attention_outputs(lm.model, [start, *query])
        context = attention_outputs(lm.model, [start, *shown, *query])
        after = attention_outputs(tuned, [start, *query])
        cosines.append(F.cosine_similarity(context - zero, after - zero, dim=-1))
        for name, model, prefix in (
            ("zero-shot", lm.model, [start]),
            ("in-context", lm.model, [start, *shown]),
            ("fine-tuned", tuned, [start]),
        ):
            scores = []
            for label in labels:
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([[*prefix, *query, *label]])).logits[0]
                places = range(len(prefix) + len(query) - 1, len(prefix) + len(query) + len(label) - 1)
                logs = logits.log_softmax(-1)
                scores.append(float(np.mean([logs[p, t] for p, t in zip(places, label, strict=True)])))
            answers[name].append(scores[0] > scores[1] if gold == "red" else scores[1] > scores[0])
    np.testing.assert_allclose(found.update, torch.stack(cosines).mean(0), atol=1e-4)
    assert found.accuracy == {name: pytest.approx(np.mean(right)) for name, right in answers.items()}


def test_scores_are_compared_over_the_query_alone(lm: LM) -> None:
    start, shown, queries = prompts(lm)
    found = compare(lm, DEMONSTRATIONS, QUERIES[:1], lr=0.3, batch_size=1)
    model = copy.deepcopy(lm.model)
    model.set_attn_implementation("eager")
    logs = []
    for prefix in ([start, *shown], [start]):
        with torch.no_grad():
            maps = model(input_ids=torch.tensor([[*prefix, *queries[0]]]), output_attentions=True).attentions
        # logarithms of the probabilities are the scores but for a constant
        logs.append(torch.stack(maps)[:, 0, :, -1, len(prefix) :].log())
    recorded = conditions.Texts.of(lm, DEMONSTRATIONS, QUERIES[:1], meta_optimizers.TEMPLATE, None)
    readings = [conditions.read(lm.model, prefix, recorded, 4) for prefix in ([start, *shown], [start])]
    for log, reading, prefix in zip(logs, readings, (1 + len(shown), 1), strict=True):
        scores = reading.scores[0][..., prefix:]
        torch.testing.assert_close(scores - scores.mean(-1, True), log - log.mean(-1, True), atol=1e-4, rtol=1e-3)
    expected = F.cosine_similarity(
        readings[0].scores[0][..., 1 + len(shown) :], readings[1].scores[0][..., 1:], dim=-1
    ).mean(1)
    np.testing.assert_allclose(found.attention_before, expected, atol=1e-5)


def test_batches_change_nothing_and_everything_has_a_number_a_layer(lm: LM) -> None:
    one, other = (compare(lm, DEMONSTRATIONS, QUERIES, lr=0.1, batch_size=size) for size in (1, 64))
    for name, value in one.means().items():
        assert value == pytest.approx(other.means()[name], abs=1e-4, nan_ok=True), name
    arrays = {name: value for name, value in vars(one).items() if isinstance(value, np.ndarray)}
    assert all(value.shape == (2,) and (np.abs(value) <= 1 + 1e-9).all() for value in arrays.values())
    assert abs(one.update_gaussian).max() < 0.6


def test_recall_is_undefined_where_fine_tuning_puts_nothing_right(lm: LM) -> None:
    still = compare(lm, DEMONSTRATIONS, QUERIES, lr=1e-9)
    assert math.isnan(still.recall)
    assert still.accuracy["fine-tuned"] == still.accuracy["zero-shot"]
    np.testing.assert_allclose(still.attention_after, still.attention_before, atol=1e-5)


def test_layer_wise_descent_gives_no_gradient_from_above(lm: LM) -> None:
    whole, layered = (compare(lm, DEMONSTRATIONS, QUERIES, lr=0.3, layer_causal=causal) for causal in (False, True))
    assert not np.allclose(whole.update, layered.update, atol=1e-4)
    stack = layers(lm.model)
    model = copy.deepcopy(lm.model)
    ids = torch.tensor([[lm.tokenizer.bos_token_id, *encoded(lm, " apple Label: red")]])
    with conditions.layer_losses(model) as loss_of:
        loss = loss_of(model, ids)
    hidden = lm.model(input_ids=ids, output_hidden_states=True).hidden_states
    base = lm.model.get_decoder() if hasattr(lm.model, "get_decoder") else lm.model.transformer
    norm = base.norm if hasattr(base, "norm") else base.ln_f
    parts = [F.cross_entropy(lm.model.lm_head(norm(hidden[1]))[0, :-1], ids[0, 1:])]
    parts.append(F.cross_entropy(lm.model(input_ids=ids).logits[0, :-1], ids[0, 1:]))
    torch.testing.assert_close(loss, torch.stack(parts).sum(), atol=1e-4, rtol=1e-4)
    gradient = torch.autograd.grad(loss, next(layers(model)[0].parameters()))[0]
    first = torch.autograd.grad(parts[0], next(stack[0].parameters()))[0]
    torch.testing.assert_close(gradient, first, atol=1e-4, rtol=1e-3)


def test_ranks_agree_with_themselves() -> None:
    generator = torch.Generator().manual_seed(0)
    trained = torch.randn(1, 6, 4, generator=generator)
    queries = torch.randn(3, 1, 4, generator=generator)
    scores = [torch.cat([torch.zeros(1, 2, 1), (trained[0] @ query[0]).expand(1, 2, 6)], -1) for query in queries]
    context = conditions.Reading(torch.zeros(3, 2), torch.zeros(3, 1, 4), scores, queries)
    kendall = meta_optimizers._kendall(context, context, trained, np.array([1, 3, 7]), np.random.default_rng(0))
    assert kendall[0].tolist() == [pytest.approx(1)]
    assert abs(kendall[2][0]) < 0.9


def test_the_best_rate_is_the_one_that_answers_best(lm: LM) -> None:
    rates = (1e-6, 0.3)
    tuned = {rate: compare(lm, DEMONSTRATIONS, QUERIES, lr=rate).accuracy["fine-tuned"] for rate in rates}
    best = best_rate(lm, [(DEMONSTRATIONS, QUERIES)], rates)
    assert tuned[best] == max(tuned.values())


def test_bad_input_is_said(lm: LM) -> None:
    with pytest.raises(InputError, match="at least 2 different label words"):
        compare(lm, [("apple", "red")], QUERIES[:1], lr=0.1)
    with pytest.raises(InputError, match="'green' is not among the label words"):
        compare(lm, [("apple", "red")], QUERIES, lr=0.1, labels=["red", "blue"])
    with pytest.raises(InputError, match="ends with"):
        compare(lm, DEMONSTRATIONS, QUERIES, lr=0.1, template="{label}: {text}")
    with pytest.raises(InputError, match="give fewer demonstrations"):
        compare(lm, DEMONSTRATIONS * 40, QUERIES, lr=0.1)
    with pytest.raises(InputError, match="lr must be positive"):
        compare(lm, DEMONSTRATIONS, QUERIES, lr=0)
    with pytest.raises(InputError, match="at least one of each"):
        compare(lm, DEMONSTRATIONS, [], lr=0.1)
    with pytest.raises(InputError, match="wanted a transformer and eta"):
        MomentumAttention(eta=1.0)


def test_momentum_attention_is_gpicl_with_momentum() -> None:
    stream = Projections(BaseSet.bundled("iris"), tasks=8, features=4, length=6, batch_size=4)
    learner = MomentumAttention(width=16, layers=2, heads=2, steps=3, lr=1e-3, eta=0.4)
    fitted = learner(stream, watch=Watch(progress=False))
    assert fitted.model.config.eta == 0.4
    plain = GPICL(width=16, layers=2, heads=2).model(4, 3, 6)
    begun = replace(learner).model(4, 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), begun.parameters(), strict=True))
