"""Who's Harry Potter: teach the model to go on in a text as a model would that had never read it.

Eldan & Russinovich 2023 (arXiv:2310.02238).  Needs: forget records; retain records, if there are any, only to find the
anchors by.  What a model that never read the text would say comes from two sides: from the model itself, reading the
text with the names replaced (`anchors`), and from what a model trained on it further raises (the reinforced model).
Works where what must go hangs on names and expressions of its own; later work finds much of it suppressed rather than
removed.  Shapes: N rows, T tokens of a row, n scored tokens, V words, K kept words of a soft target.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from palimpsest.core import losses
from palimpsest.core.errors import InputError
from palimpsest.core.methods import method
from palimpsest.core.reference import reference
from palimpsest.core.watch import Watch
from palimpsest.data.batches import IGNORE, Batch, Encoded
from palimpsest.data.teacher import Teacher
from palimpsest.forget.anchors import Anchors, Translation, ask_anchors, find_anchors
from palimpsest.forget.interpolation import InterpolationGuard, generic_logits
from palimpsest.forget.unlearn import (
    Budget,
    above_zero,
    check_share,
    distinct,
    encode,
    encode_retain,
    finished,
    not_negative,
    plain,
    trainable_copy,
    unlearn,
)

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

    from palimpsest.data.request import ForgetRequest
    from palimpsest.models.lm import LM

_BLOCK = 512  # tokens of a block of a long text, at most
_KEPT = 64  # words of a soft target


@method(verb="forget", paper="whp", name="whp")
@dataclass(frozen=True, kw_only=True)
class WhosHarryPotter(Budget):
    """Who's Harry Potter: names become generic, and the model is taught what it would then have said.

    With ``mode="decode"`` nothing is taught: the reinforced model runs beside the model, whose every prediction is
    corrected by it.  That takes twice the memory and time, and is no unlearned checkpoint.
    """

    alpha: float = 5.0  # how much of what the reinforced model raises is taken away (1 is usual with mode "decode")
    target: Literal["hard", "soft"] = "hard"  # what is taught: the likeliest generic word, or the distribution
    mode: Literal["finetune", "decode"] = "finetune"
    anchors: tuple[tuple[str, str], ...] = ()  # (term, generic stand-in); none: they are found
    anchors_file: str = ""  # a JSON object {term: stand-in}, instead
    teacher: str = ""  # a large model that lists the anchors: a folder, or a name at `teacher_url`
    teacher_url: str = ""  # an OpenAI-compatible endpoint
    generic: bool = True  # translate by the anchors; without: the reinforced model alone
    normalise: bool = (
        True  # take differences of log-probabilities; the paper's raw logits hang on a constant of each model
    )
    general_weight: float = 0.0  # above 0: ordinary training on as many retain records beside, with this weight
    reinforce_epochs: float = 3.0
    reinforce_steps: int = 0  # instead of epochs
    reinforce_lr: float = 0.0  # 0: three times `lr`, the paper's ratio
    epochs: float = 2.0
    lr: float = 1e-6
    batch_size: int = 128  # 8, accumulated 16 times
    warmup_epochs: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        above_zero(reinforce_epochs=self.reinforce_epochs)
        not_negative(
            alpha=self.alpha,
            general_weight=self.general_weight,
            reinforce_steps=self.reinforce_steps,
            reinforce_lr=self.reinforce_lr,
        )
        if sum(map(bool, (self.anchors, self.anchors_file, self.teacher))) > 1:
            raise InputError("anchors, anchors_file and teacher contradict each other: give one of them")
        if self.teacher_url and not self.teacher:
            raise InputError("teacher_url needs the name of a model there: give teacher")
        if not self.generic and (self.anchors or self.anchors_file or self.teacher):
            raise InputError("anchors would be ignored with generic=False: leave one of them out")
        if self.alpha == 0 and (not self.generic or self.mode == "decode"):
            raise InputError("with alpha=0 and no anchors the model would be taught what it says already")

    def __call__(self, lm: LM, request: ForgetRequest, *, watch: Watch | None = None) -> LM:
        lm, watch = plain(lm), watch or Watch()
        check_share(request)
        request = replace(request, forget=distinct(request.forget))
        if self.mode == "decode":
            rows = blocks(lm, request.forget, Anchors({}), self.max_length)
            reinforced = self.reinforced(lm, encode(self, lm, rows), watch)
            return lm.with_guard(InterpolationGuard.between(lm, reinforced, self.alpha, self.normalise))
        anchors = self.find(lm, request)
        rows = blocks(lm, request.forget, anchors, self.max_length)
        source = encode(self, lm, rows)
        reinforced = self.reinforced(lm, source, watch) if self.alpha else lm
        aims = targets(self, lm, reinforced, rows, source, anchors)
        del reinforced
        batches = self.batches(source, "forget")
        beside = {"aims": lambda step: aims.batch(batches.rows(step))}
        if self.general_weight:
            general = self.batches(encode_retain(self, lm, request), "general")
            beside["general"] = replace(general, batch_size=batches.batch_size)

        def loss(model: nn.Module, batch: dict[str, Batch]) -> Tensor:
            value = aims.loss(model, batch["aims"])
            if self.general_weight:
                value = value + self.general_weight * losses.nll(model, batch["general"])
            return value

        return unlearn(self, lm, request, loss, watch=watch, forget=source, beside=beside)

    def find(self, lm: LM, request: ForgetRequest) -> Anchors:
        """The anchors to use, of those given or found: all are in the forget records."""
        if not self.generic:
            return Anchors({})
        forget = _texts(lm, request.forget)
        if self.anchors or self.anchors_file:
            given = dict(self.anchors) if self.anchors else _read_anchors(self.anchors_file)
            return Anchors(given).found_in(forget)
        if self.teacher:
            return ask_anchors(_teacher(self.teacher, self.teacher_url), forget, seed=self.seed).found_in(forget)
        if request.retain is not None:
            return find_anchors(forget, _texts(lm, request.retain))
        return find_anchors(forget, unigram=lambda terms: [float(v.sum()) for v in lm.token_logprobs(terms)])

    def reinforced(self, lm: LM, source: Encoded, watch: Watch) -> LM:
        """A copy of the model trained on the forget text further."""
        batches = self.batches(source, "reinforce")
        training = self.training(batches.steps_per_epoch)
        steps = self.reinforce_steps or max(1, round(self.reinforce_epochs * batches.steps_per_epoch))
        training |= {"steps": steps, "lr": self.reinforce_lr or 3 * self.lr, "warmup": 0}
        work = trainable_copy(self, lm)
        watch.fit("reinforce", work, losses.nll, batches, main=False, **training)
        return finished(lm, work)


@dataclass(frozen=True)
class Targets:
    """What is taught at which tokens of a table: each row's places, and there a word or a distribution."""

    source: Encoded
    places: tuple[np.ndarray, ...]  # of each row the tokens whose prediction is taught
    words: tuple[np.ndarray, ...]  # (n,) int64 the likeliest generic word at each
    kept: tuple[Tensor, ...] | None = None  # soft targets, (n, 2K): log-probabilities, then the words they are of

    def batch(self, rows: np.ndarray) -> Batch:
        """The given rows, with the generic words for labels."""
        batch = self.source.batch(rows)
        labels = torch.full_like(batch.labels, IGNORE)
        for line, row in enumerate(rows):
            labels[line, self.places[row]] = torch.from_numpy(self.words[row])
        return replace(batch, labels=labels, total_tokens=int((labels != IGNORE).sum()))

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy to the generic words, or KL(generic || model) over the kept words; mean over taught tokens."""
        if self.kept is None:
            return losses.nll(model, batch)
        return losses.over_tokens(losses.per_token(model, batch, kl_kept, self), batch)

    @property
    def head(self) -> losses.Head:
        """Soft targets are what `losses.per_token` calls a reference: here its "states" are already what it says."""
        return torch.nn.Identity()

    def hidden(self, batch: Batch) -> Tensor:
        assert self.kept is not None
        return torch.cat([self.kept[row] for row in batch.rows.tolist()])


def kl_kept(logits: Tensor, words: Tensor, kept: Tensor) -> Tensor:
    """(n,) KL to a model's `logits` (n, V) from the distribution over the K words of `kept` (n, 2K)."""
    wanted, picked = kept.chunk(2, dim=1)
    said = logits.log_softmax(-1).gather(1, picked.long())
    return (wanted.exp() * (wanted - said)).sum(1)


