"""The bench of part two: measurements that survive an interruption, and verdicts on claims.

rows      the row store: one row per case and seed     claims   comparisons of rows, and what they say of a claim
training  setups trained and measured, rate search     batched  many small networks in one program
"""

from kdlib.lab.batched import train_many
from kdlib.lab.claims import (
    HOLDS,
    NOT_SEEN,
    PARTLY,
    Claim,
    Comparison,
    Judgement,
    difference,
    judge,
    verdict_rows,
)
from kdlib.lab.rows import RowStore, cost, load, values
from kdlib.lab.training import TrainingSetup, search_rate, train_setups

__all__ = [
    "HOLDS",
    "NOT_SEEN",
    "PARTLY",
    "Claim",
    "Comparison",
    "Judgement",
    "RowStore",
    "TrainingSetup",
    "cost",
    "difference",
    "judge",
    "load",
    "search_rate",
    "train_many",
    "train_setups",
    "values",
    "verdict_rows",
]
