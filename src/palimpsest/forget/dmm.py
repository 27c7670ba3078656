"""Datamodel matching: predict what the model would say had it never seen the records, then train it to say that.

Georgiev et al. 2024 (Attribute-to-Delete, arXiv:2410.23232; ICLR 2025).  Nobody guesses how wrong the model should
become: a record's target is the model's own log-odds of the answer less the predicted effect of the removal, and the
loss is the squared distance to it, on forget records and on a sample of retain records.  As good as the prediction is.
Needs: forget and retain records, and what the model was trained on (``train``, else forget, retain and utility).

The prediction is TRAK's, from the model itself (and from `checkpoints` trained likewise, if there are any): a gradient
for each training record, kept in the cache for later requests.  TRAK has no scale.  Ours is set without retraining:
in a linear datamodel the effects of all records together are what training did, f(model) - f(start).
Plain classifiers, with datamodels by regression, have `forget.classifiers`.
Shapes: B rows of a batch, N training records, Q dimensions of the projection.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.attribution import Trak, check_rows, scale_of, trak
from palimpsest.core.cache import cached
from palimpsest.core.errors import InputError
from palimpsest.core.gradients import linear_layers, projected_gradients
from palimpsest.core.methods import method
from palimpsest.core.reference import passes
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch, Encoded
from palimpsest.data.records import content_hashes
from palimpsest.forget.unlearn import (
    Budget,
    above_zero,
    check_vocabulary,
    distinct,
    encode,
    encode_retain,
    not_negative,
    plain,
    required,
    unlearn,
)
from palimpsest.models.anatomy import hooked
from palimpsest.models.train import fresh

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_SURE = -1e-6  # log p of an answer beyond which float32 cannot tell the odds
_LOG = logging.getLogger(__name__)


@method(verb="forget", paper="dmm")
@dataclass(frozen=True, kw_only=True)
class DMM(Budget):
    """Datamodel matching: predicts what a model trained without the records would say, and trains towards that."""

    projection: int = 1024  # Q
    ridge: float = 0.1  # in means of the eigenvalues of the gradients' covariance
    retain_rows: int = 256  # r: how many retain records are held in place; 0: all
    retain_effect: float = (
        0.0  # share of the predicted effect that their targets get; their predictions are mostly noise
    )
    scale: float = 0.0  # of the predicted effects; 0: from what training did, see `base`
    base: str = ""  # the model that training started from; empty: fresh random weights
    checkpoints: tuple[
        str, ...
    ] = ()  # folders of models trained likewise (other seeds): their attributions are averaged

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "checkpoints", tuple(self.checkpoints))
        above_zero(projection=self.projection, ridge=self.ridge)
        not_negative(retain_rows=self.retain_rows, retain_effect=self.retain_effect, scale=self.scale)

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm = plain(lm)
        request = replace(request, forget=distinct(request.forget))
        forget = encode(self, lm, request.forget)
        retain = self._sampled(encode_retain(self, lm, request))
        wanted = self._targets(lm, request, forget, retain)
        return match(self, lm, request, (forget, wanted[0]), (retain, wanted[1]), watch=watch)

    def predict(self, lm: LM, request: ForgetRequest, table: Dataset) -> np.ndarray:
        """DM-Direct: the log-odds (records,) that a model trained without the forget records would give to a table."""
        lm = plain(lm)
        request = replace(request, forget=distinct(request.forget))
        retain = self._sampled(encode_retain(self, lm, request))
        datamodel = self._datamodel(lm, request, (encode(self, lm, request.forget), retain))
        asked = encode(self, lm, table)
        return (log_odds_of(lm, asked) - datamodel.removal(asked)).numpy()

    def _targets(self, lm: LM, request: ForgetRequest, forget: Encoded, retain: Encoded) -> tuple[Tensor, Tensor]:
        datamodel = self._datamodel(lm, request, (forget, retain))
        kept = log_odds_of(lm, retain)
        if self.retain_effect:
            kept = kept - self.retain_effect * datamodel.removal(retain)
        return log_odds_of(lm, forget) - datamodel.removal(forget), kept

    def _sampled(self, retain: Encoded) -> Encoded:
        if not self.retain_rows or self.retain_rows >= len(retain):
            return retain
        return retain.select(np.sort(numpy_rng(self.seed, "retained").permutation(len(retain))[: self.retain_rows]))

    def _datamodel(self, lm: LM, request: ForgetRequest, known: Sequence[Encoded]) -> Removal:
        """`known`: training records on which the scale of the effects is set."""
        required(request.retain, "retain")
        table = request.trained_on()
        rows = _rows_of(request.forget, table)
        models = [lm, *(self._other(lm, folder) for folder in self.checkpoints)]
        gradients = Gradients(tuple(models), self.projection, self.seed)
        values, features = zip(*gradients(self._readable(lm, table)), strict=True)
        made = Removal(gradients, trak(features, values, self.ridge), rows)
        return replace(made, scale=self.scale or self._scale(lm, made, known))

    def _readable(self, lm: LM, table: Dataset) -> Encoded:
        return lm.encode(table, max_length=self.max_length)

    def _scale(self, lm: LM, made: Removal, known: Sequence[Encoded]) -> float:
        start = self._other(lm, self.base) if self.base else fresh(lm, self.seed)
        predicted = torch.cat([made.everything(rows) for rows in known])
        did = torch.cat([log_odds_of(lm, rows) - log_odds_of(start, rows) for rows in known])
        scale = scale_of(predicted, did)
        if scale <= 0:
            _LOG.warning("training did not make its records likelier than at the start: TRAK's raw scale is used")
            return 1.0
        return scale

    def _other(self, lm: LM, folder: str) -> LM:
        from palimpsest.models.lm import LM as Loader

        other = plain(Loader.load(folder, device=lm.device))
        check_vocabulary(other, lm)
        return other


def match(
    budget: Budget,
    lm: LM,
    request: ForgetRequest,
    forget: tuple[Encoded, Tensor],
    retain: tuple[Encoded, Tensor],
    *,
    watch: Watch | None = None,
) -> LM:
    """Oracle matching: a copy of `lm` trained to give the rows' target log-odds, (rows,) each, by squared error.

    With the log-odds of a model that was trained without the forget records (`log_odds_of`) it is the skyline.
    """
    batches = budget.batches(forget[0], "forget")
    kept = replace(budget.batches(retain[0], "retain"), batch_size=batches.batch_size)
    targets = {"forget": forget[1], "retain": retain[1]}

    def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
        return sum(_distance(model, batch[name], wanted) for name, wanted in targets.items()) / 2  # type: ignore[return-value]

    return unlearn(budget, lm, request, loss, watch=watch, forget=forget[0], beside={"retain": kept})


def _distance(model: nn.Module, batch: Batch, wanted: Tensor) -> Tensor:
    target = wanted[batch.rows.cpu()].to(batch.input_ids.device)
    return losses.over_rows((log_odds(model, batch) - target).square(), batch)


def log_odds(model: nn.Module, batch: Batch) -> Tensor:
    """log p / (1 - p) of each row's answer (of a document: of its text), in nats, (B,)."""
    logp = losses.sequence_logprobs(model, batch).clamp(max=_SURE)
    return logp - torch.log(-torch.expm1(logp))


