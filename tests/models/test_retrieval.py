from __future__ import annotations

import builtins

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.models.retrieval import NONE, DenseIndex, overlapping


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(1, 30), k=st.integers(1, 6))
def test_it_finds_what_sorting_all_products_finds(seed, size, k):
    rng = np.random.default_rng(seed)
    vectors, queries = (rng.normal(size=(n, 5)).astype(np.float32) for n in (size, 4))
    barred = [rng.choice(size, rng.integers(0, size), replace=False) for _ in queries]
    found = DenseIndex(vectors).search(queries, k, barred)
    products = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for line, out in enumerate(barred):
        wanted = [row for row in np.argsort(-products[line], kind="stable") if row not in out][:k]
        assert found.rows[line].tolist() == wanted + [NONE] * (k - len(wanted))
        np.testing.assert_allclose(found.scores[line, : len(wanted)], products[line, wanted], rtol=1e-12)
        assert (found.scores[line, len(wanted) :] == -np.inf).all()


def test_company_changes_no_answer():
    rng = np.random.default_rng(1)
    index = DenseIndex(rng.normal(size=(50, 7)))
    queries = rng.normal(size=(40, 7))
    together = index.search(queries, 3)
    for line, query in enumerate(queries):
        alone = index.search(query[None], 3)
        np.testing.assert_array_equal(alone.rows[0], together.rows[line])
        np.testing.assert_array_equal(alone.scores[0], together.scores[line])


def test_a_row_taken_out_is_gone_and_the_disk_keeps_the_rest(tmp_path):
    vectors = np.eye(4, dtype=np.float32)
    before = vectors.copy()
    index = DenseIndex(vectors)
    smaller = index.without([1])
    assert (len(index), len(smaller)) == (4, 3)
    assert smaller.search(vectors[2:3], 1).rows.tolist() == [[1]]
    assert smaller.search(vectors[1:2], 1).scores.tolist() == [[0.0]]
    smaller.save(tmp_path / "index.safetensors")
    np.testing.assert_array_equal(DenseIndex.load(tmp_path / "index.safetensors").vectors, smaller.vectors)
    np.testing.assert_array_equal(vectors, before)
    (tmp_path / "other").write_text("no index")
    for name in ("other", "missing"):
        with pytest.raises(InputError, match="is not an index"):
            DenseIndex.load(tmp_path / name)


def test_bad_input(monkeypatch):
    index = DenseIndex(np.eye(3))
    for bad, words in [
        (lambda: DenseIndex(np.empty((0, 3))), "nothing to retrieve"),
        (lambda: DenseIndex(np.array([[1.0], [np.nan]])), "row 1 has a number that is NaN"),
        (lambda: DenseIndex(np.zeros(3)), "wanted vectors"),
        (lambda: index.search(np.ones((1, 2)), 1), "2 dimensions, the index has 3"),
        (lambda: index.search(np.full((1, 3), np.inf), 1), "NaN or infinite"),
        (lambda: index.search(np.eye(3), 0), "k must be at least 1"),
        (lambda: index.search(np.eye(3), 1, [[0]]), "3 queries but 1 lists"),
        (lambda: overlapping(["a"], ["a"], 0), "words must be at least 1"),
    ]:
        with pytest.raises(InputError, match=words):
            bad()
    assert index.search(np.empty((0, 3)), 2).rows.shape == (0, 2)
    usual = builtins.__import__

    def without_faiss(name, *rest, **named):
        if name == "faiss":
            raise ImportError(name)
        return usual(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(MissingExtra, match="faiss-cpu"):
        DenseIndex(np.eye(3)).search(np.eye(3), 1)


def test_texts_that_share_a_run_of_words_overlap():
    labelled = ["The cat sat on the mat, and then it slept.", "Two words"]
    texts = ["They say: THE CAT sat on the mat!", "a cat sat on one mat", "two words.", "two words more", ""]
    assert overlapping(texts, labelled, 5).tolist() == [True, False, True, False, False]
