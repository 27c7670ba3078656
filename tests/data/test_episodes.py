from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.episodes import CONTEXTS, Episodes
from palimpsest.data.tasks import Examples, Task, Tasks, split_classes


def pool(classes=8, each=12, contexts=None, x=None):
    y = np.repeat(np.arange(classes), each)
    x = np.arange(len(y), dtype=np.float32)[:, None] if x is None else x
    return Examples(x, y, tuple(f"class {label}" for label in range(classes)), contexts)


@settings(max_examples=30, deadline=None)
@given(
    way=st.integers(2, 5),
    shot=st.integers(1, 4),
    queries=st.integers(1, 5),
    nota=st.sampled_from([0.0, 0.15, 0.5]),
    seed=st.integers(0, 99),
)
def test_an_episode_holds_what_it_says(way, shot, queries, nota, seed):
    examples = pool()
    rows = Episodes(pool=examples, way=way, shot=shot, queries=queries, nota=nota, seed=seed).rows(0, 300)
    assert rows.support.shape == (300, way, shot)
    strangers = round(nota / (1 - nota) * way * queries)
    assert rows.query.shape == rows.labels.shape == (300, way * queries + strangers)
    for support, query, labels, classes in zip(rows.support, rows.query, rows.labels, rows.classes, strict=True):
        assert len(set(classes)) == way
        every = [*support.reshape(-1), *query]
        assert len(set(every)) == len(every)  # nothing comes twice, and no query is in the support
        assert (examples.y[support] == classes[:, None]).all()
        known = labels < way
        assert (examples.y[query[known]] == classes[labels[known]]).all()
        assert not np.isin(examples.y[query[~known]], classes).any()
        assert (~known).sum() == strangers


def test_the_share_of_strangers_is_of_all_queries():
    episodes = Episodes(pool=pool(), way=5, shot=1, queries=3, nota=0.5)
    labels = episodes.rows(0, 1).labels[0]
    assert (labels == 5).mean() == 0.5


def test_an_episode_depends_on_its_number_alone():
    episodes = Episodes(pool=pool(), seed=3, way=3, shot=2, queries=4)
    whole = episodes.rows(0, 600)
    part = Episodes(pool=pool(), seed=3, way=3, shot=2, queries=4).rows(250, 20)  # across two blocks
    for name in ("support", "query", "labels", "classes"):
        np.testing.assert_array_equal(getattr(whole, name)[250:270], getattr(part, name))
    other = Episodes(pool=pool(), seed=4, way=3, shot=2, queries=4).rows(0, 600)
    assert (other.support != whole.support).any()


def test_rows_and_classes_are_drawn_evenly():
    """30,000 draws of 96 rows: each comes 312.5 times on average, with a standard deviation of about 18."""
    episodes = Episodes(pool=pool(), way=5, shot=2, queries=1)
    rows = episodes.rows(0, 3000)
    for drawn, size in ((rows.support, 96), (rows.classes, 8)):
        counts = np.bincount(drawn.reshape(-1), minlength=size)
        mean = drawn.size / size
        assert abs(counts - mean).max() < 5 * np.sqrt(mean)
    first, second = rows.support[..., 0] % 12, rows.support[..., 1] % 12  # any pair of different rows alike
    pairs = np.bincount((first * 12 + second).reshape(-1), minlength=144).reshape(12, 12)
    assert (np.diag(pairs) == 0).all()
    off = pairs[~np.eye(12, dtype=bool)]
    assert abs(off - 15000 / 132).max() < 5 * np.sqrt(15000 / 132)


def test_a_task_carries_its_examples_and_names():
    episodes = Episodes(pool=pool(), way=3, shot=2, queries=2, nota=0.25)
    task = episodes.task(7).check()
    rows = episodes.rows(7, 1)
    assert task.way == 3
    assert task.support.y.tolist() == [0, 0, 1, 1, 2, 2]
    assert task.support.x[:, 0].tolist() == rows.support.reshape(-1).tolist()
    assert task.query.x[:, 0].tolist() == rows.query[0].tolist()
    assert task.query.y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert task.support.names == tuple(f"class {label}" for label in rows.classes[0])
    assert task.name == "episode 7"
    assert len(list(Episodes(pool=pool(), count=4, queries=2))) == 4


@pytest.mark.parametrize("kind", ["tensor", "texts"])
def test_any_kind_of_input(kind):
    x = torch.arange(96.0)[:, None] if kind == "tensor" else [f"text {row}" for row in range(96)]
    task = Episodes(pool=pool(x=x), way=2, shot=1, queries=1).task(0)
    rows = Episodes(pool=pool(), way=2, shot=1, queries=1).rows(0, 1)
    assert len(task.support.x) == 2
    expected = rows.support.reshape(-1).tolist()
    got = task.support.x[:, 0].tolist() if kind == "tensor" else [int(text.split()[1]) for text in task.support.x]
    assert got == expected


def test_the_same_episodes_over_features():
    episodes = Episodes(pool=pool(), way=2, shot=1, queries=1)
    doubled = episodes.over(episodes.pool.x * 2)
    np.testing.assert_array_equal(doubled.task(5).support.x, episodes.task(5).support.x * 2)


def test_queries_from_another_domain():
    near, far = pool(), pool(x=np.arange(1000, 1096, dtype=np.float32)[:, None])
    episodes = Episodes(pool=near, query_from=far, way=3, shot=12, queries=12)  # neither pool could serve both
    task = episodes.task(0)
    assert (task.support.x < 100).all()
    assert (task.query.x >= 1000).all()
    with pytest.raises(InputError, match="very classes"):
        Episodes(pool=near, query_from=pool(classes=7))