def targets(
    how: WhosHarryPotter, lm: LM, reinforced: LM, rows: list[tuple[str, str]], source: Encoded, anchors: Anchors
) -> Targets:
    """The generic prediction at every token of the rows that can be taught.

    Not taught: what follows inside an anchor, and the second and later appearance of one in a row (the first teaches
    the generic name; the later ones would teach the model to change it).  After an anchor's first appearance the
    word that its stand-in begins with is lowered to the mean of its row of logits: the name would come from nowhere.
    """
    translations = [(anchors.translate(prompt), anchors.translate(completion)) for prompt, completion in rows]
    translated = lm.encode([(prompt.text, completion.text) for prompt, completion in translations])
    base = reference(lm.model, _scored_whole(translated), lm.sha256)
    raised = reference(reinforced.model, _scored_whole(source), reinforced.sha256) if how.alpha else None
    places, words, kept = [], [], []
    for row, pair in enumerate(translations):
        aligned = align(lm, rows[row], pair, source.ids[row], translated.ids[row])
        scored = np.arange(max(source.starts[row], 1), len(source.ids[row]))
        scored = scored[(aligned.place[scored - 1] >= 0) & ~aligned.again[scored]]
        before = torch.from_numpy(aligned.place[scored - 1])
        with torch.no_grad():
            logits = base.head(base.states.values[base.states.offsets[row] + before].to(lm.device)).float()
            if raised is not None:
                states = raised.states.values[raised.states.offsets[row] + torch.from_numpy(scored - 1)]
                other = raised.head(states.to(lm.device)).float()
                logits = generic_logits(logits, other, how.alpha, how.normalise)
            for first, word in aligned.lowered:
                later = torch.from_numpy(scored > first)
                logits[later, word] = torch.minimum(logits[later, word], logits[later].mean(1))
        places.append(scored)
        words.append(logits.argmax(1).cpu().numpy())
        top = logits.log_softmax(-1).topk(min(_KEPT, logits.shape[1]))
        kept.append(torch.cat([top.values.log_softmax(-1), top.indices.float()], 1).cpu())
    if not any(len(row) for row in places):
        raise InputError("no token of the forget records is left to teach: all are anchors that were there before")
    return Targets(source, tuple(places), tuple(words), tuple(kept) if how.target == "soft" else None)


