import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from palimpsest.core import inner
from palimpsest.core.errors import InputError
from palimpsest.curate import Storm, bilevel, engine, learners, noise, pool
from palimpsest.curate.samples import Answers, Texts, Vectors
from palimpsest.models.lm import LM
from palimpsest.models.storage import weights_sha256

SMALL = Storm(epochs=2, lr=1e-2, batch_size=8)
WORDS = {"good": ["fine", "great", "lovely", "superb"], "bad": ["poor", "awful", "dull", "broken"]}


def blobs(count=96, share=0.0, seed=0):
    """Three clouds in the plane, and which labels are wrong."""
    rng = np.random.default_rng(seed)
    labels = torch.from_numpy(rng.integers(0, 3, count))
    centres = np.array([[0, 3], [3, -2], [-3, -2]])
    inputs = torch.from_numpy((centres[labels.numpy()] + rng.normal(size=(count, 2))).astype(np.float32))
    noisy, wrong = noise.flipped(labels, 3, share, seed)
    return Vectors(inputs, noisy, 3), wrong


def network(dropout=0.2, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Dropout(dropout), nn.Linear(16, 3))


def test_the_meta_gradient_is_that_of_finite_differences():
    samples, _ = blobs(24)
    samples = replace(samples, inputs=samples.inputs.double())
    plan = replace(SMALL, batch_size=6, dropout_rounds=0)
    run = bilevel.Training(plan, network(0.0).double(), samples, samples, False)
    for number in range(3):  # Adam's first step hardly depends on the length of the gradient
        run._step(number, samples.batch(run.draws.rows(number)), samples.batch(run.others.beside(number)), np.arange(6))
    own, other = samples.batch(run.draws.rows(3)), samples.batch(run.others.beside(3))
    torch.manual_seed(1)
    features = [torch.randn(6, 19, dtype=torch.float64) for _ in range(2)]
    run.rescaler.double()
    run.descent = torch.optim.SGD(run.rescaler.parameters(), 0.0)
    run.memory, run.other_memory = (lambda signals, groups, one=one: one for one in features)
    start = {name: value.detach().clone() for name, value in run.rescaler.named_parameters()}
    parameters, state, groups = run.parameters, run.state, torch.zeros(6, dtype=torch.int64)

    def meta_loss(name, flat):
        """Without autograd through the step: what the meta loss is for other weights of the rescaler."""
        changed = {**start, name: flat.view_as(start[name])}
        weigh = lambda one: torch.func.functional_call(run.rescaler, changed, (one, groups))  # noqa: E731
        loss = inner.evaluate(samples.outcome, run.model, parameters, own).loss
        new, _ = inner.step((weigh(features[0]) * loss).mean(), parameters, run.optimiser, state, differentiable=False)
        return float((weigh(features[1]) * inner.evaluate(samples.outcome, run.model, new, other).loss).mean())

    run._step(3, own, other, np.arange(6))
    for name, value in run.rescaler.named_parameters():
        for place in range(0, value.numel(), 37):
            steps = torch.zeros(value.numel(), dtype=torch.float64)
            steps[place] = 1e-6
            flat = start[name].flatten()
            slope = (meta_loss(name, flat + steps) - meta_loss(name, flat - steps)) / 2e-6
            assert float(value.grad.flatten()[place]) == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_weights_that_are_not_used_leave_plain_training():
    samples, _ = blobs(50)
    plan = replace(SMALL, warmup_epochs=2)
    trained = plan.train(network(), samples)
    plain = noise.Plain(epochs=2, lr=1e-2, batch_size=8).train(network(), samples)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(trained.model.state_dict()[name], value, rtol=1e-4, atol=1e-6)
    assert not np.allclose(trained.weights, 1)  # they were learned all the same


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"separate_classes": True},
        {"features": "loss", "by_agreement": False, "stats_window": 0},
        {"meta_rescaling": False, "preserve_scale": True, "floor": 0.1},
        {"threshold": 0.4},
    ],
)
def test_training_is_repeatable_and_touches_nothing(changes):
    samples, _ = blobs()
    plan, model = replace(SMALL, epochs=1.5, **changes), network()
    before, labels = weights_sha256(model), samples.labels.clone()
    torch.manual_seed(3)
    first = plan.train(model, samples)
    drawn = torch.rand(1)
    second = plan.train(model, samples)
    assert weights_sha256(model) == before != weights_sha256(first.model)
    assert weights_sha256(first.model) == weights_sha256(second.model)
    np.testing.assert_array_equal(first.weights, second.weights)
    torch.manual_seed(3)
    assert torch.equal(torch.rand(1), drawn)  # nor does it draw from anybody's generator
    assert torch.equal(samples.labels, labels)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert first.weights.shape == (96, 2)
    assert first.weights.min() >= plan.floor
    assert first.forwards == 6 * len(first.losses)
    assert weights_sha256(replace(plan, seed=1).train(model, samples).model) != weights_sha256(first.model)


