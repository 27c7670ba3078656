"""``palimpsest verify``: is this certificate what it says?"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Verify:
    """Re-check a certificate: its signature, the hash of every file, and the numbers themselves with --rerun."""

    public_key: str | None = None  # fingerprint or PEM file of the key that must have signed
    rerun: bool = False  # audit the models again and compare the numbers


def verify(folder: str, options: Verify) -> int:
    """Print every check; 0 if all passed, else 1."""
    from rich.console import Console

    from palimpsest.jobs.proof import measure_again
    from palimpsest.report import certificate

    checks = certificate.verify(folder, public_key=options.public_key, rerun=measure_again if options.rerun else None)
    console = Console()
    for check in checks:
        mark = "[green]ok  [/]" if check.ok else "[red]FAIL[/]"
        console.print(f"{mark} {check.name}", end="  ", highlight=False)
        console.print(check.detail, markup=False, highlight=False)
    failed = sum(not check.ok for check in checks)
    console.print(f"{len(checks) - failed} of {len(checks)} checks passed", highlight=False)
    return int(failed > 0)
