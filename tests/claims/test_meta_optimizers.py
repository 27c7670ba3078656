"""Meta-optimizers' claim at a small scale: every value is there, and the control switches off what it says."""

from __future__ import annotations

from palimpsest import claims
from palimpsest.claims.meta_optimizers import CLASSES, SHOWN, Language


def test_all_values_are_measured_and_the_control_differs() -> None:
    claim = claims.get("meta_optimizers")
    measured, control = (claim(0, mechanism=mechanism, scale=0.01) for mechanism in (True, False))
    assert measured.keys() == control.keys()
    for name in ("identity_error", "softmax_error", "loss_plain", "loss_previous"):
        assert measured[name] == control[name]
    assert control["loss_momentum"] == control["loss_previous"] != measured["loss_momentum"]
    assert control["update"] != measured["update"]


def test_sequences_follow_a_map_and_tasks_never_the_usual_one() -> None:
    language = Language(0)
    words, labels = language._ids
    classes = {int(word): number for number, row in enumerate(words) for word in row}
    usual = 0
    for ids in language.batch(3)["ids"][:, 1:].reshape(-1, SHOWN + 1, 2).tolist():
        found = {classes[word]: label for word, label in ids}
        assert all(found[classes[word]] == label for word, label in ids)  # one label a class
        assert len(set(found.values())) == len(found)
        usual += all(label == labels[number] for number, label in found.items())
    assert 5 <= usual <= 22
    shown, asked = language.task(0)
    assert len(shown) == SHOWN
    own = {word: language.labels[number] for number in range(CLASSES) for word in language.words[number]}
    assert all(own[text] != label for text, label in [*shown, *asked])
