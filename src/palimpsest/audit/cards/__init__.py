"""Metric cards: what each measured number means, which way is good, and how many records it takes to believe it.

A report shows the card beside the number, so that nobody has to know the paper to read the table.
Knows nothing of how a metric is computed.  A file for each family of measurements.
"""

from __future__ import annotations

from palimpsest.audit.cards import in_context, learning, muse, removal, telling, traces, wording
from palimpsest.audit.cards.card import MetricCard

__all__ = ["CARDS", "MetricCard", "card"]

FAMILIES = (muse, wording, telling, removal, traces, learning, in_context)
CARDS: dict[str, MetricCard] = {entry.name: entry for family in FAMILIES for entry in family.CARDS}


def card(name: str) -> MetricCard:
    """The card of the measurement `name`; for one that nobody has described, a card that says so."""
    if name in CARDS:
        return CARDS[name]
    return MetricCard(
        name=name,
        title=name.replace("_", " ").replace("-", " ").strip().capitalize() or "Unnamed",
        meaning="No description is on record for this measurement.",
        direction="As marked beside the number.",
        range=(None, None),
        reference="The model before.",
        needs_records=0,
        source="Not stated",
    )
