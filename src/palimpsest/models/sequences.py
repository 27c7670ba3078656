"""Sequence models that read vectors instead of tokens: what learners in context are made of.

Four kinds under one face, ``model(tokens, context=None)``: a causal transformer, an LSTM, an LSTM whose cell is a
matrix written by outer products (fast weights), and a grid of LSTMs with shared weights (after VSML, arXiv:2012.14905).
With `context`, the tokens after the first `context` ones are alternatives of one and the same next token: each sees the
context and itself, so many queries are answered in one pass.
Knows nothing of tasks or of what the numbers in a token mean, but for `vsml`, whose token ends with the last label.
Shapes: B sequences, T tokens, F inputs a token, O outputs, D width.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from palimpsest.core.errors import InputError, unknown
from palimpsest.core.seeds import derive
from palimpsest.models.attention import decayed

Kind = Literal["transformer", "lstm", "fast-weights", "vsml"]


@dataclass(frozen=True)
class SequenceConfig:
    """What decides the shape of a model."""

    inputs: int
    outputs: int
    kind: Kind = "transformer"
    width: int = 64
    layers: int = 2  # of the transformer and the LSTM
    heads: int = 4
    length: int = 0  # most tokens of a transformer with learned positions; 0: no positions, any length
    eta: float = 0.0  # decay of momentum attention; 0: plain attention
    reach: int = 0  # how many values back momentum goes; 0: all the way

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise unknown("kind of sequence model", self.kind, get_args(Kind))
        if self.width % self.heads:
            raise InputError(f"width={self.width} is not a multiple of heads={self.heads}")
        if not 0 <= self.eta < 1:
            raise InputError(f"eta must be at least 0 and below 1, not {self.eta}")

    def state_size(self, tokens: int) -> int:
        """Numbers that carry the past into the prediction of the token after `tokens` ones."""
        cells = (self.inputs - self.outputs) * self.outputs  # of the grid
        sizes = {
            "transformer": 2 * self.width * self.layers * tokens,  # keys and values
            "lstm": 2 * self.width * self.layers,
            "fast-weights": self.width**2 + self.width,
            "vsml": 2 * self.width * cells,
        }
        return sizes[self.kind]


class SequenceModel(nn.Module):
    """A model and the configuration that it was built from."""

    config: SequenceConfig

    def forward(self, tokens: Tensor, context: int | None = None) -> Tensor:
        """(B, T, F) -> (B, T, O).  `InputError` for tokens of another width, or more than there are positions."""
        if tokens.ndim != 3 or tokens.shape[2] != self.config.inputs:
            raise InputError(f"tokens must have shape (B, T, {self.config.inputs}), not {tuple(tokens.shape)}")
        return self.read(tokens, tokens.shape[1] if context is None else context)

    def read(self, tokens: Tensor, context: int) -> Tensor:
        raise NotImplementedError

    @property
    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def build(config: SequenceConfig, seed: int = 0) -> SequenceModel:
    """A model with fresh float32 weights drawn from `seed`."""
    kinds = {"transformer": Transformer, "lstm": LSTM, "fast-weights": FastWeights, "vsml": SharedGrid}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return kinds[config.kind](config)


def save(model: SequenceModel, folder: str | Path) -> None:
    """Write ``model.safetensors`` and ``config.json`` into a folder."""
    from safetensors.torch import save_file

    from palimpsest.core.files import write_json

    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, Path(folder) / "model.safetensors"
    )
    write_json(Path(folder) / "config.json", asdict(model.config))


def load(folder: str | Path) -> SequenceModel:
    """What `save` wrote.  `InputError` if the folder holds no such model."""
    import json

    from safetensors.torch import load_file

    path = Path(folder)
    if not (path / "config.json").is_file() or not (path / "model.safetensors").is_file():
        raise InputError(f"{folder} holds no sequence model (config.json and model.safetensors are wanted)")
    model = build(SequenceConfig(**json.loads((path / "config.json").read_text(encoding="utf-8"))))
    model.load_state_dict(load_file(path / "model.safetensors"))
    return model.eval()


class Transformer(SequenceModel):
    """Pre-norm decoder with learned positions, or none (a causal mask suffices to tell order)."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.read_in = nn.Linear(config.inputs, config.width)
        self.places = nn.Parameter(0.02 * torch.randn(config.length, config.width)) if config.length else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.read_out = nn.Linear(config.width, config.outputs)

    def read(self, tokens: Tensor, context: int) -> Tensor:
        length = tokens.shape[1]
        places = torch.arange(length, device=tokens.device).clamp(max=context)
        hidden = self.read_in(tokens)
        if self.places is not None:
            if int(places[-1]) >= len(self.places):
                raise InputError(
                    f"{int(places[-1]) + 1} tokens are more than the {len(self.places)} the model was trained for: "
                    "give fewer examples, or train with more (or without positions)"
                )
            hidden = hidden + self.places[places]
        visible = None  # causal
        if length > context + 1:
            visible = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
            visible[context:, context:] = torch.eye(length - context, dtype=torch.bool, device=tokens.device)
        for block in self.blocks:
            hidden = block(hidden, places, visible)
        return self.read_out(self.norm(hidden))


