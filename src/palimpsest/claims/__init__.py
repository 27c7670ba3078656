"""Claims: one module a paper re-tests its headline claim against its baselines, with a negative control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palimpsest.claims.definition import Claim, ClaimError, Expect, claim

if TYPE_CHECKING:
    from palimpsest.claims.discovery import discover, get, slugs, without_claim
    from palimpsest.claims.results import Result, exit_code, table
    from palimpsest.claims.runner import reproduce, run

_names = {
    **dict.fromkeys(("discover", "get", "slugs", "without_claim"), "discovery"),
    **dict.fromkeys(("Result", "exit_code", "table"), "results"),
    **dict.fromkeys(("reproduce", "run"), "runner"),
}
__all__ = [
    "Claim",
    "ClaimError",
    "Expect",
    "Result",
    "claim",
    "discover",
    "exit_code",
    "get",
    "reproduce",
    "run",
    "slugs",
    "table",
    "without_claim",
]


def __getattr__(name: str) -> Any:  # a claim's module needs the decorator only
    if name in _names:
        import importlib

        return getattr(importlib.import_module(f"palimpsest.claims.{_names[name]}"), name)
    raise AttributeError(f"module 'palimpsest.claims' has no attribute '{name}'")
