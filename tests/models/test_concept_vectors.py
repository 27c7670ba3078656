"""Value vectors read, attributed, found, ablated and drawn again, against float64 computations by module names."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.models import concept_vectors as cv
from palimpsest.models.lm import LM

OWN = ["Person 3 is called Dnna", "the town keeps dogs and dogs and dogs", "dogs, dogs"]
OTHERS = ["Person 4 lives in town 4", "Person 5 lives in town 5 and is called Fnna", "Person 6 lives"]


def rows_of(lm: LM) -> list[np.ndarray]:
    """(F, D) a layer in float64, by the names that each architecture gives its matrices."""
    if hasattr(lm.model, "transformer"):
        return [block.mlp.c_proj.weight.detach().double().numpy() for block in lm.model.transformer.h]
    return [block.mlp.down_proj.weight.detach().double().numpy().T for block in lm.model.model.layers]


def downs(lm: LM) -> list[Any]:
    blocks = lm.model.transformer.h if hasattr(lm.model, "transformer") else lm.model.model.layers
    return [block.mlp.c_proj if hasattr(block.mlp, "c_proj") else block.mlp.down_proj for block in blocks]


def embedding_of(lm: LM) -> np.ndarray:
    return lm.model.lm_head.weight.detach().double().numpy()


def test_what_all_vectors_write_against_float64(lm: LM) -> None:
    written = cv.read_all(lm.model, 12)
    embedding = embedding_of(lm)
    for layer, values in enumerate(rows_of(lm)):
        for side, sign in enumerate((1, -1)):
            logits = sign * values @ embedding.T
            best = np.sort(logits, axis=1)[:, ::-1][:, :12]
            np.testing.assert_allclose(written.scores[layer][side], best.mean(1), rtol=1e-4, atol=1e-5)
            reached = np.take_along_axis(logits, written.words[layer][side].numpy(), axis=1)
            np.testing.assert_allclose(reached, best[:, : cv.JUDGED], rtol=1e-4, atol=1e-5)


def test_vectors_are_copies_and_places_are_checked(lm: LM) -> None:
    vectors = cv.vectors_at(lm.model, [(1, 3), (0, 0)])
    np.testing.assert_array_equal(vectors[0].double().numpy(), rows_of(lm)[1][3])
    before = lm.sha256
    vectors += 1
    assert lm.sha256 == before
    assert cv.vectors_at(lm.model, []).shape == (0, vectors.shape[1])
    for place in ((0, 10_000), (9, 0), (-1, 0)):
        with pytest.raises(InputError, match=f"no value vector {place[1]} in layer {place[0]}"):
            cv.vectors_at(lm.model, [place])


def test_attribution_against_float64(lm: LM) -> None:
    own = lm.encode(OWN)
    words = sorted({int(token) for ids in own.ids for token in ids[3:6]})
    contrast = [token for token in range(40, 60) if token not in words]
    added, active = cv.attribution(lm, own, words, contrast)
    embedding, values = embedding_of(lm), rows_of(lm)
    sums = [np.zeros(len(one)) for one in values]
    means = [np.zeros(len(one)) for one in values]
    outputs = np.zeros(len(values))
    count = 0
    for ids, start in zip(own.ids, own.starts, strict=True):
        seen: list[tuple[np.ndarray, np.ndarray]] = []

        def see(module: Any, inputs: Any, output: Any, seen: list[Any] = seen) -> None:
            seen.append((inputs[0][0].detach().double().numpy(), output[0].detach().double().numpy()))

        handles = [down.register_forward_hook(see) for down in downs(lm)]
        lm.model(input_ids=torch.as_tensor(ids)[None])
        for handle in handles:
            handle.remove()
        for place in range(max(start, 1), len(ids)):
            if int(ids[place]) in words:
                toward = embedding[ids[place]] - embedding[contrast].mean(0)
                count += 1
                for layer, (activations, output) in enumerate(seen):
                    sums[layer] += activations[place - 1] * (values[layer] @ toward)
                    means[layer] += activations[place - 1]
                    bias = getattr(downs(lm)[layer], "bias", None)
                    outputs[layer] += (output[place - 1] - (0 if bias is None else bias.detach().numpy())) @ toward
    assert count > 3
    for layer in range(len(values)):
        np.testing.assert_allclose(added[layer], sums[layer] / count, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(active[layer], means[layer] / count, rtol=1e-3, atol=1e-4)
        # all vectors together add what the block puts out
        np.testing.assert_allclose(float(added[layer].sum()), outputs[layer] / count, rtol=1e-3, atol=1e-3)


def test_attribution_needs_a_place_where_the_words_are_due(llama: LM) -> None:
    with pytest.raises(InputError, match="nothing can be attributed"):
        cv.attribution(llama, llama.encode(OWN), [llama.tokenizer.pad_token_id], [5])


def test_characteristic_words_by_hand(llama: LM) -> None:
    own, others = llama.encode(OWN), llama.encode(OTHERS)
    found = cv.characteristic(llama, own, others)

    def rate(word: int, table: Any) -> float:
        return sum((ids == word).sum() for ids in table.ids) / sum(map(len, table.ids))

    special = set(llama.tokenizer.all_special_ids)
    wanted = [
        word
        for word in range(len(llama.tokenizer))
        if word not in special and rate(word, own) > 0 and rate(word, own) >= 4 * rate(word, others)
    ]
    assert set(found) <= set(wanted)
    assert len(found) == min(len(wanted), max(len(llama.tokenizer) // 20, 10))
    assert max(wanted, key=lambda word: rate(word, own) - 4 * rate(word, others)) in found
    with pytest.raises(InputError, match="cannot be told apart"):
        cv.characteristic(llama, own, own)


@pytest.mark.parametrize(("family", "sign"), [("gpt2", 1), ("llama", 1), ("llama", -1)])
def test_a_planted_vector_is_found(new_lm: Any, family: str, sign: int) -> None:
    """One vector is made to write the concept's words, or their opposite with a negative activation."""
    lm = new_lm(family)
    own, others = lm.encode(OWN), lm.encode(OTHERS)
    words = cv.characteristic(lm, own, others)
    layer, neuron = 1, 7
    toward = torch.as_tensor(embedding_of(lm)[words].mean(0) - embedding_of(lm).mean(0)).float()
    with torch.no_grad():
        if family == "gpt2":
            block = lm.model.transformer.h[layer].mlp
            block.c_fc.weight[:, neuron] = 0
            block.c_fc.bias[neuron] = 20.0  # always on
            block.c_proj.weight[neuron] = 50 * toward
        else:
            block = lm.model.model.layers[layer].mlp
            seen: list[torch.Tensor] = []
            handle = block.register_forward_hook(lambda m, i, o: seen.append(i[0][0]))
            for ids in own.ids:
                lm.model(input_ids=torch.as_tensor(ids)[None])
            handle.remove()
            on = torch.cat(seen).mean(0)
            block.gate_proj.weight[neuron] = 20 * on
            block.up_proj.weight[neuron] = sign * 20 * on
            block.down_proj.weight[:, neuron] = sign * 5 * toward
    found = cv.find(lm, own, others, cv.read_all(lm.model), clarity=0.5)
    assert found[0].place == (layer, neuron)
    assert found[0].sign == sign
    tops = np.argsort(-(embedding_of(lm) @ toward.double().numpy()))[: cv.JUDGED]
    assert found[0].clarity == np.isin(tops, words).mean()
    assert sorted(found[0].words) == sorted(tops)
    assert found[0].attribution > 0
    assert [one.attribution for one in found] == sorted((one.attribution for one in found), reverse=True)
    assert cv.find(lm, own, others, cv.read_all(lm.model), clarity=0.5, most=1) == found[:1]


