from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from palimpsest.core.errors import InputError
from palimpsest.data.records import content_hashes, sha256
from palimpsest.data.request import ForgetRequest


def texts(*names: str) -> Dataset:
    return Dataset.from_dict({"text": list(names)})


def numbered(prefix: str, count: int) -> Dataset:
    return texts(*(f"{prefix} {i}" for i in range(count)))


def people(count: int, rows: int = 3) -> Dataset:
    return Dataset.from_dict(
        {
            "text": [f"row {row} of person {person}" for person in range(count) for row in range(rows)],
            "person": [f"person {person}" for person in range(count) for _ in range(rows)],
        }
    )


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (
            {"forget": texts("a", "b"), "retain": texts("c", "b", "a")},
            r"forget and retain overlap: 2 of 3 retain rows also in forget, first row 2 \('b'\); a row cannot",
        ),
        (
            {"forget": texts("a  b"), "holdout": texts("a b", "c")},
            r"forget and holdout overlap: 1 of 2 holdout rows also in forget, first row 1 \('a b'\); holdout rows must",
        ),
        ({"forget": texts("a"), "utility": texts("a")}, "forget and utility overlap"),
        ({"forget": texts("a"), "retain": texts("b"), "holdout": texts("b")}, "retain and holdout overlap"),
        ({"forget": texts("a"), "utility": texts("b"), "holdout": texts("b")}, "utility and holdout overlap"),
        ({"forget": texts("a"), "train": texts("a", "b"), "holdout": texts("b")}, "train and holdout overlap"),
        ({"forget": texts("a"), "retain": texts("b"), "utility": texts("b")}, "retain and utility overlap"),
        ({"forget": texts()}, "the forget set is empty"),
        ({"forget": texts("a"), "retain": texts()}, "the retain set is empty"),
        ({"forget": Dataset.from_dict({"label": [1]})}, "wanted 'text'"),
    ],
)
def test_sets_that_cannot_be_used_say_why(sets: dict, message: str):
    with pytest.raises(InputError, match=message):
        ForgetRequest(**sets)


def test_the_duplicate_is_shown_short():
    with pytest.raises(InputError) as error:
        ForgetRequest(texts("x" * 500), retain=texts("x" * 500))
    assert "xxx...'" in str(error.value)
    assert len(str(error.value)) < 250


def test_train_may_share_rows_with_all_but_holdout():
    request = ForgetRequest(texts("a"), texts("b"), texts("c"), texts("d"), texts("a", "b", "c"))
    assert request.trained_on() is request.train


def test_describe_is_the_data_section_of_the_evidence():
    request = ForgetRequest(texts("a", "b"), holdout=texts("c"))
    assert request.describe() == {
        "forget": {"rows": 2, "sha256": sha256(request.forget)},
        "holdout": {"rows": 1, "sha256": sha256(texts("c"))},
    }
    assert json.dumps(request.describe())


def write(path: Path, prefix: str, count: int) -> Path:
    path.write_text("".join(json.dumps({"text": f"{prefix} {i}"}) + "\n" for i in range(count)))
    return path


def test_read_splits_a_seeded_quarter_of_retain_off_as_utility(tmp_path: Path):
    forget, retain = write(tmp_path / "leak.v2.jsonl", "f", 3), write(tmp_path / "retain.jsonl", "r", 100)
    request = ForgetRequest.read(forget, retain)
    assert request.name == "leak"
    assert request.retain is not None
    assert request.utility is not None
    assert (len(request.retain), len(request.utility)) == (75, 25)
    assert sorted([*request.retain["text"], *request.utility["text"]]) == sorted(numbered("r", 100)["text"])
    assert ForgetRequest.read(forget, retain).describe() == request.describe()
    assert ForgetRequest.read(forget, retain, seed=1).describe() != request.describe()


@pytest.mark.parametrize(("rows", "utility"), [(3, None), (4, 2), (30, 15), (40, 16), (64, 16), (68, 17)])
def test_the_size_of_utility(rows: int, utility: int | None):
    request = ForgetRequest.read(texts("f"), numbered("r", rows))
    assert (None if request.utility is None else len(request.utility)) == utility


def test_a_given_utility_is_left_alone():
    request = ForgetRequest.read(texts("f"), numbered("r", 40), numbered("u", 2), name="mine")
    assert request.utility is not None
    assert request.retain is not None
    assert (len(request.retain), len(request.utility), request.name) == (40, 2, "mine")


def test_equal_rows_and_people_stay_on_one_side_of_the_split():
    request = ForgetRequest.read(texts("f"), texts(*["twice", " twice "] * 4, *(f"r {i}" for i in range(9))))
    assert request.utility is not None  # ForgetRequest would have refused an overlap
    request = ForgetRequest.read(texts("f"), people(80))
    assert request.retain is not None
    assert request.utility is not None
    assert set(request.retain["person"]).isdisjoint(request.utility["person"])


