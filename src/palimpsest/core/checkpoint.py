"""Checkpoints of a training run: folders ``step-00000100`` that appear whole or not at all, the newest two kept.

A checkpoint holds the trained weights, the optimiser's state and the trace as safetensors, and ``state.json``, which
also says which run wrote it: a run with other hyper-parameters, parameters or data is told the difference and refused.
Knows nothing of losses and batches.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import Optimizer

from palimpsest.core.errors import InputError
from palimpsest.core.files import atomic_folder

KEEP = 2
_BUFFER = "buffer "  # no parameter's name has a space
_NAME = re.compile(r"step-(\d{8})")
_PARTS = ("weights", "optimizer", "trace")


@dataclass(frozen=True)
class Checkpoint:
    """One state of a run.  `run` is what tells this run from others, as JSON-able values."""

    step: int  # steps done
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    trace: dict[str, Tensor] = field(default_factory=dict)  # one float64 a step
    state: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)


def steps(folder: Path) -> list[int]:
    """The steps of the whole checkpoints in `folder`, ascending."""
    if not folder.is_dir():
        return []
    return sorted(int(found[1]) for entry in folder.iterdir() if (found := _NAME.fullmatch(entry.name)))


def place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Write `checkpoint` into `folder` and drop all but the newest two.  `InputError` if the disk is full."""
    target = place(folder, checkpoint.step)
    if target.exists():
        return
    try:
        with atomic_folder(target) as part:
            for name in _PARTS:
                _save(part / f"{name}.safetensors", getattr(checkpoint, name))
            state = {"step": checkpoint.step, **checkpoint.state, "run": checkpoint.run}
            (part / "state.json").write_text(json.dumps(state, indent=1, allow_nan=False), encoding="utf-8")
            for entry in (*part.iterdir(), part):
                _sync(entry)
        _sync(folder)
    except (OSError, SafetensorError) as error:
        if not _is_full(error):
            raise
        kept = steps(folder)
        before = f"the checkpoint of step {kept[-1]} is intact" if kept else "no checkpoint was written before"
        raise InputError(f"{folder}: no space left for the checkpoint of step {checkpoint.step}; {before}") from error
    for step in steps(folder)[:-KEEP]:
        _remove(place(folder, step))


def newest(folder: Path, run: dict[str, Any]) -> Checkpoint | None:
    """The newest checkpoint in `folder`, None if there is none; `InputError` if it is damaged or another run's."""
    found = steps(folder)
    if not found:
        return None
    path = place(folder, found[-1])
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        there = state.pop("run")
        step = state.pop("step")
        if unlike := differences(there, run):
            raise InputError(
                f"{folder} holds the checkpoints of another run ({'; '.join(unlike)}): "
                "give another folder, or delete it to start anew"
            )
        parts = {name: load_file(path / f"{name}.safetensors") for name in _PARTS}
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError) as error:
        raise InputError(f"{path}: damaged checkpoint ({error}); delete it to go on from the one before") from error
    return Checkpoint(step=step, state=state, run=there, **parts)


def differences(there: Any, here: Any, name: str = "", most: int = 4) -> list[str]:
    """What differs between two JSON-able values, as readable pieces: ``lr is 0.1 there, 0.01 here``."""
    if isinstance(there, dict) and isinstance(here, dict):
        keys = list(dict.fromkeys([*there, *here]))
        found = [
            d for key in keys for d in differences(there.get(key), here.get(key), f"{name}.{key}" if name else key)
        ]
        return found if len(found) <= most else [*found[:most], f"and {len(found) - most} more"]
    return [] if there == here else [f"{name} is {_short(there)} there, {_short(here)} here"]


def clean(folder: Path) -> None:
    """Remove what a killed run left half-written in `folder`."""
    if folder.is_dir():
        for entry in folder.iterdir():
            if entry.name.startswith(".step-"):
                shutil.rmtree(entry, ignore_errors=True)


def gather(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights and the buffers, in main memory.  Every process must call it (FSDP2)."""
    weights = {name: _whole(p) for name, p in _trainable(model)}
    return weights | {f"{_BUFFER}{name}": _whole(buffer) for name, buffer in buffers(model)}


def restore(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Undo `gather`."""
    with torch.no_grad():
        for name, p in _trainable(model):
            p.copy_(_like(weights[name], p))
        for name, buffer in buffers(model):
            buffer.copy_(weights[f"{_BUFFER}{name}"])


def gather_optimizer(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by parameter, ``exp_avg.layers.0.weight``.  Every process must call it (FSDP2)."""
    return {
        f"{key}.{name}": _whole(value)
        for name, p in _trainable(model)
        for key, value in optimizer.state.get(p, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, state: dict[str, Tensor]) -> None:
    """Undo `gather_optimizer`."""
    parameters = dict(_trainable(model))
    for label, value in state.items():
        key, name = label.split(".", 1)
        p = parameters[name]
        value = value.clone()  # not a view of the file, for the optimiser goes on writing to it
        optimizer.state[p][key] = _like(value, p) if value.shape == p.shape else value.to(p.device)


def buffers(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What training changes beside the parameters (running statistics): the buffers that a state dict holds."""
    kept = set(model.state_dict(keep_vars=True))
    return [(name, buffer) for name, buffer in model.named_buffers() if name in kept]


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of all weights, frozen ones too: the run of another start is another run."""
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *buffers(model)]:
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def data_fingerprint(batches: Any) -> Any:
    """What a source of batches says about itself: the `sha256` of its data, its plain settings; None if nothing."""
    if isinstance(batches, str | int | float | bool | None):
        return batches
    if isinstance(sha256 := getattr(batches, "sha256", None), str):
        return sha256
    if isinstance(batches, dict):
        return {str(name): data_fingerprint(value) for name, value in batches.items()}
    if is_dataclass(batches):
        return {f.name: data_fingerprint(getattr(batches, f.name)) for f in fields(batches)}
    return None


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def _whole(tensor: Any) -> Tensor:
    """The tensor in main memory; the shards of a distributed one (FSDP2) are gathered."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().contiguous()


def _like(value: Tensor, tensor: Any) -> Tensor:
    """`value` on the device of `tensor`, distributed as it is."""
    value = value.to(tensor.device)
    if hasattr(tensor, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # here, because it takes long to import

        return distribute_tensor(value, tensor.device_mesh, tensor.placements)
    return value


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path)


def _remove(path: Path) -> None:
    hidden = path.with_name(f".{path.name}.old")  # renamed first: a kill in between must not leave half a checkpoint
    os.replace(path, hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors gives the error of the system only as text, and not the same text in all its versions
    return re.search(rf"(os error|code:) ({errno.ENOSPC}|{errno.EDQUOT})\b", str(error)) is not None


def _short(value: Any) -> str:
    if value is None:
        return "not given"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 40 else text[:12] + "..."
