from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.evaluation import evaluate
from palimpsest.data.tasks import Examples, Tasks
from palimpsest.learn import load, save
from palimpsest.learn.fewshot import raml
from palimpsest.learn.fewshot.episodic import EpisodeBatches
from palimpsest.learn.fewshot.raml import RAML, Fusion, contrastive, entropy

QUIET = Watch(progress=False)
D = 128
SMALL = {"passages": 2, "dimensions": 6, "steps": 3}


def vector_of(text: str) -> np.ndarray:
    """Each word has a vector of its own: texts with common words are near."""
    return sum(numpy_rng(0, word).normal(size=D) for word in text.lower().split()).astype(np.float32)


@pytest.fixture
def words(monkeypatch):
    """An encoder of no weights; vectors given stay as they are."""
    usual = raml.vectors_of

    def vectors_of(x, encoder):
        return np.stack([vector_of(text) for text in x]) if isinstance(x[0], str) else usual(x, encoder)

    monkeypatch.setattr(raml, "vectors_of", vectors_of)


def texts_pool(classes=range(6)) -> Examples:
    """Nothing in a text tells its class: only a passage about the thing that it names does."""
    texts = [f"thing{c}{i} seen{c}{i}" for c in classes for i in range(6)]
    return Examples(texts, np.repeat(np.arange(len(classes)), 6), tuple(f"name {c}" for c in classes))


PASSAGES = [f"thing{c}{i} lore{c}" for c in range(40) for i in range(6)]


def by_hand(network: Fusion, x: np.ndarray, *, mean=False, slot=True, joint=True):
    """One text and its passages (1 + k, D) by the formulas of the sheet; passages of zeros are none."""
    at = {name: value.detach().numpy() for name, value in network.state_dict().items()}

    def linear(name, z):
        return at[f"{name}.weight"] @ z + at.get(f"{name}.bias", 0.0)

    length = np.sqrt(x.shape[1])
    h = x[0] / np.linalg.norm(x[0]) * length
    passages = [row / np.linalg.norm(row) * length for row in x[1:] if row.any()]
    scores, values = [], []
    for p in passages:
        u = np.tanh(linear("together", np.concatenate([h, p, h * p, abs(h - p)])))
        s = linear("query", h) @ linear("key", p) / np.sqrt(network.dimensions)
        scores.append(s + (linear("score", np.tanh(linear("judge", u)))[0] if joint else 0.0))
        values.append(linear("value", np.concatenate([p, u]) if joint else p))
    if mean:
        weights = np.append(np.full(len(passages), 1 / max(len(passages), 1)), float(not passages))
    else:
        raised = np.exp([*scores, at["empty"] if slot or not passages else -np.inf])
        weights = raised / raised.sum()
    r = sum((w * v for w, v in zip(weights, values, strict=False)), np.zeros(network.dimensions))
    gate = 1.0 if mean else 1 / (1 + np.exp(-linear("gate", np.concatenate([h, r]))))
    e = linear("own", h) + gate * r
    e = (e - e.mean()) / np.sqrt(e.var() + 1e-5)
    return e * at["norm.weight"] + at["norm.bias"], weights


def network_of(**options) -> Fusion:
    torch.manual_seed(0)
    network = Fusion(D, RAML(dimensions=6, **options)).double().eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return network


@pytest.mark.parametrize(
    ("options", "kind"),
    [
        ({}, {}),
        ({"fusion": "mean"}, {"mean": True}),
        ({"empty_slot": False}, {"slot": False}),
        ({"joint": False}, {"joint": False}),
    ],
)
def test_fusion_by_hand(options, kind):
    network = network_of(**options)
    x = np.random.default_rng(0).normal(size=(5, 4, D))
    x[1, 2:] = 0
    x[2, 1:] = 0
    parts = network.fused(torch.from_numpy(x))
    for row, vectors in enumerate(x):
        e, weights = by_hand(network, vectors, **kind)
        np.testing.assert_allclose(parts.vectors[row].detach().numpy(), e, rtol=1e-9)
        given = parts.weights[row].detach().numpy()
        np.testing.assert_allclose(given[[*vectors[1:].any(1).tolist(), True]], weights, rtol=1e-9)
        assert given.sum() == pytest.approx(1)
    own = network.norm(network.own(torch.from_numpy(x[2, 0] / np.linalg.norm(x[2, 0]) * D**0.5)))
    torch.testing.assert_close(parts.vectors[2], own)  # without passages it is a function of the text alone


def test_the_order_of_passages_does_not_matter():
    network = network_of()
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 5, D)))
    torch.testing.assert_close(network(x[:, [0, 4, 2, 1, 3]]), network(x))


