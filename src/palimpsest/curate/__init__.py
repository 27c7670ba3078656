"""Choose or weigh the data worth learning from: a pool of anything goes in, the same rows with columns added come out.

``MetaCLIP(metadata="entries.txt")(frame)`` works on any Daft frame; ``run(method, "pool/*.parquet", "out")`` works
through files of any size, shard by shard.  Needs the extra ``palimpsest[curate]`` when something is run, not to be
imported.
"""

from palimpsest.curate.dsir import DSIR
from palimpsest.curate.engine import Curation, run
from palimpsest.curate.lightreasoner import LightReasoner
from palimpsest.curate.meta_rater import MetaRater
from palimpsest.curate.metaclip import MetaCLIP
from palimpsest.curate.pool import read
from palimpsest.curate.raters import Classifier, Perplexity
from palimpsest.curate.signals import Signals
from palimpsest.curate.storm import Storm

__all__ = [
    "DSIR",
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
