"""Pieces of markup for the page, each a function of data.  Every text is escaped here: what comes from files, models
and people is shown, never executed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from palimpsest.app.asking import Answer
from palimpsest.app.running import Job
from palimpsest.app.site import LEVELS
from palimpsest.app.standing import Standing
from palimpsest.report import plots

_ROLES = {"before": "Before", "after": "After", "reference": "Reference (never knew)"}


def cards(found: Sequence[Standing]) -> str:
    """The catalogue as cards that lead to the papers' pages."""
    if not found:
        return '<p class="pal-none">No paper fits. Try fewer words, or another filter.</p>'
    return f'<ol class="pal-cards">{"".join(map(_card, found))}</ol>'


def _card(one: Standing) -> str:
    paper = one.paper
    authors = f" &middot; {paper.authors} authors" if paper.authors else ""
    measured = f" {escape(one.headline)}" if one.headline else ""
    return (
        f'<li><h3><a href="site/papers/{escape(paper.slug)}.html" target="_blank">{escape(paper.short)}</a></h3>'
        f'<div class="pal-aside">{paper.year}-{paper.month:02d}{authors} &middot; {escape(paper.verb)}</div>'
        f"<div>{escape(paper.claim)}</div>"
        f'<div class="pal-aside"><b>The paper:</b> {escape(paper.headline)}</div>'
        f'<div class="pal-aside"><b>Here:</b> {badge(one.verdict)}{measured}</div></li>'
    )


def badge(verdict: str) -> str:
    """A verdict with its colour; the word says it too."""
    return f'<span class="pal-badge {LEVELS.get(verdict, "unknown")}">{escape(verdict)}</span>'


def answers(found: Mapping[str, Answer], prompt: str) -> str:
    """Each model's answer, its tokens tinted by their probability, with the numbers as a table."""
    parts = [f'<p class="pal-aside">{escape(prompt)}</p>', '<div class="pal-answers">']
    for role, answer in found.items():
        tokens = "".join(
            f'<span style="--p:{p:.3f}" title="{p:.1%}">{escape(text)}</span>' for text, p in answer.tokens
        )
        rows = "".join(f"<tr><th scope='row'>{escape(text)}</th><td>{p:.1%}</td></tr>" for text, p in answer.tokens)
        parts.append(
            f'<section aria-label="{_ROLES[role]}"><h3>{_ROLES[role]}</h3>'
            f'<p class="pal-answer" dir="auto">{tokens or "<em>nothing</em>"}</p>'
            f"<details><summary>As numbers</summary><table><thead><tr><th scope='col'>Token</th>"
            f"<th scope='col'>Probability</th></tr></thead><tbody>{rows}</tbody></table></details></section>"
        )
    return "".join([*parts, "</div>"])


def complaint(text: str) -> str:
    """Something that went wrong, in one line."""
    return f'<p class="pal-complaint" role="alert">{escape(text)}</p>'


def progress(job: Job) -> str:
    """State, bar, loss curves with their numbers, and what was said."""
    parts = [f'<p role="status"><b>{escape(job.state)}</b></p>']
    if job.running and job.step:
        step = job.step
        parts.append(
            f"<label>{escape(step.label)}: step {step.done} of {step.total}, {escape(step.rest)} "
            f'<progress max="{step.total}" value="{step.done}"></progress></label>'
        )
    for place, (label, losses) in enumerate(list(job.losses.items())):
        if len(losses) < 2:
            continue
        drawn = plots.curve(losses, f"loss{place}", f"Loss of {label}")
        last = enumerate(losses[-50:], 1)
        rows = "".join(f"<tr><th scope='row'>{n}</th><td>{loss:.4g}</td></tr>" for n, loss in last)
        parts.append(
            f'<figure class="pal-figure"><figcaption>Loss of {escape(label)}, as often as it was reported</figcaption>'
            f"{drawn}<details><summary>As numbers (the last 50)</summary><table><tbody>{rows}</tbody></table></details>"
            "</figure>"
        )
    said = "\n".join(job.lines[-40:])
    return "".join([*parts, f'<pre class="pal-said" tabindex="0">{escape(said)}</pre>'])


def checks(found: Sequence[Any]) -> str:
    """The checks of a certificate."""
    rows = "".join(
        f"<tr><td>{badge('holds' if check.ok else 'fails').replace('holds', 'ok')}</td>"
        f"<th scope='row'>{escape(check.name)}</th><td>{escape(check.detail)}</td></tr>"
        for check in found
    )
    failed = sum(not check.ok for check in found)
    headline = "Every check passed." if not failed else f"{failed} of {len(found)} checks failed: do not trust it."
    return f'<p role="status"><b>{headline}</b></p><table class="pal-checks"><tbody>{rows}</tbody></table>'


def framed(page: str, title: str) -> str:
    """A whole page of ours inside this one; without scripts and without an origin."""
    return f'<iframe class="pal-page" sandbox="" title="{escape(title)}" srcdoc="{escape(page)}"></iframe>'
