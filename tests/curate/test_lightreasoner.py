import copy
import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.watch import Watch
from palimpsest.curate import LightReasoner, contrast, engine, lightreasoner, pool
from palimpsest.curate.distillation import Chosen, Distillation
from palimpsest.data.batches import IGNORE, Encoded
from palimpsest.models.encode import encode_prompts
from palimpsest.models.lm import LM
from palimpsest.models.storage import weights_sha256

TEXTS = ["12+34=46", "7 red dogs", "a sum is 5"]
QUESTIONS = ["12+3=", "a", "7 red", "5+55+555=", "why"]
SMALL = LightReasoner(max_new_tokens=6, steps=3, lr=1e-3, batch_size=4, lora_rank=0, share=0.3)
QUIET = Watch(progress=False)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def pair(request):
    """Two sizes of a family with one tokenizer."""
    expert = LM.build(TEXTS, f"{request.param}-tiny", vocab_size=300, seed=0)
    amateur = replace(LM.build(TEXTS, f"{request.param}-tiny", vocab_size=300, seed=1), source="amateur")
    return expert, amateur


@pytest.fixture(scope="module")
def steps(pair):
    return SMALL.contrasted(*pair, QUESTIONS)


def distributions(lm, ids):
    with torch.no_grad():
        return lm.model(input_ids=torch.as_tensor(ids)[None]).logits[0].double().softmax(-1)


def test_every_step_is_what_one_prefix_at_a_time_says(pair, steps):
    place = 0
    for ids, start in zip(steps.rollouts.ids, steps.rollouts.starts, strict=True):
        for position in range(start, len(ids)):
            p, q = (distributions(lm, ids[:position])[-1] for lm in pair)
            assert ids[position] == int(p.argmax())  # greedy
            expected = float((p * ((p + 1e-12) / (q + 1e-12)).log()).sum())
            assert steps.divergence[place] == pytest.approx(expected, abs=2e-5)
            plausible = torch.nonzero(p >= 0.2 * p.max()).squeeze(1)
            target = (p / q)[plausible] / (p / q)[plausible].sum()
            live = steps.weights[place] > 0
            found = dict(zip(steps.tokens[place][live].tolist(), steps.weights[place][live].tolist(), strict=True))
            assert found == pytest.approx(dict(zip(plausible.tolist(), target.tolist(), strict=True)), abs=1e-4)
            place += 1
    assert place == len(steps.divergence) == steps.offsets[-1]


def test_targets_by_hand():
    expert, amateur = torch.tensor([[0.5, 0.4, 0.1]]).log(), torch.tensor([[0.5, 0.1, 0.4]]).log()
    divergence, tokens, weights = contrast.contrast(expert, amateur, 0.5)
    assert float(divergence) == pytest.approx(0.4 * np.log(4) + 0.1 * np.log(0.25))
    assert tokens.tolist() == [[0, 1]]
    assert weights.tolist() == [pytest.approx([0.2, 0.8])]  # 1 : 4; the third is not plausible
    _, tokens, weights = contrast.contrast(torch.stack([expert[0], 9 * expert[0]]), amateur.repeat(2, 1), 0.9)
    assert tokens.shape == (2, 1)
    assert weights.tolist() == [[1.0], [1.0]]


def test_a_rollout_ends_with_its_end(pair):
    expert, _ = pair
    ids = encode_prompts(expert.tokenizer, QUESTIONS)
    rollouts = contrast.rolled_out(expert, ids, 6)
    for prompt, row, start in zip(ids, rollouts.ids, rollouts.starts, strict=True):
        assert np.array_equal(row[:start], prompt)
        assert 1 <= len(row) - start <= 6
        ended = row[-1] == expert.tokenizer.eos_token_id
        assert ended or len(row) - start == 6


def test_the_loss_is_the_divergence_from_the_targets(pair, steps):
    expert, _ = pair
    chosen = SMALL.chosen(steps)
    batch = Chosen(chosen, 4, 0)(0)
    assert int((batch.labels != IGNORE).sum()) == 4
    found = float(Distillation(chosen)(expert.model, batch).detach())
    total = 0.0
    for line, row in enumerate(batch.rows.tolist()):
        ids, start = steps.rollouts.ids[row], steps.rollouts.starts[row]
        for position in torch.nonzero(batch.labels[line] != IGNORE).flatten().tolist():
            step = steps.offsets[row] + position - start
            assert chosen.chosen[step]
            own = distributions(expert, ids[:position])[-1]
            for token, weight in zip(steps.tokens[step], steps.weights[step].astype(float), strict=True):
                total += weight * (np.log(weight) - float(own[token].log())) if weight else 0.0
    assert found == pytest.approx(total / 4, rel=1e-4)
    assert found >= 0


