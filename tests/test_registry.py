"""What every registered method must be and do, whoever wrote it; and the paper and the claim that stand behind it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import textwrap
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from palimpsest import catalog, claims
from palimpsest.core.errors import InputError
from palimpsest.core.methods import MethodInfo, all_methods, config_of, get, info_of, kebab
from palimpsest.core.watch import Watch
from palimpsest.data.episodes import Episodes
from palimpsest.data.functions import Dense, FunctionStream
from palimpsest.data.records import select_questions
from palimpsest.data.request import ForgetRequest
from palimpsest.data.tables import TablePrior, Tables
from palimpsest.data.tasks import Examples, Task
from palimpsest.data.text_tasks import TextTask
from palimpsest.data.world import World
from palimpsest.learn import evaluate, load, save
from palimpsest.learn.incontext.mend import PromptedTasks
from palimpsest.models.lm import LM

METHODS = all_methods()
FORGET = [info for info in METHODS if info.verb == "forget"]
LEARN = [info for info in METHODS if info.verb == "learn"]
SMALL = {
    "steps": 2,
    "helper_steps": 2,
    "tuning_steps": 2,
    "pretraining_steps": 2,
    "batch_size": 8,
    "lr": 1e-3,
    "scales_tried": 2,
    "width": 8,
}  # where a method has the field
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
learning = pytest.mark.parametrize("info", LEARN, ids=named)
of_tasks = pytest.mark.parametrize(
    "info", [info for info in LEARN if {"features", "images"} & set(info.cls.inputs)], ids=named
)


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


def pool_of(kind: str) -> Examples:
    """Eight classes of six examples, as features (M, 6) or images (M, 1, 8, 8)."""
    rng = np.random.default_rng(0)
    y = np.repeat(np.arange(8), 6)
    shape = (6,) if kind == "features" else (1, 8, 8)
    x = rng.normal(size=(8, *shape))[y] + 0.5 * rng.normal(size=(48, *shape))
    return Examples(x.astype(np.float32), y, tuple(f"class {label}" for label in range(8)))


def episodes_for(info: MethodInfo, kind: str = "features") -> Episodes:
    nota = 0.4 if info.cls.answers_none else 0.0  # type: ignore[attr-defined]
    return Episodes(pool=pool_of(kind), way=3, shot=2, queries=3, nota=nota, count=20)


@dataclasses.dataclass(frozen=True)
class Trial:
    """How learners of one kind of input are tried: a stream of tasks, and a look at the answers of what was learnt."""

    stream: Callable[[MethodInfo], Any]
    answers: Callable[[Any, Any], np.ndarray]  # (fitted, stream)


TRIALS: dict[str, Trial] = {
    kind: Trial(partial(episodes_for, kind=kind), lambda fitted, stream: evaluate(fitted, stream).answers)
    for kind in ("features", "images")
}
TRIALS["texts"] = Trial(
    lambda info: texts_of(episodes_for(info)), lambda fitted, stream: evaluate(fitted, stream).answers
)
TRIALS["functions"] = Trial(
    lambda info: FunctionStream(Dense(2), points=6, batch_size=8),
    lambda fitted, stream: fitted.predictions(**{name: stream(5)[name] for name in "xy"}).numpy(),
)
TRIALS["prompted"] = Trial(
    lambda info: prompted_tasks(),
    lambda fitted, stream: fitted.adapt(stream.tasks[0]).scores(["green", "black"]),
)
TRIALS["tables"] = Trial(
    lambda info: Tables(TablePrior(columns=(2, 3), classes=(2, 2), deepest=1), (8, 8), 4, batch_size=4, block=2),
    lambda fitted, stream: table_answers(fitted, **stream(5)),
)


def table_answers(fitted: Any, x: torch.Tensor, y: torch.Tensor, present: torch.Tensor, shots: int) -> np.ndarray:
    return fitted.predictor(x[0, :shots], y[0, :shots], 2).probabilities(x[0, shots:])


def texts_of(episodes: Episodes) -> Episodes:
    """The same episodes of short texts."""
    return episodes.over([f"number {row} is of the kind {label}" for row, label in enumerate(episodes.pool.y)])


def prompted_tasks() -> PromptedTasks:
    texts = ["red is warm and blue is cold, so they say here", "a cat sees a dog and the dog sees the cat again"]
    pairs = (("red", "warm"), ("blue", "cold"), ("pink", "warm"), ("grey", "cold"))
    lm = LM.build(texts, CONFIGS["gpt2"], vocab_size=300, seed=1)
    return PromptedTasks(lm, [TextTask("colours", pairs, ("cold", "warm"))], texts)


def trials(info: MethodInfo) -> list[Trial]:
    kinds: tuple[str, ...] = info.cls.inputs  # type: ignore[attr-defined]
    unknown = set(kinds) - set(TRIALS)
    assert not unknown, f"no trial of learners of {', '.join(unknown)}: add one to TRIALS"
    return [TRIALS[kind] for kind in kinds]


def written(fitted: Any, folder: Path) -> dict[str, bytes]:
    save(fitted, folder)
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@learning
def test_learning_is_repeatable_touches_nothing_and_survives_the_disk(
    info: MethodInfo, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number, trial in enumerate(trials(info)):
        method, watch = small(info), Watch(progress=False)
        stream, same = trial.stream(info), trial.stream(info)
        torch.manual_seed(1)
        fitted = method.meta_fit(stream, watch=watch)
        answers = trial.answers(fitted, stream)
        first = written(fitted, tmp_path / f"{number}-first")
        assert method == small(info)
        if isinstance(stream, Episodes):
            np.testing.assert_array_equal(stream.pool.x, same.pool.x)
            np.testing.assert_array_equal(stream.pool.y, same.pool.y)

        torch.manual_seed(2)  # whatever was drawn elsewhere in between
        again = method(stream, watch=watch)  # calling a learner is meta_fit
        assert written(again, tmp_path / f"{number}-again") == first

        np.testing.assert_array_equal(trial.answers(fitted, stream), answers)  # adapting leaves no trace
        loaded = load(tmp_path / f"{number}-first")
        assert loaded.learner == method
        np.testing.assert_array_equal(trial.answers(loaded, stream), answers)
    assert capfd.readouterr() == ("", ""), "a learner that is told to be silent is silent"


@of_tasks
def test_adapting_sees_the_support_alone(info: MethodInfo) -> None:
    stream = episodes_for(info)
    fitted = small(info).meta_fit(stream, watch=Watch(progress=False))
    task = stream.task(3)
    predictor = fitted.adapt(task)
    answers = predictor(task.query.x)
    assert answers.shape == task.query.y.shape
    assert answers.dtype == np.int64
    assert set(answers.tolist()) <= set(range(task.way + 1))
    lied = replace(task, query=replace(task.query, y=np.zeros_like(task.query.y)))
    np.testing.assert_array_equal(fitted.adapt(lied)(task.query.x), answers)
    one_by_one = [predictor(task.query.x[row : row + 1])[0] for row in range(len(answers))]
    assert np.mean(one_by_one == answers) > 0.95  # but for rounding: an answer must not depend on the other queries


@of_tasks
def test_tasks_that_cannot_be_learnt(info: MethodInfo) -> None:
    stream = episodes_for(info)
    fitted = small(info).meta_fit(stream, watch=Watch(progress=False))
    task = stream.task(0)
    alone = Examples(task.support.x[:2], np.array([0, 0]), ("one",))
    with pytest.raises(InputError, match="one class: there is nothing to tell apart"):
        fitted.adapt(Task(alone, task.query))
    with pytest.raises(InputError, match="has no example in the support"):
        fitted.adapt(Task(task.support.take([0, 1, 2, 3]), task.query))
    with pytest.raises(InputError, match="NaN or infinite"):
        fitted.adapt(task)(np.full_like(task.query.x, np.nan))


@pytest.mark.parametrize(
    "info", [info for info in LEARN if "images" in info.cls.inputs and hasattr(info(), "seed")], ids=named
)
def test_the_seed_of_a_learner_matters(info: MethodInfo, tmp_path: Path) -> None:
    stream, watch = episodes_for(info, "images"), Watch(progress=False)
    fitted = (replace(small(info), seed=seed).meta_fit(stream, watch=watch) for seed in (0, 1))
    first, second = (written(one, tmp_path / str(seed)) for seed, one in enumerate(fitted))
    assert first != {**second, "learner.json": first["learner.json"]}
