"""The bench of part two: measurements that survive an interruption, and verdicts on claims.

rows      the row store: one row per case and seed     claims   comparisons of rows, and what they say of a claim
training  setups trained and measured                  batched  many small networks in one program
teachers  one for each seed                            search   learning rates and the like, for all sides alike
replication  the verdicts of one run, of a second, and of both
students  those beside the book's own, as they are published
"""

from kdlib.lab.batched import train_many
from kdlib.lab.claims import (
    CONTRADICTED,
    INCONCLUSIVE,
    MIXED,
    PARTLY,
    SUPPORTED,
    VERDICTS,
    Claim,
    Comparison,
    Estimate,
    Judgement,
    compare,
    contrast,
    difference,
    estimate,
    interval,
    judge,
    pooled,
)
from kdlib.lab.replication import Verdict, badge, published_rows, verdict_table, verdicts
from kdlib.lab.rows import RowStore, cost, load, values, weighted
from kdlib.lab.search import Tuned, search_rows, tune
from kdlib.lab.teachers import soft_labels_of, teachers
from kdlib.lab.training import TrainingSetup, train_setups

__all__ = [
    "CONTRADICTED",
    "INCONCLUSIVE",
    "MIXED",
    "PARTLY",
    "SUPPORTED",
    "VERDICTS",
    "Claim",
    "Comparison",
    "Estimate",
    "Judgement",
    "RowStore",
    "TrainingSetup",
    "Tuned",
    "Verdict",
    "badge",
    "compare",
    "contrast",
    "cost",
    "difference",
    "estimate",
    "interval",
    "judge",
    "load",
    "pooled",
    "published_rows",
    "search_rows",
    "soft_labels_of",
    "teachers",
    "train_many",
    "train_setups",
    "tune",
    "values",
    "verdict_table",
    "verdicts",
    "weighted",
]