def test_the_gradient_of_packed_steps_is_that_of_one_step_each(pair, steps):
    """The published form trains one prefix at a time."""
    expert, _ = pair
    chosen = SMALL.chosen(steps)
    batch, loss = Chosen(chosen, 5, 0)(1), Distillation(chosen)
    model = expert.copy().model
    loss(model, batch).backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    parts = Chosen(chosen, 5, 0)
    for line, row in enumerate(batch.rows.tolist()):
        for position in torch.nonzero(batch.labels[line] != IGNORE).flatten().tolist():
            step = np.array([chosen.offsets[row] + position - chosen.rollouts.starts[row]])
            loss(model, parts._batch([row], [step])).backward()
    for name, value in packed.items():
        torch.testing.assert_close(value, model.get_parameter(name).grad, rtol=1e-3, atol=1e-6)


def test_batches_teach_every_chosen_step_once_an_epoch(steps):
    chosen = SMALL.chosen(steps)
    batches, total = Chosen(chosen, 1, 3), int(chosen.chosen.sum())
    for epoch in range(2):
        seen = []
        for step in range(epoch * total, (epoch + 1) * total):
            batch = batches(step)
            row = int(batch.rows[0])
            position = int(torch.nonzero(batch.labels[0] != IGNORE))
            seen.append(steps.offsets[row] + position - steps.rollouts.starts[row])
            assert batch.input_ids.shape[1] == position + 1  # nothing beyond the last taught step is read
        assert sorted(seen) == np.flatnonzero(chosen.chosen).tolist()
    assert torch.equal(batches(2).input_ids, Chosen(chosen, 1, 3)(2).input_ids)


def test_which_steps_are_taught(steps):
    divergence = steps.divergence
    by_line = replace(SMALL, share=0.0, beta=float(np.median(divergence))).chosen(steps)
    assert np.array_equal(by_line.chosen, divergence >= np.median(divergence))
    share = SMALL.chosen(steps)
    assert share.chosen.sum() == round(0.3 * len(divergence))
    assert divergence[share.chosen].min() >= divergence[~share.chosen].max()
    anywhere = replace(SMALL, select="random").chosen(steps)
    assert anywhere.chosen.sum() == share.chosen.sum()
    assert not np.array_equal(anywhere.chosen, share.chosen)
    own = replace(SMALL, contrast=False).chosen(steps)
    assert np.array_equal(own.tokens[:, 0], steps.own)
    assert (own.weights == 1).all()
    with pytest.raises(InputError, match="no step diverges by 99 nats"):
        replace(SMALL, share=0.0, beta=99).chosen(steps)
    with pytest.warns(UserWarning, match="would select"):
        replace(SMALL, share=0.9).chosen(steps)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}])
def test_teaching_is_repeatable_touches_nothing_and_approaches_the_targets(pair, changes):
    expert, amateur = pair
    method = replace(SMALL, steps=12, lr=5e-3, **changes)
    before = weights_sha256(expert.model), weights_sha256(amateur.model)
    torch.manual_seed(1)
    first = method.teach(expert, amateur, QUESTIONS, watch=QUIET)
    torch.manual_seed(2)
    watch = Watch(progress=False)
    assert method.teach(expert, amateur, QUESTIONS, watch=watch).sha256 == first.sha256
    assert (weights_sha256(expert.model), weights_sha256(amateur.model)) == before
    losses = watch.traces["distil"].losses
    assert np.mean(losses[-3:]) < np.mean(losses[:3])
    assert not hasattr(first.model, "peft_config")
    assert first.sha256 != expert.sha256


def test_contrastive_decoding_takes_the_best_target(pair):
    expert, amateur = pair
    prompts = encode_prompts(expert.tokenizer, QUESTIONS)
    found = contrast.decode(expert, amateur, prompts, alpha=0.2, max_new_tokens=3)
    for prompt, text in zip(prompts, found, strict=True):
        ids = list(prompt)
        for _ in range(3):
            p, q = (distributions(lm, ids)[-1] for lm in pair)
            ids.append(int((p / q).masked_fill(p < 0.2 * p.max(), 0).argmax()))
            if ids[-1] == expert.tokenizer.eos_token_id:
                break
        assert text == expert.tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True)


