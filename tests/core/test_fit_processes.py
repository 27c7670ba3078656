"""Two processes under ``accelerate launch`` (gloo) against one: same losses, resumes and stops; FSDP2 as well."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

PROGRAM = """
    import json, sys
    import numpy as np, torch
    from transformers import LlamaConfig, LlamaForCausalLM
    from palimpsest.core import fit as fit_module
    from palimpsest.core.errors import TrainingDiverged
    from palimpsest.core.losses import nll
    from palimpsest.core.seeds import numpy_rng
    from palimpsest.data.batches import Batches, Encoded

    torch.set_num_threads(1)
    folder = sys.argv[1]
    rng = numpy_rng(0, "test")
    rows = tuple(rng.integers(3, 64, rng.integers(4, 12)) for _ in range(40))
    batches = Batches(Encoded(rows, (1,) * 40, 0), 8)

    def llama():
        torch.manual_seed(0)
        sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
        return LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **sizes))

    def summary(trace):
        weights = [float(p.detach().double().abs().sum()) for p in trace.model.parameters()]
        return dict(losses=trace.losses, logs=trace.logs, weights=weights, tokens=trace.tokens, stopped=trace.stopped)

    def run(loss=nll, **other):
        settings = dict(steps=6, lr=1e-3, warmup=2, progress="", precision="fp32")
        return summary(fit_module.fit(llama(), loss, batches, **{**settings, **other}))

    def lower_half(model, batch):  # a loss that leaves parameters without a gradient
        hidden = model.model(batch.input_ids, output_hidden_states=True).hidden_states[1]
        return (hidden.pow(2) * batch.attention_mask[..., None]).sum() / batch.total_rows

    found = {"plain": run(), "micro": run(micro_batches=2), "part": run(lower_half)}
    found["until"] = run(until=lambda done, model: done == 3)
    run(steps=4, checkpoint=folder + "/run", every=2)
    found["resumed"] = run(checkpoint=folder + "/run", every=2)

    def broken_on_one(model, batch):
        value = nll(model, batch)
        return value * float("nan") if 7 in batch.rows else value  # a row that only one process sees

    try:
        run(broken_on_one, steps=20)
    except TrainingDiverged as error:
        found["diverged"] = error.step

    import torch.distributed as dist
    if dist.is_initialized():
        sharded = fit_module._accelerator

        def fsdp2():  # what Accelerate does on GPUs; on processors it has no FSDP2, torch has
            accelerator = sharded()
            class Sharded:
                is_fsdp2 = True
                def __getattr__(self, name):
                    return getattr(accelerator, name)
                def prepare(self, objective, optimizer):
                    from torch.distributed.fsdp import fully_shard
                    names = {p: n for n, p in objective.named_parameters()}
                    groups = [[names[p] for p in g["params"]] for g in optimizer.param_groups]
                    for layer in objective.model.model.layers:
                        fully_shard(layer)
                    fully_shard(objective)
                    cut = dict(objective.named_parameters())
                    for group, inside in zip(optimizer.param_groups, groups, strict=True):
                        group["params"] = [cut[name] for name in inside]
                    return objective, optimizer
            return Sharded()

        fit_module._accelerator = fsdp2
        found["fsdp2"] = run()
        run(steps=4, checkpoint=folder + "/sharded", every=2)
        found["fsdp2 resumed"] = run(checkpoint=folder + "/sharded", every=2)
        found["fsdp2 until"] = run(until=lambda done, model: done == 3)
        rank = dist.get_rank()
        dist.barrier()
        dist.destroy_process_group()
    else:
        rank = 0
    if rank == 0:
        json.dump(found, open(folder + "/found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What one process found, and what two found; both run at once."""
    started = []
    launch = [str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        folder = tmp_path_factory.mktemp(name)
        program = folder / "program.py"
        program.write_text(textwrap.dedent(PROGRAM))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        run = subprocess.Popen(
            [*command, str(program), str(folder)], stderr=subprocess.PIPE, env=environment, text=True
        )
        started.append((run, folder / "found.json"))
    results = []
    for run, path in started:
        _, said = run.communicate()
        assert run.returncode == 0, said
        results.append(json.loads(path.read_text()))
    return results[0], results[1]


@pytest.mark.parametrize(
    "case", ["plain", "micro", "part", "until", "resumed", "fsdp2", "fsdp2 resumed", "fsdp2 until"]
)
def test_two_processes_train_as_one(case, found):
    one, two = found
    mine, theirs = two[case], one["plain" if case.startswith("fsdp2") else case]
    if case.endswith("until"):
        theirs = one["until"]
    assert mine["losses"] == pytest.approx(theirs["losses"], abs=1e-5)
    assert mine["logs"]["grad_norm"] == pytest.approx(theirs["logs"]["grad_norm"], rel=1e-4)
    assert mine["weights"] == pytest.approx(theirs["weights"], rel=1e-5)
    assert mine["tokens"] == theirs["tokens"]
    assert mine["stopped"] == theirs["stopped"]


def test_the_processes_differ_from_one_in_rounding_and_resume_to_their_own_bits(found):
    one, two = found
    assert two["plain"]["losses"] != one["plain"]["losses"]  # or there were not two
    assert two["resumed"] == two["plain"]
    assert two["fsdp2 resumed"] == two["fsdp2"]


def test_a_loss_that_breaks_in_one_process_stops_both_at_the_same_step(found):
    one, two = found
    assert two["diverged"] == one["diverged"]