def test_the_contrastive_loss_by_hand():
    rng = np.random.default_rng(2)
    vectors, labels = rng.normal(size=(2, 5, 3)), np.array([[0, 0, 1, 1, 2], [0, 1, 0, 0, 1]])
    wanted = []
    for episode, of in zip(vectors, labels, strict=True):
        z = episode / np.linalg.norm(episode, axis=1, keepdims=True)
        for i in range(5):
            others = [j for j in range(5) if j != i]
            total = sum(np.exp(z[i] @ z[j] / 0.2) for j in others)
            same = [j for j in others if of[j] == of[i]]
            if same:
                wanted.append(-np.mean([np.log(np.exp(z[i] @ z[j] / 0.2) / total) for j in same]))
    found = contrastive(torch.from_numpy(vectors), torch.from_numpy(labels), 0.2)
    assert found.item() == pytest.approx(np.mean(wanted), rel=1e-9)
    assert contrastive(torch.randn(1, 2, 3), torch.tensor([[0, 1]])).item() == 0


def test_entropy_by_hand():
    weights = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0]], requires_grad=True)
    found = entropy(weights)
    assert found.tolist() == pytest.approx([np.log(2), 0.0], abs=1e-6)
    found.sum().backward()
    assert torch.isfinite(weights.grad).all()


def small_batch(**more):
    rng = np.random.default_rng(3)
    return {
        "support": torch.from_numpy(rng.normal(size=(2, 4, 4, D))),
        "query": torch.from_numpy(rng.normal(size=(2, 3, 4, D))),
        "support_labels": torch.tensor([[0, 0, 1, 1]] * 2),
        "labels": torch.tensor([[0, 1, 1], [1, 0, 0]]),
        "number": torch.arange(2),
        **more,
    }


def test_the_loss_has_the_right_gradient_and_it_reaches_everything():
    learner = RAML(dimensions=6, dropped=0.0, entropy=0.3)
    torch.manual_seed(0)
    network = learner.build(np.zeros((2, 4, D)), 2).double()
    value, _ = learner.loss(network, small_batch(), 2)
    names = [name for name, _ in network.named_parameters()]
    slopes = dict(zip(names, torch.autograd.grad(value, list(network.parameters())), strict=True))
    for name, parameter in network.named_parameters():
        assert slopes[name].abs().max() > 0, name
        place, values = (0,) * parameter.ndim, []
        for sign in (1, -1):
            with torch.no_grad():
                parameter[place] += sign * 1e-6
                values.append(learner.loss(network, small_batch(), 2)[0].item())
                parameter[place] -= sign * 1e-6
        assert slopes[name][place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4, abs=1e-7)


def test_the_entropy_bonus_ends_in_the_middle_of_training():
    learner = RAML(dimensions=6, dropped=0.0, entropy=1.0, steps=10, episodes=2)
    network = learner.build(np.zeros((2, 4, D)), 2).double()

    def extra(number):
        value, logs = learner.loss(network, small_batch(number=torch.tensor([number, number + 1])), 2)
        return (value - logs["nll"] - 0.1 * logs["contrast"]).item() / logs["attention_entropy"].item()

    assert [extra(number) for number in (0, 5, 10, 18)] == pytest.approx([-1, -0.5, 0, 0])


def test_withheld_passages_leave_the_text_in_training_alone():
    network = network_of(dropped=0.9)
    x = torch.from_numpy(np.random.default_rng(4).normal(size=(200, 3, D)))
    torch.manual_seed(0)
    share = (network.train().fused(x).weights[:, -1] == 1).double().mean().item()
    assert 0.8 < share < 1
    assert (network.eval().fused(x).weights[:, -1] < 1).all()


def test_knowledge_from_the_corpus_helps_and_goes_with_it(words):
    train, test = texts_pool(range(36)), texts_pool(range(36, 40))
    stream = Episodes(pool=train, way=10, shot=1, queries=4)
    learner = RAML(passages=1, dimensions=64, steps=150, lr=3e-3)
    fitted = learner.meta_fit(stream, passages=PASSAGES, watch=QUIET)
    rows = fitted.lookup(test.x[:3]).rows
    for text, row in zip(test.x, rows[:, 0], strict=False):
        assert fitted.corpus.passages[row].split()[0] == text.split()[0]
    episodes = Episodes(pool=test, way=2, shot=2, queries=4, count=200)
    smaller = fitted.over(fitted.corpus.without(rows[:, 0]))
    assert len(smaller.corpus.passages) == len(PASSAGES) - 3
    assert not {PASSAGES[row] for row in rows[:, 0]} & set(smaller.corpus.passages)
    alone = fitted.over(None).lookup(test.x)
    assert (alone.weights[:, -1] == 1).all()
    knowing, unknowing = (evaluate(one, episodes).accuracy.mean() for one in (fitted, fitted.over(None)))
    assert knowing > unknowing + 0.1


def test_a_copy_of_the_text_is_never_looked_up(words):
    pool = texts_pool()
    corpus = raml.Corpus.of([*PASSAGES, pool.x[0], pool.x[0].upper()])
    inputs, rows = corpus.beside(np.stack([vector_of(text) for text in pool.x]), 2)
    assert not set(rows[0]) & {len(PASSAGES), len(PASSAGES) + 1}
    assert inputs.shape == (36, 3, D)


