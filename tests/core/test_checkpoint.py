"""Checkpoints: whole or not there, refused for another run, and bit-equal after any kill."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from palimpsest.core import checkpoint as checkpoints
from palimpsest.core.checkpoint import Checkpoint
from palimpsest.core.errors import InputError
from palimpsest.core.fit import fit
from palimpsest.data.batches import Batches, Encoded, Together


def network(width: int = 8) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width), nn.Dropout(0.2), nn.Linear(width, 1))


def regression(step: int) -> dict[str, torch.Tensor]:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
    return {"x": x, "y": x.sum(1, keepdim=True)}


def squared(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return ((model(batch["x"]) - batch["y"]) ** 2).mean()


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_resumes_to_the_very_same_bits_with_running_statistics(tmp_path):
    settings = {"lr": 0.05, "warmup": 3, "progress": "", "every": 4}
    whole = fit(network(), squared, regression, steps=20, **settings)
    fit(network(), squared, regression, steps=9, checkpoint=tmp_path, **settings)
    assert names(tmp_path) == ["step-00000008", "step-00000009"]
    resumed = fit(network(), squared, regression, steps=20, checkpoint=tmp_path, **settings)
    assert names(tmp_path) == ["step-00000016", "step-00000020"]
    assert (resumed.losses, resumed.logs, resumed.tokens) == (whole.losses, whole.logs, whole.tokens)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def test_a_finished_run_is_read_back_without_a_step(tmp_path):
    def no_batches(step: int):
        raise AssertionError("no step should be taken")

    settings = {"steps": 5, "lr": 0.05, "checkpoint": tmp_path, "progress": ""}
    first = fit(network(), squared, regression, **settings)
    again = fit(network(), squared, no_batches, **settings)
    assert again.losses == first.losses
    assert torch.equal(again.model[0].weight, first.model[0].weight)


def test_a_run_stopped_by_its_rule_stays_stopped(tmp_path):
    settings = {"steps": 9, "lr": 0.05, "checkpoint": tmp_path, "progress": ""}
    fit(network(), squared, regression, until=lambda done, model: done == 3, **settings)
    again = fit(network(), squared, regression, until=lambda done, model: False, **settings)
    assert (again.steps, again.stopped) == (3, "until")
    assert fit(network(), squared, regression, **settings).steps == 9


def tokens(seed: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    ids = tuple(torch.randint(1, 10, (6,), generator=generator).numpy() for _ in range(8))
    return Batches(Encoded(ids, (1,) * 8, pad_id=0), batch_size=4)


class Table(nn.Module):
    def __init__(self, seed: int = 0, rows: int = 10) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(rows, 10)

    def nll(self, tree) -> torch.Tensor:
        batch = tree["forget"]
        return nn.functional.cross_entropy(self.table(batch.input_ids[:, :-1]).flatten(0, 1), batch.targets.flatten())


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"lr": 0.2}, "lr is 0.1 there, 0.2 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"clip": None}, "clip is 1.0 there, not given here"),
        ({"identity": {"beta": 0.2}}, "identity.beta is 0.1 there, 0.2 here"),
        ({"model": Table(seed=5)}, "start is "),
        ({"model": Table(rows=12)}, "parameters.table.weight is [10, 10] there, [12, 10] here"),
        ({"batches": Together(forget=tokens(1))}, "data.sources.forget.encoded is "),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(changed, said, tmp_path):
    def run(model=None, batches=None, **other):
        settings = {"steps": 4, "lr": 0.1, "identity": {"beta": 0.1}, "checkpoint": tmp_path, "progress": "", **other}
        return fit(model or Table(), Table.nll, batches or Together(forget=tokens(0)), **settings)

    run()
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        run(**changed)
    assert "\n" not in str(caught.value)
    assert run().steps == 4


def test_a_falling_schedule_belongs_to_its_number_of_steps(tmp_path):
    settings = {"lr": 0.1, "schedule": "linear", "checkpoint": tmp_path, "progress": ""}
    fit(network(), squared, regression, steps=4, **settings)
    with pytest.raises(InputError, match="steps is 4 there, 8 here"):
        fit(network(), squared, regression, steps=8, **settings)


def test_a_checkpoint_past_the_wanted_steps_is_refused(tmp_path):
    fit(network(), squared, regression, steps=4, lr=0.1, checkpoint=tmp_path, progress="")
    with pytest.raises(InputError, match="step 4, past steps=2"):
        fit(network(), squared, regression, steps=2, lr=0.1, checkpoint=tmp_path, progress="")


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named(file, tmp_path):
    fit(network(), squared, regression, steps=4, lr=0.1, checkpoint=tmp_path, progress="")
    damaged = tmp_path / "step-00000004" / file
    damaged.write_bytes(damaged.read_bytes()[:20])
    with pytest.raises(InputError, match="step-00000004: damaged checkpoint"):
        fit(network(), squared, regression, steps=4, lr=0.1, checkpoint=tmp_path, progress="")


def test_differences_are_cut_short():
    here = {str(n): n for n in range(9)}
    said = checkpoints.differences({}, here)
    assert said[0] == "0 is not given there, 0 here"
    assert said[-1] == "and 5 more"
    assert checkpoints.differences(here, json.loads(json.dumps(here))) == []


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 300 kB."""
    folder = tmp_path / "small"
    folder.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_keeps_the_checkpoint_before(small_disk):
    settings = {"lr": 0.1, "every": 2, "progress": "", "checkpoint": small_disk / "run"}
    fit(network(), squared, regression, steps=2, **settings)
    disk = os.statvfs(small_disk)
    (small_disk / "ballast").write_bytes(bytes(disk.f_bavail * disk.f_bsize - 8192))  # room for two files, not for four
    with pytest.raises(InputError, match=r"no space left .* step 4; the checkpoint of step 2 is intact") as caught:
        fit(network(), squared, regression, steps=6, **settings)
    assert "\n" not in str(caught.value)
    assert names(small_disk / "run") == ["step-00000002"]
    (small_disk / "ballast").unlink()
    resumed = fit(network(), squared, regression, steps=6, **settings)
    assert resumed.losses == fit(network(), squared, regression, steps=6, lr=0.1, progress="").losses


