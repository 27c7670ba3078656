"""How long a search takes, at the size of the catalogue and at 10,000 papers, and how long until the first card.

    python benchmarks/page_latency.py

Wanted: at most 150 ms a search, 300 ms among 10,000 papers, 2 s to the first card.
"""

from __future__ import annotations

import shutil
import tempfile
import time
import urllib.request
from dataclasses import replace
from statistics import median

from common import report
from palimpsest import catalog
from palimpsest.app.server import Ui, serving
from palimpsest.catalog import ranking

QUERIES = (
    "make a model forget a book",
    "few examples of each class",
    "noisy labels",
    "what a model still knows",
    "DNA",
)
ROUNDS = 5


def search() -> float:
    """Median seconds of a search, the first of each size left out (it fills the cache)."""
    catalog.search(QUERIES[0], k=12)
    seconds = []
    for query in QUERIES * ROUNDS:
        began = time.perf_counter()
        catalog.search(query, k=12)
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def first_card(url: str) -> float | None:
    """Seconds until a browser shows the first card; None where there is no browser."""
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        chromium = None
    if chromium is None:
        return None
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        began = time.perf_counter()
        page.goto(url)
        page.wait_for_selector(".pal-cards h3")
        taken = time.perf_counter() - began
        browser.close()
    return taken


def main() -> None:
    few = search()
    own = catalog.papers()
    many = [replace(own[n % len(own)], slug=f"p{n}", short=f"{own[n % len(own)].short} {n}") for n in range(10_000)]
    ranking.papers = lambda: many
    among_many = search()
    ranking.papers = catalog.papers
    with tempfile.TemporaryDirectory() as runs, serving(Ui(runs=runs)) as up:
        urllib.request.urlopen(up.url).close()
        painted = first_card(up.url)
    report("page: seconds of a search", 0.15, few, at_most=True, papers=float(len(own)))
    report("page: seconds of a search among 10,000 papers", 0.3, among_many, at_most=True)
    if painted is not None:
        report("page: seconds to the first card", 2.0, painted, at_most=True)


if __name__ == "__main__":
    main()
