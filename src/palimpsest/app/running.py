"""Runs started from the page: the command line in a process of its own, watched through what it says on stderr.

Cancelling is Ctrl-C: the step is finished and a checkpoint written, and the same run started again goes on from there.
Nothing here knows of the page.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from palimpsest.core.errors import InputError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_STEP = re.compile(r"(?P<label>[^:]+): step (?P<done>\d+)/(?P<total>\d+), loss (?P<loss>\S+), (?P<rest>.+)")
_SECONDS = "0.5"  # between two lines of progress
_LINES = 400  # that are kept


@dataclass(frozen=True)
class Step:
    """The newest line of progress of one training."""

    label: str
    done: int
    total: int
    rest: str  # speed and time left, in words


@dataclass
class Job:
    """One command in progress or finished."""

    arguments: tuple[str, ...]
    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)  # what it said, without progress
    step: Step | None = None
    losses: dict[str, list[float]] = field(default_factory=dict)  # of each training, as often as it spoke
    cancelled: bool = False
    reader: threading.Thread | None = None

    @property
    def running(self) -> bool:
        return self.process.poll() is None

    @property
    def state(self) -> str:
        code = self.process.poll()
        if code is None:
            return "stopping" if self.cancelled else "running"
        return {0: "done", 130: "cancelled"}.get(code, "failed")

    def cancel(self) -> None:
        """Ask it to stop after the step at hand."""
        if self.running:
            self.cancelled = True
            self.process.send_signal(signal.SIGINT)

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as said:
            for line in said:
                self.hear(line.rstrip("\n"))
        self.process.wait()

    def hear(self, line: str) -> None:
        """Take note of a line from its stderr."""
        found = _STEP.fullmatch(line)
        if not found:
            self.lines = [*self.lines[-_LINES:], line]
            return
        self.step = Step(found["label"], int(found["done"]), int(found["total"]), found["rest"])
        self.losses.setdefault(found["label"], []).append(float(found["loss"]))


class Jobs:
    """The runs of one folder, by name: at most one process each, and few at once."""

    def __init__(self, folder: Path, at_once: int = 2):
        self.folder = folder
        self.at_once = at_once
        self._jobs: dict[str, Job] = {}
        self._lock = threading.Lock()

    def start(self, name: str, arguments: Sequence[str]) -> Job:
        """Start ``palimpsest run ARGUMENTS --out FOLDER/NAME``.

        Raises `InputError` for a name that is not a plain file name, a run of that name in progress, or too many runs.
        """
        where = self.where(name)
        with self._lock:
            running = [other for other, job in self._jobs.items() if job.running]
            if name in running:
                raise InputError(f"the run '{name}' is in progress: cancel it, or choose another name")
            if len(running) >= self.at_once:
                raise InputError(f"{len(running)} runs are in progress ({', '.join(running)}): wait, or cancel one")
            self.folder.mkdir(parents=True, exist_ok=True)
            command = ("run", *arguments, "--out", str(where))
            process = subprocess.Popen(
                [sys.executable, "-m", "palimpsest", *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=os.environ | {"PALIMPSEST_PROGRESS_SECONDS": _SECONDS},
                start_new_session=True,  # a Ctrl-C at the server's terminal is passed on by `stop`, not twice
                preexec_fn=_heed_interrupts if os.name == "posix" else None,
            )
            job = self._jobs[name] = Job(command, process)
            job.reader = threading.Thread(target=job._read, daemon=True, name=f"run {name}")
            job.reader.start()
        return job

    def get(self, name: str) -> Job | None:
        return self._jobs.get(name)

    def where(self, name: str) -> Path:
        """The folder of a run; `InputError` for a name that could lead elsewhere."""
        if not NAME.fullmatch(name or ""):
            raise InputError(f"'{name}': a run's name is letters, digits, dots, dashes and underscores")
        return self.folder / name

    def finished(self) -> list[str]:
        """The runs whose proof is whole, newest first."""
        proofs = sorted(self.folder.glob("*/certificate.json"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
        return [path.parent.name for path in proofs if NAME.fullmatch(path.parent.name)]

    def stop(self) -> None:
        """Cancel every run and wait for their checkpoints."""
        for job in self._jobs.values():
            job.cancel()
        for job in self._jobs.values():
            job.process.wait()
            if job.reader:
                job.reader.join()


def _heed_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a server in the background ignores SIGINT