@pytest.mark.parametrize("file", ["weights", "optimizer", "trace"])
def test_a_disk_that_fills_while_safetensors_writes_is_a_full_disk(file, small_disk):
    big = {"w": torch.zeros(100_000)}
    parts = {name: big if name == file else {"w": torch.zeros(1)} for name in ("weights", "optimizer", "trace")}
    with pytest.raises(InputError, match=r"no space left .* no checkpoint was written before"):
        checkpoints.write(small_disk / "run", Checkpoint(1, **parts))
    assert names(small_disk / "run") == []


# One process trains; each child of it is a run that is killed at another moment.  They share the imports by forking.
KILLED = """
    import os, signal, sys
    from pathlib import Path
    import torch
    from torch import nn
    import palimpsest.core.checkpoint as checkpoints
    import palimpsest.core.files as files
    from palimpsest.core.fit import fit
    from safetensors.torch import save_file
    sys.path.insert(0, {tests!r})
    from test_checkpoint import network, regression, squared

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    settings = dict(steps=24, lr=0.05, every=3, warmup=5, schedule="cosine", progress="")

    def die(*_, **__):
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_on(module, name, call, after=False):
        real, calls = getattr(module, name), []
        def counted(*a, **k):
            calls.append(1)
            if len(calls) == call and not after:
                die()
            result = real(*a, **k)
            if len(calls) == call:
                die()
            return result
        setattr(module, name, counted)

    def loss_dying_at(step):
        calls = []
        def loss(model, batch):
            calls.append(1)
            return die() if len(calls) == step else squared(model, batch)
        return loss

    moments = {{
        "in a loss before any checkpoint": lambda: loss_dying_at(2),
        "between the files of the first checkpoint": lambda: kill_on(checkpoints, "_save", 2),
        "in a loss": lambda: loss_dying_at(5),
        "before a checkpoint is named": lambda: kill_on(os, "replace", 1),
        "after a checkpoint is named": lambda: kill_on(os, "replace", 1, after=True),
        "after the last file, before state.json": lambda: kill_on(checkpoints, "_save", 6, after=True),
        "while an old checkpoint is taken away": lambda: kill_on(checkpoints.shutil, "rmtree", 3),
        "in the update": lambda: kill_on(torch.optim.AdamW, "step", 4),
    }}
    whole = fit(network(), squared, regression, **settings)  # first, so that the children need not import anything
    for moment, arrange in moments.items():
        child = os.fork()
        if child == 0:
            fit(network(), arrange() or squared, regression, checkpoint=folder, **settings)
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(moment, ended, checkpoints.steps(folder), flush=True)
    resumed = fit(network(), squared, regression, checkpoint=folder, **settings)
    assert [p.name for p in sorted(folder.iterdir())] == ["step-00000021", "step-00000024"], list(folder.iterdir())
    assert resumed.losses == whole.losses and resumed.logs == whole.logs
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
    print("equal")
"""


def test_killed_at_any_moment_a_run_goes_on_to_the_same_bits(tmp_path):
    program = textwrap.dedent(KILLED).format(tests=str(Path(__file__).parent))
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.stdout.splitlines()[-1:] == ["equal"], ran.stdout + ran.stderr
    ends = [int(line.split(" [")[0].rsplit(" ", 1)[1]) for line in ran.stdout.splitlines()[:-1]]
    assert ends == [-9] * 8, ran.stdout
