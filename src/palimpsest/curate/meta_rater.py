"""Meta-rater: learn how much each quality score should count, from what many tiny models learn on different choices.

Zhuang et al. 2025 (arXiv:2504.14194).  Needs a pool with score columns (of any origin: `Signals`, a rater's logits) and
a file of validation documents: being good at these is the objective, so keep them apart from what tests the model.
Weights are never negative: say which scores are better when lower.  A score whose good side is in the middle is no use.

Ours where the paper's text is silent: the normaliser (ranks to a standard normal), the draw of weights, the proxies'
size, and ridge regression beside LightGBM, whichever predicts held-out proxies better.
Shapes: N sampled documents, m scores, P proxies, K knots.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from palimpsest.core.errors import InputError, MissingExtra
from palimpsest.core.methods import method
from palimpsest.core.seeds import derive, numpy_rng
from palimpsest.curate.engine import add, text_column
from palimpsest.curate.pool import require_daft

if TYPE_CHECKING:
    from daft import DataFrame

Array = np.ndarray[Any, Any]

_KNOTS = 257  # quantiles that stand for a score's distribution
_REPEATS = (3, 3)  # weightings that are trained again, and with how many seeds each, to know the noise
_TINY = 1e-9  # of a hash in [0, 1): breaks ties between equal scores


@method(verb="curate", paper="meta_rater", name="meta-rater")
@dataclass(frozen=True)
class MetaRater:
    """Rank documents by the mixture of their scores whose choice teaches small models most, and keep the best share.

    Adds ``score_meta_rater`` and ``keep``.
    """

    validation: str = ""  # file of documents that the model should be good at
    text: str = "text"  # column
    scores: str = ""  # columns, separated by commas; "": every number called score_*
    lower_is_better: str = ""  # those of them that are, separated by commas
    share: float = 0.25  # of the pool to keep, by bytes of text (which stand for tokens)
    proxies: int = 256
    proxy_share: float = 0.15  # of the sampled text that a proxy is trained on
    proxy_steps: int = 150
    sample: int = 20_000  # documents of the pool that proxies choose from, drawn by hash
    length: int = 64  # tokens of a document that proxies read
    candidates: int = 100_000  # weightings whose loss is predicted
    top: int = 128  # of these, the best that are averaged
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("share", "proxy_share"):
            if not 0 < getattr(self, name) < 1:
                raise InputError(f"{name} must lie between 0 and 1, not {getattr(self, name)}")
        if self.proxies < 16:
            raise InputError(f"proxies must be at least 16, not {self.proxies}: fewer cannot be regressed on")

    def __call__(self, pool: DataFrame) -> DataFrame:
        return self.judge(pool, self.gather([self.survey(pool).to_arrow()]))

    def survey(self, shard: DataFrame) -> DataFrame:
        """The documents of the shard with the lowest hashes: text, scores and draw."""
        daft = require_daft()
        names = self._names(shard)
        _refuse_nulls(shard, names)
        kept = shard.select(
            text_column(shard, self.text).fill_null("").alias("text"),
            *(daft.col(name).cast(daft.DataType.float64()).alias(name) for name in names),
            self._draw(shard).alias("draw"),
        )
        return kept.sort(["draw", "text"]).limit(self.sample)

    def gather(self, parts: Sequence[pa.Table]) -> pa.Table:
        """(m,) rows: score, sign, weight and knots; the rest of what was learned is JSON in the schema."""
        from palimpsest.curate import proxies

        table = pa.concat_tables(parts).sort_by([("draw", "ascending"), ("text", "ascending")]).slice(0, self.sample)
        names = [name for name in table.column_names if name not in ("text", "draw")]
        signs = np.array([-1.0 if name in _listed(self.lower_is_better) else 1.0 for name in names])
        raw = np.stack([table[name].to_numpy() for name in names], axis=1) * signs
        constant = [name for name, column in zip(names, raw.T, strict=True) if np.ptp(column) == 0]
        if len(constant) == len(names):
            raise InputError(f"every score is constant ({', '.join(constant)}): nothing to rank by")
        knots = np.quantile(raw, np.linspace(0, 1, _KNOTS), axis=0).T
        scores = normalised(raw, knots)
        texts, draw = table["text"].to_pylist(), uniform_draw(table["draw"].to_numpy())
        size = np.array([len(text.encode()) for text in texts])
        rng = numpy_rng(self.seed, "meta-rater")
        live = np.array([name not in constant for name in names])
        weights = np.zeros((self.proxies, len(names)))
        weights[:, live] = draw_weights(int(live.sum()), self.proxies, rng)

        documents, held_out = proxies.encode(texts, self._held_out(), self.length)
        again, times = _REPEATS
        trained = np.concatenate([weights, *[weights[-again:]] * (times - 1)])
        rounds = np.repeat([0, *range(1, times)], [self.proxies, *[again] * (times - 1)])
        loss = proxies.losses(
            documents,
            held_out,
            np.stack([top_share(scores @ w + _TINY * draw, size, self.proxy_share) for w in trained]),
            steps=self.proxy_steps,
            seeds=[derive(self.seed, "proxy", int(number)) for number in rounds],  # one for all weightings of a round
        )
        repeated = loss[self.proxies - again :].reshape(times, again)
        noise = float(np.sqrt(repeated.var(axis=0, ddof=1).mean()))
        signal = float(loss[: self.proxies].std() / max(noise, 1e-12))
        if signal < 1:
            raise InputError(
                f"the proxies' losses vary less between weightings than between seeds (ratio {signal:.2f}): "
                "raise proxy_steps or lower proxy_share"
            )
        found = search(weights, loss[: self.proxies], live, self.candidates, self.top, rng)
        chosen = scores @ found.weights + _TINY * draw
        line = float(chosen[top_share(chosen, size, self.share)].min())
        told = {
            "line": line,
            "spearman": found.spearman,
            "regressor": found.regressor,
            "signal": signal,
            "predicted": found.predicted,
            "constant": constant,
            "runs": [[*w.tolist(), float(value)] for w, value in zip(weights, loss, strict=False)],
        }
        facts = pa.table({"score": names, "sign": signs, "weight": found.weights, "knots": list(knots)})
        return facts.replace_schema_metadata({"learned": json.dumps(told)})

    def judge(self, shard: DataFrame, facts: pa.Table) -> DataFrame:
        daft = require_daft()
        names, signs = facts["score"].to_pylist(), facts["sign"].to_numpy()
        weights, knots = facts["weight"].to_numpy(), np.array(facts["knots"].to_pylist())
        line = learned(facts)["line"]
        _refuse_nulls(shard, names)

        @daft.func.batch(return_dtype=daft.DataType.float64(), use_process=False)
        def score(draw: Any, *columns: Any) -> Any:
            raw = np.stack([column.to_arrow().to_numpy() for column in columns], axis=1) * signs
            return normalised(raw, knots) @ weights + _TINY * uniform_draw(draw.to_arrow().to_numpy())

        columns = [daft.col(name).cast(daft.DataType.float64()) for name in names]
        judged = add(shard, {"score_meta_rater": score(self._draw(shard), *columns)})
        return add(judged, {"keep": daft.col("score_meta_rater") >= line})

    def review(self, judged: DataFrame) -> DataFrame:
        """Bytes of text, in all and kept."""
        daft = require_daft()
        size = daft.functions.length_bytes(daft.col(self.text).fill_null(""))
        kept = daft.col("keep").cast(daft.DataType.int64())
        return judged.agg(size.sum().alias("bytes"), (size * kept).sum().alias("kept"))

    def notes(self, facts: pa.Table, reviews: Sequence[pa.Table], totals: Mapping[str, float]) -> dict[str, Any]:
        told = learned(facts)
        size, kept = (sum(sum(part[name].to_pylist()) for part in reviews) for name in ("bytes", "kept"))
        weights = sorted(zip(facts["weight"].to_pylist(), facts["score"].to_pylist(), strict=True), reverse=True)
        return {
            "numbers": {name: told[name] for name in ("line", "spearman", "signal", "predicted")},
            "sentences": [
                f"{kept / max(size, 1):.1%} of the text was kept by bytes; {self.share:.1%} were asked for.",
                f"Proxies' losses vary {told['signal']:.1f} times as much between weightings as between seeds; "
                f"{told['regressor']} predicts held-out ones with a rank correlation of {told['spearman']:.2f}.",
            ],
            "warnings": [f"The score {name} is constant and was not used." for name in told["constant"]],
            "curves": [],
            "tables": [
                {
                    "caption": "What each score counts",
                    "columns": ["score", "weight"],
                    "rows": [[name, f"{weight:.3f}"] for weight, name in weights],
                }
            ],
        }

    def _names(self, frame: DataFrame) -> list[str]:
        """The score columns that the user names, or all that are called so."""
        kinds = {name: frame.schema()[name].dtype for name in frame.column_names}
        wanted = _listed(self.scores)
        for name in [*wanted, *_listed(self.lower_is_better)]:
            if name not in kinds:
                raise InputError(f"no column '{name}' to rank by; found {', '.join(repr(found) for found in kinds)}")
            if not kinds[name].is_numeric():
                raise InputError(f"the column '{name}' holds {kinds[name]}; wanted numbers")
        found = wanted or sorted(
            name for name, kind in kinds.items() if name.startswith("score_") and kind.is_numeric()
        )
        if len(found) < 2:
            raise InputError(
                f"found {len(found)} scores ({', '.join(found) or 'none'}); wanted at least two columns called "
                "score_*, or named with scores ('signals' adds eleven)"
            )
        return found

    def _draw(self, frame: DataFrame) -> Any:
        """A 64-bit hash of a document's text and the seed."""
        daft = require_daft()
        text = text_column(frame, self.text).fill_null("")
        return daft.functions.hash(text, seed=derive(self.seed, "draw"), hash_function="xxhash3_64")

    def _held_out(self) -> list[str]:
        if not self.validation:
            raise InputError("wanted validation: a file of documents that the model should be good at")
        from palimpsest.data import records, sources

        return records.documents(sources.read(Path(self.validation), wanted="documents"))


