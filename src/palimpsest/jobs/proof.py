"""Evidence becomes a folder that can be handed on: numbers, report, model card and signed certificate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palimpsest.core.records import Evidence
    from palimpsest.models.lm import LM


def write_proof(evidence: Evidence, out: Path, model: LM | None = None) -> None:
    """Write the evidence and everything made from it into `out`, and `model` into ``out/model``.

    Any older proof in the folder is replaced file by file; the certificate, which vouches for all others, comes last.
    """
    from palimpsest.report import card, certificate, html
    from palimpsest.report.verdict import verdict

    (out / "certificate.json").unlink(missing_ok=True)
    if model is not None:
        model.save(out / "model")
    evidence.write(out)
    html.write(evidence, out)
    card.write(evidence, out / "model" if model is not None else out)
    certificate.sign(out)
    print(f"{out / 'report.html'}: {verdict(evidence).headline}", file=sys.stderr)