def log_odds_of(lm: LM, encoded: Encoded) -> Tensor:
    """The log-odds of every row, (rows,) float32, on the processor."""
    found = torch.empty(len(encoded))
    with losses.evaluating(lm.model):
        for rows, batch in passes(lm.model, encoded):
            found[torch.from_numpy(rows)] = log_odds(lm.model, batch).float().cpu()
    return found


@dataclass(frozen=True, eq=False)
class Gradients:
    """Each model's log-odds of a table's rows, and the projected gradients of these: cached by model and table."""

    models: tuple[LM, ...]
    dimension: int
    seed: int

    def __call__(self, encoded: Encoded) -> list[tuple[Tensor, Tensor]]:
        """[(rows,), (rows, Q)] of each model."""
        return [self._of(lm, number, encoded) for number, lm in enumerate(self.models)]

    def _of(self, lm: LM, number: int, encoded: Encoded) -> tuple[Tensor, Tensor]:
        seed = derive(self.seed, "projection", number)

        def build(folder: Path) -> None:
            order: list[np.ndarray] = []

            def batches() -> Iterator[Batch]:
                for rows, batch in passes(lm.model, encoded):
                    order.append(rows)
                    yield batch

            layers = layers_by_row(lm.model)
            values, features = projected_gradients(
                lm.model, log_odds, batches(), self.dimension, seed=seed, layers=layers
            )
            back = np.argsort(np.concatenate(order))
            np.save(folder / "values.npy", values.float().cpu().numpy()[back])
            np.save(folder / "features.npy", features.cpu().numpy()[back])

        def read(folder: Path) -> tuple[Tensor, Tensor]:
            return tuple(torch.from_numpy(np.load(folder / f"{name}.npy")) for name in ("values", "features"))  # type: ignore[return-value]

        return cached("gradients", [lm.sha256, encoded.sha256, self.dimension, seed], build, read)


@dataclass(frozen=True, eq=False)
class Removal:
    """The predicted effect of leaving training rows out, on any rows' log-odds."""

    gradients: Gradients
    trak: Trak
    rows: np.ndarray  # of the training table: what must go
    scale: float = 1.0

    def removal(self, encoded: Encoded) -> Tensor:
        """(rows,): by how much the log-odds of each would fall."""
        return self.scale * self.trak.removal(self._seen(encoded), self.rows)

    def everything(self, encoded: Encoded) -> Tensor:
        """(rows,): the same if all of the training table went, on TRAK's raw scale."""
        return self.trak.removal(self._seen(encoded))

    def _seen(self, encoded: Encoded) -> list[Tensor]:
        return [features for _, features in self.gradients(encoded)]


def layers_by_row(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers inside the decoder that see rows apart, (B, T, D): experts, which see tokens mixed, do not."""
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    found = {name: layer for name, layer in linear_layers(model).items() if layer is not head}
    seen: set[str] = set()

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if output.shape[:2] == (2, 3):
                seen.add(name)

        return hook

    device = next(model.parameters()).device
    with losses.evaluating(model), hooked(*((layer, look(name)) for name, layer in found.items())):
        tokens = torch.arange(6, device=device).reshape(2, 3)
        model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    return {name: layer for name, layer in found.items() if name in seen}


def _rows_of(forget: Dataset, table: Dataset) -> np.ndarray:
    """Where the forget records are in what the model was trained on; `InputError` if one is not, or half of it goes."""
    places: dict[bytes, list[int]] = {}
    for row, content in enumerate(content_hashes(table)):
        places.setdefault(content, []).append(row)
    for number, content in enumerate(content_hashes(forget)):
        if content not in places:
            raise InputError(
                f"forget record {number + 1} of {len(forget)} is not among the {len(table)} training records: "
                "nothing can be said of what it did"
            )
    return check_rows(sorted(row for content in content_hashes(forget) for row in places[content]), len(table))
