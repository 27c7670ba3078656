import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.curate import student
from palimpsest.curate.labels import Schema
from palimpsest.curate.student import Course, Student, train
from palimpsest.models.tokenizers import train_bpe

SCHEMA = Schema.from_json(
    {"fields": {"kind": {"classes": {"bird": "", "fish": ""}}, "worth": {"scale": {"1": "", "2": "", "3": ""}}}}
)
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QUICK = Course(epochs=10, lr=3e-3, batch=16, length=24, pooling="mean")


def rows(count=96, seed=0):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        bird, worth = bool(rng.random() < 0.5), int(rng.integers(1, 4))
        words = ["the owl flew" if bird else "the cod swam", *["truly"] * worth, *["x"] * int(rng.integers(3))]
        found.append({"text": " ".join(words), "kind": "bird" if bird else "fish", "worth": worth})
    return found


def encoder(folder, kind):
    import transformers

    torch.manual_seed(0)
    tokenizer = train_bpe([row["text"] for row in rows()] * 3, vocab_size=300, max_length=64)
    config, model = {
        "bert": (transformers.BertConfig, transformers.BertModel),
        "modernbert": (transformers.ModernBertConfig, transformers.ModernBertModel),
        "roberta": (transformers.RobertaConfig, transformers.RobertaModel),
        "distilbert": (transformers.DistilBertConfig, transformers.DistilBertModel),
    }[kind]
    size = SMALL
    if kind == "distilbert":
        size = {"dim": 32, "hidden_dim": 64, "n_layers": 2, "n_heads": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model(config(vocab_size=len(tokenizer), max_position_embeddings=64, **ids, **size)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["bert", "modernbert", "roberta", "distilbert"])
@pytest.mark.parametrize("pooling", student.POOLINGS)
def test_every_encoder_learns(tmp_path, kind, pooling):
    course = Course(epochs=10, lr=3e-3, batch=16, length=24, pooling=pooling)
    taught = train(rows(), SCHEMA, encoder(tmp_path / kind, kind), course)
    fresh = rows(60, seed=1)
    found = taught.label([row["text"] for row in fresh])
    kinds = np.array(["bird", "fish"])[found["kind"].argmax(1)]
    assert np.mean(kinds == [row["kind"] for row in fresh]) > 0.95
    assert np.corrcoef(found["worth"], [row["worth"] for row in fresh])[0, 1] > 0.8
    assert np.allclose(found["kind"].sum(1), 1)


def test_the_same_seed_gives_the_same_student_and_it_survives_the_disk(tmp_path):
    path, course = encoder(tmp_path / "bert", "bert"), Course(epochs=1, batch=16, length=24)
    first, second = (train(rows(40), SCHEMA, path, course) for _ in range(2))
    texts = [row["text"] for row in rows(20, seed=2)]
    there = first.label(texts)
    for found in (second.label(texts), Student.unpack(first.pack()).label(texts)):
        for name, values in there.items():
            np.testing.assert_array_equal(found[name], values)
    assert first.pack() == second.pack()
    other = train(rows(40), SCHEMA, path, Course(epochs=1, batch=16, length=24, seed=1))
    assert not np.array_equal(other.label(texts)["worth"], there["worth"])


def test_a_killed_course_goes_on(tmp_path, monkeypatch):
    path, course = encoder(tmp_path / "bert", "bert"), Course(epochs=3, batch=16, length=24)
    whole = train(rows(40), SCHEMA, path, course)
    real, done = student._loss, []

    def killed(*arguments):
        done.append(1)
        if len(done) == 6:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(student, "_EVERY", 2)
    with monkeypatch.context() as inside:
        inside.setattr(student, "_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            train(rows(40), SCHEMA, path, course, checkpoint=tmp_path / "unfinished")
    done.clear()
    monkeypatch.setattr(student, "_loss", lambda *arguments: (done.append(1), real(*arguments))[1])
    again = train(rows(40), SCHEMA, path, course, checkpoint=tmp_path / "unfinished")
    assert len(done) == 9 - 4
    assert again.pack() == whole.pack()


def test_neither_batch_nor_company_changes_a_label(tmp_path):
    taught = train(rows(40), SCHEMA, encoder(tmp_path / "bert", "bert"), QUICK)
    texts = ["the owl flew", "", "the cod swam truly truly truly x x", "truly " * 40]
    together = taught.label(texts, ["", "", "Birds", ""])
    for place, text in enumerate(texts):
        alone = taught.label([text], ["Birds" if place == 2 else ""], batch=1)
        np.testing.assert_allclose(alone["kind"][0], together["kind"][place], atol=1e-5)
        np.testing.assert_allclose(alone["worth"][0], together["worth"][place], atol=1e-5)
    assert together["truncated"].tolist() == [False, False, False, True]
    assert taught.label([])["kind"].shape == (0, 2)
    with_title = taught.label(["the owl flew"], ["Fish"])
    assert not np.allclose(with_title["kind"], together["kind"][:1], atol=1e-4)


def test_the_loss_by_hand():
    outputs = torch.tensor([[2.0, 0.0, 1.5], [0.0, 0.0, 3.0]])
    targets = torch.tensor([[0.0, 1.0], [1.0, 3.0]])
    entropy = (np.log(1 + np.exp(-2.0)) + np.log(2.0)) / 2
    assert float(student._loss(outputs, targets, SCHEMA)) == pytest.approx(entropy + 0.25 / 2, abs=1e-6)
    assert student._targets([{"kind": "fish", "worth": 3}], SCHEMA).tolist() == [[1.0, 3.0]]


def test_every_row_is_read_once_an_epoch():
    seen = np.concatenate([student._rows_of(step, 4, 10, seed=0) for step in range(5)])
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


def test_bad_input(tmp_path):
    path = encoder(tmp_path / "bert", "bert")
    with pytest.raises(InputError, match="pooling must be one of first, mean, not 'last'"):
        train(rows(20), SCHEMA, path, Course(pooling="last"))
    with pytest.raises(InputError, match="epochs, batch and length must be at least 1"):
        train(rows(20), SCHEMA, path, Course(epochs=0))
    with pytest.raises(InputError, match="not an encoder"):
        train(rows(20), SCHEMA, str(tmp_path / "none"), Course())
    with pytest.raises(InputError, match="not a student"):
        Student.load(path)
