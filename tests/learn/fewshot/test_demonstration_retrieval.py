from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import IGNORE
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import evaluate
from palimpsest.data.tasks import Examples, Task, Tasks
from palimpsest.data.text_tasks import TextTask
from palimpsest.learn import load, save
from palimpsest.learn.fewshot import demonstration_retrieval as module
from palimpsest.learn.fewshot.demonstration_retrieval import (
    Bank,
    Demonstration,
    DemonstrationRetrieval,
    Training,
    examples_of,
    mixture,
)
from palimpsest.models.seq2seq import marginal_logprobs

QUIET = Watch(progress=False)
SMALL = {"width": 16, "layers": 1, "heads": 2, "vocab_size": 400, "count": 2, "batch_size": 4, "repeat_question": False}


@pytest.fixture(autouse=True)
def words(monkeypatch):
    """An encoder of no weights: each word has a vector of its own, so texts with common words are near."""

    def vectors_of(texts, encoder):
        vectors = [sum(numpy_rng(0, word).normal(size=64) for word in text.lower().split()) for text in texts]
        return np.stack([vector / np.linalg.norm(vector) for vector in vectors]).astype(np.float32)

    monkeypatch.setattr(module, "vectors_of", vectors_of)


def bank_rows() -> list[Demonstration]:
    return [Demonstration(f"colour of item{n}", ("red", "blue", "green")[n % 3], task="colours") for n in range(12)]


def task_of(numbers=range(6), name="ask") -> TextTask:
    pairs = tuple((f"which colour has item{n}", ("red", "blue", "green")[n % 3]) for n in numbers)
    return TextTask(name, pairs, ("red", "blue", "green"))


def fitted_of(steps=3, **options):
    learner = DemonstrationRetrieval(**{**SMALL, "lr": 1e-3, "tuning_steps": 2, "steps": steps, **options})
    return learner.meta_fit([task_of()], bank=bank_rows(), watch=QUIET)


def test_weights_are_a_softmax_over_what_was_retrieved():
    fitted = fitted_of(steps=0, count=3, temperature=0.2)
    asked = examples_of(task_of())
    shown = fitted.shown(asked)
    queries = module.vectors_of([one.question for one in asked], "").astype(np.float64)
    products = queries @ fitted.bank.index.vectors.astype(np.float64).T
    for line in range(len(asked)):
        rows = np.argsort(-products[line])[:3]
        assert shown.rows[line].tolist() == rows.tolist()
        raised = np.exp(products[line, rows] / 0.2)
        np.testing.assert_allclose(shown.weights[line], raised / raised.sum(), rtol=1e-9)
        assert shown.rows[line, 0] == line  # the row about the same item


def test_the_loss_is_the_mean_over_answered_tokens_and_teaches_the_reader():
    fitted = fitted_of(steps=0)
    training = Training(fitted, fitted.reader, [examples_of(task_of())])
    seen = {}

    class Recorder(Watch):
        def fit(self, name, model, loss, batches, **options):
            seen.update(model=model, loss=loss, batch=batches(0), options=options)

    training.run("meta-training", 10, 1e-3, Recorder())
    model, batch = seen["model"].double(), seen["batch"]
    batch["log_weights"] = batch["log_weights"].double()
    value, _ = seen["loss"](model, batch)
    total = 0.0
    for line in range(len(batch["labels"])):
        row = {name: tensor[line : line + 1] for name, tensor in batch.items()}
        total -= marginal_logprobs(model, row, row["log_weights"], row["labels"]).item()
    assert value.item() == pytest.approx(total / (batch["labels"] != IGNORE).sum().item(), rel=1e-9)
    value.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0 or "relative" in name, name
    assert not torch.isnan(torch.cat([p.grad.flatten() for p in model.parameters()])).any()


