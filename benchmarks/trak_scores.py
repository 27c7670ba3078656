"""TRAK scores against the package `trak` (PyPI: traker) at equal dimension of the projection, on a processor.

Both sides get the same five networks, training rows and queries, float32, and the package one batch of all rows (its
fastest: it draws its projection anew for every batch).  Quality is the LDS on held-out subset models, which ours must
match: the package's is given as it comes, and with a ridge equal to ours.

    pip install traker && python benchmarks/trak_scores.py
"""

from __future__ import annotations

import logging
import tempfile

import numpy as np
import torch

from common import in_turns, ratio_of, report
from digits_networks import BATCH, SGD, TRAIN, digits, loss, network, trained_by_hand
from palimpsest.audit.datamodels import draw_subsets, lds, margins, projected_gradients, subset_outputs, trak_of

MODELS, DIMENSION, HELD_OUT, STEPS = 5, 512, 100, 560
RIDGE = 0.1


def main() -> None:
    try:
        from trak import TRAKer
    except ImportError:
        print("trak_scores: skipped, the package trak is not installed (pip install traker)")
        return
    data, asked = digits()
    models = [trained_by_hand(number, np.ones(TRAIN, bool), STEPS) for number in range(MODELS)]
    held = draw_subsets(TRAIN, HELD_OUT, seed=1)
    recipe = {"steps": STEPS // 2, "batch_size": BATCH, "optimizer": "sgd", **SGD}
    observed = margins(subset_outputs(network, loss, data, held, asked[0], seed=1, **recipe), asked[1])
    found: dict[str, torch.Tensor] = {}

    def score(model: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return margins(model(batch[0]), batch[1])

    def ours() -> None:
        found["ours"] = trak_of(models, score, [data], [asked], dimension=DIMENSION, ridge=RIDGE).effects

    def package(ridge: float) -> torch.Tensor:
        with tempfile.TemporaryDirectory() as folder:
            traker = TRAKer(
                network(),
                "image_classification",
                train_set_size=TRAIN,
                save_dir=folder,
                device="cpu",
                proj_dim=DIMENSION,
                use_half_precision=False,
                lambda_reg=ridge,
                logging_level=logging.ERROR,
            )
            for number, model in enumerate(models):
                traker.load_checkpoint(model.state_dict(), model_id=number)
                traker.featurize(batch=data, num_samples=TRAIN)
            traker.finalize_features()
            for number, model in enumerate(models):
                traker.start_scoring_checkpoint("queries", model.state_dict(), number, num_targets=len(asked[1]))
                traker.score(batch=asked, num_samples=len(asked[1]))
            return torch.from_numpy(np.array(traker.finalize_scores("queries")))

    def packaged() -> None:
        found["package"] = package(0.0)

    in_turns(ours, packaged, rounds=1)  # warm up
    fast, slow = in_turns(ours, packaged, rounds=5)
    # of the sum of eigenvalues the package sees 1 / (number of weights), ours all of it, over the dimensions
    squares = np.mean([projected_gradients(m, score, [data], DIMENSION)[1].square().sum() for m in models])
    found["package_equal_ridge"] = package(float(RIDGE * squares / sum(p.numel() for p in models[0].parameters())))
    masks = torch.from_numpy(held).float()
    quality = {f"lds_{side}": float(lds(masks @ effects, observed).mean()) for side, effects in found.items()}
    report(
        "trak_scores",
        2.0,
        ratio_of(slow, fast),
        dimension=DIMENSION,
        networks=MODELS,
        seconds_ours=float(np.median(fast)),
        seconds_package=float(np.median(slow)),
        **quality,
    )


if __name__ == "__main__":
    main()
