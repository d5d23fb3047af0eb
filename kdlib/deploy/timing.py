"""How fast networks are beside each other: in turns, so that what else the machine does meets all of them alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import numpy as np


def interleaved(
    calls: Mapping[str, Callable[[], object]], *, rounds: int = 20, seconds: float = 0.02, at_most: float = 60
) -> dict[str, float]:
    """Median milliseconds of each call, measured in rounds: in every round each is called for `seconds` in turn.

    Args:
        at_most: seconds after which no further round begins, once there have been three; the first one warms up.

    Returns:
        The median over the rounds by name, each round being the mean of its calls.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    begin = time.perf_counter()
    for done in range(rounds + 1):
        if done > 3 and time.perf_counter() - begin > at_most:
            break
        for name, call in calls.items():
            start, count = time.perf_counter(), 0
            while count == 0 or time.perf_counter() - start < seconds:
                call()
                count += 1
            times[name].append((time.perf_counter() - start) / count)
    return {name: 1000 * float(np.median(own[1:])) for name, own in times.items()}