def test_an_input_is_never_its_own_demonstration():
    """Neither in training nor when it answers, though the bank holds the very question with its answer."""
    task = task_of(range(12))
    for kind in ("retrieved", "random"):
        learner = DemonstrationRetrieval(**SMALL, steps=2, demonstrations=kind)
        fitted = learner.meta_fit([task], watch=QUIET)  # the examples are the bank
        assert [row.question for row in fitted.bank.rows] == [question for question, _ in task.examples]
        asked = examples_of(task)
        rows = fitted.shown(asked).rows
        assert all(number not in line for number, line in enumerate(rows))
        shouted = replace(asked[0], question=asked[0].question.upper() + "?")
        assert 0 not in fitted.shown([shouted]).rows
        batch = Training(fitted, fitted.reader, [asked])(0)
        texts = fitted.reader.tokenizer.batch_decode(batch["input_ids"].flatten(0, 1))
        for text in texts:
            assert text.count(text.split("question:")[-1].split("\n")[0].strip()) == 1


def test_the_support_of_a_new_task_does_not_enter_the_bank():
    fitted = fitted_of()
    rows, vectors = fitted.bank.rows, fitted.bank.index.vectors.copy()
    weights = {name: value.clone() for name, value in fitted.reader.model.state_dict().items()}
    predictor = fitted.adapt(task_of(range(6, 9)))
    predictor.answers(["which colour has item7"])
    assert fitted.bank.rows == rows
    np.testing.assert_array_equal(fitted.bank.index.vectors, vectors)
    for name, value in fitted.reader.model.state_dict().items():
        assert torch.equal(value, weights[name])
    tuned = predictor.reader.model.state_dict()
    assert any(not torch.equal(tuned[name], weights[name]) for name in weights)


def test_rows_are_deleted_swapped_and_deduplicated():
    fitted = fitted_of(steps=0)
    asked = examples_of(task_of())[:1]
    smaller = fitted.over(fitted.bank.without([0]))
    assert len(smaller.bank.rows) == 11
    assert "item0" not in [smaller.bank.rows[row].question.split()[-1] for row in smaller.shown(asked).rows[0]]
    other = [replace(row, answer="white") for row in bank_rows()]
    assert {row.answer for row in fitted.over(other).bank.rows} == {"white"}
    assert len(fitted.bank.without_overlap(["Colour of item3!"]).rows) == 11


def test_a_reader_learns_to_read_what_it_is_shown():
    """Each row's answer is drawn anew from the bank it is in: only who reads it can know."""
    rng = np.random.default_rng(0)
    values = ("red", "blue", "green")
    rows = [Demonstration(f"colour of item{n}", values[rng.integers(3)]) for n in range(60)]
    asked = tuple((f"which colour has item{n}", rows[n].answer) for n in range(40))
    never = [(f"which colour has item{n}", rows[n].answer) for n in range(40, 60)]
    right = {}
    for kind in ("retrieved", "none"):
        learner = DemonstrationRetrieval(
            **{**SMALL, "count": 1, "batch_size": 16}, demonstrations=kind, steps=150, lr=1e-2, tuning_steps=0
        )
        fitted = learner.meta_fit([TextTask("ask", asked, values)], bank=rows, watch=QUIET)
        predictor = fitted.adapt(TextTask("ask", asked[:1], values))
        chosen = predictor([question for question, _ in never])
        right[kind] = np.mean([values[label] == answer for label, (_, answer) in zip(chosen, never, strict=True)])
        assert predictor.answers([never[0][0]])[0] in values
    assert right["retrieved"] > 0.8
    assert right["retrieved"] > right["none"] + 0.3


