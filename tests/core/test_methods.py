from __future__ import annotations

from dataclasses import dataclass

import pytest

from palimpsest.core import methods
from palimpsest.core.errors import InputError
from palimpsest.core.methods import MethodInfo, config_of, info_of, kebab, method


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(methods, "_registry", dict(methods._registry))


def example() -> type:
    @method(verb="forget", paper="muse")
    @dataclass(frozen=True)
    class ExampleMethod:
        """Does one thing.

        And here is why.
        """

        beta: float = 0.1

    return ExampleMethod


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("GradientAscent", "gradient-ascent"),
        ("NPO", "npo"),
        ("SimNPO", "sim-npo"),
        ("IdkDPO", "idk-dpo"),
        ("KGA", "kga"),
    ],
)
def test_class_names_become_commands(name, command):
    assert kebab(name) == command


def test_a_registered_method_is_found_and_made():
    cls = example()
    info = methods.get("forget", "Example_Method")
    assert info == MethodInfo("example-method", "forget", "muse", cls)
    assert info.summary == "Does one thing."
    assert info in methods.all_methods("forget")
    instance = info(beta=0.5)
    assert config_of(instance) == {"beta": 0.5}
    assert info_of(instance) is info


def test_unknown_names_suggest_the_nearest():
    info = MethodInfo("example-method", "forget", "muse", example())
    with pytest.raises(InputError, match="unknown hyper-parameter of example-method 'bta': did you mean beta"):
        info(bta=1)
    with pytest.raises(InputError, match=r"unknown forget method 'exmaple-method': did you mean .*example-method"):
        methods.get("forget", "exmaple-method")
    with pytest.raises(InputError, match="unknown verb"):
        methods.all_methods("forgive")
    with pytest.raises(InputError, match="int is not a registered method"):
        info_of(3)


def test_what_cannot_be_a_method_is_refused():
    @dataclass
    class Mutable:
        pass

    with pytest.raises(TypeError, match="frozen"):
        method(verb="forget", paper="muse")(Mutable)
    with pytest.raises(InputError, match="unknown verb"):
        method(verb="forgive", paper="muse")

    @dataclass(frozen=True)
    class Other:
        pass

    example()
    with pytest.raises(ValueError, match="two methods of forget are called example-method"):
        method(verb="forget", paper="muse", name="example-method")(Other)
