"""Which papers have a claim, and the claim of a paper: its module bears the paper's slug, imported when asked for."""

from __future__ import annotations

import importlib
import pkgutil

from palimpsest import catalog
from palimpsest.claims.definition import Claim, ClaimError
from palimpsest.core.errors import InputError, unknown


def slugs() -> list[str]:
    """The papers that have a claim, by name; imports none of them."""
    import palimpsest.claims

    modules = {module.name for module in pkgutil.iter_modules(palimpsest.claims.__path__)}
    return sorted(modules & {paper.slug for paper in catalog.papers()})


def without_claim() -> list[str]:
    """The papers of the catalogue that have no claim yet, by name."""
    return sorted({paper.slug for paper in catalog.papers()} - set(slugs()))


def get(slug: str) -> Claim:
    """The claim of a paper.  Raises InputError for an unknown paper (with the nearest names) and one with no claim."""
    known = [paper.slug for paper in catalog.papers()]
    name = slug.lower().replace("-", "_")
    if name not in known:
        raise unknown("paper", slug, known)
    if name not in slugs():
        raise InputError(f"the paper '{name}' has no claim yet; papers with one: {', '.join(slugs()) or 'none'}")
    module = importlib.import_module(f"palimpsest.claims.{name}")
    found = [value for value in vars(module).values() if isinstance(value, Claim)]
    if len(found) != 1 or found[0].paper != name:
        raise ClaimError(f"{module.__name__} must hold one claim, of the paper '{name}'")
    return found[0]


def discover() -> dict[str, Claim]:
    """Every claim by its paper's slug.  Imports them all."""
    return {slug: get(slug) for slug in slugs()}
