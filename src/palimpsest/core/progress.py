"""A progress bar on stderr.  On a terminal it moves; in a log it is one line a minute, so that nothing floods.

PALIMPSEST_PROGRESS_SECONDS sets another pace for the lines of a log, for programs that read along.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

_LOG_EVERY = 60.0  # seconds between two lines in a log


class Progress:
    """Steps done, loss, tokens a second and time left.  Silent if `label` is empty.  A context manager."""

    def __init__(self, label: str, total: int, done: int = 0):
        self.label = label
        self.total = total
        self.done = done
        self.tokens = 0
        self._first = done
        self._log_every = float(os.environ.get("PALIMPSEST_PROGRESS_SECONDS", _LOG_EVERY))
        self._bar: Any = None

    def __enter__(self) -> Progress:
        self._start = self._spoke = time.monotonic()
        if self.label and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[numbers]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                refresh_per_second=4,
                speed_estimate_period=120,
            )
            self._task = self._bar.add_task(self.label, total=self.total, completed=self.done, numbers="")
            self._bar.start()
        return self

    def update(self, done: int, loss: float, tokens: int) -> None:
        """`done` steps are done; the latest had `loss`; `tokens` more tokens were seen."""
        self.done = done
        self.tokens += tokens
        if not self.label:
            return
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=self._numbers(loss, now))
        elif now - self._spoke >= self._log_every:
            self._spoke = now
            left = (now - self._start) * (self.total - done) / max(done - self._first, 1)
            line = f"{self.label}: step {done}/{self.total}, {self._numbers(loss, now)}, {_duration(left)} left"
            print(line, file=sys.stderr, flush=True)

    def _numbers(self, loss: float, now: float) -> str:
        return f"loss {loss:.4g}, {self.tokens / max(now - self._start, 1e-9):,.0f} tokens/s"

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"