def test_weights_tell_wrong_labels_from_right_ones_unless_they_go_to_others():
    samples, wrong = blobs(400, share=0.3)
    plan = Storm(epochs=12, lr=3e-3, batch_size=32)
    found = plan.train(network(), samples)
    assert roc_auc_score(~wrong, found.weights[:, -1]) > 0.9
    clean, _ = blobs(400)
    assert noise.agreement(found.model, clean) > 0.9
    shuffled = plan.train(network(), samples, shuffle=True)
    assert weights_sha256(shuffled.model) != weights_sha256(found.model)


def test_clean_samples_can_teach_the_weights():
    samples, wrong = blobs(200, share=0.3)
    clean, _ = blobs(64, seed=1)
    found = Storm(epochs=10, lr=3e-3, batch_size=32).train(network(), samples, meta=clean)
    assert roc_auc_score(~wrong, found.weights[:, -1]) > 0.85


def test_defaults_follow_what_is_trained():
    vectors, texts = blobs()[0], Texts(([1], [2]) * 8, torch.arange(16) % 2, 2, 0)
    head, fine_tuned = Storm()._settled(vectors), Storm()._settled(texts)
    assert (head.epochs, head.lr, head.batch_size) == (25, 1e-3, 64)
    assert (fine_tuned.epochs, fine_tuned.lr, fine_tuned.batch_size) == (3, 5e-5, 8)  # the paper's
    assert SMALL._settled(texts) == SMALL


def test_a_model_without_dropout_is_warned_of():
    with pytest.warns(UserWarning, match="no dropout is active"):
        SMALL.train(network(0.0), blobs()[0])


def tokenizer_and_texts():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 40)
    texts = [" ".join(rng.choice(WORDS["good" if label else "bad"], 3)) for label in labels]
    return LM.build(texts, "llama-tiny", vocab_size=300).tokenizer, texts, labels


def configs():
    from transformers import BertConfig, GPT2Config

    tiny = {"vocab_size": 300, "num_labels": 2, "pad_token_id": 0}
    return {
        "bert": BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, **tiny),
        "gpt2": GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=64, **tiny),
    }


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_sequence_classifiers(family):
    from transformers import AutoModelForSequenceClassification

    tokenizer, texts, labels = tokenizer_and_texts()
    tokenizer.padding_side = "right"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(configs()[family])
    samples = Texts.read(texts, torch.from_numpy(labels), 2, tokenizer)
    before = weights_sha256(model)
    found = Storm(epochs=6, lr=3e-3, batch_size=8).train(model, samples)
    assert weights_sha256(model) == before
    assert noise.agreement(found.model, samples) > 0.9
    assert not found.model.training


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models(family):
    pairs = [(f"{a} plus {b} is", f" {a + b}") for a in range(4) for b in range(4)]
    lm = LM.build([a + b for a, b in pairs], f"{family}-tiny", vocab_size=300)
    samples = Answers(lm.encode(pairs))
    outcome = samples.outcome(lm.model, samples.batch(np.arange(16)))
    np.testing.assert_allclose(outcome.loss.detach().numpy(), lm.nll(pairs), rtol=1e-4)
    with pytest.warns(UserWarning, match="no dropout is active"):
        found = Storm(kind="answer", epochs=4, lr=3e-3, batch_size=4).train(lm.model, samples)
    assert found.losses[-1] < found.losses[0]
    assert noise.outcomes(found.model, samples)[0].mean() < noise.outcomes(lm.model, samples)[0].mean()


