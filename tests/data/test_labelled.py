from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from PIL import Image

from palimpsest.core.errors import InputError
from palimpsest.data.labelled import read, rotated
from palimpsest.data.pictures import as_images
from palimpsest.data.tasks import Examples


def labels(classes=10, each=3):
    return np.repeat(np.arange(classes), each)


def pictures(classes=10, each=3, shape=(28, 28)):
    return np.random.default_rng(0).integers(0, 255, (classes * each, *shape)).astype(np.uint8)


def test_npz_with_a_list_of_test_classes(tmp_path):
    y = np.array([f"c{label}" for label in labels()])
    lists = {"train_classes": [f"c{n}" for n in range(6)], "test_classes": [f"c{n}" for n in range(6, 10)]}
    np.savez(tmp_path / "a.npz", images=pictures(), labels=y, **lists)
    found = read(tmp_path / "a.npz")
    assert (found.kind, found.given) == ("images", True)
    assert found.train.x.shape == (18, 1, 28, 28)
    assert found.test.names == ("c6", "c7", "c8", "c9")
    np.testing.assert_array_equal(found.test.x[:, 0], pictures()[18:])
    assert found.describe()["test"] == {"rows": 12, "classes": 4, "sha256": found.test.sha256}


@pytest.mark.parametrize("form", ["x_train", "train_images", "classes first"])
def test_npz_with_an_array_for_each_part(tmp_path, form):
    train, test = pictures(6), pictures(4)
    arrays = {
        "x_train": {"x_train": train, "y_train": labels(6), "x_test": test, "y_test": labels(4) + 6},
        "train_images": {
            "train_images": train,
            "train_labels": labels(6),
            "test_images": test,
            "test_labels": labels(4) + 6,
        },
        "classes first": {"train": train.reshape(6, 3, 28, 28), "test": test.reshape(4, 3, 28, 28)},
    }[form]
    np.savez(tmp_path / "a.npz", **arrays)
    if form == "classes first":  # both count their classes from 0: told apart by name
        with pytest.raises(InputError, match="is for training and for testing"):
            read(tmp_path / "a.npz")
        return
    found = read(tmp_path / "a.npz")
    assert (found.train.way, found.test.way) == (6, 4)
    np.testing.assert_array_equal(found.train.x[:, 0], train)


def test_npz_of_features_is_split_by_us(tmp_path):
    x = np.random.default_rng(0).normal(size=(30, 5)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x, y=labels())
    found = read(tmp_path / "a.npz", seed=1)
    assert (found.kind, found.given) == ("features", False)
    parts = [found.train, found.valid, found.test]
    assert sum(part.way for part in parts) == 10
    assert not set(found.train.names) & set(found.test.names)
    assert read(tmp_path / "a.npz", seed=1).test.names == found.test.names


def test_pictures_come_in_one_form():
    colour = pictures(shape=(20, 20, 3))
    assert as_images(colour).shape == (30, 3, 20, 20)
    assert as_images(colour.transpose(0, 3, 1, 2)).shape == (30, 3, 20, 20)
    assert as_images(pictures() / 255.0).dtype == np.uint8
    np.testing.assert_array_equal(as_images(pictures() / 255.0)[:, 0], pictures())
    assert as_images(pictures() > 100).max() == 255
    assert as_images(pictures(shape=(105, 105))).shape == (30, 1, 28, 28)
    assert as_images(pictures(shape=(100, 120, 3)), 32).shape == (30, 3, 32, 32)
    with pytest.raises(InputError, match="numbers from -1"):
        as_images(pictures() - 1.0)
    with pytest.raises(InputError, match="height x width"):
        as_images(pictures(shape=(28, 28, 7)))


def test_each_quarter_turn_is_a_class():
    examples = Examples(np.arange(2 * 9, dtype=np.uint8).reshape(2, 1, 3, 3), np.array([0, 1]), ("a", "b"))
    turned = rotated(examples)
    assert turned.way == 8
    assert turned.names[2] == "a, turned 90"
    np.testing.assert_array_equal(turned.x[turned.y == 2][0, 0], np.rot90(examples.x[0, 0]))
    np.testing.assert_array_equal(turned.x[:2], examples.x)


def write(folder, names, colour=False):
    rng = np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            pixels = rng.integers(0, 255, (30, 30, 3) if colour else (30, 30)).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")


def test_a_folder_with_parts(tmp_path):
    write(tmp_path / "images_background", ["Greek/alpha", "Greek/beta"])  # Omniglot's own folders
    write(tmp_path / "images_evaluation", ["Tengwar/alpha", "Tengwar/beta"])
    found = read(tmp_path)
    assert found.train.names == ("Greek/alpha", "Greek/beta")
    assert found.test.x.shape == (4, 1, 28, 28)


