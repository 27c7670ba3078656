"""Evidence becomes a folder that can be handed on, and be measured again from what lies in it.

``evidence.json``, ``measurements.csv``, ``records.csv``, ``report.html``, the model with its card, ``job.json`` (what
was asked for), and ``certificate.json``, which vouches for all of them.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.core.errors import InputError
from palimpsest.core.files import write_json

if TYPE_CHECKING:
    from palimpsest.core.records import Evidence
    from palimpsest.models.lm import LM


def write_proof(evidence: Evidence, out: Path, options: Any, model: LM | None = None) -> None:
    """Write the evidence and everything made from it into `out`, and `model` into ``out/model``.

    An older proof in the folder is replaced file by file; its certificate goes first and the new one comes last.
    `options`: the dataclass of the job, kept so that `measure_again` can repeat it.
    """
    from palimpsest.report import card, certificate, html
    from palimpsest.report.verdict import verdict

    (out / "certificate.json").unlink(missing_ok=True)
    if model is not None:
        model.save(out / "model")
    evidence.write(out)
    write_json(out / "job.json", {"job": type(options).__name__, "options": dataclasses.asdict(options)})
    html.write(evidence, out)
    card.write(evidence, out / "model" if model is not None else out)
    certificate.sign(out)
    print(f"{out / 'report.html'}: {verdict(evidence).headline}", file=sys.stderr)


def measure_again(folder: Path) -> Evidence:
    """The evidence of a proof, measured anew: its models and records are read (or made) again as ``job.json`` says.

    Raises `InputError` when the folder does not say how, or what it names is not there.
    """
    from palimpsest.core import methods
    from palimpsest.core.records import Evidence
    from palimpsest.jobs import single
    from palimpsest.jobs.attempt import examined
    from palimpsest.jobs.intruder import attacked
    from palimpsest.jobs.material import prepare
    from palimpsest.jobs.run import Run
    from palimpsest.models.lm import LM

    try:
        job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
        kind, options = job["job"], job["options"]
    except (OSError, KeyError, ValueError) as error:
        raise InputError(f"{folder / 'job.json'}: cannot be read ({error}); it says how to measure again") from None
    stored = Evidence.read(folder)
    described = stored.extras["audit"]
    audit = methods.get("audit", described["name"])(**described["config"])
    if kind == "AuditOptions":
        return single.audited(audit, single.AuditOptions(**options))
    if kind == "BenchmarkOptions":
        return single.examined(audit, single.BenchmarkOptions(**options))
    material = prepare(Run(**options))
    after = LM.load(folder / "model")
    info = methods.get("forget", stored.method["name"])
    found = examined(material, after, info(**stored.method["config"]), stored.method, options.get("folds", 0))
    return attacked(found, after, material) if options.get("attacks") else found
