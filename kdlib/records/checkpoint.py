"""An unfinished training in a file: all that decides how it goes on, so that an interrupted run loses a minute."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kdlib.records import artefacts

CHECKPOINT_SECONDS = 60  # at least so long between two checkpoints of a long run


class Checkpoint:
    """One unfinished run's file.

    Args:
        path: the file; None: nothing is kept.
        key: what the run is; a file of another run is refused.
        generator: of the run's random numbers.
        parts: by name, what has a state: model, optimizer, scaler.
    """

    def __init__(self, path: Path | None, key: str | None, generator: torch.Generator, **parts):
        self.path, self.key, self.generator, self.parts = path, key, generator, parts
        self.saved_at = time.perf_counter()

    def resume(self) -> dict[str, list[float]]:
        """The run's history so far, with the parts and the generator as they were then; {} without a file.

        Raises:
            ValueError: the file is damaged, or of another run.
        """
        if self.path is None or not self.path.exists():
            return {}
        try:
            state = torch.load(self.path, weights_only=True)
            if state["key"] != self.key:
                raise ValueError(
                    "it is of a run with another network, other first weights, other data, another objective or recipe"
                )
            for name, part in self.parts.items():
                part.load_state_dict(state[name])
            self.generator.set_state(state["generator"].cpu())
            return state["history"]
        except Exception as error:
            raise ValueError(
                f"{self.path} is not a checkpoint of this run ({artefacts.short_reason(error)}): move it away to start "
                "afresh"
            ) from error

    def save(self, history: dict[str, list[float]]) -> None:
        """Write all of it, if the last time is long enough ago."""
        if self.path is None or time.perf_counter() - self.saved_at < CHECKPOINT_SECONDS:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"key": self.key, "generator": self.generator.get_state(), "history": history}
        with artefacts.atomic_write(self.path) as partial:
            torch.save(state, partial)
        self.saved_at = time.perf_counter()

    def remove(self) -> None:
        """Delete the file: the run is finished."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)
