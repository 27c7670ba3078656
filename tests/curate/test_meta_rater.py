import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tests.curate.conftest import rows_of, write_lines

from palimpsest.core.errors import InputError
from palimpsest.curate import MetaRater, meta_rater, pool, proxies, run

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "more",
    "dog",
    "near",
    "that",
    "old",
    "red",
    "barn",
]


def documents(count, seed=0):
    """Half are sentences, half noise; one score tells them apart, one says the opposite, two say nothing."""
    rng = np.random.default_rng(seed)
    rows = []
    for number in range(count):
        good = bool(rng.random() < 0.5)
        text = " ".join(rng.choice(WORDS, 8)) if good else "".join(rng.choice(list("qxzjvk 0123456789"), 30))
        quality = good + 0.2 * rng.normal()
        noise = {"score_length": float(len(text) % 7), "score_noise": rng.normal()}
        rows.append({"n": number, "text": text, "score_good": quality, "score_bad": -quality, **noise})
    return rows


@pytest.fixture
def validation(tmp_path):
    rng = np.random.default_rng(9)
    write_lines(tmp_path / "validation.jsonl", [{"text": " ".join(rng.choice(WORDS, 8))} for _ in range(40)])
    return str(tmp_path / "validation.jsonl")


def small(validation, **changes):
    sizes = {"proxies": 20, "proxy_steps": 24, "sample": 200, "length": 16, "candidates": 2000, "top": 20}
    return MetaRater(validation=validation, **{**sizes, **changes})


def test_the_score_that_tells_good_from_bad_is_found(validation, tmp_path):
    write_lines(tmp_path / "a.jsonl", documents(240))
    method = small(validation)
    result = run(method, tmp_path / "a.jsonl", tmp_path / "out", workers=1, progress="")
    weights = {name: float(weight) for name, weight in result.notes["tables"][0]["rows"]}
    assert max(weights, key=weights.__getitem__) == "score_good"
    assert sum(weights.values()) == pytest.approx(1, abs=2e-3)
    assert weights["score_bad"] < 0.25 < weights["score_good"]
    found = rows_of(tmp_path / "out")
    kept = [row for row in found if row["keep"]]
    assert np.mean([row["text"].split()[0] in WORDS for row in kept]) > 0.95
    size = sum(len(row["text"]) for row in found)
    assert sum(len(row["text"]) for row in kept) / size == pytest.approx(0.25, abs=0.05)
    assert all(row["keep"] == (row["score_meta_rater"] >= result.notes["numbers"]["line"]) for row in found)


def test_shards_and_order_do_not_change_what_is_learned(validation):
    daft = pool.require_daft()
    rows, method = documents(120), small(validation, sample=80, proxies=16, proxy_steps=12)
    whole = method.gather([method.survey(daft.from_pylist(rows)).to_arrow()])
    parts = [method.survey(daft.from_pylist(part)).to_arrow() for part in (rows[70:], rows[:30], rows[30:70])]
    assert method.gather(parts).equals(whole, check_metadata=True)
    learned = json.loads(whole.schema.metadata[b"learned"])
    assert np.array(learned["runs"]).shape == (16, 5)
    assert learned["runs"][0][:4] == [1, 0, 0, 0]


def test_signs_and_constant_scores(validation):
    daft = pool.require_daft()
    rows = [{**row, "score_same": 1.0} for row in documents(200)]
    for row in rows:
        del row["score_good"]
    method = small(validation, lower_is_better="score_bad")
    facts = method.gather([method.survey(daft.from_pylist(rows)).to_arrow()])
    weights = dict(zip(facts["score"].to_pylist(), facts["weight"].to_pylist(), strict=True))
    assert weights["score_same"] == 0
    assert max(weights, key=weights.__getitem__) == "score_bad"
    assert "score_same is constant" in method.notes(facts, [], {})["warnings"][0]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=5, max_size=60))
def test_normalising_keeps_the_order_and_ties(values):
    raw = np.array(values, float)[:, None]
    knots = np.quantile(raw, np.linspace(0, 1, 33), axis=0).T
    found = meta_rater.normalised(raw, knots)[:, 0]
    assert np.isfinite(found).all()
    order = np.argsort(values, kind="stable")
    gaps = np.diff(raw[order, 0]) > 0
    assert (np.diff(found[order])[gaps] > 0).all()
    assert np.allclose(np.diff(found[order])[~gaps], 0)


