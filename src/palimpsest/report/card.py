"""The model card: ``README.md`` as the Hugging Face hub reads it, with the results in its metadata.

The metadata is made by `huggingface_hub`, so what its parser reads is what was measured.  Knows nothing of how.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import palimpsest
from palimpsest.audit.cards import card
from palimpsest.core.files import write_text
from palimpsest.core.records import Evidence
from palimpsest.report.verdict import reading, verdict
from palimpsest.report.words import DIRECTIONS, given, interval, method_label, missing, number, places_of

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
_TAGS = {"forget": "machine-unlearning", "audit": "machine-unlearning", "learn": "meta-learning"}


def write(evidence: Evidence, folder: str | Path) -> Path:
    """Write ``README.md`` into `folder` (the model's, to be pushed with it); returns its path."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    path = Path(folder) / "README.md"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=False,  # Markdown: `markdown` below escapes
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["markdown"] = markdown
    found = verdict(evidence)
    text = environment.get_template("card.md").render(
        metadata=metadata(evidence).to_yaml().strip(),
        evidence=evidence,
        method=method_label(evidence),
        verdict=found,
        rows=[_row(m) for m in evidence.measurements],
        source=(evidence.model.get("before") or {}).get("source") or "",
        sets=[(name, entry) for name, entry in evidence.data.items() if isinstance(entry, dict)],
        version=palimpsest.__version__,
    )
    write_text(path, text.encode("utf-8", "replace").decode("utf-8"))
    return path


def metadata(evidence: Evidence) -> Any:
    """The card's metadata, a `huggingface_hub.ModelCardData`.  Measurements without a number are left out."""
    from huggingface_hub import EvalResult, ModelCardData

    source = str((evidence.model.get("before") or {}).get("source") or "")
    name = _plain(f"{source.rstrip('/').rsplit('/', 1)[-1] or 'model'} after {method_label(evidence)}")
    results = [
        EvalResult(
            task_type="text-generation",
            task_name=f"{evidence.kind}: {m.group}",
            dataset_type="private",
            dataset_name=f"{m.group} records",
            dataset_config=m.group,  # the hub's parser puts results with the same type and config together
            dataset_args=_sha256(evidence, m.group),
            metric_type=m.name,
            metric_name=card(m.name).title,
            metric_value=m.after,
            verified=False,
        )
        for m in evidence.measurements
        if given(m.after)
    ]
    tags = ["palimpsest", *({_TAGS[evidence.kind]} if evidence.kind in _TAGS else ()), _plain(method_label(evidence))]
    on_hub = _HUB_NAME.fullmatch(source) is not None and not Path(source).exists()
    return ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=list(dict.fromkeys(tags)),
        eval_results=results or None,
        base_model=source if on_hub else None,  # a local path is nobody else's base model
    )


def markdown(value: Any) -> str:
    """Text as itself inside a line or a table cell of Markdown."""
    text = re.sub(r"\s+", " ", str(value)).strip()
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|~#!])", r"\\\1", text)


def _row(m: Any) -> dict[str, str]:
    places = places_of(m)
    between = interval(m.low, m.high, places)
    return {
        "title": card(m.name).title,
        "direction": DIRECTIONS[m.better],
        "before": number(m.before, places),
        "after": number(m.after, places) + (f" ({between})" if between else ""),
        "reference": number(m.reference, places),
        "reading": reading(m) if given(m.after) else missing(m),
        "n": str(m.n or "\N{EM DASH}"),
    }


def _sha256(evidence: Evidence, group: str) -> dict[str, Any] | None:
    entry = evidence.data.get(group)
    return {"sha256": entry["sha256"]} if isinstance(entry, dict) and entry.get("sha256") else None


def _plain(text: str) -> str:
    return re.sub(r"[^\w .()=-]+", "-", text).strip(" -")