def test_answers_agree_by_their_first_token():
    lm = LM.build(["a b c"], "llama-tiny", vocab_size=300)
    pairs = [("a", " b c"), ("b", " a a a")]
    samples = Answers(lm.encode(pairs))
    outcome = samples.outcome(lm.model, samples.batch(np.arange(2)))
    for row, (ids, start) in enumerate(zip(samples.encoded.ids, samples.encoded.starts, strict=True)):
        with torch.no_grad():
            logits = lm.model(input_ids=torch.tensor(ids)[None]).logits[0].double()
        assert bool(outcome.agrees[row]) == (int(logits[start - 1].argmax()) == ids[start])
        sure = logits[start - 1 : -1].softmax(-1).max(-1).values.mean()
        assert float(outcome.confidence[row]) == pytest.approx(float(sure), abs=1e-5)


@pytest.fixture
def bert(tmp_path):
    from transformers import AutoModelForSequenceClassification

    tokenizer, texts, labels = tokenizer_and_texts()
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(configs()["bert"]).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = [
        {"text": text, "label": int(label), "url": f"u/{i}"}
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    ]
    rows += [{"text": None, "label": 1, "url": "u/none"}, rows[0] | {"url": "u/twice"}]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_pool_from_file_to_file(bert):
    method = Storm(model=str(bert / "bert"), epochs=2, lr=1e-3, batch_size=4)
    found = engine.run(method, bert / "pool.jsonl", bert / "out", workers=1, progress="")
    (path,) = (bert / "out" / "data").iterdir()
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["url"] for row in rows[-2:]] == ["u/none", "u/twice"]
    assert rows[-2]["keep"] is False
    assert rows[-2]["reason"] == "no text or no label"
    assert rows[-1]["weight"] == rows[0]["weight"]
    assert all(row["keep"] == (row["weight"] >= 0.5) for row in rows)
    assert found.rows == 42
    assert found.notes["numbers"]["forwards"] == 6 * found.notes["numbers"]["steps"]
    assert {row[0] for row in found.notes["tables"][0]["rows"]} == {"0", "1"}
    again = learners._classifier(
        replace(method, model=str(bert / "out" / "model")), ["fine"] * 2, torch.arange(2), ["0", "1"]
    )
    assert again.model.config.id2label == {0: "0", 1: "1"}


def test_the_trained_model_is_there_or_made_again(bert):
    method = Storm(model=str(bert / "bert"), epochs=1, lr=1e-3, batch_size=4)
    run = lambda: engine.run(method, bert / "pool.jsonl", bert / "out", workers=1, progress="")  # noqa: E731
    run()
    weights = bert / "out" / "model" / "model.safetensors"
    before = weights.read_bytes()
    assert run().done == 0
    for file in (bert / "out" / "model").iterdir():
        file.unlink()
    assert run().done == 0  # the same weights came out
    assert weights.read_bytes() == before


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Storm(batch_size=1), "at least 2"),
        (lambda: Storm(threshold=1), r"threshold must lie in \[0, 1\)"),
        (lambda: Storm(kind="answer", separate_classes=True), "answers have none"),
        (lambda: Storm(lr=-1), "lr must not be below 0"),
        (lambda: SMALL.train(network(), blobs(10)[0]), "10 samples are fewer than two batches of 8"),
        (lambda: SMALL.train(network(), blobs()[0], meta=blobs(9)[0]), "9 meta samples"),
        (lambda: Vectors(torch.ones(2, 2), torch.tensor([0, 3]), 3), "found the label 3"),
        (lambda: Vectors(torch.ones(2, 2), torch.tensor([0, 0]), 1), "found 1 class"),
        (lambda: Vectors(torch.ones(2, 2), torch.tensor([0.0, 1.0]), 2), "float32"),
        (lambda: learners.class_numbers(["a", "a"]), "all 2 labels are 'a'"),
        (lambda: learners.class_numbers(list("abcd")), "no classes"),
        (lambda: learners.make(Storm(), [], []), "no row has both"),
        (lambda: learners.make(Storm(kind="answer"), ["a"], ["b"]), "needs model"),
        (lambda: learners.make(Storm(model="no/../where"), list("abcd"), list("xxyy")), "not a text classifier"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_pool_without_labels_names_what_it_has():
    frame = pool.require_daft().from_pydict({"text": ["a"], "class": ["b"]})
    with pytest.raises(InputError, match="no column 'label'; found 'text', 'class'"):
        Storm()(frame)
