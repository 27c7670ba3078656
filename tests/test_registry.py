"""What every registered method must be and do, whoever wrote it; and the paper and the claim that stand behind it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest import catalog, claims
from palimpsest.core.methods import MethodInfo, all_methods, config_of, get, info_of, kebab
from palimpsest.core.watch import Watch
from palimpsest.data.records import select_questions
from palimpsest.data.request import ForgetRequest
from palimpsest.data.world import World
from palimpsest.models.lm import LM

METHODS = all_methods()
FORGET = [info for info in METHODS if info.verb == "forget"]
SMALL = {"steps": 2, "helper_steps": 2, "batch_size": 8, "lr": 1e-3, "scales_tried": 2}  # where a method has the field
EXPERTS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
FOR_MIXTURES = ("uoe",)
MIXTURES: dict[str, dict[str, Any]] = {  # what stands in for a family where a method needs a mixture of experts
    "llama": {"model_type": "mixtral", "num_local_experts": 4, "intermediate_size": 16, **EXPERTS},
    "gpt2": {"model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    | {"shared_expert_intermediate_size": 16, **EXPERTS},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    },
    "gpt2": {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 192},
}


def named(info: MethodInfo) -> str:
    return f"{info.verb}-{info.name}"


every = pytest.mark.parametrize("info", METHODS, ids=named)
forgetting = pytest.mark.parametrize("info", FORGET, ids=named)


@every
def test_is_a_frozen_dataclass_that_says_what_it_does(info: MethodInfo) -> None:
    assert dataclasses.is_dataclass(info.cls)
    assert info.cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert info.summary
    assert info.summary.endswith((".", ":"))
    assert "Method(" not in info.summary
    assert info.name == kebab(info.name)
    assert callable(info.cls)


@every
def test_its_defaults_make_a_method_that_describes_itself(info: MethodInfo) -> None:
    method = info()
    config = config_of(method)
    assert json.loads(json.dumps(config, allow_nan=False)) is not None
    assert info(**config) == method
    assert info_of(method) is info
    assert get(info.verb, info.name.replace("-", "_").upper()) is info
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(method, next(iter(config), "anything"), None)


@every
def test_its_paper_is_in_the_catalogue(info: MethodInfo) -> None:
    paper = {paper.slug: paper for paper in catalog.papers()}[info.paper]
    assert info.verb in (paper.verb, "forget", "audit")  # an audit's paper may bring baselines that forget
    module = f"{info.cls.__module__.removeprefix('palimpsest.').replace('.', '/')}.py"
    assert (Path(catalog.__file__).parents[1] / module).exists()


@every
def test_its_paper_has_a_claim_with_a_negative_control(info: MethodInfo) -> None:
    claim = claims.get(info.paper)
    assert claim.expectations
    tree = ast.parse(textwrap.dedent(inspect.getsource(claim.measure)))
    read = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == "mechanism"]
    assert read, "measure never looks at `mechanism`: nothing is switched off in the control"


@pytest.fixture(scope="module")
def request_of_questions() -> ForgetRequest:
    whole = World(people=10, facts=4, seed=1).request()
    return replace(whole, forget=select_questions(whole.forget))


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def family(request: pytest.FixtureRequest) -> dict[bool, LM]:
    """A dense model, and (True) the mixture of experts that stands in for it."""
    train = World(people=10, facts=4, seed=1).train
    configs = {False: CONFIGS[request.param], True: MIXTURES[request.param]}
    return {sparse: LM.build(train, one, vocab_size=300, max_length=192, seed=3) for sparse, one in configs.items()}


@pytest.fixture
def lm(info: MethodInfo, family: dict[bool, LM]) -> LM:
    return family[info.name in FOR_MIXTURES]


def small(info: MethodInfo) -> Any:
    fields = {field.name for field in dataclasses.fields(info.cls)}
    return info(**{name: value for name, value in SMALL.items() if name in fields})


def state_of(lm: LM) -> dict[str, Any]:
    return {
        "weights": lm.weights_sha256,
        "sha256": lm.sha256,
        "guard": lm.guard,
        "modes": [module.training for module in lm.model.modules()],
        "trainable": [p.requires_grad for p in lm.model.parameters()],
        "gradients": [p.grad for p in lm.model.parameters()],
        "hooks": [len(module._forward_hooks) for module in lm.model.modules()],
        "tokens": lm.tokenizer.get_vocab(),
    }


@forgetting
def test_forgetting_is_repeatable_touches_nothing_and_survives_the_disk(
    info: MethodInfo,
    lm: LM,
    request_of_questions: ForgetRequest,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    before, tables = state_of(lm), request_of_questions.describe()
    torch.manual_seed(1)
    after = small(info)(lm, request_of_questions, watch=Watch(progress=False))
    assert state_of(lm) == before
    assert request_of_questions.describe() == tables
    assert isinstance(after, LM)
    assert after.sha256 != lm.sha256

    torch.manual_seed(2)  # whatever was drawn elsewhere in between
    again = small(info)(lm, request_of_questions, watch=Watch(progress=False))
    assert again.sha256 == after.sha256

    after.save(tmp_path / "model")
    loaded = LM.load(tmp_path / "model")
    assert loaded.sha256 == after.sha256
    np.testing.assert_array_equal(loaded.nll(request_of_questions.forget), after.nll(request_of_questions.forget))
    assert capfd.readouterr() == ("", ""), "a method that is told to be silent is silent"


@pytest.mark.parametrize("info", [info for info in FORGET if hasattr(info(), "seed")], ids=named)
def test_a_seed_that_is_a_hyper_parameter_matters(
    info: MethodInfo, lm: LM, request_of_questions: ForgetRequest
) -> None:
    method = small(info)
    watch = Watch(progress=False)
    first, second = (replace(method, seed=seed)(lm, request_of_questions, watch=watch) for seed in (0, 1))
    assert first.sha256 != second.sha256
