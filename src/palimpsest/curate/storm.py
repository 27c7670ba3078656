"""STORM: train on labels of which some are wrong, and learn while training how much each sample's loss should count.

"Learning from Noisy Labels via Self-Taught On-the-Fly Meta Loss Rescaling", AAAI 2025 (arXiv:2412.12955).  Needs
labelled samples and a model with dropout; no clean labels.  A `Rescaler` gives each sample of a batch a weight; the
model takes a step on the weighted loss, and the rescaler is changed so that the step would have helped on another batch
of the same noisy data, whose losses it weighs as well.  The weights rank samples by suspicion.  Six forward passes a
step instead of one make about five times the time.  Of labels that are mostly wrong it would believe the wrong ones.

The training loop is in `bilevel`.  Shapes: N samples, B a batch, E epochs.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import derive
from palimpsest.curate.bilevel import Trained, Training
from palimpsest.curate.engine import add, text_column, with_model_folder
from palimpsest.curate.pool import Shard, require_daft
from palimpsest.curate.rescaler import WIDTHS, Features
from palimpsest.curate.samples import Samples, Vectors

if TYPE_CHECKING:
    from daft import DataFrame

    from palimpsest.curate.learners import Learner

_DROPPED = 0.5  # weight below which the paper calls a sample filtered out


@method(verb="curate", paper="storm", name="storm")
@dataclass(frozen=True)
class Storm:
    """Find labels that look wrong: a model is trained on all of them and learns meanwhile how much each should count.

    Adds ``weight``, ``keep`` and ``reason``; with `model` the classifier (or language model) so trained is written too.
    """

    model: str = ""  # folder or hub name; "": a small head on the packaged sentence encoder's vectors
    kind: Literal["classify", "answer"] = "classify"  # labels are classes, or answers that a causal model should give
    text: str = "text"  # column of texts, or of prompts
    label: str = "label"  # column of classes, or of answers
    epochs: float = 0.0  # 0: 3, the paper's, for a model that is fine-tuned; 25 for the head
    lr: float = 0.0  # 0: 5e-5, the paper's; 1e-3 for the head
    batch_size: int = 0  # 0: 8, the paper's; 64 for the head
    rescaler_lr: float = 1e-2
    dropout_rounds: int = 2  # extra passes from which spreads are read
    stats_window: int = 1  # batches that a sample is compared with; 0: all so far
    separate_classes: bool = False  # the paper's code: a net a class, which wants many samples of each in a batch
    by_agreement: bool = True  # compare believed samples with believed ones only, and others with others
    features: Features = "all"
    meta_rescaling: bool = True  # weigh the other batch's losses too
    threshold: float = 0.0  # above 0: weights are 0 or 1, cut there
    preserve_scale: bool = False  # scale weighted losses up to what they were (the paper: for several heads)
    warmup_epochs: float = 0.0  # the rescaler learns, but its weights are not used yet
    floor: float = 0.0  # the least weight
    max_length: int = 128  # tokens of a text
    tuned: str = ""  # folder for the trained model, if `model` is given; "": OUT/model
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kind not in ("classify", "answer"):
            raise InputError(f"kind must be 'classify' or 'answer', not '{self.kind}'")
        if self.kind == "answer" and self.separate_classes:
            raise InputError("separate_classes needs classes: answers have none")
        if self.features not in WIDTHS:
            raise InputError(f"features must be 'all' or 'loss', not '{self.features}'")
        for name in ("epochs", "lr", "batch_size", "dropout_rounds", "stats_window", "warmup_epochs"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must not be below 0, not {getattr(self, name)}")
        for name in ("threshold", "floor"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"{name} must lie in [0, 1), not {getattr(self, name)}")
        if self.rescaler_lr <= 0:
            raise InputError(f"rescaler_lr must be above 0, not {self.rescaler_lr}")
        if self.batch_size == 1:
            raise InputError("batch_size must be at least 2: a sample is weighed against others")

    # ---- training

    def train(
        self,
        model: nn.Module,
        samples: Samples,
        *,
        meta: Samples | None = None,
        shuffle: bool = False,
        progress: str = "",
    ) -> Trained:
        """Train a copy of `model` on `samples`.

        `meta`: samples that the other batch comes from instead; clean ones make this the supervised cousin
        (Meta-Weight-Net).  `shuffle` is the negative control: weights go to other samples of the same batch.
        `progress`: label of the bar, "" for none.  `InputError` for too few samples or a model without trainable
        parameters, `TrainingDiverged` for a loss that is not finite.
        """
        plan = self._settled(samples)
        meta = samples if meta is None else meta
        for kind, given in (("", samples), ("meta ", meta)):
            if len(given) < 2 * plan.batch_size:
                raise InputError(
                    f"{len(given)} {kind}samples are fewer than two batches of {plan.batch_size}: lower batch_size"
                )
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise InputError("the model has no trainable parameter (all are frozen)")
        with torch.random.fork_rng(devices=[]):
            return Training(plan, copy.deepcopy(model), samples, meta, shuffle).run(progress)

    def _settled(self, samples: Samples) -> Storm:
        """With the defaults that depend on what is trained."""
        usual: dict[str, Any] = {"epochs": 3.0, "lr": 5e-5, "batch_size": 8}
        if isinstance(samples, Vectors):
            usual = {"epochs": 25.0, "lr": 1e-3, "batch_size": 64}
        return replace(self, **{name: getattr(self, name) or value for name, value in usual.items()})

    # ---- curation

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def prepare(self, shards: Sequence[Shard], out: Path) -> Storm:
        """With a place for the trained model; where that is gone, what was learned is learned again."""
        return with_model_folder(self, bool(self.model), out)

    def survey(self, shard: DataFrame) -> DataFrame:
        """(text, label, row) of the shard's samples; row is a hash of both."""
        daft = require_daft()
        text, label = self._columns(shard)
        rows = shard.select(text.alias("text"), label.alias("label"), self._row(shard).alias("row"))
        return rows.where(daft.col("text").not_null() & daft.col("label").not_null())

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """(row, weight, history): the last weight of each distinct sample, and its weight in each epoch."""
        from palimpsest.curate import learners

        # by content, so that neither the order of the shards nor their number matters
        table = pa.concat_tables(parts).sort_by([(name, "ascending") for name in ("text", "label", "row")])
        learner: Learner = learners.make(self, table["text"].to_pylist(), table["label"].to_pylist())
        trained = self.train(learner.model, learner.samples, progress="learning to weigh")
        if self.model and self.tuned:
            learner.save(trained.model, Path(self.tuned))
        rows, where = np.unique(table["row"].to_numpy(), return_inverse=True)
        counts = np.bincount(where).astype(np.float64)
        history = np.stack([np.bincount(where, weights=one) / counts for one in trained.weights.T], axis=1)
        told = {
            "classes": learner.classes,
            "mean": trained.weights.mean(0, dtype=np.float64).tolist(),
            "dropped": (trained.weights < _DROPPED).mean(0).tolist(),
            "loss": [float(np.mean(part)) for part in np.array_split(trained.losses, trained.weights.shape[1])],
            "forwards": trained.forwards,
            "steps": len(trained.losses),
        }
        facts = pa.table({"row": rows, "weight": history[:, -1], "history": list(history)})
        return facts.replace_schema_metadata({"learned": json.dumps(told)})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        col = daft.col
        rows, weights = facts["row"].to_numpy(), facts["weight"].to_numpy()
        text, label = self._columns(shard)

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def weight(hashes: Any) -> Any:
            wanted = hashes.to_arrow().to_numpy()
            places = np.searchsorted(rows, wanted).clip(max=len(rows) - 1)
            return np.where(rows[places] == wanted, weights[places], 0.0)

        complete = text.not_null() & label.not_null()
        judged = add(
            shard, {"weight": daft.functions.when(complete, weight(self._row(shard))).otherwise(daft.lit(0.0))}
        )
        judged = add(judged, {"keep": col("weight") >= _DROPPED})
        reason = (
            daft.functions.when(~complete, daft.lit("no text or no label"))
            .when(col("keep"), daft.lit("its label looks right"))
            .otherwise(daft.lit("its label looks wrong"))
        )
        return add(judged, {"reason": reason})

    def review(self, judged: DataFrame) -> DataFrame:
        """(label, rows, kept) of each class."""
        daft = require_daft()
        col = daft.col
        # the judged frame has the label and keep; answers are too many to be counted one by one
        label = daft.lit("all") if self.kind == "answer" else col(self.label).cast(daft.DataType.string())
        told = judged.select(label.alias("label"), col("keep").cast(daft.DataType.int64()).alias("kept"))
        return told.groupby("label").agg(col("kept").count().alias("rows"), col("kept").sum().alias("kept"))

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        told = json.loads(facts.schema.metadata[b"learned"])
        counts: dict[str, list[int]] = {}
        for part in reviews:
            for label, rows, kept in zip(*(part[name].to_pylist() for name in ("label", "rows", "kept")), strict=True):
                one = counts.setdefault(str(label), [0, 0])
                one[0], one[1] = one[0] + rows, one[1] + (kept or 0)
        dropped = told["dropped"][-1]
        warned = [] if dropped < 0.5 else [_MOST_DROPPED.format(share=dropped)]
        return {
            "numbers": {"dropped": dropped, "forwards": told["forwards"], "steps": told["steps"]},
            "sentences": [
                f"In the last epoch the mean weight was {told['mean'][-1]:.2f}, and {dropped:.1%} of the samples were "
                f"below {_DROPPED:g}.",
                f"Training took {told['steps']:,} steps and {told['forwards']:,} passes through the model.",
            ],
            "warnings": warned,
            "curves": [],
            "tables": [
                {
                    "caption": "Labels and how many of them look right",
                    "columns": ["label", "rows", "kept"],
                    "rows": [
                        [label, rows, f"{kept / rows:.1%}"]
                        for label, (rows, kept) in sorted(counts.items(), key=lambda item: item[1][1] / item[1][0])
                    ],
                }
            ],
        }

    def _columns(self, frame: DataFrame) -> tuple[Any, Any]:
        daft = require_daft()
        text = text_column(frame, self.text)
        if self.label not in frame.column_names:
            found = ", ".join(f"'{column}'" for column in frame.column_names)
            raise InputError(f"no column '{self.label}'; found {found} (say which one holds the label)")
        return text, daft.col(self.label).cast(daft.DataType.string())

    def _row(self, frame: DataFrame) -> Any:
        daft = require_daft()
        seed = derive(0, "storm")
        return daft.functions.hash(*self._columns(frame), seed=seed, hash_function="xxhash3_64")


_MOST_DROPPED = (
    "{share:.1%} of the samples look wrong, more than half: the model may not have learned anything yet (more epochs, "
    "a higher lr, or warmup_epochs)"
)
