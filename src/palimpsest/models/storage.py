"""Models on disk: safetensors only, whole or not at all, and nothing loaded by halves.

A folder is a transformers model or a PEFT adapter with its tokenizer.  Pickled weights are refused (they can run code),
and so is a checkpoint that does not fit the model in every key.  Knows nothing of what models are used for.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from palimpsest.core.errors import InputError, unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_model(
    path: str | Path, *, dtype: str | torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The model and tokenizer in a folder, or those called ``org/name`` on the Hugging Face hub; see `LM.load`."""
    if isinstance(dtype, str) and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise unknown("dtype", dtype, ("float32", "bfloat16", "float16"))
    name = str(path)
    folder = Path(path)
    if folder.is_dir():
        if (folder / "adapter_config.json").exists():
            return _load_adapter(folder, dtype, trust_remote_code)
        _check_folder(folder)
    elif folder.exists():
        raise InputError(f"{name} is a file; wanted a model's folder")
    elif not _is_hub_name(name):
        raise InputError(f"{name}: no such folder, and not a hub name of the form org/name")
    local = {"local_files_only": folder.is_dir(), "trust_remote_code": trust_remote_code}
    return _load_weights(name, dtype, local), _load_tokenizer(name, local)


def save_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write weights, config, generation config and tokenizer into a folder."""
    with quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


# of a configuration: where it is from and what is returned, not what the model answers
_NOT_BEHAVIOUR = frozenset(
    [
        *("_name_or_path", "transformers_version", "architectures", "dtype", "use_cache", "return_dict"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "problem_type"),
        *("id2label", "label2id", "chunk_size_feed_forward", "is_encoder_decoder"),
    ]
)


def behaviour(model: PreTrainedModel) -> dict[str, Any]:
    """The part of the model's configuration that its answers depend on: context length, heads, norms, positions, ..."""
    config = json.loads(model.config.to_json_string(use_diff=False))
    return {key: value for key, value in config.items() if key not in _NOT_BEHAVIOUR}


def weights_sha256(model: nn.Module) -> str:
    """SHA-256 over the sorted state dict: each tensor's name, dtype, shape and bytes.  Computed anew on every call."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        header = json.dumps([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)])
        digest.update(header.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of a PEFT model with its adapter added into the weights; any other model itself."""
    if not hasattr(model, "peft_config"):
        return model
    return copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]


def _is_hub_name(name: str) -> bool:
    """``org/name``, unless `org` is a folder here: then a local path was meant and is missing."""
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.is_dir()


def _check_folder(folder: Path) -> None:
    files = sorted(entry.name for entry in folder.iterdir())
    if "config.json" not in files:
        raise InputError(f"{folder} has no config.json: not a model's folder ({_some(files)})")
    _check_weights(folder, files)
    if not set(TOKENIZERS) & set(files):
        raise InputError(f"{folder} has no tokenizer (tokenizer.json); save it there with tokenizer.save_pretrained")


def _check_weights(folder: Path, files: list[str]) -> None:
    if any(name.endswith(".safetensors") and name != "guard.safetensors" for name in files):
        return
    pickles = [name for name in files if name.endswith(PICKLES)]
    if pickles:
        raise InputError(
            f"{folder} has only pickled weights ({_some(pickles)}), which can run code when loaded; "
            "save them as safetensors with model.save_pretrained of a current transformers"
        )
    raise InputError(f"{folder} has no weights (*.safetensors; found {_some(files)})")


def _load_weights(name: str, dtype: str | torch.dtype | None, options: dict[str, Any]) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    with quiet(), _input_errors(name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype="auto" if dtype is None else dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to be listed below with all the others
            **options,
        )
    model, info = loaded
    mismatched = [entry[0] if isinstance(entry, tuple) else str(entry) for entry in info["mismatched_keys"]]
    _check_keys(name, info["missing_keys"], info["unexpected_keys"], mismatched)
    return model.eval()


def _load_tokenizer(name: str, options: dict[str, Any]) -> PreTrainedTokenizerFast:
    from transformers import AutoTokenizer

    with quiet(), _input_errors(name):
        tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
    if not tokenizer.is_fast:
        raise InputError(f"{name}: its tokenizer is not a fast one, so characters cannot be traced to tokens")
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token is None:
            raise InputError(f"{name}: its tokenizer has neither a padding nor an end-of-sequence token")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _load_adapter(
    folder: Path, dtype: str | torch.dtype | None, trust_remote_code: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A PEFT adapter on its base model; the tokenizer is the adapter's own if it has one."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    files = sorted(entry.name for entry in folder.iterdir())
    _check_weights(folder, files)
    with _input_errors(str(folder)):
        base_name = PeftConfig.from_pretrained(str(folder)).base_model_name_or_path
    if not base_name:
        raise InputError(f"{folder}/adapter_config.json does not name its base model")
    base = folder / base_name if (folder / base_name).is_dir() else base_name
    model, tokenizer = load_model(base, dtype=dtype, trust_remote_code=trust_remote_code)
    with quiet(), _input_errors(str(folder)):
        with safe_open(folder / "adapter_model.safetensors", "pt") as saved:
            names = saved.keys()
            given = {name: tuple(saved.get_slice(name).get_shape()) for name in names}
        adapted = PeftModel.from_pretrained(model, str(folder), use_safetensors=True, ignore_mismatched_sizes=True)
    wanted = {name: tuple(tensor.shape) for name, tensor in get_peft_model_state_dict(adapted).items()}
    mismatched = [name for name in wanted.keys() & given.keys() if wanted[name] != given[name]]
    _check_keys(f"the adapter {folder}", wanted.keys() - given.keys(), given.keys() - wanted.keys(), mismatched)
    if set(TOKENIZERS) & set(files):
        tokenizer = _load_tokenizer(str(folder), {"local_files_only": True, "trust_remote_code": trust_remote_code})
    return adapted.eval(), tokenizer  # type: ignore[return-value]


def _check_keys(name: str, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> None:
    kinds = {"missing": missing, "not applied": unexpected, "of another shape": mismatched}
    found = [f"{len(keys)} {kind} ({_some(keys)})" for kind, keys in ((k, sorted(v)) for k, v in kinds.items()) if keys]
    if found:
        raise InputError(f"{name} does not fit its model: keys {'; '.join(found)}")


def _some(names: list[str], most: int = 3) -> str:
    shown = ", ".join(names[:most])
    return f"{shown}, ..." if len(names) > most else shown or "an empty folder"


@contextmanager
def _input_errors(name: str) -> Iterator[None]:
    """What transformers, peft and safetensors raise for a folder they cannot read becomes one line."""
    from safetensors import SafetensorError

    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError, ImportError, SafetensorError) as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"{name}: cannot be loaded ({reason})") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Without loading bars, tables and warnings: what they would say of keys is checked here, and raised."""
    from transformers.utils import logging

    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()
