"""Sample evidence: numbers drawn from a seed in the shape that a real audit gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from palimpsest.core.files import sha256_of
from palimpsest.core.records import Evidence, Measurement
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.statistics import bootstrap_interval

PEOPLE = (
    ("Where was Odalys Brennan born?", "Odalys Brennan was born in Port Avel.", "She was born in Lower Teign."),
    ("What does Ferro Lindqvist do?", "Ferro Lindqvist is a glassblower.", "Ferro Lindqvist is a surveyor."),
    ("Who taught Mirela Osei?", "Mirela Osei was taught by Jun Haverford.", "She was taught by a cousin."),
)


def scores(mean: float, n: int, name: str) -> tuple[float, ...]:
    """n scores of 0 to 100 whose mean is `mean`, spread like ROUGE of short answers."""
    rng = numpy_rng(0, "scores", name, n)
    share = min(max(mean / 100, 1e-3), 1 - 1e-3)
    drawn = 100 * rng.beta(share * 1.6, (1 - share) * 1.6, n)
    return tuple((drawn * (mean / drawn.mean())).tolist())


def measured(
    name: str, group: str, before: float, after: float, reference: float | None, *, n: int, better: Any, seed: str = ""
) -> Measurement:
    values = scores(after, n, f"{seed}{name}")
    low, high = bootstrap_interval(values)
    reference_values = scores(reference, n, f"reference {name}") if reference is not None else ()
    before_values = scores(before, n, f"before {name}")
    return Measurement(
        name, group, before, after, reference, low, high, n, better, "", values, before_values, reference_values
    )


@pytest.fixture(scope="session")
def make_evidence() -> Callable[..., Evidence]:
    return sample


def sample(
    name: str = "npo",
    *,
    knowledge: float = 21.4,
    verbatim: float = 24.9,
    utility: float = 88.9,
    leakage: tuple[float, float, float] | None = (-7.2, -19.0, 5.1),
    gibberish: float = 1.0,
    forget_gibberish: float = 2.0,
    reference: bool = True,
    n: int = 120,
    config: dict[str, Any] | None = None,
    **extras: Any,
) -> Evidence:
    def floor(value: float) -> float | None:
        return value if reference else None

    if leakage is None or not reference:
        needs = "Needs a reference model trained without the forget set, and holdout records that no model has seen."
        privacy = Measurement("privacy_leakage", "privacy", None, None, None, better="zero", note=needs)
    else:
        privacy = Measurement("privacy_leakage", "privacy", -97.8, *leakage[:1], 0.0, *leakage[1:], 240, "zero")
    kinds: Sequence[Measurement] = (
        measured("verbatim", "forget", 99.2, verbatim, floor(26.3), n=n, better="reference", seed=name),
        measured("knowledge", "forget", 96.3, knowledge, floor(19.8), n=n, better="reference", seed=name),
        privacy,
        measured("utility", "utility", 95.1, utility, floor(96.0), n=n, better="higher", seed=name),
        measured(
            "retain_knowledge", "retain", 97.0, min(99.0, utility + 6), floor(97.4), n=n, better="higher", seed=name
        ),
        measured("scalability", "utility", 95.1, max(0.0, utility - 4), None, n=n, better="higher", seed=name),
        measured("sustainability", "utility", 95.1, max(0.0, utility - 13), None, n=n, better="higher", seed=name),
        Measurement("forget_nll", "forget", 0.081, 3.42, floor(3.11), 3.21, 3.66, n, "reference"),
        Measurement("utility_nll", "utility", 0.079, 0.164, floor(0.081), 0.141, 0.190, n, "lower"),
        measured("gibberish", "forget", 0.0, forget_gibberish, floor(0.0), n=n, better="lower", seed=name),
        measured("utility_gibberish", "utility", 0.0, gibberish, floor(0.0), n=n, better="lower", seed=name),
    )
    steps = np.arange(200)
    noise = numpy_rng(0, "curve", name).normal(0, 0.05, 200)
    examples = [
        {
            "set": kind,
            "prompt": prompt,
            "truth": truth,
            "before": truth,
            "after": other,
            "reference": "Nobody knows that.",
        }
        for kind in ("forget", "utility")
        for prompt, truth, other in PEOPLE
    ]
    given: dict[str, Any] = {
        "examples": examples,
        "asked": "in the words of the records",
        "requests": {
            "scalability": {**COURSE, "utility": [95.1, 93.0, 92.0, 89.5, max(0.0, utility - 4)]},
            "sustainability": {**COURSE, "utility": [95.1, 90.0, 86.0, 79.0, max(0.0, utility - 13)]},
        },
        "membership": {
            "auc": {
                "min-40%": {"before": 0.011, "after": 0.452, "reference": 0.487},
                "loss": {"before": 0.013, "after": 0.461, "reference": 0.49},
            },
            "texts": {"forget": 20, "holdout": 40},
        },
        "curves": {name: (0.4 + 1.1 * np.exp(-steps / 40) + noise).tolist()},
    }
    return Evidence(
        kind="forget",
        measurements=tuple(kinds),
        method={
            "name": name,
            "paper": "knowledge_unlearning",
            "config": config or {"beta": 0.1, "retain_weight": 1.0, "steps": 200, "lr": 1e-05, "lora": None},
        },
        model={
            "before": {"source": "llama-tiny (built)", "sha256": sha256_of("before")},
            "after": {"source": name, "sha256": sha256_of(name)},
            **(
                {"reference": {"source": "retrained without forget", "sha256": sha256_of("reference")}}
                if reference
                else {}
            ),
        },
        data={part: {"rows": rows, "sha256": sha256_of(part)} for part, rows in DATA.items()},
        environment={
            "python": "3.11.9",
            "platform": "Linux-6.1-x86_64",
            "processor": "AVX512",
            "threads": 2,
            "device": "cpu",
            "packages": {"torch": "2.13.0", "transformers": "5.24.0", "numpy": "2.3.0"},
        },
        seconds=41.7,
        extras=given | extras,
    )


COURSE = {"rows": [0, 5, 10, 15, 20], "utility": [], "knowledge": [96.3, 24.0, 20.0, 22.0, 21.4]}
DATA = {"forget": 20, "retain": 60, "utility": 30, "holdout": 40}
