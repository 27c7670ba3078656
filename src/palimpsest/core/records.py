"""What was measured, and on what: `Measurement` and `Evidence`, and their one form on disk, ``evidence.json``.

Knows nothing of how anything is measured.  Per-record values travel beside a measurement so that two methods can be
compared record by record; on disk they are ``records.csv``.
"""

from __future__ import annotations

import csv
import json
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any, Literal

import palimpsest
from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_file, write_json

Better = Literal["lower", "higher", "zero", "reference"]


@dataclass(frozen=True)
class Measurement:
    """One number before and after, beside the reference's, with the 95% interval of *after*.

    `better` says which way is good: "lower", "higher", near "zero", or near the "reference".
    `None` for `before`, `after` or `reference` means that it could not be measured; `note` then says what it needs.
    """

    name: str
    group: str  # forget, retain, privacy, utility, ...
    before: float | None
    after: float | None
    reference: float | None = None
    low: float | None = None
    high: float | None = None
    n: int = 0  # records measured
    better: Better = "lower"
    note: str = ""
    values: tuple[float, ...] = field(default=(), repr=False, compare=False)  # of *after*, one a record
    before_values: tuple[float, ...] = field(default=(), repr=False, compare=False)
    reference_values: tuple[float, ...] = field(default=(), repr=False, compare=False)


@dataclass(frozen=True)
class Evidence:
    """Everything a report or a certificate needs.  `extras` holds what only some kinds have (examples, curves, ...)."""

    kind: str  # the verb that made `after`
    measurements: tuple[Measurement, ...]
    method: dict[str, Any]  # name, paper, config
    model: dict[str, Any]  # before / after / reference: source, sha256
    data: dict[str, Any]  # forget / retain / ...: rows, sha256
    environment: dict[str, Any] = field(default_factory=lambda: environment())
    seconds: float = 0.0
    extras: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Measurement:
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        rows = [
            {key.name: getattr(m, key.name) for key in fields(Measurement) if not key.name.endswith("values")}
            for m in self.measurements
        ]
        return {
            "palimpsest": palimpsest.__version__,
            "kind": self.kind,
            "method": self.method,
            "model": self.model,
            "data": self.data,
            "measurements": rows,
            "environment": self.environment,
            "seconds": round(self.seconds, 3),
            "extras": self.extras,
        }

    def write(self, folder: str | Path) -> None:
        """Write ``evidence.json``, ``measurements.csv`` and ``records.csv`` into `folder`."""
        folder = Path(folder)
        value = self.to_json()
        columns = [f.name for f in fields(Measurement) if not f.name.endswith("values")]
        _write_csv(folder / "measurements.csv", columns, ([row[c] for c in columns] for row in value["measurements"]))
        lines = (
            [m.name, row, _at(m.before_values, row), _at(m.values, row), _at(m.reference_values, row)]
            for m in self.measurements
            for row in range(max(len(m.values), len(m.before_values), len(m.reference_values)))
        )
        _write_csv(folder / "records.csv", ["measurement", "row", "before", "after", "reference"], lines)
        write_json(folder / "evidence.json", value)

    @staticmethod
    def read(folder: str | Path) -> Evidence:
        """Read ``evidence.json`` (and the per-record values, if they lie beside it)."""
        path = Path(folder) / "evidence.json"
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; wanted a folder written by palimpsest") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not valid JSON ({error})") from None
        try:
            records = _read_records(path.with_name("records.csv"))
            measurements = tuple(Measurement(**row, **records.get(row["name"], {})) for row in value["measurements"])
            names = ("kind", "method", "model", "data", "environment", "seconds", "extras")
            return Evidence(measurements=measurements, **{name: value[name] for name in names})
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: not an evidence file ({error})") from None


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they can change a number."""
    import torch

    names = ("torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "packages": {name: package_version(name) for name in names},
    }


def _at(values: tuple[float, ...], row: int) -> float | str:
    return values[row] if row < len(values) else ""


def _write_csv(path: Path, header: list[str], rows: Iterable[list[Any]]) -> None:
    with atomic_file(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle)
        writer.writerow(header)
        writer.writerows(rows)


def _read_records(path: Path) -> dict[str, dict[str, Any]]:
    columns = {"before": "before_values", "after": "values", "reference": "reference_values"}
    found: dict[str, dict[str, list[float]]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as handle:
            for row in csv.DictReader(handle):
                for column, name in columns.items():
                    if row[column] != "":
                        found.setdefault(row["measurement"], {}).setdefault(name, []).append(float(row[column]))
    return {name: {key: tuple(values) for key, values in value.items()} for name, value in found.items()}