class Block(nn.Module):
    """One layer: attention (with momentum, if the configuration says so), then a feed-forward block."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.eta, self.reach = config.eta, config.reach

    def forward(self, hidden: Tensor, places: Tensor, visible: Tensor | None) -> Tensor:
        rows, length, width = hidden.shape
        split = self.qkv(self.before_attention(hidden)).view(rows, length, 3, self.heads, width // self.heads)
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, is_causal=visible is None)
        if self.eta:
            weights = decayed(places[:, None] - places, torch.tensor(self.eta, device=hidden.device), self.reach)
            mixed = mixed + (weights if visible is None else weights * visible) @ value
        hidden = hidden + self.out(mixed.transpose(1, 2).reshape(rows, length, width))
        return hidden + self.down(F.gelu(self.up(self.before_mlp(hidden))))


class Recurrent(SequenceModel):
    """A model that carries a state: the context is read once, and each query goes on from where it ended."""

    def read(self, tokens: Tensor, context: int) -> Tensor:
        rows, length, _ = tokens.shape
        if length <= context + 1:
            return self.run(tokens, None)[0]
        queries = tokens[:, context:].flatten(0, 1)[:, None]
        if context == 0:
            return self.run(queries, None)[0].view(rows, length, -1)
        seen, state = self.run(tokens[:, :context], None)
        spread = tuple(part.repeat_interleave(length - context, dim=self.batch_dimension) for part in state)
        answers = self.run(queries, spread)[0].view(rows, length - context, -1)
        return torch.cat([seen, answers], dim=1)

    batch_dimension = 0  # of the state's tensors

    def run(self, tokens: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(B, T, F) and a state -> (B, T, O) and the state after the last token."""
        raise NotImplementedError


class LSTM(Recurrent):
    """The plain LSTM."""

    batch_dimension = 1

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.cells = nn.LSTM(config.inputs, config.width, config.layers, batch_first=True)
        self.read_out = nn.Linear(config.width, config.outputs)

    def run(self, tokens: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        hidden, after = self.cells(tokens, state)
        return self.read_out(hidden), after


class FastWeights(Recurrent):
    """An LSTM whose cell is a D x D matrix: written by gated outer products, read by a product with a query."""

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.gates = nn.Linear(config.inputs + config.width, 6 * config.width)
        self.read_out = nn.Linear(config.width, config.outputs)

    def run(self, tokens: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, width = len(tokens), self.config.width
        cell, hidden = state or (tokens.new_zeros(rows, width, width), tokens.new_zeros(rows, width))
        seen = []
        for token in tokens.unbind(1):
            parts = self.gates(torch.cat([token, hidden], dim=1)).chunk(6, dim=1)
            write, keep, show = (part.sigmoid() for part in parts[:3])
            value, key, query = (part.tanh() for part in parts[3:])
            cell = keep[:, :, None] * cell + (write * value)[:, :, None] * key[:, None, :]
            hidden = show * torch.tanh((cell @ query[:, :, None])[:, :, 0] / width**0.5)
            seen.append(hidden)
        return self.read_out(torch.stack(seen, dim=1)), (cell, hidden)


class SharedGrid(Recurrent):
    """One small LSTM, its weights shared, at each crossing of an input and a class: blind to the order of both.

    A token is an input vector and the label of the one before it; each crossing first learns from how wrong the last
    prediction was, then sends a message to its class.
    """

    def __init__(self, config: SequenceConfig):
        super().__init__()
        self.config = config
        self.features = config.inputs - config.outputs
        if self.features < 1:
            raise InputError("vsml reads tokens that end with the last label: inputs must exceed outputs")
        self.cell = nn.LSTMCell(3, config.width)
        self.message = nn.Linear(config.width, 1)

    def run(self, tokens: Tensor, state: tuple[Tensor, ...] | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        rows, classes = len(tokens), self.config.outputs
        shape = (rows, self.features, classes)
        if state is None:
            state = (
                tokens.new_zeros(*shape, self.config.width),
                tokens.new_zeros(*shape, self.config.width),
                tokens.new_zeros(rows, self.features),
                tokens.new_zeros(rows, classes),
            )
        hidden, cell, before, logits = state
        seen = []
        for token in tokens.unbind(1):
            x, label = token.split((self.features, classes), dim=1)
            # the first token has no label before it, and nothing to be wrong about
            wrong = (label - logits.softmax(1)) * label.sum(1, keepdim=True)
            hidden, cell = self._tick(before, wrong, 0.0, hidden, cell)
            hidden, cell = self._tick(x, torch.zeros_like(wrong), 1.0, hidden, cell)
            logits = self.message(hidden)[..., 0].sum(1) / self.features**0.5
            before = x
            seen.append(logits)
        return torch.stack(seen, dim=1), (hidden, cell, before, logits)

    def _tick(self, x: Tensor, wrong: Tensor, phase: float, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        shape = hidden.shape
        inputs = torch.stack(
            [
                x[:, :, None].expand(shape[:3]),
                wrong[:, None, :].expand(shape[:3]),
                torch.full(shape[:3], phase, device=x.device, dtype=x.dtype),
            ],
            dim=-1,
        )
        after = self.cell(inputs.reshape(-1, 3), (hidden.reshape(-1, shape[3]), cell.reshape(-1, shape[3])))
        return after[0].view(shape), after[1].view(shape)
