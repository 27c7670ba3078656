"""LightReasoner: a weak model shows at which few tokens a stronger one's skill lies; there it is taught a sharper self.

"LightReasoner: Can Small Language Models Teach Large Language Models Reasoning?", 2025 (arXiv:2510.07962).  Needs an
expert and a weaker amateur that read the same tokens, and questions without answers.  At the steps of the expert's own
rollouts where the amateur's next token is far from its own, the expert is fine-tuned towards expert / amateur:
contrastive decoding put into the weights.  Without a gap between the two there is nothing to learn, and a stronger
"amateur" harms; trained too long it harms as well.

The published trainer pads on the right and reads the last position; here each step is trained where it stands.
"""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch

from palimpsest.core.errors import InputError
from palimpsest.core.methods import config_of, method
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.curate import contrast
from palimpsest.curate.contrast import Steps
from palimpsest.curate.distillation import Chosen, Distillation
from palimpsest.curate.engine import add, text_column, with_model_folder
from palimpsest.curate.pool import Shard, require_daft
from palimpsest.data.batches import Encoded
from palimpsest.models import adapt
from palimpsest.models.encode import encode_prompts
from palimpsest.models.storage import merged

if TYPE_CHECKING:
    from daft import DataFrame

    from palimpsest.models.lm import LM

_MANY = 0.6  # share of chosen steps above which selecting is hardly a selection
_ATTENTION = ("q_proj", "v_proj")  # the paper's LoRA matrices, where a model has them
_TARGET = pa.struct(
    [
        ("position", pa.int32()),
        ("token", pa.int32()),
        ("divergence", pa.float32()),
        ("tokens", pa.list_(pa.int32())),
        ("weights", pa.list_(pa.float32())),
    ]
)


