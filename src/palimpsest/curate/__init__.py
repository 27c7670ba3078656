"""Choose or weigh the data worth learning from: a pool of anything goes in, the same rows with columns added come out.

``MetaCLIP(metadata="entries.txt")(frame)`` works on any Daft frame; ``run(method, "pool/*.parquet", "out")`` works
through files of any size, shard by shard.  Needs the extra ``palimpsest[curate]`` when something is run, not to be
imported.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from palimpsest.curate.biomed_enriched import BiomedEnriched
    from palimpsest.curate.dsir import DSIR
    from palimpsest.curate.engine import Curation, run
    from palimpsest.curate.lightreasoner import LightReasoner
    from palimpsest.curate.meta_rater import MetaRater
    from palimpsest.curate.metaclip import MetaCLIP
    from palimpsest.curate.pool import read
    from palimpsest.curate.raters import Classifier, Perplexity
    from palimpsest.curate.signals import Signals
    from palimpsest.curate.storm import Storm

_modules = {
    "DSIR": "dsir",
    "BiomedEnriched": "biomed_enriched",
    "Classifier": "raters",
    "Curation": "engine",
    "LightReasoner": "lightreasoner",
    "MetaCLIP": "metaclip",
    "MetaRater": "meta_rater",
    "Perplexity": "raters",
    "Signals": "signals",
    "Storm": "storm",
    "read": "pool",
    "run": "engine",
}
__all__ = [
    "DSIR",
    "BiomedEnriched",
    "Classifier",
    "Curation",
    "LightReasoner",
    "MetaCLIP",
    "MetaRater",
    "Perplexity",
    "Signals",
    "Storm",
    "read",
    "run",
]


def __getattr__(name: str) -> Any:  # a worker process waits for what its own method needs, not for all of them
    if name in _modules:
        return getattr(importlib.import_module(f"palimpsest.curate.{_modules[name]}"), name)
    raise AttributeError(f"module 'palimpsest.curate' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
