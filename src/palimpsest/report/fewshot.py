"""The page of a few-shot learner: accuracy with its interval, a test episode's embedding with prototypes, confusions.

Reads the evidence that ``palimpsest learn few-shot`` writes, and knows nothing of any method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.core.errors import InputError
from palimpsest.core.records import Evidence
from palimpsest.report import parts
from palimpsest.report.html import render
from palimpsest.report.words import duration

_WIDTH, _HEIGHT, _EDGE = 720, 460, 36
_COLOURS = ("after", "reference", "good", "bad", "before")
_SHAPES = ("circle", "square", "triangle", "diamond")
_NAME = 40  # characters of a class's name in the picture


def write(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``report.html`` into `folder`; returns its path.  Raises InputError for evidence of another kind."""
    if "episode" not in evidence.extras:
        raise InputError("this evidence is not of a few-shot learner")
    path = Path(folder) / "report.html"
    episode, training = evidence.extras["episode"], evidence.extras["training"]
    main = evidence.measurements[0]
    headline = f"{main.after:.1f}% of the queries answered right"
    test = evidence.data["test_classes"]
    context = {
        "title": f"{headline} \N{MIDDLE DOT} {evidence.method['name']}",
        "kicker": "few-shot report",
        "undertext": evidence.model["after"]["sha256"],
        "headline": headline,
        "sentences": _sentences(evidence),
        "facts": [
            ("Method", evidence.method["name"]),
            ("Episodes", f"{main.n:,}, {episode['way']}-way {episode['shot']}-shot, {episode['queries']} queries each"),
            ("Test classes", f"{test['classes']:,} ({test['rows']:,} examples)"),
            ("Trained on", f"{evidence.data['train_classes']['classes']:,} other classes, {training['way']} ways"),
            ("Time", duration(evidence.seconds)),
        ],
        "rows": [parts.row(m) for m in evidence.measurements],
        "map": _map(evidence.extras["embedding"]) if "embedding" in evidence.extras else None,
        "confusions": evidence.extras.get("confusions") or [],
        "curves": parts.curves(evidence.extras.get("curves") or {}),
        "config": parts.flat(evidence.method["config"]),
        "data": parts.hashed(evidence.data),
        "environment": parts.flat(evidence.environment),
        "width": _WIDTH,
        "height": _HEIGHT,
    }
    render("fewshot.html", context, path)
    return path


def _sentences(evidence: Evidence) -> list[str]:
    """What the number says: its interval, chance, and what meta-training gave."""
    main, episode = evidence.measurements[0], evidence.extras["episode"]
    assert main.after is not None
    assert main.low is not None
    said = [f"95% interval over {main.n:,} episodes: {main.low:.2f} to {main.high:.2f} percent."]
    if episode["nota"]:
        said.append(
            f"{episode['nota']:.0%} of all queries belong to no class: always saying so would be right that often."
        )
    else:
        said.append(f"Guessing would be right in {100 / episode['way']:.0f} percent.")
    if main.before is not None and evidence.method["config"].get("steps"):
        gain = main.after - main.before
        way = "adds" if gain >= 0 else "takes"
        said.append(
            f"Meta-training {way} {abs(gain):.1f} points: without it the same comparison reaches {main.before:.1f}."
        )
    return said


def _map(found: Mapping[str, Any]) -> dict[str, Any]:
    """Positions in pixels; a class has a colour and a shape, so that colour alone never tells."""
    spots = [*found["prototypes"], *(query["at"] for query in found["queries"])]
    spots = [[*spot, 0.0][:2] for spot in spots]  # two classes span one dimension
    lows, highs = ([pick(spot[axis] for spot in spots) for axis in (0, 1)] for pick in (min, max))
    spans = [max(high - low, 1e-9) for low, high in zip(lows, highs, strict=True)]
    scale = min((_WIDTH - 2 * _EDGE) / spans[0], (_HEIGHT - 2 * _EDGE) / spans[1])  # one scale: distances are distances

    def place(spot: list[float]) -> dict[str, float]:
        across, up = [*spot, 0.0][:2]
        x = _WIDTH / 2 + (across - (lows[0] + highs[0]) / 2) * scale
        y = _HEIGHT / 2 - (up - (lows[1] + highs[1]) / 2) * scale
        return {"x": round(x, 1), "y": round(y, 1)}

    names = [parts.cut(name, _NAME) for name in found["names"]]
    kinds = [{"colour": _COLOURS[n % len(_COLOURS)], "shape": _SHAPES[n % len(_SHAPES)]} for n in range(len(names))]
    none = {"colour": "muted", "shape": "cross"}
    queries = []
    for query in found["queries"]:
        label, answer = query["label"], query["answer"]
        kind = kinds[label] if label < len(names) else none
        told = [names[n] if n < len(names) else "none of them" for n in (label, answer)]
        title = f"{told[0]}, answered right" if label == answer else f"{told[0]}, taken for {told[1]}"
        queries.append({**place(query["at"]), **kind, "right": label == answer, "title": title})
    prototypes = [
        {**place(spot), **kind, "name": name}
        for spot, kind, name in zip(found["prototypes"], kinds, names, strict=True)
    ]
    right = sum(query["right"] for query in queries)
    return {
        "queries": queries,
        "prototypes": prototypes,
        "strangers": any(query["colour"] == "muted" for query in queries),
        "caption": f"{right} of these {len(queries)} queries were answered right. The plane is the one in which the "
        f"prototypes lie farthest apart; it shows {found['share']:.0%} of the squared distances between them.",
    }
