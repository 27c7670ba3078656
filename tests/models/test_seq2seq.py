from __future__ import annotations

import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.data.batches import IGNORE
from palimpsest.models.seq2seq import Seq2Seq, marginal_logprobs, mixed

TEXTS = ["the cat sits on the mat", "a dog runs to the red house", "answer: cat", "answer: dog"]


@pytest.fixture(scope="module")
def reader() -> Seq2Seq:
    return Seq2Seq.build(TEXTS, width=16, layers=1, heads=2, vocab_size=300, seed=1)


def by_hand(logits, log_weights, labels, marginal):
    found = []
    for one, weights, wanted in zip(logits, np.exp(log_weights), labels, strict=True):
        places = [place for place, label in enumerate(wanted) if label != IGNORE]
        p = np.exp(one) / np.exp(one).sum(-1, keepdims=True)  # (K, L, V)
        each = np.array([[p[k, place, wanted[place]] for place in places] for k in range(len(one))])
        if marginal == "token":
            found.append(sum(np.log((weights[:, None] * each).sum(0))))
        else:
            found.append(np.log((weights * each.prod(1)).sum()))
    return np.array(found)


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_the_mixture_by_hand_and_its_gradient(marginal):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(2, 3, 4, 5))
    weights = rng.dirichlet(np.ones(3), size=2)
    weights[1] = [0.0, 0.4, 0.6]
    labels = np.array([[1, 4, 0, 2], [3, 3, IGNORE, IGNORE]])
    with np.errstate(divide="ignore"):
        log_weights = np.log(weights)
    given = torch.from_numpy(logits).requires_grad_()
    found = mixed(given, torch.from_numpy(log_weights), torch.from_numpy(labels), marginal)
    np.testing.assert_allclose(found.detach().numpy(), by_hand(logits, log_weights, labels, marginal), rtol=1e-10)
    weights_given = torch.from_numpy(log_weights)
    assert torch.autograd.gradcheck(lambda x: mixed(x, weights_given, torch.from_numpy(labels), marginal), (given,))
    found.sum().backward()
    assert given.grad[1, 0].abs().max() == 0  # a document of no weight teaches nothing
    assert given.grad[1, :, 2:].abs().max() == 0  # nor does what is behind the answer


@pytest.mark.parametrize("marginal", ["token", "sequence"])
def test_one_document_is_the_model_itself_and_equal_ones_are_one(reader, marginal):
    labels = reader.targets(["cat", "red house"])
    alone = reader.read([["a dog. "], ["the mat. "]], ["who sits?", "where to?"], 64)
    with torch.no_grad():
        found = marginal_logprobs(reader.model, alone, torch.zeros(2, 1), labels, marginal)
        for line in range(2):
            row = {name: value[line] for name, value in alone.items()}
            loss = reader.model(**row, labels=labels[line : line + 1]).loss
            assert -found[line].item() / (labels[line] != IGNORE).sum().item() == pytest.approx(loss.item(), rel=1e-5)
        twice = reader.read([["a dog. "] * 2, ["the mat. "] * 2], ["who sits?", "where to?"], 64)
        weights = torch.tensor([[0.3, 0.7], [0.5, 0.5]]).log()
        torch.testing.assert_close(marginal_logprobs(reader.model, twice, weights, labels, marginal), found)


def test_a_document_gives_way_to_the_question(reader):
    question = "who sits on the red mat?"
    length = len(reader.ids(question))
    read = reader.read([["the cat sits on the mat " * 9, "a"], ["a dog", ""]], [question, question], length + 4)
    assert read["input_ids"].shape == (2, 2, length + 4)
    for line in read["input_ids"].flatten(0, 1).tolist():
        row = [token for token in line if token != reader.tokenizer.pad_token_id]
        assert row[-1] == reader.tokenizer.eos_token_id
        assert tuple(row[-1 - length : -1]) == reader.ids(question)


def test_what_is_written_is_the_likeliest_token_by_token(reader):
    read = reader.read([["a dog. ", "the mat. "]], ["who?"], 64)
    weights = torch.tensor([[0.4, 0.6]]).log()
    (written,) = reader.generate(read, weights, most=3)
    ids: list[int] = []
    with torch.no_grad():
        for _ in range(3):
            scores = [
                marginal_logprobs(reader.model, read, weights, torch.tensor([[*ids, token]])).item()
                for token in range(len(reader.tokenizer))
            ]
            ids.append(int(np.argmax(scores)))
            if ids[-1] == reader.tokenizer.eos_token_id:
                break
    assert written == reader.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_other_families_and_the_disk(reader, tmp_path):
    from transformers import BartConfig, BartForConditionalGeneration

    tokenizer = reader.tokenizer
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        max_position_embeddings=64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    bart = Seq2Seq(BartForConditionalGeneration(config).eval(), tokenizer)
    labels = reader.targets(["cat", "red house"])
    for number, one in enumerate((reader, bart)):
        one.save(tmp_path / str(number))
        loaded = Seq2Seq.load(tmp_path / str(number))
        read = one.read([["a dog. "], ["the mat. "]], ["who?", "where to?"], 32)
        with torch.no_grad():
            before, after = (marginal_logprobs(x.model, read, torch.zeros(2, 1), labels) for x in (one, loaded))
        torch.testing.assert_close(before, after, rtol=0, atol=0)
        assert one.generate(read, torch.zeros(2, 1), most=4) == loaded.generate(read, torch.zeros(2, 1), most=4)


def test_bad_input(reader, tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    for bad, message in [
        (lambda: Seq2Seq.load(tmp_path), "only pickled weights"),
        (lambda: Seq2Seq.load(tmp_path / "missing"), "no encoder-decoder"),
        (lambda: Seq2Seq.build(TEXTS, width=10, heads=4), "multiple of heads"),
        (lambda: reader.targets(["cat", "the cat sits on the mat " * 20], 32), "at most 32 are written"),
    ]:
        with pytest.raises(InputError, match=message):
            bad()