def test_a_folder_with_lists(tmp_path):
    write(tmp_path, list("abcde"), colour=True)
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "test.txt").write_text("d\ne\n")
    found = read(tmp_path)
    assert found.train.names == ("a", "b", "c")
    assert found.test.x.shape == (4, 3, 30, 30)
    assert read(tmp_path, test_classes=["a", "b"]).train.names == ("c", "d", "e")
    with pytest.raises(InputError, match="no example of the class 'z'"):
        read(tmp_path, test_classes=["a", "z"])


def test_what_a_table_lacks_is_filled_from_the_training_classes_alone(tmp_path):
    lines = [f"{10 * (n % 4)},{n},k{n % 4}" for n in range(39)] + [",39,k3"]
    (tmp_path / "a.csv").write_text("\n".join(["size,place,class", *lines]))
    (tmp_path / "b.csv").write_text(
        "\n".join(["size,place,class", *(line.replace("30,", "3000,", 1) for line in lines)])
    )
    named = {"train_classes": ["k0", "k1"], "test_classes": ["k2", "k3"]}
    for name in ("a", "b"):
        found = read(tmp_path / f"{name}.csv", **named)
        filled = found.test.x[found.test.y == found.test.names.index("k3")][-1, 0]
        assert filled == pytest.approx(found.train.x[:, 0].mean())
        assert found.train.x.dtype == np.float32


def test_a_folder_with_tables_of_files(tmp_path):
    write(tmp_path, ["images"])
    names = ["0.png", "1.png"]
    for part, classes in (("train", "ab"), ("test", "cd")):
        lines = [f"{name},{label}" for name, label in zip(names, classes, strict=True)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["filename,label", *lines]))
    found = read(tmp_path)
    assert (found.train.names, found.test.names) == (("a", "b"), ("c", "d"))
    (tmp_path / "test.csv").write_text("filename,label\n9.png,c\n")
    with pytest.raises(InputError, match=r"test.csv:2: no such image: 9.png"):
        read(tmp_path)


def test_texts_relations_and_tables(tmp_path):
    rows = [{"text": f"text {n}", "intent": f"i{n % 8}", "split": "train" if n < 20 else "test"} for n in range(40)]
    path = tmp_path / "a.jsonl.gz"
    with gzip.open(path, "wt") as handle:
        handle.writelines(json.dumps(row) + "\n" for row in rows)
    found = read(path, seed=0)
    assert (found.kind, found.given) == ("texts", False)  # its column parts the rows of the classes, not the classes
    assert found.train.x[0].startswith("text")

    fewrel = {
        f"P{n}": [{"tokens": ["a", "b", "c"], "h": ["a", "", [[0]]], "t": ["c", "", [[2]]]}] * 2 for n in range(8)
    }
    (tmp_path / "b.json").write_text(json.dumps(fewrel))
    found = read(tmp_path / "b.json")
    assert found.kind == "relations"
    assert found.train.x[0].mentions == ("a", "c")

    table = ["size,colour,class"] + [f"{n},{'red' if n % 2 else 'blue'},k{n % 8}" for n in range(40)]
    (tmp_path / "c.csv").write_text("\n".join(table))
    found = read(tmp_path / "c.csv")
    assert found.kind == "features"
    assert found.train.x.shape[1] == 3  # size, blue, red
    np.testing.assert_allclose(found.train.x.mean(0), 0, atol=1e-5)  # by the training classes


def test_small_classes_are_named_and_left_out(tmp_path):
    y = np.r_[labels(9, 5), [99, 99]]
    np.savez(tmp_path / "a.npz", x=np.random.default_rng(0).normal(size=(47, 3)), y=y)
    assert read(tmp_path / "a.npz", at_least=5).dropped == ("99",)
    with pytest.raises(InputError, match="0 of 10 classes to train on have the 6 examples"):
        read(tmp_path / "a.npz", at_least=6)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"z": np.zeros(3)}, r"it holds z \(3,\); wanted inputs"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2)}, "wanted one label an input"),
        ({"x": np.zeros((3, 2))}, "wanted labels"),
        ({"x": np.full((4, 2), np.nan), "y": np.array([0, 0, 1, 1])}, "NaN or infinite"),
    ],
)
def test_arrays_that_cannot_be_used(tmp_path, arrays, words):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(InputError, match=words):
        read(tmp_path / "a.npz")


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read(tmp_path / "none.npz")
    (tmp_path / "a.npz").write_bytes(b"nothing")
    with pytest.raises(InputError, match="not a readable"):
        read(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x=np.array([{"a": 1}], dtype=object), y=np.array([0]))
    with pytest.raises(InputError, match="plain arrays"):  # a pickle inside is never opened
        read(tmp_path / "b.npz")
    (tmp_path / "c.csv").write_text("text,label\nhello,\n")
    with pytest.raises(InputError, match=r"c.csv:2: 'label' is empty"):
        read(tmp_path / "c.csv")
    (tmp_path / "d.csv").write_text("text,kind\nhello,a\n")
    with pytest.raises(InputError, match="say which is the label"):
        read(tmp_path / "d.csv")
