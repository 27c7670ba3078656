from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from palimpsest.core.errors import InputError
from palimpsest.models.lm import LM


@pytest.fixture(scope="module")
def saved(llama: LM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model's folder; copy it before changing anything."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    llama.save(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def adapter_on(lm: LM) -> LM:
    """`lm` with a LoRA adapter that does something."""
    torch.manual_seed(0)
    names = {"gpt2": ["c_attn"]}.get(lm.model.config.model_type, ["q_proj", "v_proj"])
    fan = lm.model.config.model_type == "gpt2"
    lora = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=names, init_lora_weights=False, fan_in_fan_out=fan)
    with warnings.catch_warnings():  # peft 0.21 reads a property that transformers 5.24 has renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = get_peft_model(lm.copy().model, lora)
    return LM(adapted.eval(), lm.tokenizer, lm.source)


def test_round_trip_is_bit_equal(lm: LM, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lm.save(tmp_path / "model")
    again = LM.load(tmp_path / "model")
    assert capfd.readouterr() == ("", "")
    before, after = lm.model.state_dict(), again.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.sha256 == lm.sha256
    assert again.num_parameters == lm.num_parameters
    assert again.source == str(tmp_path / "model")
    assert not again.model.training
    assert (again.nll(["Anna lives"]) == lm.nll(["Anna lives"])).all()
    assert again.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
    for text in ("Anna's 1234 dogs,  twice\n\nand", "cafe\u0301 日本 \t?!"):
        assert again.tokenizer(text)["input_ids"] == lm.tokenizer(text)["input_ids"]
    assert not [path for path in (tmp_path / "model").iterdir() if path.suffix in (".bin", ".pt")]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_transformers_reads_it(lm: LM, tmp_path: Path) -> None:
    lm.save(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = torch.tensor([tokenizer("Anna lives")["input_ids"]])
    with torch.no_grad():
        assert torch.equal(model(ids).logits, lm.model(ids).logits)
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == tokenizer.eos_token_id


def test_dtype_is_kept_or_chosen(folder: Path) -> None:
    half = LM.load(folder, dtype="bfloat16")
    assert half.model.dtype == torch.bfloat16
    half.save(folder)
    assert LM.load(folder).model.dtype == torch.bfloat16
    assert LM.load(folder).sha256 == half.sha256
    assert LM.load(folder, dtype=torch.float32).model.dtype == torch.float32
    assert LM.load(folder, device="cpu").device.type == "cpu"
    with pytest.raises(InputError, match="unknown dtype 'bfloat61': did you mean bfloat16"):
        LM.load(folder, dtype="bfloat61")


def test_a_failed_save_leaves_the_old_folder(llama: LM, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in folder.iterdir())

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(type(llama.tokenizer), "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        llama.save(folder)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_sha256_is_of_names_dtypes_shapes_and_bytes(llama: LM) -> None:
    again = llama.copy()
    assert again.sha256 == llama.sha256
    weight = again.model.get_input_embeddings().weight
    with torch.no_grad():
        weight[0, 0] += 1
    changed = again.sha256
    assert changed != llama.sha256
    weight.data[0, 0] -= 1  # not even autograd sees this
    assert again.sha256 != changed
    other = llama.copy()
    other.model.to(torch.float64)
    assert other.sha256 != llama.sha256


def test_adapters_are_merged_or_kept(lm: LM, tmp_path: Path) -> None:
    lm.save(tmp_path / "base")
    base = LM.load(tmp_path / "base")
    adapted = adapter_on(base)
    rows = [("Anna", " lives in town 3")]
    assert abs(adapted.nll(rows) - base.nll(rows)) > 1e-3
    prompts = ["Anna", "Person 3 lives"]
    before = adapted.weights_sha256
    adapted.save(tmp_path / "merged")
    assert adapted.weights_sha256 == before
    merged = LM.load(tmp_path / "merged")
    assert not hasattr(merged.model, "peft_config")
    assert merged.nll(rows) == pytest.approx(adapted.nll(rows), rel=1e-4)
    assert merged.generate(prompts, max_new_tokens=8) == adapted.generate(prompts, max_new_tokens=8)
    adapted.save(tmp_path / "adapter", merge=False)
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = LM.load(tmp_path / "adapter")
    assert again.nll(rows) == adapted.nll(rows)


def test_adapter_keys_that_do_not_apply(llama: LM, folder: Path, tmp_path: Path) -> None:
    adapter_on(LM.load(folder)).save(tmp_path / "adapter", merge=False)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    good = load_file(path)
    first = sorted(good)[0]
    save_file({name.replace("layers.1", "layers.7"): tensor for name, tensor in good.items()}, path)
    with pytest.raises(InputError, match=r"the adapter .* does not fit its model: keys 4 missing \(.*4 not applied \("):
        LM.load(tmp_path / "adapter")
    save_file({name: tensor[:1] if name == first else tensor for name, tensor in good.items()}, path)
    with pytest.raises(InputError, match=rf"keys 1 of another shape \({first}\)"):
        LM.load(tmp_path / "adapter")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(InputError, match="only pickled weights"):
        LM.load(tmp_path / "adapter")


def test_adapter_without_its_base(folder: Path, tmp_path: Path) -> None:
    adapter_on(LM.load(folder)).save(tmp_path / "adapter", merge=False)
    shutil.rmtree(folder)
    with pytest.raises(InputError, match="no such folder"):
        LM.load(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": None}))
    with pytest.raises(InputError, match="does not name its base model"):
        LM.load(tmp_path / "adapter")


def test_keys_that_do_not_fit(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = load_file(path)
    first = "model.layers.0.self_attn.q_proj.weight"
    for weights, message in [
        ({name: tensor for name, tensor in good.items() if name != first}, rf"keys 1 missing \({first}\)"),
        (good | {"model.extra.weight": torch.zeros(2)}, r"keys 1 not applied \(model.extra.weight\)"),
        (good | {first: torch.zeros(3, 3)}, rf"keys 1 of another shape \({first}\)"),
    ]:
        save_file(weights, path, metadata={"format": "pt"})
        with pytest.raises(InputError, match=message):
            LM.load(folder)


def remove(folder: Path, *names: str) -> None:
    for name in names:
        for path in folder.glob(name):
            path.unlink()


def test_pickles_are_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    assert LM.load(folder)  # there are safetensors as well
    remove(folder, "model.safetensors")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model.bin\)"):
        LM.load(folder)


def test_incomplete_folders(folder: Path, tmp_path: Path) -> None:
    remove(folder, "tokenizer*")
    with pytest.raises(InputError, match="has no tokenizer"):
        LM.load(folder)
    remove(folder, "model.safetensors")
    with pytest.raises(InputError, match=r"has no weights \(\*.safetensors; found config.json, gen"):
        LM.load(folder)
    remove(folder, "*")
    with pytest.raises(InputError, match=r"has no config.json: not a model's folder \(an empty folder\)"):
        LM.load(folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        LM.load(tmp_path / "file")
    for missing in (tmp_path / "missing", "missing", "./missing/model", "a/b/c"):
        with pytest.raises(InputError, match="no such folder, and not a hub name"):
            LM.load(missing)


def test_a_missing_folder_is_not_looked_for_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="no such folder"):
        LM.load("out/model")
    with pytest.raises(InputError, match=r"^no-such-org/no-such-model: cannot be loaded"):
        LM.load("no-such-org/no-such-model")  # offline in tests


def test_broken_files(folder: Path) -> None:
    path = folder / "model.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:1000])
    with pytest.raises(InputError, match=f"^{folder}: cannot be loaded"):
        LM.load(folder)
    path.write_bytes(good)
    tokenizer = (folder / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer[:1000])
    with pytest.raises(InputError, match="cannot be loaded"):
        LM.load(folder)
    (folder / "tokenizer.json").write_bytes(tokenizer)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot be loaded"):
        LM.load(folder)
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "no-such"}))
    with pytest.raises(InputError, match="cannot be loaded"):
        LM.load(folder)


def test_remote_code_is_not_run(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "mine.py").write_text("raise SystemExit('remote code ran')")
    with pytest.raises(InputError, match="cannot be loaded"):
        LM.load(folder)


def test_tokenizer_without_a_padding_token(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    lm = LM.load(folder)
    assert lm.tokenizer.pad_token_id == lm.tokenizer.eos_token_id
    assert lm.generate(["Anna", "Anna lives in"], max_new_tokens=4) == [
        lm.generate([prompt], max_new_tokens=4)[0] for prompt in ("Anna", "Anna lives in")
    ]


def test_a_tokenizer_larger_than_the_model(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"new{i}" for i in range(3)])
    tokenizer.save_pretrained(folder)
    with pytest.raises(InputError, match="the tokenizer has 323 tokens, the model only 320"):
        LM.load(folder)
