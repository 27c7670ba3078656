"""What changed since a day: new results, verdicts that moved, papers that came out; as text or as an e-mail."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date

from palimpsest.app.standing import Standing
from palimpsest.catalog import Paper
from palimpsest.claims.results import interval_words


@dataclass(frozen=True)
class Change:
    """A claim with a result since that day."""

    paper: Paper
    before: str  # its verdict until then, "" if it had no result
    now: str
    lines: tuple[str, ...]  # each expectation as measured

    @property
    def moved(self) -> bool:
        return self.before != self.now

    @property
    def words(self) -> str:
        if not self.before:
            return f"{self.now}, measured for the first time"
        return f"{self.now}, was {self.before}" if self.moved else f"{self.now}, as before"


@dataclass(frozen=True)
class Digest:
    since: date
    changes: tuple[Change, ...]  # verdicts that moved first
    papers: tuple[Paper, ...]  # that came out in that month or later

    @property
    def title(self) -> str:
        moved = sum(change.moved for change in self.changes)
        results = f"{len(self.changes)} result{'s' * (len(self.changes) != 1)} since {self.since.isoformat()}"
        return f"palimpsest: {results}, {moved or 'no'} new or changed verdict{'s' * (moved != 1)}"

    def text(self) -> str:
        """Plain text for a terminal or a mailer."""
        parts = [self.title, ""]
        for change in self.changes:
            parts += [f"{change.paper.short} ({change.paper.slug}): {change.words}"]
            parts += [*(f"  {line}" for line in change.lines), ""]
        if self.papers:
            parts += ["New papers:", *(f"  {paper.short}: {paper.claim}" for paper in self.papers), ""]
        return "\n".join(parts).rstrip() + "\n"

    def html(self) -> str:
        """The body of an e-mail: no style sheet, no script, no picture, everything escaped."""
        from palimpsest.report.html import environment

        return environment().get_template("digest.html").render(digest=self)


def digest(found: Sequence[Standing], since: date) -> Digest:
    """What changed among `found` on or after the day `since` (UTC)."""
    changes = []
    for one in found:
        earlier = [line for line in one.results if str(line.get("date", ""))[:10] < since.isoformat()]
        if one.result is None or len(earlier) == len(one.results):
            continue
        lines = (f"{e.words}: {interval_words(*e.measured)}, {e.verdict}" for e in one.expected)
        before = str(earlier[-1]["verdict"]) if earlier else ""
        changes.append(Change(one.paper, before, one.verdict, tuple(lines)))
    changes.sort(key=lambda change: (not change.moved, change.paper.slug))
    fresh = [one.paper for one in found if (one.paper.year, one.paper.month) >= (since.year, since.month)]
    return Digest(since, tuple(changes), tuple(fresh))
