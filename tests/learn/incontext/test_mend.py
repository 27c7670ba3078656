"""MEND: what the distiller may read, the divergence against float64, a frozen model, and the learner's face."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.data.batches import share
from palimpsest.data.tasks import Examples, Task
from palimpsest.data.text_tasks import TextTask
from palimpsest.learn import load, save
from palimpsest.learn.incontext.distillation import distances, first_vectors, negative_log_likelihoods
from palimpsest.learn.incontext.mend import (
    MEND,
    FittedMEND,
    HyperTuning,
    PromptedTasks,
    PromptTuning,
    _Loss,
    _Texts,
    batch_of,
)
from palimpsest.learn.incontext.prompting import in_context, zero_shot
from palimpsest.models.lm import LM
from palimpsest.models.prefix import Prefix, cost, embed

QUIET = Watch(progress=False)
TEXTS = ["red is warm and blue is cold, so they say here", "a cat sees a dog and the dog sees the cat again"]
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 96}
    | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "initializer_range": 0.2},
    "llama": {"model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.2},
}
TASKS = (
    TextTask("colours", (("red", "warm"), ("blue", "cold"), ("pink", "warm"), ("grey", "cold")), ("cold", "warm")),
    TextTask("animals", (("a cat", "tame"), ("a wolf", "wild"), ("a dog", "tame")), ("tame", "wild")),
)
SMALL: dict[str, Any] = {"vectors": 3, "demonstrations": 2, "pretraining_steps": 2, "steps": 2, "batch_size": 2}
SMALL |= {"lr": 1e-3, "pretraining_lr": 1e-3}


@pytest.fixture(params=sorted(CONFIGS))
def lm(request: pytest.FixtureRequest) -> LM:
    return LM.build(TEXTS, CONFIGS[request.param], vocab_size=300, seed=1)


def ids_of(lm: LM, text: str) -> list[int]:
    return lm.tokenizer(text, add_special_tokens=False)["input_ids"]


def stream(lm: LM, **given: Any) -> PromptedTasks:
    return PromptedTasks(lm, TASKS, TEXTS, **given)


def untrained(lm: LM, learner: MEND | None = None, **given: Any) -> FittedMEND:
    learner, material = learner or MEND(**SMALL), stream(lm, **given)
    return FittedMEND(learner, lm, learner.reader(material).eval(), (material.distiller or lm).tokenizer)


def test_vectors_are_the_last_states_of_places_that_see_all_demonstrations_and_no_padding(lm: LM) -> None:
    fitted = untrained(lm)
    reader: Any = fitted.reader
    short, long = [5, 90, 17], [7, 8, 99, 40, 12, 61]
    read = torch.tensor([[0, 0, 0, *short], long])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6])
    together = reader(read, mask)
    junk = reader(read.masked_fill(mask == 0, 77), mask)
    torch.testing.assert_close(junk, together, rtol=0, atol=0)
    body = getattr(lm.model, lm.model.base_model_prefix)
    for row, ids in enumerate((short, long)):
        whole = torch.cat([body.get_input_embeddings()(torch.tensor([ids])), reader.places[None]], 1)
        alone = body(inputs_embeds=whole).last_hidden_state[0, -3:]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)
    changed = reader(torch.tensor([[8, *long[1:]]]), torch.ones(1, 6, dtype=torch.int64))
    assert (changed[0] - together[1]).abs().amax(1).min() > 1e-4  # each vector looks at the very first token


def test_the_loss_equals_an_independent_computation_in_double_precision(lm: LM) -> None:
    learner = MEND(**SMALL, kl_weight=0.7, prediction_weight=0.4, temperature=2.0)
    fitted = untrained(lm, learner)
    rows = [
        ((("red", "warm"), ("blue", "cold")), ("pink", "warm")),
        ((("a cat", "tame"),), ("a wolf at night", "wild")),
    ]
    batch = batch_of(fitted, rows)
    value, logs = _Loss(fitted, 0.7, 0.4)(fitted.reader, batch)

    exact = lm.copy().model.double()
    divergences, predictions = [], []
    for demonstrations, (question, answer) in rows:
        shown = [lm.tokenizer.bos_token_id]
        for one in demonstrations:
            shown += ids_of(lm, one[0]) + ids_of(lm, f" {one[1]}")
        query = ids_of(lm, question) + ids_of(lm, f" {answer}")
        vectors = fitted.reader(torch.tensor([shown]), torch.ones(1, len(shown), dtype=torch.int64)).double()
        student = exact(inputs_embeds=torch.cat([vectors, embed(exact, torch.tensor([query]))], 1)).logits[0]
        teacher = exact(input_ids=torch.tensor([shown + query])).logits[0]
        p, q = (part[-len(query) :].div(2.0).softmax(-1) for part in (teacher, student))
        divergences.append((p * (p.log() - q.log())).sum(-1))
        count = len(ids_of(lm, f" {answer}"))
        before = student[-count - 1 : -1].log_softmax(-1)
        predictions.append(-before[torch.arange(count), torch.tensor(query[-count:])])
    wanted = 0.7 * torch.cat(divergences).mean() + 0.4 * torch.cat(predictions).mean()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-4)
    assert logs["nll"].item() == pytest.approx(torch.cat(predictions).mean().item(), rel=1e-4)
    shares = [_Loss(fitted, 0.7, 0.4)(fitted.reader, share(batch, row, 2))[0] for row in range(2)]
    assert sum(one.item() for one in shares) / 2 == pytest.approx(
        value.item(), rel=1e-5
    )  # rows weigh as fit weighs them


def test_divergences_of_states_in_double_precision() -> None:
    lm = LM.build(TEXTS, CONFIGS["gpt2"], vocab_size=300)
    rng = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 16, generator=rng) for _ in range(2))
    counts = torch.tensor([[True, True, False], [True, False, False]])
    lm.model.requires_grad_(False)
    weight = lm.model.get_output_embeddings().weight.double()
    p, q = ((part.double() @ weight.T).softmax(-1) for part in (teacher, student))
    wanted = (p * (p / q).log()).sum(-1).masked_fill(~counts, 0).float()
    found = distances(lm.model, student, teacher, counts)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert float(distances(lm.model, student, student, counts).abs().max()) < 1e-6
    squares = ((student - teacher) ** 2).mean(-1).masked_fill(~counts, 0)
    torch.testing.assert_close(distances(lm.model, student, teacher, counts, "hidden"), squares)
    words = torch.tensor([[4, 9, 0], [200, 0, 0]])
    said = -q.log().gather(2, words[..., None])[..., 0].masked_fill(~counts, 0).float()
    torch.testing.assert_close(negative_log_likelihoods(lm.model, student, words, counts), said, rtol=1e-4, atol=1e-5)


def test_texts_are_parted_into_context_and_query() -> None:
    lm = LM.build(TEXTS, CONFIGS["gpt2"], vocab_size=300)
    fitted = untrained(lm)
    batch = _Texts(fitted, TEXTS)(0)
    for line in range(2):
        shown = batch["shown"][line][batch["shown_mask"][line].bool()].tolist()
        query = batch["query"][line][batch["query_mask"][line].bool()].tolist()
        assert lm.tokenizer.decode(shown[1:] + query) in TEXTS
        assert shown == batch["read"][line][batch["read_mask"][line].bool()].tolist()
        assert len(query) == pytest.approx(0.2 * (len(shown) - 1 + len(query)), abs=1)
    assert (batch["output"] == batch["all"]).all()


@pytest.mark.parametrize("kind", [MEND, HyperTuning, PromptTuning])
def test_training_changes_the_vectors_and_not_the_model_and_survives_the_disk(
    lm: LM, kind: type[MEND], tmp_path: Path
) -> None:
    lm.model.train()
    before = lm.sha256, [p.requires_grad for p in lm.model.parameters()]
    watch = Watch(progress=False)
    fitted = kind(**SMALL).meta_fit(stream(lm), watch=watch)
    assert (lm.sha256, [p.requires_grad for p in lm.model.parameters()]) == before
    assert lm.model.training
    assert all(p.grad is None for p in lm.model.parameters())
    logs = watch.traces["meta-distillation"].logs
    assert ("kl_output" in logs) == (kind is MEND)
    start = untrained(lm, kind(**SMALL))
    assert not torch.equal(start.compress(TASKS[0].examples), fitted.compress(TASKS[0].examples))
    reads = not torch.equal(fitted.compress(TASKS[0].examples), fitted.compress(TASKS[1].examples))
    assert reads == (kind is not PromptTuning)
    scores = fitted.adapt(TASKS[0]).scores(["green", "yellow"])
    save(fitted, tmp_path / "learner")
    loaded = load(tmp_path / "learner")
    np.testing.assert_array_equal(loaded.adapt(TASKS[0]).scores(["green", "yellow"]), scores)
    again = kind(**SMALL).meta_fit(stream(lm), watch=QUIET)
    np.testing.assert_array_equal(again.adapt(TASKS[0]).scores(["green", "yellow"]), scores)


def test_the_control_without_teacher_is_hyper_tuning(lm: LM) -> None:
    plain = HyperTuning(**SMALL).meta_fit(stream(lm), watch=QUIET)
    switched = MEND(**SMALL, kl_weight=0.0, pretrain_on="nll").meta_fit(stream(lm), watch=QUIET)
    torch.testing.assert_close(switched.compress(TASKS[0].examples), plain.compress(TASKS[0].examples), rtol=0, atol=0)


def test_a_distiller_of_another_width_and_tokenizer_is_projected() -> None:
    lm = LM.build(TEXTS, CONFIGS["llama"], vocab_size=300)
    small = LM.build(["other words", *TEXTS], CONFIGS["gpt2"] | {"n_embd": 12}, vocab_size=290, seed=2)
    fitted = MEND(**SMALL).meta_fit(stream(lm, distiller=small), watch=QUIET)
    vectors = fitted.compress(TASKS[0].examples)
    assert vectors.shape == (3, 16)
    assert float(vectors.abs().max()) < 1
    assert fitted.adapt(TASKS[1])(["a bear"]).shape == (1,)


def test_the_prompt_and_no_prompt_answer_as_the_model_does(lm: LM) -> None:
    task, queries = TASKS[0], ["rose", "navy blue"]
    found = {True: in_context(lm, task).scores(queries), False: zero_shot(lm, task).scores(queries)}
    for shown, scores in found.items():
        start = [lm.tokenizer.bos_token_id]
        for question, answer in task.examples if shown else ():
            start += ids_of(lm, question) + ids_of(lm, f" {answer}")
        for row, text in enumerate(queries):
            for column, option in enumerate(task.options):
                ids, end = start + ids_of(lm, text), ids_of(lm, f" {option}")
                with torch.no_grad():
                    logits = lm.model(input_ids=torch.tensor([ids + end])).logits[0, len(ids) - 1 : -1]
                wanted = -F.cross_entropy(logits, torch.tensor(end))
                assert scores[row, column] == pytest.approx(float(wanted), abs=1e-4)
    alone = in_context(lm, task).scores(queries[:1])
    np.testing.assert_allclose(alone[0], found[True][0], atol=1e-5)


def test_generation_goes_on_behind_the_vectors(lm: LM) -> None:
    fitted = untrained(lm)
    vectors = fitted.compress(TASKS[0].examples)
    said = Prefix(lm, vectors).generate([[70, 80]], 4)[0]
    ids: list[int] = []
    for _ in range(4):
        whole = torch.cat([vectors[None], embed(lm.model, torch.tensor([[70, 80, *ids]]))], 1)
        ids.append(int(lm.model(inputs_embeds=whole).logits[0, -1].argmax()))
    assert said == lm.tokenizer.decode(ids[: ids.index(2)] if 2 in ids else ids, skip_special_tokens=True)


def test_more_demonstrations_than_can_be_read_are_distilled_part_by_part(lm: LM) -> None:
    fitted = untrained(lm, MEND(**SMALL | {"read_tokens": 14}))
    pairs = TASKS[0].examples * 3
    first = fitted.reading.demonstrations(pairs, 14)
    assert 1 <= len(first) < len(pairs)
    whole = fitted.compress(pairs, whole=True)
    assert len(whole) % 3 == 0
    assert len(whole) > 3
    torch.testing.assert_close(whole[:3], fitted.compress(pairs), rtol=0, atol=0)


def test_a_labelled_task_of_texts_is_answered_by_number(lm: LM) -> None:
    labelled = Examples.of(["red", "blue", "pink", "grey"], ["warm", "cold", "warm", "cold"])
    task = Task(labelled, labelled.take([0]))
    predictor = untrained(lm).adapt(task)
    answers = predictor(["rose", "ice"])
    assert answers.dtype == np.int64
    np.testing.assert_array_equal(answers, untrained(lm).adapt(TextTask.of(task)).scores(["rose", "ice"]).argmax(1))


def test_what_a_prefix_costs() -> None:
    lm = LM.build(TEXTS, CONFIGS["gpt2"], vocab_size=300)
    few, many = cost(lm, 3, 5), cost(lm, 30, 5)
    assert many.kept == 10 * few.kept == 2 * 2 * 16 * 30
    weights = sum(p.numel() for name, p in lm.model.named_parameters() if "wte" not in name)
    assert few.query == 2 * weights * 5 + 4 * 2 * 16 * (5 * 3 + 15)
    assert many.reading > 10 * few.reading


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"vectors": 0}, "vectors must be at least 1"),
        ({"match": "cosine"}, "match"),
        ({"context_share": 1.0}, "context_share"),
        ({"kl_weight": 0.0, "prediction_weight": 0.0}, "nor both be 0"),
    ],
)
def test_settings_that_cannot_work(given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        MEND(**given)


def test_material_that_cannot_be_learnt_from(lm: LM) -> None:
    learner = MEND(**SMALL)
    with pytest.raises(InputError, match="vectors do not fit"):
        replace(learner, vectors=96).meta_fit(stream(lm), watch=QUIET)
    with pytest.raises(InputError, match="plain texts of at least"):
        learner.meta_fit(PromptedTasks(lm, TASKS), watch=QUIET)
    with pytest.raises(InputError, match="no task to train on"):
        learner.meta_fit(PromptedTasks(lm, ()), watch=QUIET)
    with pytest.raises(InputError, match="has one example"):
        learner.meta_fit(PromptedTasks(lm, (TextTask("one", (("a", "b"),)),), TEXTS), watch=QUIET)
    fitted = untrained(lm)
    with pytest.raises(InputError, match="there is no demonstration"):
        fitted.compress([])
    with pytest.raises(InputError, match="no options to choose among"):
        fitted.adapt(TextTask("open", (("a", "b"),)))(["c"])
    with pytest.raises(InputError, match="more than the 96"):
        fitted.adapt(TASKS[0])(["word " * 200])
    with pytest.raises(InputError, match="does not fit into"):
        untrained(lm, replace(learner, read_tokens=2)).compress(TASKS[0].examples)


def test_first_vectors_are_rows_of_the_table() -> None:
    table = torch.randn(150, 4)
    found = first_vectors(table, 5, 0)
    assert all((table[100:] == row).all(1).any() for row in found)
