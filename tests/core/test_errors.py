from __future__ import annotations

import pytest

from palimpsest.core.errors import InputError, MissingExtra, TrainingDiverged, unknown


def test_an_unknown_name_suggests_the_nearest():
    assert str(unknown("method", "Nop", ["npo", "simnpo", "rmu"])).startswith("unknown method 'Nop': did you mean npo")
    assert str(unknown("method", "xyzzy", {"b", "a"})) == "unknown method 'xyzzy': known: a, b"


def test_a_missing_extra_says_how_to_get_it():
    with pytest.raises(InputError, match=r"pip install 'palimpsest\[cluster\]'"):
        raise MissingExtra("ray", "cluster")


def test_divergence_is_told_in_one_line():
    error = TrainingDiverged(7, 20, "the loss is nan", (6, 1.25), 0.01, "; kept")
    assert (error.step, error.lr) == (7, 0.01)
    assert str(error).startswith("training diverged at step 7 of 20: the loss is nan (last finite loss 1.25 at step 6;")
    assert "\n" not in str(error)
    assert "no finite loss before it" in str(TrainingDiverged(1, 2, "x", None, 0.1))
