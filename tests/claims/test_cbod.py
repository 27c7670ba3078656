from __future__ import annotations

import math

from palimpsest.audit.rephrase import Gates, reword
from palimpsest.claims import cbod


def test_one_seed_at_a_small_scale():
    measured = cbod.measure(0, scale=0.08)
    control = cbod.measure(0, mechanism=False, scale=0.08)
    assert set(measured) == set(control)
    assert all(math.isfinite(value) for value in measured.values())
    assert {expect.value for expect in cbod.measure.expectations} <= set(measured)
    for name in ("overfit_tuned", "overfit_skilled", "null_flags"):
        assert control[name] == measured[name]  # the control changes the wording that is compared, not the models


def test_a_rewording_keeps_the_answer():
    task = cbod.Task(3, 80)
    questions = [item.question for item in task.items]
    for mu in (0.5, 1.5):
        said = task.rephrase(questions, mu, 1)
        assert [task._item(text, 0).right for text in said] == [item.right for item in task.items]
        assert said == task.rephrase(questions, mu, 1) != task.rephrase(questions, mu, 2)
    reworded = [task.rephrase(questions, mu, 1) for mu in (0.1, 1.0)]
    changed = [sum(a != b for a, b in zip(said, questions, strict=True)) for said in reworded]
    assert changed[0] < changed[1]
    done = reword(task.items, task.rephrase, 1.0, 0, Gates())
    assert len(done.rows) == len(task.items)  # the audit's gates let all of them pass


def test_the_control_asks_in_no_wording_that_was_trained_on():
    task = cbod.Task(3, 80)
    own = {item.question for item in task.items}
    assert not own & {item.question for item in task.reworded_items}
    assert [item.right for item in task.reworded_items] == [item.right for item in task.items]