def test_without_forget_leaves_what_a_reference_is_trained_on():
    request = ForgetRequest(texts("a", "b"), retain=texts("c"), utility=texts("d"), holdout=texts("e"))
    assert request.without_forget()["text"] == ["c", "d"]
    assert request.without_forget(texts("x", " b", "a"))["text"] == ["x"]
    known = dataclasses.replace(request, train=texts("a", "z", "b"))
    assert known.without_forget()["text"] == ["z"]


def test_without_forget_refuses_what_would_change_nothing_or_leave_nothing():
    request = ForgetRequest(texts("a", "b"))
    with pytest.raises(InputError, match="none of the 2 forget rows is among the 1 training rows"):
        request.without_forget(texts("x"))
    with pytest.raises(InputError, match=r"nothing is left to train a reference on \(give --retain\)"):
        request.without_forget()


@given(count=st.integers(2, 30), share=st.floats(0.01, 0.99), seed=st.integers(0, 3))
@settings(max_examples=30, deadline=None)
def test_a_reserved_holdout_parts_the_forget_people(count: int, share: float, seed: int):
    request = ForgetRequest(people(count)).reserve_holdout(share, seed=seed)
    assert request.holdout is not None
    assert sorted([*request.forget["text"], *request.holdout["text"]]) == sorted(people(count)["text"])
    assert set(request.forget["person"]).isdisjoint(request.holdout["person"])
    assert len(set(request.holdout["person"])) == min(max(round(share * count), 1), count - 1)
    again = ForgetRequest(people(count)).reserve_holdout(share, seed=seed)
    assert again.describe() == request.describe()


def test_a_holdout_is_only_reserved_where_it_is_right():
    with pytest.raises(InputError, match="the model has been trained on these rows"):
        ForgetRequest(texts("a", "b"), train=texts("a", "b", "c")).reserve_holdout()
    with pytest.raises(InputError, match="it has a holdout set"):
        ForgetRequest(texts("a", "b"), holdout=texts("c")).reserve_holdout()
    with pytest.raises(InputError, match="at least 2 different forget rows"):
        ForgetRequest(texts("a", " a")).reserve_holdout()
    for share in (0, 1, -0.5):
        with pytest.raises(InputError, match="share must lie between 0 and 1"):
            ForgetRequest(texts("a", "b")).reserve_holdout(share)


@given(count=st.integers(1, 25), k=st.integers(1, 8), seed=st.integers(0, 3))
@settings(max_examples=40, deadline=None)
def test_folds(count: int, k: int, seed: int):
    request = ForgetRequest(people(count, rows=2), retain=texts("r"))
    if k > count:
        with pytest.raises(InputError, match=f"{k} folds of {count} different forget records; wanted 1 to {count}"):
            request.folds(k, nested=True)
        return
    whole = set(content_hashes(request.forget))
    nested = request.folds(k, nested=True, seed=seed)
    disjoint = request.folds(k, nested=False, seed=seed)
    assert [fold.name for fold in nested] == [f"request-{i + 1}of{k}" for i in range(k)]
    assert sorted(nested[-1].forget["text"]) == sorted(request.forget["text"])
    for smaller, larger in itertools.pairwise(nested):
        assert set(content_hashes(smaller.forget)) < set(content_hashes(larger.forget))
    pieces = [set(content_hashes(fold.forget)) for fold in disjoint]
    assert sum(map(len, pieces)) == len(whole)
    assert set().union(*pieces) == whole
    assert max(map(len, pieces)) - min(map(len, pieces)) <= 2
    for fold in disjoint:
        assert fold.retain is request.retain
        assert all(list(fold.forget["person"]).count(person) == 2 for person in fold.forget["person"])


def test_folds_by_another_column():
    table = texts(*"abcdef").add_column("author", [1, 1, 2, 2, 3, 3])
    for fold in ForgetRequest(table).folds(3, nested=False, by="author"):
        assert len(set(fold.forget["author"])) == 1
        assert len(fold.forget) == 2


def test_real_books(dev_data: Path):
    books = dev_data / "books"
    request = ForgetRequest.read(
        books / "forget_time_machine.txt.gz",
        books / "retain_sherlock_holmes.txt.gz",
        holdout=books / "same_author_war_of_the_worlds.txt.gz",
    )
    assert request.name == "forget_time_machine"
    assert request.utility is not None
    assert request.retain is not None
    assert len(request.without_forget()) == len(request.retain) + len(request.utility)