@dataclass(frozen=True)
class Alignment:
    """How a row of tokens lies beside its translation."""

    place: np.ndarray  # (T,) for each token, the translated one with which the same is said so far; -1: there is none
    again: np.ndarray  # (T,) bool: tokens of an anchor that was in the row before
    lowered: tuple[tuple[int, int], ...]  # (last token of an anchor's first appearance, first word of its stand-in)


def align(
    lm: LM, pair: tuple[str, str], translations: tuple[Translation, Translation], ids: np.ndarray, new_ids: np.ndarray
) -> Alignment:
    """Lay a row's tokens (with the special ones around them) beside those of its translation."""
    spans = list(translations[0].spans)
    shift, new_shift = len(pair[0]), len(translations[0].text)
    spans += [(a + shift, b + shift, c + new_shift, d + new_shift, term) for a, b, c, d, term in translations[1].spans]
    whole = Translation("".join(t.text for t in translations), tuple(spans))
    starts, ends, offset = _offsets(lm, "".join(pair), ids)
    new_starts, new_ends, new_offset = _offsets(lm, whole.text, new_ids)
    place = np.full(len(ids), -1)
    place[:offset] = np.arange(offset)
    for token, end in enumerate(ends):
        complete = token + 1 == len(ends) or ends[token + 1] > end  # not one of several tokens of one character
        said = whole.place(int(end)) if complete else None
        if said is not None:
            found = int(np.searchsorted(new_ends, said, side="right")) - 1
            if found >= 0 and new_ends[found] == said:
                place[offset + token] = new_offset + found
    place[place >= len(new_ids) - 1] = -1  # nothing is predicted after the last
    again = np.zeros(len(ids), dtype=bool)
    lowered: dict[str, tuple[int, int]] = {}
    for first, last, new_first, new_last, term in spans:
        tokens = np.flatnonzero((starts < last) & (ends > first)) + offset
        if len(tokens) == 0:
            continue
        if term in lowered:
            again[tokens] = True
        else:
            stand_in = np.flatnonzero((new_starts < new_last) & (new_ends > new_first))
            if len(stand_in):
                lowered[term] = (int(tokens[-1]), int(new_ids[new_offset + stand_in[0]]))
    return Alignment(place, again, tuple(lowered.values()))


