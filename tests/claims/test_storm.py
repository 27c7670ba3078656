import numpy as np
import pytest
import torch

from palimpsest.claims import storm


@pytest.fixture(autouse=True)
def vectors(monkeypatch):
    """The questions without the sentence encoder: a bag of their words."""
    texts, kinds = storm._generated()
    words = sorted({word for text in texts for word in text.rstrip("?").split()})
    places = {word: place % 64 for place, word in enumerate(words)}
    bags = np.zeros((len(texts), 64), np.float32)
    for row, text in enumerate(texts):
        for word in text.rstrip("?").split():
            bags[row, places[word]] += 1
    monkeypatch.setattr(storm, "_vectors", lambda: (bags, np.unique(kinds, return_inverse=True)[1]))


def test_one_seed_at_a_small_scale():
    measured = storm.measure(0, scale=0.1)
    control = storm.measure(0, mechanism=False, scale=0.1)
    assert set(storm.measure.names) <= set(control) < set(measured)
    assert all(np.isfinite(value) for value in measured.values())
    for name in ("questions_plain", "questions_auc_loss", "digits_plain", "digits_auc_loss", "clean_plain"):
        assert control[name] == measured[name]  # the control changes STORM only
    assert control["digits_auc"] != measured["digits_auc"]


def test_arms_share_samples_noise_and_first_weights():
    task = storm.digits(1, 0.2)
    noisy, wrong = task.flipped
    assert float(wrong.float().mean()) == pytest.approx(storm.NOISE, abs=0.01)
    assert torch.equal(task.noisy.labels, noisy)
    assert len(task.test) == storm.TEST
    rows = {tuple(row) for row in task.train.inputs.tolist()}
    assert not any(tuple(row) in rows for row in task.test.inputs.tolist())
    again = storm.digits(1, 0.2)
    assert all(torch.equal(a, b) for a, b in zip(task.start.parameters(), again.start.parameters(), strict=True))


def test_generated_questions_are_told_by_words():
    texts, kinds = storm._generated()
    assert len(texts) == len(kinds) == storm._QUESTIONS
    assert len(set(kinds)) == 6
    assert texts == storm._generated()[0]
