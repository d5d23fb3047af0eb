"""An unfinished training in a file: all that decides how it goes on, so that an interrupted run loses a minute."""

from __future__ import annotations

import contextlib
import hashlib
import io
import signal
import threading
import time
import warnings
from pathlib import Path

import torch

from kdlib.gpu import ranks
from kdlib.records import artefacts, files

CHECKPOINT_SECONDS = 60  # at least so long between two checkpoints of a long run
_SEAL = b"\nkdlib sha256 "  # what stands before the SHA-256, in hexadecimal digits, at the end of the file
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Checkpoint:
    """One unfinished run's file; the one before it is kept too, as ``<name>.previous``. Rank 0 writes, all read.

    As a context manager it catches Ctrl-C and SIGTERM: the epoch is finished and saved, and then the signal takes its
    course. The second time it does so at once.

    Args:
        path: the file; None: nothing is kept, and signals are as they were.
        key: what the run is; a file of another run is refused.
        generator: of the run's random numbers.
        parts: by name, what has a state: model, optimizer, scaler.
    """

    def __init__(self, path: Path | None, key: str | None, generator: torch.Generator, **parts):
        self.path, self.key, self.generator, self.parts = path, key, generator, parts
        self.saved_at, self.cost = time.perf_counter(), 0.0  # seconds that the last one took
        self.received, self.handlers = None, {}

    def __enter__(self) -> Checkpoint:
        if self.path is not None and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())

    def _receive(self, number: int, _) -> None:
        if self.received is not None:
            self._obey(number)
        self.received = number
        with contextlib.suppress(RuntimeError):  # if it came while something else was printed
            print("stopping after this epoch, with a checkpoint; the same again stops at once", flush=True)

    def _obey(self, number: int) -> None:
        self.__exit__()
        signal.raise_signal(number)

    def resume(self) -> dict[str, list[float]]:
        """The run's history so far, with the parts and the generator as they were then; {} without a file.

        Raises:
            ValueError: the file is damaged, and so is the one before it; or it is of another run or device.
        """
        refused: list[Exception] = []
        for file in (self.path, previous(self.path)) if self.path is not None else ():
            if not ranks.broadcast(file.exists()):
                continue
            try:
                history = self._load(file)
            except Exception as error:
                refused.append(error)
                continue
            if refused:
                print(f"{self.path} is damaged ({artefacts.short_reason(refused[0])}): going on from the one before it")
            return history
        if refused:
            raise ValueError(
                f"{self.path} is not a checkpoint of this run ({artefacts.short_reason(refused[0])}): move it away to "
                "start afresh"
            ) from refused[0]
        return {}

    def _load(self, file: Path) -> dict[str, list[float]]:
        content, seal, sha256 = file.read_bytes().rpartition(_SEAL)
        if not seal or hashlib.sha256(content).hexdigest().encode() != sha256:
            raise ValueError("it is damaged, or of an older version of kdlib")
        state = torch.load(io.BytesIO(content), weights_only=True)
        if state["key"] != self.key:
            raise ValueError(
                "it is of a run with another network, other first weights, other data, another objective or recipe"
            )
        if state["device"] != self.generator.device.type:
            raise ValueError(
                f"it was written on {state['device']}, this run is on {self.generator.device.type}, where the random "
                "numbers would not go on"
            )
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        self.generator.set_state(state["generator"].cpu())
        return state["history"]

    def save(self, history: dict[str, list[float]]) -> None:
        """Write all of it, if the last time is long enough ago; and if a signal came, let it take its course.

        If it cannot be written, a warning says so, and training goes on.
        """
        wait = CHECKPOINT_SECONDS * max(1.0, 5 * self.cost)  # where writing is slow, it takes a 300th of the time
        start = time.perf_counter()
        self.received = ranks.broadcast(self.received)  # a signal reaches ranks in different epochs; rank 0's counts
        due = self.received is not None or start - self.saved_at >= wait
        if self.path is not None and due and not ranks.rank():
            try:
                self._write(history)
            except OSError as error:
                warnings.warn(f"the checkpoint is not saved, and training goes on: {error}", stacklevel=3)
            self.saved_at = time.perf_counter()
            self.cost = self.saved_at - start
        if self.received is not None:
            ranks.barrier()  # rank 0 has written it
            self._obey(self.received)

    def _write(self, history: dict[str, list[float]]) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"key": self.key, "generator": self.generator.get_state(), "device": self.generator.device.type}
        content = io.BytesIO()
        torch.save(state | {"history": history}, content)
        with files.temporary(self.path) as partial:
            with open(partial, "wb") as file:
                file.write(content.getbuffer())
                file.write(_SEAL + hashlib.sha256(content.getbuffer()).hexdigest().encode())
            files.sync(partial)
            if self.path.exists():
                files.replace(self.path, previous(self.path))
            files.replace(partial, self.path)


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(f"{path.name}.previous")


def remove_checkpoint(path: Path) -> None:
    """Delete a run's checkpoints: what it made is saved."""
    for file in (previous(path), path):
        files.remove(file)