def test_it_survives_the_disk_and_can_be_repeated(tmp_path):
    task, rows = task_of(), bank_rows()
    learner = DemonstrationRetrieval(**SMALL, steps=3, tuning_steps=2)
    one, two = (learner.meta_fit([task], bank=rows, watch=QUIET) for _ in range(2))
    assert (task, rows) == (task_of(), bank_rows())
    for name, fitted in (("one", one), ("two", two)):
        save(fitted, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
        assert path.suffix in (".json", ".safetensors")
    loaded = load(tmp_path / "one")
    questions = [question for question, _ in task.examples]
    np.testing.assert_array_equal(loaded.adapt(task).logprobs(questions), one.adapt(task).logprobs(questions))
    assert loaded.bank.rows == one.bank.rows


def test_an_answer_does_not_depend_on_the_others():
    predictor = fitted_of().adapt(task_of())
    questions = [question for question, _ in task_of().examples]
    together = predictor.logprobs(questions)
    alone = np.concatenate([predictor.logprobs([question]) for question in questions])
    np.testing.assert_allclose(together, alone, rtol=1e-4)


def test_labelled_tasks_of_texts():
    pool = Examples([f"note {n} on {n % 4}" for n in range(40)], np.arange(40) % 4, tuple("abcd"))
    episodes = Episodes(pool=pool, way=2, shot=2, queries=2, count=3)
    learner = DemonstrationRetrieval(**SMALL, steps=2, tuning_steps=1)
    fitted = learner.meta_fit(episodes, watch=QUIET)
    assert len(fitted.bank.rows) == 40
    assert evaluate(fitted, episodes).answers.shape == (3, 4)
    tasks = Tasks(tuple(episodes.task(number) for number in range(2)))
    assert [len(task.examples) for task in mixture(tasks)] == [8, 8]
    task = episodes.task(0)
    lied = replace(task, query=replace(task.query, y=np.zeros_like(task.query.y)))
    np.testing.assert_array_equal(fitted.adapt(lied)(task.query.x), fitted.adapt(task)(task.query.x))


def test_the_format_is_the_papers():
    one = Demonstration("who?", "me", "a room")
    assert one.text() == "question: who? \n answer: me \n context: a room \n "
    assert one.text("<mask>") == "question: who? \n answer: <mask> \n context: a room \n "
    assert "me" not in one.key
    fitted = fitted_of(steps=0, repeat_question=True)
    assert fitted.target(one) == "question: who? \n answer: me"


def test_nothing_to_show_leaves_the_question_alone():
    learner = DemonstrationRetrieval(**SMALL, steps=0)
    fitted = learner.meta_fit([task_of()], bank=[Demonstration("which colour has item0", "red")], watch=QUIET)
    shown = fitted.shown(examples_of(task_of())[:2])
    assert shown.rows.tolist() == [[-1, -1], [0, -1]]
    assert shown.weights.tolist() == [[1.0, 0.0], [1.0, 0.0]]
    assert np.isfinite(fitted.adapt(task_of()).logprobs(["which colour has item0"])).all()


def test_bad_input():
    fitted = fitted_of(steps=0)
    features = Examples(np.zeros((4, 3), dtype=np.float32), np.array([0, 0, 1, 1]), ("a", "b"))
    for bad, message in [
        (lambda: Bank.of([]), "the bank is empty"),
        (lambda: Bank.of([*bank_rows(), ("q", "a")]), "row 12 of the bank is"),
        (lambda: Bank.of([Demonstration("q", " ")]), "row 0 of the bank is"),
        (lambda: fitted.over(fitted.bank.without(range(12))), "nothing to retrieve"),
        (lambda: DemonstrationRetrieval(**SMALL).meta_fit([], watch=QUIET), "at least one"),
        (lambda: mixture(Episodes(pool=features, way=2, shot=1, queries=1)), "wanted a task of texts"),
        (lambda: fitted.adapt(Task(features, features)), "wanted a task of texts"),
        (lambda: fitted.adapt(Task(Examples(["x"], np.array([0]), ("a",)), features)), "one class"),
        (lambda: fitted.adapt(Task(Examples(["x"], np.array([0]), ("a", "b")), features)), "no example"),
        (lambda: fitted.adapt(TextTask("free", (("q", "a"),))).logprobs(["q"]), "no options"),
        (lambda: fitted.adapt(task_of()).answers(["q", ""]), "input 1 is ''"),
        (lambda: DemonstrationRetrieval(demonstrations="some"), "unknown demonstrations"),
        (lambda: DemonstrationRetrieval(marginal="word"), "unknown marginal"),
        (lambda: DemonstrationRetrieval(count=0), "out of range"),
        (lambda: DemonstrationRetrieval(answer_length=1), "too small"),
    ]:
        with pytest.raises(InputError, match=message):
            bad()