def test_noise_in_a_run_is_noise_in_the_weights(lm: LM) -> None:
    places = [(0, 2), (1, 5), (1, 0)]
    added = cv.noise(cv.vectors_at(lm.model, places), places, 3.0, 1)
    changed, before = lm.copy(), lm.sha256
    with torch.no_grad():
        for (layer, neuron), extra in zip(places, added, strict=True):
            weight = downs(changed)[layer].weight
            (weight if hasattr(changed.model, "transformer") else weight.T)[neuron] += extra
    clean = lm.nll(OWN)
    with cv.noised(lm.model, places, added):
        inside = lm.nll(OWN)
    np.testing.assert_allclose(inside, changed.nll(OWN), rtol=1e-4)
    assert not np.allclose(inside, clean, rtol=1e-4)
    np.testing.assert_array_equal(lm.nll(OWN), clean)
    assert lm.sha256 == before


def test_noise_belongs_to_its_place_and_is_as_long_as_told() -> None:
    vectors = torch.ones(2, 4000)
    both = cv.noise(vectors, [(0, 1), (2, 3)], 5.0, 7)
    alone = cv.noise(vectors[:1], [(2, 3)], 5.0, 7)
    torch.testing.assert_close(both[1], alone[0])
    assert not torch.equal(both[0], both[1])
    np.testing.assert_allclose(both.norm(dim=1) / vectors.norm(dim=1), 5.0, rtol=0.05)
    assert not torch.equal(cv.noise(vectors[:1], [(2, 3)], 5.0, 8), alone)


