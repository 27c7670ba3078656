"""Forms are the dataclass: every hyper-parameter with its default, and only what was changed becomes a flag."""

from __future__ import annotations

import pytest

from palimpsest.app.forms import entries, settings
from palimpsest.core import methods
from palimpsest.core.errors import InputError
from palimpsest.jobs.compare import settings as parsed

FORGET = methods.all_methods("forget")


@pytest.mark.parametrize("info", FORGET, ids=lambda info: info.name)
def test_defaults_need_no_flag(info):
    assert settings(info, {entry.name: entry.default for entry in entries(info)}) == []


def test_what_was_changed_is_what_the_command_line_reads():
    npo = methods.get("forget", "npo")
    flags = settings(npo, {"beta": 0.5, "retain_loss": "kl", "batch_size": 16.0, "gamma": 1.0})
    assert flags == ["--set", "batch_size=16", "retain_loss=kl", "beta=0.5"]
    assert parsed([npo], flags[1:]) == {"beta": 0.5, "retain_loss": "kl", "batch_size": 16}
    kinds = {entry.name: entry.kind for entry in entries(npo)}
    assert kinds["retain_loss"] == "choice"
    assert "lr" not in kinds  # the page has its own field for it
    with pytest.raises(InputError, match="beta is empty"):
        settings(npo, {"beta": None})


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["beta"], "wanted NAME=VALUE"),
        (["bet=1"], "unknown hyper-parameter of npo 'bet': did you mean beta?"),
        (["beta=x"], "wanted a number"),
        (["batch_size=1.5"], "wanted a whole number"),
    ],
)
def test_wrong_settings_are_one_line(given, said):
    with pytest.raises(InputError, match=said.replace("?", r"\?")):
        parsed([methods.get("forget", "npo")], given)


def test_settings_are_of_one_method():
    two = [methods.get("forget", "npo"), methods.get("forget", "grad-diff")]
    with pytest.raises(InputError, match="for one method, not for 2"):
        parsed(two, ["beta=1"])
    assert parsed(two, []) == {}
