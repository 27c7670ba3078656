"""MachineLearningLM: what the model is shown, who sees whom, the vote, the warm start, and the classifier's face."""

from __future__ import annotations

import json
from dataclasses import replace
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.tables import IGNORE, TablePrior, Tables
from palimpsest.data.tasks import Examples, Task
from palimpsest.learn import load, save
from palimpsest.learn.incontext import json_labels, table_prompts
from palimpsest.learn.incontext.machinelearninglm import MachineLearningLM, Prompted, Staged, TabularLM, voted
from palimpsest.learn.incontext.packed_rows import PackedRows, column_vectors, fresh, packed_integers
from palimpsest.learn.incontext.table_classifier import TableClassifier
from palimpsest.learn.incontext.warm_start import Pool, consensus
from palimpsest.models.lm import LM

QUIET = Watch(progress=False)
PRIOR = TablePrior(columns=(2, 3), classes=(2, 3), deepest=1)
STREAM = Tables(PRIOR, shots=(8, 16), queries=6, batch_size=8, seed=100, block=2)
TINY: dict[str, Any] = {"steps": 2, "warm_share": 0.0, "votes": 3, "lr": 1e-3}
FAMILIES = pytest.mark.parametrize("base", ["llama-tiny", "gpt2-tiny"])


@pytest.fixture(scope="module")
def fitted() -> TabularLM:
    return MachineLearningLM(**TINY).meta_fit(STREAM, watch=QUIET)