def uniform_draw(hashes: Array) -> Array:
    """(N,) in [0, 1) from uint64 hashes."""
    return (hashes >> np.uint64(11)) * 2.0**-53


def normalised(raw: Array, knots: Array) -> Array:
    """(N, m) raw scores -> their ranks as standard normal values; the distributions are given by (m, K) quantiles."""
    from scipy import stats

    levels = (np.arange(knots.shape[1]) + 0.5) / knots.shape[1]
    columns = []
    for values, known in zip(raw.T, knots, strict=True):
        below = np.interp(
            values, known, levels
        )  # at a value that many share: its highest rank, so take both ends' mean
        above = 1 - np.interp(-values, -known[::-1], levels)
        columns.append(stats.norm.ppf((below + above) / 2))
    return np.stack(columns, axis=1)


def draw_weights(scores: int, count: int, rng: np.random.Generator) -> Array:
    """(P, m) weights >= 0 that sum to 1: each score alone, all alike, then Dirichlet draws, sharp and mild 2 : 7."""
    fixed = np.concatenate([np.eye(scores), np.full((1, scores), 1 / scores)])[: count // 2]
    sharp = (count - len(fixed)) * 2 // 9
    mild = count - len(fixed) - sharp
    drawn = [rng.dirichlet(np.full(scores, 0.3), sharp), rng.dirichlet(np.ones(scores), mild)]
    return np.concatenate([fixed, *drawn])


def top_share(score: Array, size: Array, share: float) -> Array:
    """(N,) bool: the documents from the highest score down until they hold `share` of the total size; at least one."""
    order = np.argsort(-score, kind="stable")
    held = np.cumsum(size[order])
    chosen = np.zeros(len(score), bool)
    chosen[order[: max(1, int(np.searchsorted(held, share * held[-1], side="right")))]] = True
    return chosen


@dataclass(frozen=True)
class Found:
    weights: Array  # (m,)
    predicted: float  # loss
    regressor: str
    spearman: float  # of predictions for held-out proxies


def search(weights: Array, loss: Array, live: Array, candidates: int, top: int, rng: np.random.Generator) -> Found:
    """The mean of the `top` of many fresh weightings with the lowest predicted loss (the mean, so as not to fall for an
    outlier of the regressor), from (P, m) weights and (P,) losses.  `live`: (m,) bool, the scores in use.
    """
    regressors = {"ridge": _ridge, "LightGBM": _boosted}
    ranked = {name: _cross_validated(fit, weights[:, live], loss) for name, fit in regressors.items()}
    name = max(ranked, key=lambda key: ranked[key])
    fresh = draw_weights(int(live.sum()), candidates, rng)
    predicted = regressors[name](weights[:, live], loss, fresh)
    best = np.argsort(predicted, kind="stable")[:top]
    found = np.zeros(weights.shape[1])
    found[live] = fresh[best].mean(axis=0)
    return Found(found, float(predicted[best].mean()), name, ranked[name])


def _cross_validated(fit: Any, weights: Array, loss: Array, folds: int = 5) -> float:
    """Spearman's rank correlation of predictions for left-out proxies; -1 where they do not vary."""
    from scipy import stats

    fold = np.arange(len(loss)) % folds
    predicted = np.empty(len(loss))
    for number in range(folds):
        inside = fold != number
        predicted[~inside] = fit(weights[inside], loss[inside], weights[~inside])
    if np.ptp(predicted) < 1e-12 or np.ptp(loss) < 1e-12:
        return -1.0
    return float(stats.spearmanr(predicted, loss).statistic)


def _ridge(weights: Array, loss: Array, wanted: Array) -> Array:
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import PolynomialFeatures, StandardScaler

    model = make_pipeline(PolynomialFeatures(2, include_bias=False), StandardScaler(), RidgeCV(np.logspace(-3, 3, 13)))
    return np.asarray(model.fit(weights, loss).predict(wanted))


def _boosted(weights: Array, loss: Array, wanted: Array) -> Array:
    try:
        import lightgbm
    except ModuleNotFoundError:
        raise MissingExtra("lightgbm", "curate") from None
    settings = {
        "objective": "regression",
        "learning_rate": 0.01,
        "num_leaves": 15,
        "min_data_in_leaf": max(2, min(20, len(loss) // 20)),  # the default of 20 makes a constant of few proxies
        "verbosity": -1,
        "num_threads": 1,
        "deterministic": True,
        "seed": 0,
    }
    held = np.arange(len(loss)) % 10 == 9
    train, valid = (lightgbm.Dataset(weights[rows], loss[rows]) for rows in (~held, held))
    stop: list[Any] = [lightgbm.early_stopping(50, verbose=False)]
    model = lightgbm.train(settings, train, 1000, valid_sets=[valid], callbacks=stop)
    return np.asarray(model.predict(wanted))


def _refuse_nulls(frame: DataFrame, names: list[str]) -> None:
    """An `InputError` that names the first score column with a missing value, and a text that lacks it."""
    daft = require_daft()
    counts = frame.agg(*(daft.col(name).is_null().cast(daft.DataType.int64()).sum().alias(name) for name in names))
    for name, count in counts.to_pylist()[0].items():
        if count:
            row = frame.where(daft.col(name).is_null()).limit(1).to_pylist()[0]
            shown = {key: value for key, value in row.items() if isinstance(value, str)}
            raise InputError(f"the score '{name}' is missing in {count:,} rows; the first: {str(shown)[:120]}")


def learned(facts: pa.Table) -> dict[str, Any]:
    """What `MetaRater.gather` found beside the weights: line, spearman, signal, runs (m weights and a loss each)"""
    found: dict[str, Any] = json.loads(facts.schema.metadata[b"learned"])
    return found


def _listed(names: str) -> list[str]:
    return [name.strip() for name in names.split(",") if name.strip()]
