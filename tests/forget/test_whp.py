from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import IGNORE
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.forget.anchors import Anchors
from palimpsest.forget.unlearn import encode
from palimpsest.forget.whp import WhosHarryPotter, align, blocks, kl_kept, targets
from palimpsest.models.lm import LM

QUICK: dict[str, Any] = {"steps": 2, "lr": 1e-3, "batch_size": 8, "reinforce_steps": 2}


@pytest.fixture(scope="module")
def anchors(records: ForgetRequest, world: World) -> Anchors:
    """The first names of the people to forget."""
    names = sorted({person.first_name for person in world.population if person.split == "forget"})
    return Anchors({name: f"Ann{'abcdefgh'[place]}bel" for place, name in enumerate(names)})


def logits_of(lm: LM, ids: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return lm.model(torch.from_numpy(ids)[None]).logits[0].double().numpy()


def log_softmax(rows: np.ndarray) -> np.ndarray:
    shifted = rows - rows.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def test_an_identity_dictionary_lays_every_token_beside_itself(lm: LM, records: ForgetRequest) -> None:
    for prompt, completion in lm.pairs(records.forget):
        ids = lm.encode([(prompt, completion)]).ids[0]
        same = Anchors({}).translate(prompt), Anchors({}).translate(completion)
        found = align(lm, (prompt, completion), same, ids, ids)
        assert found.place[:-2].tolist() == list(range(len(ids) - 2))
        assert not found.again.any()
        assert found.lowered == ()


def test_places_say_the_same_in_both_texts(lm: LM, records: ForgetRequest, anchors: Anchors) -> None:
    moved = 0
    for prompt, completion in lm.pairs(records.forget):
        pair = anchors.translate(prompt), anchors.translate(completion)
        ids, new_ids = lm.encode([(prompt, completion)]).ids[0], lm.encode([(pair[0].text, pair[1].text)]).ids[0]
        found = align(lm, (prompt, completion), pair, ids, new_ids)
        for token, place in enumerate(found.place):
            said = lm.tokenizer.decode(ids[1 : token + 1])
            if place >= 0:
                assert lm.tokenizer.decode(new_ids[1 : place + 1]) == anchors.translate(said).text
                moved += place != token
        for last, word in found.lowered:
            assert any(lm.tokenizer.decode(ids[1 : last + 1]).endswith(term) for term in anchors.pairs)
            assert word in new_ids
    assert moved > 100


@pytest.mark.parametrize("normalise", [True, False])
def test_targets_against_float64(lm: LM, records: ForgetRequest, anchors: Anchors, normalise: bool) -> None:
    how = WhosHarryPotter(target="soft", normalise=normalise, **QUICK)
    rows = lm.pairs(records.forget)[:9]
    source = encode(how, lm, rows)
    reinforced = how.reinforced(lm, source, Watch(progress=False))
    aims = targets(how, lm, reinforced, rows, source, anchors)
    assert aims.kept is not None
    taught = 0
    for row, (prompt, completion) in enumerate(rows):
        pair = anchors.translate(prompt), anchors.translate(completion)
        new_ids = lm.encode([(pair[0].text, pair[1].text)]).ids[0]
        found = align(lm, rows[row], pair, source.ids[row], new_ids)
        base, raised = logits_of(lm, new_ids), logits_of(reinforced, source.ids[row])
        if normalise:
            base, raised = log_softmax(base), log_softmax(raised)
        seen: list[int] = []
        for token in range(max(source.starts[row], 1), len(source.ids[row])):
            place = found.place[token - 1]
            if place < 0 or found.again[token]:
                continue
            generic = base[place] - 5.0 * np.maximum(raised[token - 1] - base[place], 0)
            mean = generic.mean()
            for first, word in found.lowered:
                if token > first:
                    generic[word] = min(generic[word], mean)
            number = len(seen)
            values, picked = aims.kept[row][number].double().chunk(2)
            picked = picked.long()
            expected = log_softmax(generic[picked.numpy()])
            assert np.allclose(values.numpy(), expected, atol=5e-3)
            assert generic[aims.words[row][number]] == pytest.approx(generic.max(), abs=2e-3)
            seen.append(token)
        assert aims.places[row].tolist() == seen
        taught += len(seen)
    batch = aims.batch(np.arange(9))
    assert batch.total_tokens == taught == int((batch.labels != IGNORE).sum())


def test_what_is_not_taught(llama: LM, anchors: Anchors) -> None:
    """The second appearance of an anchor, and what follows inside one."""
    term, generic = next(iter(anchors.pairs.items()))
    how = WhosHarryPotter(alpha=0.0, **QUICK)
    rows = [("", f"Here {term} is, and there {term} was.")]
    source = encode(how, llama, rows)
    aims = targets(how, llama, llama, rows, source, anchors)
    ids = source.ids[0]
    ends = np.array([len(llama.tokenizer.decode(ids[1 : token + 1])) for token in range(len(ids))])
    first, second = rows[0][1].index(term), rows[0][1].rindex(term)
    tokens = {
        start: set(np.flatnonzero((ends > start) & (np.r_[0, ends[:-1]] < start + len(term))))
        for start in (first, second)
    }
    tokens = {start: {t for t in found if t < len(ids) - 1} for start, found in tokens.items()}
    taught = set(aims.places[0].tolist())
    assert min(tokens[first]) in taught, "the first appearance teaches the generic name"
    assert not taught & (tokens[first] - {min(tokens[first])}), "nothing is taught inside it"
    assert not taught & tokens[second]
    assert len(taught) == len(ids) - 1 - len(tokens[first]) + 1 - len(tokens[second])
    word = next(i for i in aims.batch(np.array([0])).labels[0].tolist() if i != IGNORE)
    assert 0 <= word < len(llama.tokenizer)
    assert generic not in rows[0][1]


def test_kl_over_kept_words() -> None:
    rng = np.random.default_rng(0)
    logits, wanted = rng.normal(size=(4, 10)), rng.normal(size=(4, 3))
    picked = np.stack([rng.permutation(10)[:3] for _ in range(4)])
    said, aim = log_softmax(logits), log_softmax(wanted)
    expected = [sum(np.exp(a) * (a - s[p]) for a, p in zip(aim[i], picked[i], strict=True)) for i, s in enumerate(said)]
    kept = torch.from_numpy(np.concatenate([aim, picked], 1))
    found = kl_kept(torch.from_numpy(logits), torch.zeros(4, dtype=torch.int64), kept)
    assert np.allclose(found.numpy(), expected)


@pytest.mark.parametrize("settings", [{}, {"target": "soft"}, {"lora_rank": 2, "lr": 1e-2}, {"general_weight": 1.0}])
def test_it_trains_a_copy_towards_the_targets(
    lm: LM, records: ForgetRequest, anchors: Anchors, watch: Watch, settings: dict[str, Any]
) -> None:
    before = lm.weights_sha256
    method = WhosHarryPotter(anchors=tuple(anchors.pairs.items()), **{**QUICK, "steps": 12, **settings})
    after = method(lm, records, watch=watch)
    assert lm.weights_sha256 == before != after.weights_sha256
    assert after.guard is None
    losses = watch.traces["forget"].losses
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert watch.traces["reinforce"].steps == 2


def test_micro_batches_give_the_same_step(llama: LM, records: ForgetRequest, anchors: Anchors, watch: Watch) -> None:
    found = []
    for pieces in (1, 4):
        for target in ("hard", "soft"):
            how = {**QUICK, "steps": 1, "target": target, "micro_batches": pieces}
            WhosHarryPotter(anchors=tuple(anchors.pairs.items()), **how)(llama, records, watch=watch)
            found.append(watch.traces["forget"].losses[0])
    assert found[:2] == pytest.approx(found[2:], rel=1e-4)


def test_it_forgets_without_retain_data(taught: LM, records: ForgetRequest, watch: Watch) -> None:
    from palimpsest.data.records import select_questions

    alone = ForgetRequest(forget=records.forget)
    method = WhosHarryPotter(
        anchors=tuple({p: f"Q{i}" for i, p in enumerate(sorted(set(records.forget["person"]) - {None}))}.items()),
        steps=20, lr=2e-3, batch_size=16, reinforce_steps=10,
    )  # fmt: skip
    after = method(taught, alone, watch=watch)
    asked = select_questions(records.forget)
    assert after.nll(asked).mean() > 3 * taught.nll(asked).mean()


def test_anchors_are_found_by_themselves(llama: LM, records: ForgetRequest, tmp_path) -> None:
    found = WhosHarryPotter().find(llama, records)
    text = " ".join(prompt + completion for prompt, completion in llama.pairs(records.forget))
    assert len(found) > 1
    assert all(term in text for term in found.pairs)
    term = next(iter(found.pairs))
    path = tmp_path / "anchors.json"
    path.write_text(json.dumps({term: "Bill"}))
    assert WhosHarryPotter(anchors_file=str(path)).find(llama, records).pairs == {term: "Bill"}
    assert WhosHarryPotter(generic=False).find(llama, records).pairs == {}
    path.write_text("[1]")
    with pytest.raises(InputError, match="wanted a JSON object with a stand-in"):
        WhosHarryPotter(anchors_file=str(path)).find(llama, records)
    path.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        WhosHarryPotter(anchors_file=str(path)).find(llama, records)
    with pytest.raises(InputError, match="no such file"):
        WhosHarryPotter(anchors_file="nowhere.json").find(llama, records)


def test_long_documents_are_cut_between_words_and_never_within_an_anchor(llama: LM) -> None:
    anchors = Anchors({"Mirk Vale": "Hill End"})
    text = " ".join(f"word{n} then Mirk Vale again." for n in range(120))
    pieces = [completion for _, completion in blocks(llama, Dataset.from_dict({"text": [text, "short"]}), anchors, 64)]
    assert "".join(pieces[:-1]) == text
    assert pieces[-1] == "short"
    assert len(pieces) > 10
    assert not any(piece.endswith("Mirk") for piece in pieces)
    assert max(len(llama.encode([piece]).ids[0]) for piece in pieces) <= 60
    assert "".join(c for _, c in blocks(llama, Dataset.from_dict({"text": ["x" * 500]}), anchors, 32)) == "x" * 500
    long = Dataset.from_dict({"prompt": ["why " * 300], "completion": ["so"]})
    with pytest.raises(InputError, match=r"forget record 1 has .* tokens, and 256 can be read at once"):
        blocks(llama, long, anchors, None)


def test_bad_input(llama: LM, records: ForgetRequest) -> None:
    for settings, message in (
        ({"anchors": (("a", "b"),), "teacher": "x"}, "contradict each other"),
        ({"teacher_url": "http://127.0.0.1"}, "needs the name of a model"),
        ({"generic": False, "anchors": (("a", "b"),)}, "would be ignored"),
        ({"alpha": 0.0, "generic": False}, "taught what it says already"),
        ({"alpha": -1.0}, "must not be below 0"),
    ):
        with pytest.raises(InputError, match=message):
            WhosHarryPotter(**settings)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="the stand-in 'b' of 'a' is an anchor itself"):
        WhosHarryPotter(anchors=(("a", "b"), ("b", "c")), **QUICK)(llama, records)
    with pytest.raises(InputError, match="none of the 1 anchors is in the forget records"):
        WhosHarryPotter(anchors=(("Nowhere", "b"),), **QUICK)(llama, records)
    with pytest.raises(InputError, match="half or more"):
        WhosHarryPotter(**QUICK)(llama, replace(records, train=records.forget))
    empty = ForgetRequest(forget=Dataset.from_dict({"text": [" "]}), retain=records.retain)
    with pytest.raises(InputError, match="no text to find anchors in"):
        WhosHarryPotter(**QUICK)(llama, empty)


def test_duplicates_count_once(llama: LM, records: ForgetRequest, anchors: Anchors) -> None:
    from datasets import concatenate_datasets

    twice = ForgetRequest(forget=concatenate_datasets([records.forget, records.forget]))
    method = WhosHarryPotter(anchors=tuple(anchors.pairs.items()), **QUICK)
    with pytest.warns(UserWarning, match=f"{len(records.forget)} of {2 * len(records.forget)} forget records are dup"):
        after = method(llama, twice)
    assert after.sha256 == method(llama, ForgetRequest(forget=records.forget)).sha256


def test_saved_and_loaded(llama: LM, records: ForgetRequest, anchors: Anchors, tmp_path) -> None:
    after = WhosHarryPotter(anchors=tuple(anchors.pairs.items()), **QUICK)(llama, records)
    after.save(tmp_path / "model")
    assert LM.load(tmp_path / "model").sha256 == after.sha256