@method(verb="curate", paper="lightreasoner", name="lightreasoner")
@dataclass(frozen=True)
class LightReasoner:
    """Pick the steps of a model's solutions where a weaker model would go astray, with a sharper target at each.

    Adds ``rollout``, ``targets`` (position, token, divergence; tokens and weights of the target), ``score_divergence``,
    ``keep`` and ``reason``, and writes the model that was fine-tuned on the targets.
    """

    expert: str = ""  # folder or hub name of the model to improve
    amateur: str = ""  # folder or hub name of a weaker model with the same vocabulary
    text: str = "prompt"  # column of questions
    system: str = "Please reason step by step."  # where the expert has a chat template
    max_new_tokens: int = 128  # of a rollout: early steps are the reliable ones
    beta: float = 0.4  # least divergence of a step that is taught, in nats
    share: float = 0.0  # teach this share of the steps instead, the most divergent
    alpha: float = 0.2  # a token as likely as this times the likeliest may be taught
    select: Literal["divergence", "random"] = "divergence"  # random: as many steps, anywhere (ablation)
    contrast: bool = True  # False: teach the expert's own tokens (ablation)
    steps: int = 1000  # of fine-tuning; 0: only add columns
    lr: float = 5e-5
    batch_size: int = 16  # taught steps in a batch
    lora_rank: int = 8  # 0: all weights
    lora_alpha: float = 16.0
    lora_dropout: float = 0.05
    tuned: str = ""  # folder for the fine-tuned model; "": OUT/model
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.alpha <= 1:
            raise InputError(f"alpha must lie in (0, 1], not {self.alpha}")
        if not 0 <= self.share <= 1:
            raise InputError(f"share must lie between 0 and 1, not {self.share}")
        if self.select not in ("divergence", "random"):
            raise InputError(f"select must be 'divergence' or 'random', not '{self.select}'")
        if self.beta < 0 or self.steps < 0 or self.lora_rank < 0:
            raise InputError("beta, steps and lora_rank must not be below 0")

    # ---- on models

    def teach(self, expert: LM, amateur: LM, prompts: Sequence[str], *, watch: Watch | None = None) -> LM:
        """The expert, fine-tuned on its contrast with the amateur at the chosen steps of its rollouts."""
        return self.distil(expert, self.chosen(self.contrasted(expert, amateur, prompts)), watch=watch)

    def contrasted(self, expert: LM, amateur: LM, prompts: Sequence[str]) -> Steps:
        """Every step of the expert's rollouts with its target.  `InputError` for models with unlike vocabularies."""
        adapt.check_vocabulary(expert, amateur)
        for name, lm in (("expert", expert), ("amateur", amateur)):
            if lm.guard is not None:
                raise InputError(f"the {name} has a guard ({type(lm.guard).__name__}): load it without")
        if not prompts:
            raise InputError("no questions to roll out")
        ids = encode_prompts(expert.tokenizer, [self._asked(expert, prompt) for prompt in prompts])
        return contrast.steps_of(
            expert, amateur, contrast.rolled_out(expert, ids, self.max_new_tokens), alpha=self.alpha
        )

    def chosen(self, steps: Steps) -> Steps:
        """With the steps to be taught marked.  `InputError` if there are none, a warning if they are most of all."""
        line = self.beta
        if self.share:
            line = float(np.sort(steps.divergence)[::-1][max(1, round(self.share * len(steps.divergence))) - 1])
        marked = steps.divergence >= line
        if not marked.any():
            raise InputError(
                f"no step diverges by {line:g} nats (the most: {steps.divergence.max(initial=0):.3g}): the amateur is "
                "too like the expert; take a weaker one, a lower beta, or a share"
            )
        if marked.mean() > _MANY:
            warnings.warn(
                f"{marked.mean():.0%} of all steps diverge by {line:g} nats or more: a higher beta would select",
                stacklevel=2,
            )
        if self.select == "random":
            places = numpy_rng(self.seed, "random steps").permutation(len(marked))[: int(marked.sum())]
            marked = np.zeros(len(marked), dtype=bool)
            marked[places] = True
        return (steps if self.contrast else steps.without_contrast()).choose(marked)

    def distil(self, expert: LM, steps: Steps, *, watch: Watch | None = None) -> LM:
        """A copy of the expert trained on KL(target || model) at the chosen steps; adapters are merged in."""
        expert = replace(expert, model=merged(expert.model))
        names = [name.rsplit(".", 1)[-1] for name, _ in expert.model.named_modules()]
        work = adapt.trainable_copy(
            expert,
            rank=self.lora_rank,
            alpha=self.lora_alpha,
            dropout=self.lora_dropout,
            matrices=[name for name in _ATTENTION if name in names],
            seed=self.seed,
        )
        (watch or Watch()).fit(
            "distil",
            work,
            Distillation(steps),
            Chosen(steps, self.batch_size, self.seed),
            steps=self.steps,
            lr=self.lr,
            schedule="linear",
            seed=self.seed,
            identity={"method": "lightreasoner", **config_of(self), "rollouts": steps.rollouts.sha256},
        )
        return adapt.finished(expert, work)

    def _asked(self, expert: LM, prompt: str) -> str:
        if not expert.tokenizer.chat_template:
            return prompt
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": prompt})
        return str(expert.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    # ---- on pools

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def prepare(self, shards: Sequence[Shard], out: Path) -> LightReasoner:
        """With a place for the fine-tuned model; where that is gone, it is made again."""
        return with_model_folder(self, bool(self.steps), out)

    def survey(self, shard: DataFrame) -> DataFrame:
        """(row, ids, start, divergence, tokens, weights) of each question; row is a hash of its text."""
        daft = require_daft()
        asked = shard.select(text_column(shard, self.text).alias("text"), self._row(shard).alias("row"))
        found = asked.where(daft.col("text").not_null()).distinct().sort("row").to_pydict()
        if not found["text"]:
            return daft.from_arrow(_SURVEY.empty_table())
        expert, amateur = _model("expert", self.expert), _model("amateur", self.amateur)
        steps = self.contrasted(expert, amateur, found["text"])
        parts = [slice(a, b) for a, b in zip(steps.offsets, steps.offsets[1:], strict=False)]
        columns = {
            "row": found["row"],
            "ids": list(steps.rollouts.ids),
            "start": list(steps.rollouts.starts),
            "divergence": [steps.divergence[part] for part in parts],
            "tokens": [[t[w > 0] for t, w in zip(steps.tokens[p], steps.weights[p], strict=True)] for p in parts],
            "weights": [[w[w > 0] for w in steps.weights[part]] for part in parts],
        }
        return daft.from_arrow(pa.table(columns, schema=_SURVEY))

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """(row, rollout, targets, divergence) of each distinct question, ordered by row; fine-tunes the expert."""
        table = pa.concat_tables([part.cast(_SURVEY) for part in parts])
        if not table.num_rows:
            raise InputError(f"no row has text in '{self.text}'")
        _, first = np.unique(table["row"].to_numpy(), return_index=True)
        table = table.take(pa.array(first))
        expert = _model("expert", self.expert)
        steps = self.chosen(_steps(table, int(expert.tokenizer.pad_token_id)))
        if self.tuned and self.steps:
            self.distil(expert, steps).save(Path(self.tuned))
        parts_of = [slice(a, b) for a, b in zip(steps.offsets, steps.offsets[1:], strict=False)]
        responses = [ids[start:].tolist() for ids, start in zip(steps.rollouts.ids, steps.rollouts.starts, strict=True)]
        told = {
            "steps": len(steps.divergence),
            "chosen": int(steps.chosen.sum()),
            "largest": float(steps.divergence.max()),
            "mean": float(steps.divergence.mean()),
            "quantiles": np.quantile(steps.divergence, np.linspace(0, 1, 21)).tolist(),
        }
        facts = pa.table(
            {
                "row": table["row"],
                "rollout": expert.tokenizer.batch_decode(responses, skip_special_tokens=True),
                "targets": pa.array([_targets(steps, part) for part in parts_of], pa.list_(_TARGET)),
                "divergence": [float(steps.divergence[part].mean()) for part in parts_of],
            }
        )
        return facts.replace_schema_metadata({"learned": json.dumps(told)})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        col = daft.col
        facts = facts.combine_chunks()
        rows = facts["row"].to_numpy()

        def looked_up(name: str, kind: Any) -> Any:
            column = facts[name].combine_chunks()
            column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column

            @daft.func.batch(return_dtype=kind, use_process=False)
            def found(hashes: Any, texts: Any) -> Any:
                wanted = hashes.to_arrow().to_numpy()
                places = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
                absent = np.asarray([text is None for text in texts.to_pylist()]) | (rows[places] != wanted)
                return column.take(pa.array(places, mask=absent))

            return found(self._row(shard), col(self.text))

        text_column(shard, self.text)
        judged = add(shard, {"rollout": looked_up("rollout", daft.DataType.string())})
        kind = daft.DataType.from_arrow_type(pa.list_(_TARGET))
        judged = add(judged, {"targets": looked_up("targets", kind)})
        judged = add(judged, {"score_divergence": looked_up("divergence", daft.DataType.float64())})
        count = daft.functions.list_count(col("targets"), mode="all").fill_null(0)
        judged = add(judged, {"keep": count > 0})
        reason = (
            daft.functions.when(col("rollout").is_null(), daft.lit("no question"))
            .when(col("keep"), daft.lit("has steps to teach"))
            .otherwise(daft.lit("the two models agree"))
        )
        return add(judged, {"reason": reason})

    def review(self, judged: DataFrame) -> DataFrame:
        """Rows and kept rows."""
        daft = require_daft()
        kept = daft.col("keep").cast(daft.DataType.int64())
        return judged.agg(kept.count().alias("rows"), kept.sum().alias("kept"))

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        told = json.loads(facts.schema.metadata[b"learned"])
        share = told["chosen"] / max(told["steps"], 1)
        trained = f"The expert was fine-tuned for {self.steps:,} steps: {self.tuned}." if self.tuned else ""
        return {
            "numbers": {name: told[name] for name in ("steps", "chosen", "largest", "mean")},
            "sentences": [
                f"{told['chosen']:,} of {told['steps']:,} steps ({share:.1%}) are taught; the models diverge by "
                f"{told['mean']:.3f} nats a step, at most by {told['largest']:.2f}.",
                *([trained] if trained else []),
            ],
            "warnings": [f"{share:.0%} of all steps are taught: a higher beta would select."] if share > _MANY else [],
            "curves": [],
            "tables": [
                {
                    "caption": "How far the models diverge",
                    "columns": ["share of steps below", "nats"],
                    "rows": [[f"{5 * place}%", f"{value:.3f}"] for place, value in enumerate(told["quantiles"])],
                }
            ],
        }

    def _row(self, frame: DataFrame) -> Any:
        daft = require_daft()
        seed = derive(0, "lightreasoner")
        return daft.functions.hash(text_column(frame, self.text), seed=seed, hash_function="xxhash3_64")


_SURVEY = pa.schema(
    [
        ("row", pa.uint64()),
        ("ids", pa.list_(pa.int64())),
        ("start", pa.int64()),
        ("divergence", pa.list_(pa.float32())),
        ("tokens", pa.list_(pa.list_(pa.int64()))),
        ("weights", pa.list_(pa.list_(pa.float32()))),
    ]
)


def _steps(table: pa.Table, pad_id: int) -> Steps:
    """`Steps` from a surveyed table."""
    ids = tuple(np.asarray(row, dtype=np.int64) for row in table["ids"].to_pylist())
    rollouts = Encoded(ids, tuple(table["start"].to_pylist()), pad_id)
    divergence = np.concatenate([np.asarray(row, np.float32) for row in table["divergence"].to_pylist()])
    targets = [step for row in table["tokens"].to_pylist() for step in row]
    shares = [step for row in table["weights"].to_pylist() for step in row]
    width = max(map(len, targets), default=1)
    tokens, weights = np.zeros((len(targets), width), np.int64), np.zeros((len(targets), width), np.float32)
    for place, (some, more) in enumerate(zip(targets, shares, strict=True)):
        tokens[place, : len(some)], weights[place, : len(more)] = some, more
    return Steps(rollouts, divergence, tokens, weights, np.zeros(len(divergence), dtype=bool))


def _targets(steps: Steps, part: slice) -> list[dict[str, Any]]:
    """The chosen steps of one rollout; a position counts the tokens of the response before it."""
    own = steps.own
    found = []
    for place in np.flatnonzero(steps.chosen[part]):
        step = part.start + place
        live = steps.weights[step] > 0
        found.append(
            {
                "position": int(place),
                "token": int(own[step]),
                "divergence": float(steps.divergence[step]),
                "tokens": steps.tokens[step][live].tolist(),
                "weights": steps.weights[step][live].tolist(),
            }
        )
    return found


_loading = threading.Lock()  # Daft asks from several threads at once


def _model(role: str, path: str) -> LM:
    if not path:
        raise InputError(f"wanted {role}: a folder or hub name of a causal language model")
    with _loading:
        return _loaded(path)


@lru_cache(maxsize=2)
def _loaded(path: str) -> LM:
    """Loaded once a process."""
    from palimpsest.models.lm import LM

    return LM.load(path, device="cuda" if torch.cuda.is_available() else None)