def in_contexts(classes=6, contexts=4, each=10):
    return pool(classes, contexts * each, contexts=np.tile(np.repeat(np.arange(contexts), each), classes))


@pytest.mark.parametrize("kind", CONTEXTS[1:])
def test_contexts(kind):
    examples = in_contexts()
    rows = Episodes(pool=examples, way=4, shot=3, queries=6, contexts=kind).rows(0, 50)
    for support, query, labels in zip(rows.support, rows.query, rows.labels, strict=True):
        every = [*support.reshape(-1), *query]
        assert len(set(every)) == len(every)
        own = examples.contexts[support]
        assert (own == own[:, :1]).all()  # one context a class
        assert len(set(own[:, 0])) == 4  # and each class another one
        seen = examples.contexts[query].reshape(4, 6)
        assert (labels.reshape(4, 6) == np.arange(4)[:, None]).all()
        if kind == "matched":
            assert (seen == own[:, :1]).all()
        elif kind == "adversarial":
            assert (seen != own[:, :1]).all()
        else:
            assert all(np.bincount(line, minlength=4).tolist().count(0) == 0 for line in seen)


def test_contexts_that_are_too_small():
    examples = in_contexts(each=3)
    with pytest.raises(InputError, match="at most 3 examples in one context; wanted 7"):
        Episodes(pool=examples, shot=1, queries=6, contexts="matched", way=4)
    alone = pool(contexts=np.zeros(96, dtype=np.int64))
    with pytest.raises(InputError, match="0 examples outside its context"):
        Episodes(pool=alone, shot=1, queries=2, contexts="adversarial", way=4)
    with pytest.raises(InputError, match="a context for each example"):
        Episodes(pool=pool(), contexts="shift")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"way": 9, "queries": 1}, "9 ways need 9 classes; the pool has 8"),
        ({"way": 8, "nota": 0.2, "queries": 1}, "one more for queries of none of them"),
        ({"way": 1}, "way must be at least 2"),
        ({"shot": 5, "queries": 8}, "the class 'class 0' has 12 examples; 5 shots and 8 queries need 13"),
        ({"nota": 1.0}, "nota is a share"),
        ({"way": 7, "queries": 3, "nota": 0.5}, "are 21 of each class left over; 'class 0' has 12 examples"),
        ({"contexts": "other"}, "contexts must be one of"),
    ],
)
def test_pools_that_cannot_fill_an_episode(changes, words):
    with pytest.raises(InputError, match=words):
        Episodes(pool=pool(), **changes)


def test_examples_are_checked():
    assert Examples.of(["a", "b", "c"], ["dog", "cat", "dog"]).y.tolist() == [1, 0, 1]
    with pytest.raises(InputError, match="3 examples but 2 labels"):
        Examples([1, 2, 3], np.array([0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="whole numbers"):
        Examples([1, 2], np.array([0.5, 1.0]), ("a", "b"))
    with pytest.raises(InputError, match="count from 0"):
        Examples([1, 2], np.array([0, -1]), ("a", "b"))
    for x in (np.array([[0.0, 1.0], [np.nan, 0.0]]), torch.tensor([[0.0], [torch.inf]])):
        with pytest.raises(InputError, match="example 1 has a value that is NaN or infinite"):
            Examples(x, np.array([0, 1]), ("a", "b"))


def test_tasks_are_checked():
    two = Examples([0.0, 1.0], np.array([0, 1]), ("a", "b"))
    with pytest.raises(InputError, match="one class: there is nothing to tell apart"):
        Task(Examples([0.0], np.array([0]), ("a",)), two).check()
    with pytest.raises(InputError, match="'b' has no example in the support"):
        Task(Examples([0.0, 1.0], np.array([0, 0]), ("a", "b")), two).check()
    with pytest.raises(InputError, match="example 1 of the query has the label 3"):
        Task(two, Examples([0.0, 1.0], np.array([0, 3]), ("a", "b"))).check()
    assert Task(two, Examples([0.0], np.array([2]), ("a", "b"))).check().way == 2  # none of them


def test_a_finite_stream_begins_anew():
    two = Examples([0.0, 1.0], np.array([0, 1]), ("a", "b"))
    stream = Tasks((Task(two, two, name="first"), Task(two, two, name="second")))
    assert [task.name for task in stream] == ["first", "second"]
    assert stream.task(5).name == "second"
    with pytest.raises(InputError, match="without tasks"):
        Tasks(())


def test_classes_are_split_apart():
    examples = pool(classes=25)
    train, valid, test = split_classes(examples, seed=1)
    assert valid is not None
    parts = [set(part.names) for part in (train, valid, test)]
    assert [len(part) for part in parts] == [16, 4, 5]
    assert set.union(*parts) == set(examples.names)
    for part in (train, valid, test):  # every example kept its class
        assert all(int(x) // 12 == int(part.names[y].split()[1]) for x, y in zip(part.x[:, 0], part.y, strict=True))
    assert split_classes(examples, seed=1)[2].names == test.names
    assert split_classes(examples, seed=2)[2].names != test.names
    with pytest.raises(InputError, match="leave 1 for valid"):
        split_classes(pool(classes=6))
    assert split_classes(pool(classes=6), valid=0)[1] is None


def test_the_hash_tells_examples_apart():
    one = pool()
    assert pool().sha256 == one.sha256
    others = [pool(x=one.x + 1), pool(classes=7), pool(contexts=np.zeros(96, dtype=np.int64)), pool(x=["a"] * 96)]
    assert len({one.sha256, *(other.sha256 for other in others)}) == 5
