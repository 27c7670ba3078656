"""O3: a stream of requests forgotten by one low-rank adapter, loaded only as far as a prompt belongs to a request.

Gao et al. 2024 (arXiv:2407.10223, "On Large Language Model Continual Unlearning"; sheet `o3`).  Needs: forget records,
and nothing else.  Each request trains the same adapter on, towards wrong answers or refusals, its rows held orthogonal
to what it was after earlier requests; a detector learned from the request alone (models/detector.py) says how much of
the adapter a prompt gets.  The weights stay: who has them has everything, and so has who asks about the subject in
words that the detector takes for another subject.  Prompts far from every request are answered by the very same model.
Shapes: N prompts, B rows of a batch, R rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.seeds import numpy_rng
from palimpsest.core.watch import Watch
from palimpsest.data.batches import Batch
from palimpsest.data.lexicon import REFUSALS
from palimpsest.forget.eco import halved
from palimpsest.forget.preference import join
from palimpsest.forget.unlearn import Budget, above_zero, check_share, distinct, encode, not_negative, plain
from palimpsest.models.anatomy import sharing_copy
from palimpsest.models.detector import FEWEST, Detector, weights
from palimpsest.models.encoder import PACKAGED
from palimpsest.models.guard import Prepared, register_guard
from palimpsest.models.low_rank import LowRank, layer_matrices, overlap

if TYPE_CHECKING:
    from datasets import Dataset

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_SURE = 20  # different prompts: with fewer, what is held out says little about the spread of their scores
_KNOWN = 0.5  # the weight by an earlier detector above which a prompt counts as forgotten before


@method(verb="forget", paper="o3")
@dataclass(frozen=True, kw_only=True)
class O3(Budget):
    """O3: an adapter trained orthogonally to its past, and a detector of what belongs to the request; no retain data.

    Given a model with such a guard already, its adapter is trained on and the new detector joins the old ones: a prompt
    gets the adapter as strongly as the detector that is surest of it says.  A record with ``options`` is taught one of
    the others, drawn at random; any other record a refusal.
    """

    orthogonality: float = 0.1  # lambda: weight of the overlap with the adapter after earlier requests
    epochs: float = 15.0
    lr: float = 3e-4
    batch_size: int = 128
    lora_rank: int = 8
    lora_alpha: float = 16.0
    dropout: float = 0.05
    encoder: str = PACKAGED  # RoBERTa-large in the paper
    detector_epochs: int = 2  # of tuning the encoder on the request; 0: the encoder as it is
    detector_lr: float = 1e-5
    gamma: float = 1000.0  # weight of the detector's cosine distance
    nu: float = 0.1  # share of the request's own prompts that its one-class SVM may leave outside
    zeta: float = 10.0  # how soon a typical prompt gets the adapter in full; larger forgets more and costs more
    floor: float = 0.2  # weights up to it are 0 (the sigmoid alone would give every prompt 0.12)

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(lora_rank=self.lora_rank, lora_alpha=self.lora_alpha, detector_lr=self.detector_lr)
        not_negative(orthogonality=self.orthogonality, detector_epochs=self.detector_epochs)
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout must lie between 0 and 1, not {self.dropout:g}")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        earlier = _guard(lm)
        check_share(request)
        forget = distinct(request.forget)
        lm = plain(lm.with_guard(None))
        detector = self.detector(lm, forget, watch=watch)
        if earlier is not None:
            self._compare(earlier, _prompts(lm, forget))
        past = (*earlier.past, earlier.snapshot) if earlier else ()
        factors = self.adapter(lm, forget, past, earlier.factors if earlier else None, watch)
        detectors = (*earlier.detectors, detector) if earlier else (detector,)
        return lm.with_guard(O3Guard(factors, self.lora_alpha, detectors, past))

    def detector(self, lm: LM, forget: Dataset, *, watch: Watch | None = None) -> Detector:
        """What tells the prompts of a request from all others, learned from them alone."""
        prompts = _prompts(lm, forget)
        if len(prompts) < FEWEST:
            raise InputError(f"o3 learns from at least {FEWEST} different forget prompts, not {len(prompts)}")
        if len(prompts) < _SURE:
            warnings.warn(f"only {len(prompts)} different forget prompts: the detector may miss others", stacklevel=3)
        return Detector.fit(
            prompts,
            encoder=self.encoder,
            epochs=self.detector_epochs,
            lr=self.detector_lr,
            seed=self.seed,
            watch=watch,
            gamma=self.gamma,
            nu=self.nu,
            zeta=self.zeta,
            floor=self.floor,
        )

    def adapter(
        self,
        lm: LM,
        forget: Dataset,
        past: Sequence[Mapping[str, Tensor]] = (),
        factors: Mapping[str, Tensor] | None = None,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """The factors of the adapter after a request: those given, trained on (or fresh ones, trained).

        `past`: the A of the adapter as it was after each earlier request, from which its rows shall keep away.
        """
        wrong = encode(self, lm, self.targets(lm, forget))
        model = sharing_copy(lm.model)
        settings: dict[str, Any] = {"alpha": self.lora_alpha, "dropout": self.dropout}
        if factors is None:
            adapter = LowRank.fresh(layer_matrices(model), rank=self.lora_rank, seed=self.seed, **settings)
        else:
            adapter = LowRank.of(factors, **settings)
            _check_rank(adapter, self.lora_rank)
        adapter = adapter.to(lm.device)
        model.add_module("low_rank", adapter)
        snapshots = [{name: value.to(lm.device) for name, value in one.items()} for one in past]

        def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
            value = losses.nll(model, batch)
            if not snapshots or not self.orthogonality:
                return value, {"wrong": value.detach()}
            # the overlap is the same for every share of a batch, and shares add up
            shared = overlap(adapter, snapshots) * (len(batch) / batch.total_rows)
            return value + self.orthogonality * shared, {"wrong": value.detach(), "overlap": shared.detach()}

        batches = self.batches(wrong, "forget", len(past))
        with adapter.attached(model):
            (watch or Watch()).fit("forget", model, loss, batches, **self.training(batches.steps_per_epoch))
        if not any(bool(p.any()) for p in adapter.up):
            raise InputError("the adapter learned nothing: raise lr, steps or epochs")
        return {name: value.cpu().clone() for name, value in adapter.tensors().items()}

    def targets(self, lm: LM, forget: Dataset) -> list[tuple[str, str]]:
        """What is to be answered instead: another of a record's options, or a refusal; drawn once a record.

        A document's first half is its prompt.
        """
        given = forget["options"] if "options" in forget.column_names else [None] * len(forget)
        rng = numpy_rng(self.seed, "wrong answers")
        pairs = []
        for (prompt, completion), options in zip(lm.pairs(forget), given, strict=True):
            others = [one for one in options or () if one != completion.strip()]
            pool = others if prompt and others else REFUSALS
            pairs.append(join(prompt or halved(completion)[0], pool[int(rng.integers(len(pool)))]))
        return pairs

    def _compare(self, earlier: O3Guard, prompts: list[str]) -> None:
        known = float((earlier.weights(prompts) > _KNOWN).mean())
        if known > 0.5:
            warnings.warn(
                f"{known:.0%} of the forget prompts are like those of an earlier request: was it served before?",
                stacklevel=3,
            )


@register_guard("o3")
@dataclass(frozen=True, eq=False)
class O3Guard:
    """Adds the adapter to a prompt's answer as strongly as the surest of the requests' detectors says.

    A document is a completion of the empty prompt, which belongs to no request: it is scored as by the bare model.
    """

    factors: dict[str, Tensor] = field(repr=False)  # of the adapter, by the matrices' names: ".down" (A), ".up" (B)
    alpha: float
    detectors: tuple[Detector, ...]  # one a request
    past: tuple[dict[str, Tensor], ...] = field(default=(), repr=False)  # its A after each request but the last

    @property
    def snapshot(self) -> dict[str, Tensor]:
        """The adapter's A as it is now, by the matrices' names."""
        return {name.removesuffix(".down"): value for name, value in self.factors.items() if name.endswith(".down")}

    def prepare(self, lm: LM, prompts: Sequence[str]) -> Prepared:
        return weighted(lm, self.factors, self.alpha, prompts, self.weights(prompts))

    def weights(self, prompts: Sequence[str]) -> np.ndarray:
        """(N,) how much of the adapter each prompt gets: the largest weight by a request's detector."""
        return weights(self.detectors, prompts).max(1, initial=0.0)

    def explain(self, prompts: Sequence[str]) -> list[dict[str, Any]]:
        """For a log: each prompt's weight by every request, and the request (counted from 0) that decides; -1: none."""
        found = weights(self.detectors, prompts)
        return [
            {
                "weights": row.tolist(),
                "request": int(row.argmax()) if row.any() else -1,
                "weight": float(row.max(initial=0.0)),
            }
            for row in found
        ]

    def without(self, request: int) -> O3Guard:
        """The guard without the detector of a request (counted from 0): its subject is answered again.

        What the adapter learned of it stays in the adapter, which the prompts of other requests get.
        """
        if not 0 <= request < len(self.detectors):
            raise InputError(f"there is no request {request} among the {len(self.detectors)} of this guard")
        return replace(self, detectors=self.detectors[:request] + self.detectors[request + 1 :])

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"factors.{name}": value for name, value in self.factors.items()}
        for number, snapshot in enumerate(self.past):
            tensors |= {f"past.{number}.{name}": value for name, value in snapshot.items()}
        detectors = []
        for number, detector in enumerate(self.detectors):
            settings, own = detector.state()
            detectors.append(settings)
            tensors |= {f"detectors.{number}.{name}": value for name, value in own.items()}
        return {"alpha": self.alpha, "detectors": detectors, "past": len(self.past)}, tensors

    @classmethod
    def restore(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> O3Guard:
        detectors = tuple(
            Detector.restore(one, _under(tensors, f"detectors.{number}."))
            for number, one in enumerate(settings["detectors"])
        )
        past = tuple(_under(tensors, f"past.{number}.") for number in range(settings["past"]))
        return cls(_under(tensors, "factors."), settings["alpha"], detectors, past)


def weighted(
    lm: LM, factors: Mapping[str, Tensor], alpha: float, prompts: Sequence[str], strength: np.ndarray
) -> Prepared:
    """Prompts of which each gets the adapter times its `strength`, (N,); where that is 0 the model is bare."""
    if not strength.any():
        return Prepared(prompts)
    adapter = LowRank.of(factors, alpha=alpha).to(lm.device).requires_grad_(False).eval()

    def active(rows: np.ndarray, prompt: Tensor) -> AbstractContextManager[None]:
        chosen = torch.from_numpy(strength[rows]).float().to(lm.device)
        return adapter.attached(lm.model, chosen) if bool(chosen.any()) else nullcontext()

    return Prepared(prompts, active)


def _guard(lm: LM) -> O3Guard | None:
    if lm.guard is None or isinstance(lm.guard, O3Guard):
        return lm.guard
    raise InputError(f"this model forgets by another guard ({type(lm.guard).__name__}): load it without that guard")


def _prompts(lm: LM, forget: Dataset) -> list[str]:
    """The different prompts of the records; of a document its first half, and the whole."""
    found: list[str] = []
    for prompt, completion in lm.pairs(forget):
        found += [prompt] if prompt else [halved(completion)[0], completion]
    return [text for text in dict.fromkeys(found) if text.strip()]


def _check_rank(adapter: LowRank, wanted: int) -> None:
    rank = len(adapter.down[0])
    if rank != wanted:
        raise InputError(
            f"the adapter of the earlier requests has rank {rank}: lora_rank={wanted} cannot go on from it"
        )


def _under(tensors: Mapping[str, Tensor], start: str) -> dict[str, Tensor]:
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