def rows(count: int = 12, columns: int = 3, classes: int = 2, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(count) % classes
    return rng.normal(size=(count, columns)) + 3 * y[:, None], y


def test_numbers_become_integers_by_the_context_alone() -> None:
    context = np.array([[1.0, 5.0, 2.0], [3.0, 5.0, np.nan], [8.0, 5.0, 6.0]])
    queries = np.array([[4.0, 5.0, np.nan], [1e9, 7.0, -1e9]])
    mean, spread = 4.0, np.sqrt((9 + 1 + 16) / 2)
    assert table_prompts.integers(context, context)[:, 0].tolist() == [
        int(120 * (value - mean) / spread + 500) for value in (1.0, 3.0, 8.0)
    ]
    assert table_prompts.integers(queries, context).tolist() == [[500, 500, 500], [999, 999, 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(2, 9))
def test_training_and_answering_use_the_same_integers(seed: int, shots: int) -> None:
    x = np.random.default_rng(seed).normal(size=(2, 12, 3))
    found = packed_integers(torch.from_numpy(x), shots).numpy()
    for one, cells in zip(x, found, strict=True):
        assert np.abs(table_prompts.integers(one, one[:shots]) - cells).max() <= 1  # the cut after the comma may differ


def test_a_prompt_is_written_as_in_the_paper_and_its_numbers_are_single_tokens() -> None:
    context, queries = np.array([[1, 22], [333, 999]]), np.array([[5, 500]])
    text = table_prompts.prompt(context, [0, 1], queries, 2, ["age", "size,cm"])
    assert "\n1,22|0\n333,999|1\n" in text
    assert "\nID 0:5,500\n" in text
    assert "Features: age,size cm" in text
    assert json.loads(table_prompts.answer([1, 0])) == [{"id": 0, "label": 1}, {"id": 1, "label": 0}]
    opened = "".join(f"{table_prompts.opening(place)}{label}" for place, label in enumerate([1, 0])) + "}]"
    assert opened == table_prompts.answer([1, 0])
    tokenizer = table_prompts.number_tokenizer(512)
    ids = tokenizer.encode(text + table_prompts.answer([1]), add_special_tokens=False)
    assert "".join(tokenizer.convert_ids_to_tokens(ids)).startswith("You do supervised")
    assert tokenizer.unk_token_id not in ids or "size" in text  # names of features are the only unknown words
    assert [len(tokenizer.encode(str(number), add_special_tokens=False)) for number in (0, 42, 999)] == [1, 1, 1]
    plain = table_prompts.prompt(context, [0, 1], queries, 2)
    assert tokenizer.unk_token_id not in tokenizer.encode(plain)


@FAMILIES
def test_a_query_sees_the_labelled_rows_and_itself(base: str) -> None:
    lm = fresh(base, 1)
    model = PackedRows(lm.model, lm.tokenizer, column_vectors(3, 64, 1), 3).eval()
    generator = torch.Generator().manual_seed(0)
    cells = torch.randint(1000, (2, 9, 3), generator=generator)
    present = torch.tensor([[True, True, True], [True, True, False]])
    y = torch.randint(3, (2, 5), generator=generator)
    with torch.no_grad():
        found = model(cells, present, y)
        other = cells.clone()
        other[:, 6] = 999 - other[:, 6]  # the second query
        changed = model(other, present, y)
        order = torch.tensor([3, 0, 4, 1, 2])
        shuffled = model(torch.cat([cells[:, order], cells[:, 5:]], dim=1), present, y[:, order])
        relabelled = model(cells, present, (y + 1) % 3)
        absent = cells.clone()
        absent[1, :, 2] = 7  # a column that is not there
        hidden = model(absent, present, y)
    assert found.shape == (2, 4, 3)
    torch.testing.assert_close(changed[:, [0, 2, 3]], found[:, [0, 2, 3]], atol=1e-5, rtol=0)
    assert not torch.allclose(changed[:, 1], found[:, 1], atol=1e-3)
    torch.testing.assert_close(shuffled, found, atol=1e-5, rtol=0)
    assert not torch.allclose(relabelled, found, atol=1e-3)
    torch.testing.assert_close(hidden, found, atol=1e-5, rtol=0)


def test_labels_are_apart_and_neighbouring_numbers_near() -> None:
    lm = fresh("llama-tiny", 0)
    numbers = lm.tokenizer.convert_tokens_to_ids([str(number) for number in (0, 1, 500, 501)])
    weight: Any = lm.model.get_input_embeddings().weight
    zero, one, middle, next_to_it = torch.nn.functional.normalize(weight.detach()[numbers], dim=1)
    assert abs(float(zero @ one)) < 0.6
    assert float(middle @ next_to_it) > 0.99


def test_the_vote_against_a_plain_count_in_float64(fitted: TabularLM) -> None:
    rng = np.random.default_rng(0)
    found = rng.dirichlet(np.ones(3), size=(4, 5))  # 4 votes, 5 queries
    numbering = [rng.permutation(3) for _ in range(4)]
    wanted = np.zeros((5, 3))
    for vote in range(4):
        for query in range(5):
            for cls in range(3):
                wanted[query, cls] += found[vote, query, numbering[vote][cls]] / 4
    np.testing.assert_allclose(voted(found, numbering), wanted, rtol=1e-14)

    x, y = rows(9, 2, 3)
    queries = rows(4, 2, 3, seed=1)[0]
    predictor = fitted.predictor(x, y, 3)
    by_hand = np.zeros((4, 3))
    for number in range(3):  # each vote is the first vote on the rows in its own order
        order, columns, classes = predictor._vote(number)
        alone = fitted.predictor(x[order][:, columns], classes[y[order]], 3)
        mine = table_prompts.integers(alone.x, alone.x), table_prompts.integers(queries[:, columns], alone.x)
        plain = (np.arange(9), np.arange(2), np.arange(3))
        by_hand += alone._packed(*mine, [plain])[0][:, classes] / 3
    np.testing.assert_allclose(predictor.probabilities(queries), by_hand, atol=1e-6)
    np.testing.assert_allclose(predictor.probabilities(queries).sum(1), 1)


def test_the_warm_start_filter_against_a_plain_count_in_float64() -> None:
    from sklearn.ensemble import RandomForestClassifier

    kept = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(40, 2))
        y = (x[:, 0] + rng.normal(size=40) * seed / 3 > 0).astype(np.int64)
        y[-1] = IGNORE
        told = RandomForestClassifier(30, random_state=5).fit(x[:20], y[:20]).predict(x[20:])
        truth, answers = y[20:-1], told[:-1]
        hits, size = int((truth == answers).sum()), len(truth)
        shares = [np.mean(truth == cls) for cls in (0, 1)]
        chance = max(*shares, sum(share**2 for share in shares))
        tail = sum(comb(size, k) * chance**k * (1 - chance) ** (size - k) for k in range(hits, size + 1))
        kappa = hits / size - sum(np.mean(truth == cls) * np.mean(answers == cls) for cls in (0, 1))
        balanced = np.mean([np.mean(answers[truth == cls] == cls) for cls in (0, 1)])
        good = tail <= 0.2 and kappa > 0 and balanced > 0.5 and len(set(answers)) == 2
        found = consensus(x, y, 20, 0.2, seed=5)
        assert (found is not None) == good
        if found is not None:
            kept += 1
            assert found.tolist() == [*(truth == answers), False]
    assert 0 < kept < 12


def test_the_pool_is_small_repeats_and_asks_what_the_forest_knows() -> None:
    stream = replace(STREAM, queries=24)
    batches = Pool(stream, count=8, shots=10, seed=1).build()
    first, later = batches(0), batches(9)
    assert first["shots"] == 10
    assert first["x"].shape == (8, 34, 3)
    order = [(first["x"] == one).flatten(1).all(1).nonzero().item() for one in later["x"]]
    assert sorted(order) == list(range(8))
    every = Pool(stream, count=8, shots=10, alpha=None, seed=1).build()(0)
    assert (first["y"][:, 10:] == IGNORE).sum() > (every["y"][:, 10:] == IGNORE).sum()
    assert (first["y"][:, 10:] != IGNORE).any(1).all()
    nothing = replace(STREAM, queries=1)  # one query is never enough to beat chance
    with pytest.raises(InputError, match="a random forest solves none: set warm_share=0"):
        Pool(nothing, count=1, shots=10, alpha=0.01).build()


def test_the_first_steps_come_from_the_pool() -> None:
    staged = Staged(2, lambda step: ("pool", step), lambda step: ("stream", step))
    assert [staged(step) for step in (0, 1, 2)] == [("pool", 0), ("pool", 1), ("stream", 2)]
    learner = MachineLearningLM(steps=4, warm_share=0.5, pool=4, lr=1e-3)
    cold = replace(learner, warm_share=0.0)
    x, y = rows()
    warm, other = (one.meta_fit(STREAM, watch=QUIET).predictor(x, y, 2).probabilities(x) for one in (learner, cold))
    assert np.abs(warm - other).max() > 1e-6


def test_it_learns_to_read_labels_from_the_context() -> None:
    stream = Tables(TablePrior((2, 2), (2, 2), deepest=1, tree_share=0, categorical=0), (16, 16), 16, seed=100)
    watch = Watch(progress=False)
    learner = MachineLearningLM(steps=120, warm_share=0.0, lr=3e-3, votes=2, seed=100)
    fitted = learner.meta_fit(stream, watch=watch)
    assert np.mean(watch.traces["continued pretraining"].losses[-20:]) < 0.6  # log 2 is 0.69
    x, y = rows(40, 2)
    right = fitted.predictor(x[:16], y[:16], 2)(x[16:]) == y[16:]
    lied = fitted.predictor(x[:16], 1 - y[:16], 2)(x[16:]) == y[16:]
    assert right.mean() > 0.8
    assert lied.mean() < 0.2


@FAMILIES
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("layout", ["packed", "prompt"])
def test_two_architectures_whole_or_lora_repeat_and_survive_the_disk(
    base: str, rank: int, layout: Any, tmp_path: Path
) -> None:
    stream = Tables(replace(PRIOR, columns=(2, 2)), shots=(4, 6), queries=3, batch_size=4, seed=1, block=1)
    learner = MachineLearningLM(layout=layout, base=base, rank=rank, **TINY | {"votes": 2})
    start = fresh(base, 0)
    before = start.weights_sha256
    first, again = (learner.meta_fit(stream, watch=QUIET, lm=lm) for lm in (start, None))
    assert start.weights_sha256 == before
    x, y = rows(6, 2)
    kept = x.copy()
    answers = first.predictor(x, y, 2).probabilities(x)
    assert answers.shape == (6, 2)
    np.testing.assert_allclose(answers.sum(1), 1)
    np.testing.assert_array_equal(answers, again.predictor(x, y, 2).probabilities(x))
    np.testing.assert_array_equal(x, kept)
    save(first, tmp_path / "learner")
    read = load(tmp_path / "learner")
    assert read.learner == learner
    np.testing.assert_array_equal(read.predictor(x, y, 2).probabilities(x), answers)


def test_prompts_ask_only_what_the_context_can_answer() -> None:
    lm = fresh("llama-tiny", 0)
    batch = Prompted(STREAM, lm)(0)
    asked = int((STREAM(0)["y"][:, STREAM(0)["shots"] :] != IGNORE).sum())
    words = [lm.tokenizer.decode(ids) for ids in batch.input_ids]
    assert sum(text.count("ID ") for text in words) == asked
    small = fresh("llama-tiny", 0)
    small.model.config.max_position_embeddings = 60
    with pytest.raises(InputError, match="does not fit the model's context of 60 tokens"):
        Prompted(STREAM, small)(0)
    with pytest.raises(InputError, match="give fewer rows, or ask fewer queries at once"):
        json_labels.probabilities(
            small, table_prompts.prompt(np.zeros((9, 9), int), [0] * 9, np.zeros((1, 9), int), 2), 1, 2
        )


def test_each_query_of_packed_rows_is_answered_by_itself_and_missing_numbers_are_the_mean(fitted: TabularLM) -> None:
    x, y = rows()
    queries = rows(5, seed=2)[0]
    queries[0, 1] = np.nan
    predictor = fitted.predictor(x, y, 2)
    together = predictor.probabilities(queries)
    alone = np.concatenate([predictor.probabilities(query[None]) for query in queries])
    np.testing.assert_allclose(together, alone, atol=1e-5)
    filled = queries.copy()
    filled[0, 1] = x[:, 1].mean()
    np.testing.assert_array_equal(predictor.probabilities(filled), together)
    assert predictor.probabilities(queries[:0]).shape == (0, 2)


def test_tables_that_are_narrower_wider_shorter_and_longer_than_those_of_training(fitted: TabularLM) -> None:
    for count, columns in ((3, 1), (4, 3), (200, 7)):
        x, y = rows(count, columns)
        assert fitted.predictor(x, y, 2).probabilities(x).shape == (count, 2)
    x, y = rows()
    constant = np.column_stack([np.full(12, 4.0), x[:, :2]])
    queries = constant.copy()
    queries[:, 0] = 1e6  # what never varied says nothing
    predictor = fitted.predictor(constant, y, 2)
    np.testing.assert_array_equal(predictor.probabilities(constant), predictor.probabilities(queries))


def test_the_scikit_learn_face(fitted: TabularLM) -> None:
    import pandas as pd
    from sklearn.base import clone
    from sklearn.model_selection import cross_val_score

    x, y = rows(30)
    labels = np.array(["no", "yes"])[y]
    classifier = TableClassifier(fitted, votes=2)
    assert clone(classifier).votes == 2
    assert classifier.fit(x, labels) is classifier
    assert classifier.classes_.tolist() == ["no", "yes"]
    assert set(classifier.predict(x)) <= {"no", "yes"}
    np.testing.assert_array_equal(classifier.predict_proba(x), fitted.predictor(x, y, 2).probabilities(x, votes=2))
    assert classifier.score(x, np.array(["maybe"] * 30)) == 0  # a label that no row shows is never answered

    frame = pd.DataFrame(
        {"size": x[:, 0], "colour": np.array(["red", "blue", None], dtype=object)[np.arange(30) % 3], "new": y == 1}
    )
    held = frame.copy()
    found = classifier.fit(frame, labels).predict_proba(frame)
    coded = np.column_stack([x[:, 0], np.array([1, 0, np.nan])[np.arange(30) % 3], y])
    np.testing.assert_array_equal(found, fitted.predictor(coded, y, 2).probabilities(coded, votes=2))
    pd.testing.assert_frame_equal(frame, held)
    unknown = frame.assign(colour="green")
    missing = frame.assign(colour=None)
    np.testing.assert_array_equal(classifier.predict_proba(unknown), classifier.predict_proba(missing))
    assert len(cross_val_score(classifier, x, labels, cv=2)) == 2


def test_bad_input_is_said(fitted: TabularLM) -> None:
    import pandas as pd

    x, y = rows()
    wrong: tuple[tuple[dict[str, Any], str], ...] = (
        ({"layout": "picture"}, "layout"),
        ({"warm_share": 2.0}, "warm_share must lie between 0 and 1"),
        ({"alpha": 1.0}, "alpha must lie between 0 and 1"),
        ({"steps": 0}, "steps must be at least 1"),
    )
    for settings_, message in wrong:
        with pytest.raises(InputError, match=message):
            MachineLearningLM(**settings_)
    with pytest.raises(InputError, match="so 10 are the most"):
        MachineLearningLM(**TINY).meta_fit(Tables(TablePrior(classes=(2, 11))), watch=QUIET)
    words = LM.build(["some words and no numbers"], "llama-tiny", vocab_size=300)
    with pytest.raises(InputError, match="choose layout='prompt'"):
        MachineLearningLM(**TINY).meta_fit(STREAM, watch=QUIET, lm=words)
    with pytest.raises(InputError, match="4 classes, the model knows 3"):
        fitted.predictor(*rows(12, 2, 4), 4)
    with pytest.raises(InputError, match="every column of the labelled rows is constant"):
        fitted.predictor(np.ones((12, 2)), y, 2)
    with pytest.raises(InputError, match="all of one class"):
        fitted.predictor(x, np.zeros(12, int), 2)
    with pytest.raises(InputError, match="labelled rows hold infinite"):
        fitted.predictor(np.where(x == x[0, 0], np.inf, x), y, 2)
    predictor = fitted.predictor(x, y, 2)
    with pytest.raises(InputError, match="queries must have 3 columns"):
        predictor(x[:, :2])
    with pytest.raises(InputError, match="queries hold infinite"):
        predictor(np.full((1, 3), np.inf))
    support = Examples(x, y, ("a", "b", "c"))  # no row shows the label c
    with pytest.raises(InputError, match="the class 'c' has no example in the support"):
        fitted.adapt(Task(support, support))

    classifier = TableClassifier(fitted)
    with pytest.raises(InputError, match="a label is missing"):
        classifier.fit(x, [None, *y[1:].tolist()])
    with pytest.raises(InputError, match="12 rows but 11 labels"):
        classifier.fit(x, y[1:])
    many = pd.DataFrame({"notes": [f"text {number}" for number in range(24)], "size": np.arange(24.0)})
    with pytest.raises(InputError, match="column 'notes' holds 24 different texts"):
        classifier.fit(many, np.arange(24) % 2)
    with pytest.raises(InputError, match="column 'size' holds something that is no number"):
        classifier.fit(many[["size"]], np.arange(24) % 2).predict(pd.DataFrame({"size": ["tall"]}))
    with pytest.raises(InputError, match="those of fit were"):
        classifier.fit(many[["size"]], np.arange(24) % 2).predict(many)
