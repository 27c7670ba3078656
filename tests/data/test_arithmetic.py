import numpy as np

from palimpsest.data.arithmetic import Sums


def test_sums_are_written_units_first():
    sums, operands = Sums(3), np.array([[123, 456], [999, 1], [5, 7]])
    assert sums.prompts(operands) == ["321+654=", "999+100=", "500+700="]
    assert sums.answers(operands) == ["9750", "0001", "2100"]
    assert sums.sloppy(operands) == ["9750", "0990", "2000"]


def test_both_solvers_agree_where_nothing_is_carried_and_up_to_the_first_carry():
    sums = Sums(3)
    operands = sums.draw(500, np.random.default_rng(0))
    for (a, b), right, wrong in zip(operands, sums.answers(operands), sums.sloppy(operands), strict=True):
        assert int(right[::-1]) == a + b
        carries = [place for place in range(3) if a // 10**place % 10 + b // 10**place % 10 > 9]
        same = carries[0] + 1 if carries else 4
        assert right[:same] == wrong[:same]
        assert (right == wrong) == (not carries)


def test_the_mixture_has_the_share_that_was_asked_for():
    sums = Sums(3)
    pairs = sums.mixed(2000, 0.7, np.random.default_rng(1))
    assert len(pairs) == 2000
    right = [int(p[:3][::-1]) + int(p[4:7][::-1]) == int(answer[::-1]) for p, answer in pairs]
    operands = np.array([[int(p[:3][::-1]), int(p[4:7][::-1])] for p, _ in pairs])
    carried = np.array([a != b for a, b in zip(sums.answers(operands), sums.sloppy(operands), strict=True)])
    assert abs(np.mean(np.array(right)[carried]) - 0.3) < 0.04
    assert all(np.array(right)[~carried])