def test_a_continuous_score_becomes_standard_normal():
    raw = np.random.default_rng(0).exponential(size=(5000, 1))
    found = meta_rater.normalised(raw, np.quantile(raw, np.linspace(0, 1, 257), axis=0).T)[:, 0]
    assert stats.kstest(found, "norm").statistic < 0.01


def test_drawn_weights():
    found = meta_rater.draw_weights(5, 40, np.random.default_rng(0))
    assert found.shape == (40, 5)
    assert np.allclose(found.sum(1), 1)
    assert (found >= 0).all()
    assert np.array_equal(found[:5], np.eye(5))
    assert np.allclose(found[5], 0.2)


def test_the_top_share_is_counted_in_size_not_in_documents():
    score, size = np.array([3.0, 1.0, 2.0, 0.0]), np.array([10, 50, 30, 10])
    assert meta_rater.top_share(score, size, 0.4).tolist() == [True, False, True, False]
    assert meta_rater.top_share(score, size, 0.39).tolist() == [True, False, False, False]
    assert meta_rater.top_share(score, size, 0.01).tolist() == [True, False, False, False]


def test_the_search_finds_a_known_optimum():
    rng = np.random.default_rng(0)
    weights = meta_rater.draw_weights(4, 128, rng)
    best = np.array([0.6, 0.3, 0.1, 0.0])
    loss = ((weights - best) ** 2).sum(1) + 0.001 * rng.normal(size=128)
    found = meta_rater.search(weights, loss, np.ones(4, bool), 20_000, 100, rng)
    assert found.spearman > 0.95
    assert np.abs(found.weights - best).max() < 0.1
    shuffled = meta_rater.search(weights, rng.permutation(loss), np.ones(4, bool), 20_000, 100, rng)
    assert shuffled.spearman < 0.5


def test_a_proxys_loss_is_the_models_cross_entropy():
    torch.manual_seed(0)
    model = proxies.TinyGPT(vocabulary=20, length=7, width=8, layers=1)
    ids = torch.tensor([[1, 5, 6, 7, 0, 0, 0], [1, 9, 0, 0, 0, 0, 0]])
    found = model(ids)
    assert found[:, 1].tolist() == [3, 1]
    longer = model(
        torch.cat([ids[:, :4], torch.tensor([[3, 3, 3], [3, 3, 3]])], 1)
    )  # what follows changes nothing before
    assert longer[0, 0] > found[0, 0]
    alone = model(ids[:1, :4])
    assert torch.allclose(alone[0], found[0], atol=1e-5)


def test_bad_input(validation, tmp_path):
    daft = pool.require_daft()
    rows = documents(40)

    def survey(table, **changes):
        return small(validation, **changes).survey(daft.from_pylist(table)).to_arrow()

    with pytest.raises(InputError, match=r"found 0 scores \(none\); wanted at least two"):
        survey([{"text": "x"}])
    with pytest.raises(InputError, match="no column 'quality' to rank by; found 'n', 'text'"):
        survey(rows, scores="quality,n")
    with pytest.raises(InputError, match="the column 'text' holds String; wanted numbers"):
        survey(rows, scores="n,text")
    with pytest.raises(InputError, match=r"the score 'score_bad' is missing in 1 rows; the first: \{'text': "):
        survey([{**row, "score_bad": None if row["n"] == 7 else row["score_bad"]} for row in rows])
    part = survey(rows)
    with pytest.raises(InputError, match="wanted validation"):
        small("").gather([part])
    with pytest.raises(InputError, match="every score is constant"):
        small(validation).gather([survey([{"text": "x", "score_a": 1, "score_b": 2}] * 20)])
    same = survey([{**row, "text": "the same text in every row"} for row in rows])
    with pytest.raises(InputError, match="raise proxy_steps"):
        small(validation, proxies=16, proxy_steps=8).gather([same])
    with pytest.raises(InputError, match="share must lie between 0 and 1"):
        MetaRater(share=1)
    with pytest.raises(InputError, match="proxies must be at least 16"):
        MetaRater(proxies=3)