def test_a_chat_template_is_used_where_there_is_one(pair):
    expert, _ = pair
    assert SMALL._asked(expert, "why") == "why"
    templated = replace(expert, tokenizer=copy.deepcopy(expert.tokenizer))
    templated.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
    )
    assert SMALL._asked(templated, "why") == "<system>Please reason step by step.<user>why<bot>"
    assert replace(SMALL, system="")._asked(templated, "why") == "<user>why<bot>"


@pytest.fixture
def folder(pair, tmp_path):
    for name, lm in zip(("expert", "amateur"), pair, strict=True):
        lm.save(tmp_path / name)
    rows = [{"prompt": question, "n": n} for n, question in enumerate([*QUESTIONS, None, QUESTIONS[0]])]
    (tmp_path / "pool.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_pool_from_file_to_file(pair, steps, folder):
    method = replace(SMALL, expert=str(folder / "expert"), amateur=str(folder / "amateur"))
    found = engine.run(method, folder / "pool.jsonl", folder / "out", workers=1, progress="")
    (path,) = (folder / "out" / "data").iterdir()
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert [row["n"] for row in rows] == list(range(7))
    assert rows[5]["reason"] == "no question"
    assert (rows[5]["keep"], rows[5]["targets"], rows[5]["rollout"]) == (False, None, None)
    assert rows[6]["targets"] == rows[0]["targets"]
    marked = SMALL.chosen(steps).chosen
    for number, row in enumerate(rows[:5]):
        part = slice(steps.offsets[number], steps.offsets[number + 1])
        assert row["score_divergence"] == pytest.approx(steps.divergence[part].mean(), abs=1e-5)
        assert [one["position"] for one in row["targets"]] == np.flatnonzero(marked[part]).tolist()
        assert row["keep"] == bool(marked[part].any())
        for one in row["targets"]:
            assert one["token"] == steps.own[part][one["position"]]
            assert sum(one["weights"]) == pytest.approx(1, abs=1e-5)
    assert found.notes["numbers"]["chosen"] == int(marked.sum())
    tuned = LM.load(folder / "out" / "model")
    assert tuned.sha256 != pair[0].sha256
    assert engine.run(method, folder / "pool.jsonl", folder / "out", workers=1, progress="").done == 0


def test_columns_alone_need_no_training(folder):
    method = replace(SMALL, steps=0, expert=str(folder / "expert"), amateur=str(folder / "amateur"))
    engine.run(method, folder / "pool.jsonl", folder / "out", workers=1, progress="")
    assert not (folder / "out" / "model").exists()


def test_unlike_vocabularies_are_refused(pair):
    other = replace(LM.build(["zebra zebra zebra"] * 9, "llama-tiny", vocab_size=320), source="zebra")
    with pytest.raises(InputError, match=r"built:\w+-tiny and zebra have different vocabularies") as caught:
        SMALL.contrasted(pair[0], other, QUESTIONS)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LightReasoner(alpha=0), r"alpha must lie in \(0, 1\]"),
        (lambda: LightReasoner(share=2), "share must lie between 0 and 1"),
        (lambda: LightReasoner(batch_size=0), "batch_size must be at least 1"),
        (lambda: LightReasoner(select="all"), "select must be"),
        (lambda: LightReasoner(beta=-1), "must not be below 0"),
        (lambda: lightreasoner._model("amateur", ""), "wanted amateur"),
        (lambda: LightReasoner()(pool.require_daft().from_pydict({"text": ["a"]})), "no column 'prompt'"),
        (lambda: LightReasoner()(pool.require_daft().from_pydict({"prompt": ["a", None]})), "wanted expert"),
    ],
)
def test_bad_input_is_one_line(make, message):
    with pytest.raises(InputError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_an_amateur_with_a_short_memory_is_refused(pair):
    expert, amateur = pair
    rollouts = Encoded((np.ones(amateur.max_length + 1, dtype=np.int64),), (1,), 0)
    with pytest.raises(InputError, match=f"has {amateur.max_length + 1} tokens, and the amateur can read"):
        contrast.steps_of(expert, amateur, rollouts, 0.2)
    with pytest.raises(InputError, match="no questions"):
        SMALL.contrasted(expert, amateur, [])
