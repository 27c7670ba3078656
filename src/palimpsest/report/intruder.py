"""The section "What an attacker still gets": the battery's verdict, its table, and its curves as pictures.

Knows the shape of ``extras["attacks"]`` (`audit.findings.Findings.described`) and nothing of attacks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palimpsest.audit.cards import card
from palimpsest.core.records import Evidence
from palimpsest.report import parts, plots
from palimpsest.report.words import MINUS, given, number

MODELS = ("before", "after", "reference")
ACCESS = {
    "api": "asks the model and sees probabilities",
    "finetune-api": "asks the model and may fine-tune it through a service",
    "open-weights": "has the weights",
}
HEADLINES = {
    "removed": "Removed, as far as these attacks reach",
    "suppressed": "Suppressed, not removed",
    "not forgotten": "Not forgotten",
    "collapsed": "Not judged: the model is broken",
    "undecided": "Removed or suppressed: undecided",
}
_CURVES = {  # attack -> what stands along the lower edge, and under what heading
    "relearning": "training step",
    "few_shot_relearning": "training step",
    "benign_relearning": "training step",
    "speed": "training step",
    "probe": "layer",
    "lens": "layer",
}
_TITLES = {"speed": "Relearning the very facts"}


def intruder(evidence: Evidence) -> dict[str, Any] | None:
    """What the template needs; None where no battery was run."""
    found = evidence.extras.get("attacks")
    if not isinstance(found, Mapping) or "verdict" not in found:
        return None
    rows = [_row(row) for row in found.get("table") or () if row.get("attack") != "asked"]
    against = str(found.get("held_against") or "")
    return {
        "headline": HEADLINES.get(str(found["verdict"]), str(found["verdict"])),
        "word": str(found["verdict"]),
        "why": parts.cut(_sentence(str(found.get("why") or "")), 400),
        "access": ACCESS.get(str(found.get("access")), str(found.get("access"))),
        "against": against,
        "avoided": bool(found.get("over_forgotten")),
        "asked": f"{found.get('facts', 0)} facts about {found.get('subjects', 0)} subjects",
        "rule": [str(line) for line in found.get("rule") or ()],
        "table": {"heads": ["Attack", "Before", "After", "Reference", "Brought back", "95% interval"], "rows": rows},
        "figures": _figures(found.get("traces") or {}),
        "skipped": [(_title(name), parts.cut(str(why), 200)) for name, why in (found.get("skipped") or {}).items()],
    }


def _row(row: Mapping[str, Any]) -> list[str]:
    levels = [_percent(row.get(model)) for model in MODELS]
    if not row.get("power"):
        return [_title(row["attack"]), *levels, "no power", ""]
    between = f"{_percent(row['low'])} to {_percent(row['high'])}" if given(row["low"]) and given(row["high"]) else ""
    return [_title(row["attack"]), *levels, _percent(row.get("share")), between]


def _figures(traces: Mapping[str, Any]) -> list[dict[str, Any]]:
    figures = []
    for place, (name, along) in enumerate(_CURVES.items()):
        told = {model: trace for model in MODELS if (trace := (traces.get(name) or {}).get(model))}
        key = "known" if along == "training step" else "layers"
        lines = {model: [100 * float(v) for v in trace[key]] for model, trace in told.items() if trace.get(key)}
        if "after" not in lines or len(lines["after"]) < 2:
            continue
        places = list(told["after"].get("steps") or range(len(lines["after"])))
        title = _title(name)
        figures.append(
            {
                "title": title,
                "direction": f"facts known, in percent, by {along}",
                "svg": parts.markup(plots.trio(places, lines, f"attack{place}", title, along)),
                "heads": [along.capitalize(), *(model.capitalize() for model in lines)],
                "rows": [[f"{at:g}", *(number(line[row]) for line in lines.values())] for row, at in enumerate(places)],
            }
        )
    return figures


def _title(name: str) -> str:
    return _TITLES.get(name) or card(f"attack_{name}").title


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text and not text.endswith(".") else text


def _percent(value: float | None) -> str:
    return f"{value:.0%}".replace("-", MINUS) if given(value) and value is not None else number(None)