def test_passages_that_overlap_with_labelled_texts_leave_the_corpus(words):
    long = "one two three four five six seven eight nine"
    pool = replace(texts_pool(), x=[long, *texts_pool().x[1:]])
    stream = Episodes(pool=pool, way=2, shot=1, queries=2)
    fitted = RAML(**SMALL).meta_fit(stream, passages=[*PASSAGES, f"They said {long} ten"], watch=QUIET)
    assert fitted.corpus.passages == tuple(PASSAGES)


def test_the_training_sees_only_its_own_classes(words):
    learner = RAML(**SMALL)
    pool = texts_pool(range(8))
    train = pool.of_classes(pool.names[:5])
    stream = raml._Looked(Episodes(pool=train, way=2, shot=1, queries=2), learner, raml.Corpus.of(PASSAGES)).whole()
    seen = [EpisodeBatches(stream, 1)(step)["query"][..., 0, :].flatten(0, 1) for step in range(5)]
    known = np.stack([vector_of(text) for text in train.x])
    for vector in torch.cat(seen).numpy():
        assert np.abs(known - vector).sum(1).min() == 0


def test_it_survives_the_disk_and_can_be_repeated(words, tmp_path):
    pool = texts_pool()
    stream = Episodes(pool=pool, way=3, shot=2, queries=2, count=20)
    learner, passages = RAML(**SMALL), list(PASSAGES)
    fitted, again = (learner.meta_fit(stream, passages=passages, watch=QUIET) for _ in range(2))
    assert (passages, pool.x) == (PASSAGES, texts_pool().x)
    save(fitted, tmp_path / "one")
    save(again, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert {path.suffix for path in (tmp_path / "one").iterdir()} == {".json", ".safetensors"}
    loaded = load(tmp_path / "one")
    assert loaded.corpus.passages == fitted.corpus.passages
    np.testing.assert_array_equal(evaluate(loaded, stream).answers, evaluate(fitted, stream).answers)
    task = stream.task(0)
    np.testing.assert_array_equal(loaded.adapt(task)(task.query.x), fitted.adapt(task)(task.query.x))


def test_a_list_of_tasks_looks_up_task_by_task(words):
    stream = Episodes(pool=texts_pool(), way=3, shot=2, queries=2)
    tasks = Tasks(tuple(stream.task(number) for number in range(3)))
    both = [RAML(**SMALL).meta_fit(one, passages=PASSAGES, watch=QUIET) for one in (stream, tasks)]
    for name, value in both[0].network.state_dict().items():
        torch.testing.assert_close(value, both[1].network.state_dict()[name])


def test_a_file_of_passages(words, tmp_path):
    path = tmp_path / "passages.jsonl"
    path.write_text("".join(f'{{"text": "{text}"}}\n' for text in PASSAGES), encoding="utf-8")
    stream = Episodes(pool=texts_pool(), way=2, shot=1, queries=2)
    fitted = RAML(corpus=str(path), **SMALL).meta_fit(stream, watch=QUIET)
    assert fitted.corpus.passages == tuple(PASSAGES)


def test_real_sentences_find_what_they_are_about():
    corpus = raml.Corpus.of(["The sparrow flew back to its nest.", "Steel is made from iron ore.", "Bread is baked."])
    vectors = raml.vectors_of(["A small bird sat in the tree.", "The baker opened his oven."], raml.PACKAGED)
    assert corpus.beside(vectors, 1)[1].tolist() == [[0], [2]]


def test_bad_input(words):
    stream = Episodes(pool=texts_pool(), way=2, shot=1, queries=2)
    fitted = RAML(**SMALL).meta_fit(stream, passages=PASSAGES, watch=QUIET)
    for bad, message in [
        (lambda: RAML(**SMALL).meta_fit(stream, passages=[], watch=QUIET), "the corpus is empty"),
        (lambda: RAML(**SMALL).meta_fit(stream, passages=["a", " "], watch=QUIET), "passage 1 of the corpus is"),
        (lambda: RAML(**SMALL).meta_fit(stream, passages=["a"], watch=QUIET), "1 passages; 2 are wanted"),
        (lambda: RAML(corpus="nowhere.txt").meta_fit(stream, watch=QUIET), "nowhere.txt"),
        (lambda: RAML(fusion="sum"), "unknown fusion"),
        (lambda: RAML(passages=0), "out of range"),
        (lambda: Episodes(pool=texts_pool(), way=2, shot=5, queries=2), "5 shots and 2 queries need 7"),
        (lambda: fitted.adapt(stream.task(0))(np.full((1, D), np.nan)), "NaN or infinite"),
        (lambda: fitted.embed(np.zeros((1, D + 1))), "inputs have the shape"),
        (
            lambda: fitted.over(raml.Corpus.of(PASSAGES).without(range(len(PASSAGES) - 1))).embed(["thing00"]),
            "1 passages; 2 are wanted",
        ),
    ]:
        with pytest.raises(InputError, match=message):
            bad()