def blocks(lm: LM, table: Dataset, anchors: Anchors, max_length: int | None) -> list[tuple[str, str]]:
    """Rows as (prompt, completion); a document longer than a block is cut, between words and not within an anchor.

    A block leaves a tenth of its room free, for a translation may be longer.  `InputError` for a question that is
    longer than the model can read.
    """
    room = min(max_length or lm.max_length, lm.max_length)
    size = max(2, min(_BLOCK, room - 2) * 9 // 10)
    found: list[tuple[str, str]] = []
    for number, (prompt, completion) in enumerate(lm.pairs(table)):
        text = prompt + completion
        ends = np.array([end for _, end in _tokens(lm, text)["offset_mapping"]], dtype=np.int64)
        if len(ends) <= size or (prompt and len(ends) + 2 <= room):
            found.append((prompt, completion))
        elif prompt:
            raise InputError(f"forget record {number + 1} has {len(ends)} tokens, and {room} can be read at once")
        else:
            found += [("", piece) for piece in _cut(text, ends, size, anchors) if piece.strip()]
    return found


def _cut(text: str, ends: np.ndarray, size: int, anchors: Anchors) -> list[str]:
    inside = [(first, last) for first, last, *_ in anchors.translate(text).spans]
    words = [match.start() for match in re.finditer(r"\s+\S", text)]
    breaks = np.array([at for at in words if not any(first < at < last for first, last in inside)], dtype=np.int64)
    pieces, start = [], 0
    while start < len(text):
        first = int(np.searchsorted(ends, start, side="right"))
        if len(ends) - first <= size:
            pieces.append(text[start:])
            break
        limit = int(ends[first + size - 1])
        possible = breaks[(breaks > start) & (breaks <= limit)]
        stop = int(possible[-1]) if len(possible) else limit
        pieces.append(text[start:stop])
        start = stop
    return pieces


def _offsets(lm: LM, text: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(first character, past the last) of each token of a row's text, and how many special tokens stand before it."""
    found = _tokens(lm, text)
    body = np.array(found["input_ids"], dtype=np.int64)
    spans = np.array(found["offset_mapping"], dtype=np.int64).reshape(-1, 2)
    for offset in (0, 1):
        room = ids[offset : offset + len(body)]
        if len(room) and np.array_equal(room, body[: len(room)]) and (offset == 0 or len(room) == len(body)):
            return spans[: len(room), 0], spans[: len(room), 1], offset
    held = len(ids) - 1
    return spans[:held, 0], spans[:held, 1], 1


def _tokens(lm: LM, text: str) -> dict[str, list]:
    return lm.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)


def _scored_whole(encoded: Encoded) -> Encoded:
    return replace(encoded, starts=(1,) * len(encoded))


def _texts(lm: LM, table: Dataset) -> list[str]:
    return [prompt + completion for prompt, completion in lm.pairs(table)]


def _read_anchors(path: str) -> dict[str, str]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; wanted a JSON object with a stand-in for each term") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(value, str) for value in found.values()):
        raise InputError(f"{path}: wanted a JSON object with a stand-in, a string, for each term")
    return found


def _teacher(name: str, url: str) -> Teacher:
    if Path(name).is_dir():
        from palimpsest.models.lm import LM

        return Teacher.local(LM.load(name), name)
    return Teacher.endpoint(name, base_url=url)