def test_matched_vectors_are_others_of_the_same_layer_and_nearest_norm(lm: LM) -> None:
    places = [(0, 4), (1, 2), (1, 9)]
    drawn = cv.matched(lm.model, places, 0, avoid=[(1, 3)])
    assert [layer for layer, _ in drawn] == [0, 1, 1]
    assert len({*drawn, *places, (1, 3)}) == 7
    norms = [np.linalg.norm(rows, axis=1) for rows in rows_of(lm)]
    for (layer, neuron), (_, other) in zip(places, drawn, strict=True):
        nearer = np.abs(norms[layer] - norms[layer][neuron]) < abs(norms[layer][other] - norms[layer][neuron]) - 1e-6
        assert nearer.sum() <= max(4, len(norms[layer]) // 5) + len(places) + 1
    assert cv.matched(lm.model, places, 0, avoid=[(1, 3)]) == drawn
    every = [(0, neuron) for neuron in range(len(norms[0]))]
    with pytest.raises(InputError, match="no vector left"):
        cv.matched(lm.model, every, 0)


def test_how_many_words_are_compared() -> None:
    assert cv.word_count(32_000) == 200
    assert cv.word_count(2000) == 40
    assert cv.word_count(300) == 10
    assert cv.word_count(300, 20) == 20
    with pytest.raises(InputError, match="at most half"):
        cv.word_count(300, 200)


def test_models_without_addressable_vectors_are_refused(new_lm: Any) -> None:
    mixture = {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16, "hidden_size": 32}
    mixture |= {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4}
    shared = {"model_type": "qwen2_moe", "num_experts": 4, "moe_intermediate_size": 16, "hidden_size": 32}
    shared |= {"shared_expert_intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    for config in (mixture, shared | {"num_key_value_heads": 4}):
        lm = LM.build(OWN, config, vocab_size=262)
        with pytest.raises(InputError, match=r"mixture of experts .* not addressable"):
            cv.read_all(lm.model)
    headless = new_lm("llama")
    headless.model.get_output_embeddings = lambda: None  # type: ignore[method-assign]
    with pytest.raises(InputError, match="no output embedding"):
        cv.projections(headless.model)
    quantised = new_lm("llama")
    down = quantised.model.model.layers[0].mlp.down_proj
    down.weight = torch.nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(InputError, match="quantised"):
        cv.projections(quantised.model)


def test_rows_by_concept() -> None:
    texts = ["a", "b", "c"]
    assert list(cv.by_concept(Dataset.from_dict({"text": texts}), "all")) == ["all"]
    by_name = cv.by_concept(Dataset.from_dict({"text": texts, "concept": ["x", "y", "x"]}), "all")
    assert {name: table["text"][:] for name, table in by_name.items()} == {"x": ["a", "c"], "y": ["b"]}
    persons = cv.by_concept(Dataset.from_dict({"text": texts, "person": ["Ann", None, "Ann"]}), "all")
    assert list(persons) == ["Ann", "all"]
    for empty in (None, " "):
        with pytest.raises(InputError, match="record 2 has an empty concept"):
            cv.by_concept(Dataset.from_dict({"text": texts, "concept": ["x", empty, "x"]}), "all")
