"""Runs behind the page: names that stay in their folder, progress that is read, cancelling that is Ctrl-C."""

from __future__ import annotations

import subprocess
import sys

import pytest

from palimpsest.app.running import Job, Jobs
from palimpsest.core.errors import InputError


@pytest.fixture
def job() -> Job:
    process = subprocess.Popen([sys.executable, "-c", "pass"], stderr=subprocess.PIPE, text=True)
    return Job(("run",), process)


@pytest.mark.parametrize("name", ["", "..", "../up", "a/b", "/etc", ".hidden", "a" * 65, "a\0b", "a b"])
def test_a_name_never_leads_out_of_the_folder(name, tmp_path):
    with pytest.raises(InputError, match="a run's name is"):
        Jobs(tmp_path).where(name)


def test_progress_is_told_from_what_is_said(job):
    for line in (
        "training target and reference: 20 s",
        "target: step 10/90, loss 2.5, 1,200 tokens/s, 0 min 20 s left",
        "target: step 20/90, loss 1.5, 1,200 tokens/s, 0 min 18 s left",
        "done in 3 s",
    ):
        job.hear(line)
    assert job.lines == ["training target and reference: 20 s", "done in 3 s"]
    assert job.losses == {"target": [2.5, 1.5]}
    assert job.step is not None
    assert (job.step.done, job.step.total) == (20, 90)
    job.process.communicate()
    assert job.state == "done"


def test_a_run_is_cancelled_as_by_ctrl_c_and_one_name_is_one_run(tmp_path):
    jobs = Jobs(tmp_path / "runs", at_once=1)
    job = jobs.start("first", ["--steps", "100000", "--method", "npo"])
    with pytest.raises(InputError, match="in progress: cancel it"):
        jobs.start("first", [])
    with pytest.raises(InputError, match="1 runs are in progress"):
        jobs.start("second", [])
    job.cancel()
    assert job.state == "stopping"
    jobs.stop()
    assert job.state in ("cancelled", "failed")  # failed: interrupted before our own handler was there
    assert jobs.get("second") is None
    assert jobs.finished() == []


def test_wrong_input_comes_back_as_its_one_line(tmp_path):
    jobs = Jobs(tmp_path / "runs")
    job = jobs.start("wrong", ["--forget", str(tmp_path / "none.jsonl")])
    job.process.wait()
    job.reader.join()
    assert job.state == "failed"
    assert "none.jsonl" in job.lines[-1]
