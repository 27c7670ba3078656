import numpy as np
import pytest
import torch

from palimpsest.core.errors import InputError
from palimpsest.curate import Classifier, Perplexity, pool, raters
from palimpsest.models.lm import LM

TEXTS = ["the red dog", "a much longer text about the red dog and the cat", "", None]


@pytest.fixture(scope="module")
def lm():
    return LM.build([text for text in TEXTS if text] * 5, "llama-tiny", vocab_size=300, seed=0)


def classifier(lm, folder, labels):
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=400,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        num_labels=labels,
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("labels", [1, 2, 6])
def test_the_expected_class_of_each_document(lm, tmp_path, labels):
    path = classifier(lm, tmp_path / "model", labels)
    frame = pool.require_daft().from_pydict({"text": TEXTS})
    found = Classifier(model=path, name="clean")(frame).to_pylist()
    model, tokenizer = raters._classifier(path)
    for row in found:
        with torch.inference_mode():
            logits = model(**tokenizer([row["text"] or ""], return_tensors="pt")).logits[0].double()
        expected = logits[0] if labels == 1 else (logits.softmax(0) * torch.arange(labels)).sum()
        assert row["score_clean"] == pytest.approx(float(expected), abs=1e-5)
    batched = Classifier(model=path, batch=1).rate([text or "" for text in TEXTS])
    assert np.allclose(batched, [row["score_clean"] for row in found], atol=1e-5)


def test_surprise_is_the_models_loss(lm, tmp_path):
    lm.save(tmp_path / "lm")
    frame = pool.require_daft().from_pydict({"text": TEXTS[:2]})
    found = Perplexity(model=str(tmp_path / "lm"))(frame).to_pylist()
    assert [row["score_surprise"] for row in found] == pytest.approx(lm.nll(TEXTS[:2]).tolist(), abs=1e-4)


def test_bad_models(tmp_path):
    with pytest.raises(InputError, match="wanted model"):
        Classifier().rate(["x"])
    with pytest.raises(InputError, match="not a sequence classifier"):
        Classifier(model=str(tmp_path)).rate(["x"])
