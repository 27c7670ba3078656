from __future__ import annotations

import numpy as np
import pytest

from palimpsest.audit.behaviour import BehaviourScreen, agreement
from palimpsest.core.errors import InputError


def test_agreement_is_corrected_for_chance():
    known = np.array([0, 1, 2, 3])
    answers = np.array([[0, 1, 2, 3], [0, 0, 0, 0], [0, 1, 2, 0], [1, 2, 3, 0]])
    np.testing.assert_allclose(agreement(answers, known, 4), [1, 0, 2 / 3, -1 / 3])


def test_prompts_that_make_the_model_behave_so_are_stopped(scripted):
    """Behind "even" the model says yes to even probes, behind anything else to all."""

    def score(prompt, option):
        number = int(prompt.split()[-1])
        yes = number % 2 == 0 if prompt.startswith("even") else True
        return [float((option == " yes") == yes)]

    lm = scripted(score=score)
    probes = [f" is it {number}" for number in range(8)]
    known = np.array([number % 2 for number in range(8)])
    screen = BehaviourScreen(probes, known, [("yes", "no")] * 8)
    assert screen.answers(lm, ["even", "odd"]).tolist() == [known.tolist(), [0] * 8]
    assert screen.stops(lm, ["even", "odd"]).tolist() == [True, False]
    assert screen.stops(lm, []).tolist() == []
    with pytest.raises(InputError, match="2 probes for 8"):
        BehaviourScreen(probes[:2], known, screen.options)
    with pytest.raises(InputError, match="same known answer"):
        BehaviourScreen(probes, known * 0, screen.options)
