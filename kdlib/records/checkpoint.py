"""An unfinished training in a file: all that decides how it goes on, so that an interrupted run loses a minute."""

from __future__ import annotations

import contextlib
import hashlib
import io
import signal
import threading
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from kdlib.gpu import ranks
from kdlib.records import artefacts, files
from kdlib.records.limits import load_tensors

CHECKPOINT_SECONDS = 60  # at least so long between two checkpoints of a long run
_SEAL = b"\nkdlib sha256 "  # what stands before the SHA-256, in hexadecimal digits, at the end of the file
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Checkpoint:
    """One unfinished run's file; the one before it is kept too, as ``<name>.previous``. Rank 0 writes, all read.

    As a context manager it catches Ctrl-C and SIGTERM: the epoch is finished and saved, and then the signal takes its
    course. The second time it does so at once. Meanwhile the global random numbers, which dropout draws from, are the
    run's own too: seeded as the first generator is, or as they were in the file; with several processes, in every
    epoch by the first generator and the rank. The caller's come back afterwards.

    Args:
        path: the file; None: nothing is kept, and signals are as they were.
        key: what the run is; a file of another run is refused.
        generators: of the run's random numbers, at least one; their device is the run's.
        parts: by name, what has a state: model, optimizer, scaler.
    """

    def __init__(self, path: Path | None, key: str | None, generators: Sequence[torch.Generator], **parts):
        self.path, self.key, self.generators, self.parts = path, key, generators, parts
        self.device = generators[0].device
        self.saved_at, self.cost = time.perf_counter(), 0.0  # seconds that the last one took
        self.received, self.handlers = None, {}
        # the states of the global generators, by kind of device
        self.random = _seeded(self.device, generators[0].initial_seed())
        self.callers: dict[str, torch.Tensor] = {}

    def __enter__(self) -> Checkpoint:
        self.callers = _random_states(self.device)
        _set_random_states(self.random, self.device)
        self._seed_by_rank()
        if self.path is not None and threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.handlers[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_) -> None:
        while self.handlers:
            signal.signal(*self.handlers.popitem())
        _set_random_states(self.callers, self.device)

    def _receive(self, number: int, _) -> None:
        if self.received is not None:
            self._obey(number)
        self.received = number
        with contextlib.suppress(RuntimeError):  # if it came while something else was printed
            print("stopping after this epoch, with a checkpoint; the same again stops at once", flush=True)

    def _obey(self, number: int) -> None:
        self.__exit__()
        signal.raise_signal(number)

    def resume(self) -> dict:
        """The run's history so far, with the parts and the random numbers as they were then; {} without a file.

        Random numbers of one kind of device do not go on on another: a warning says so, and they start afresh.

        Rank 0 reads for all: the others need not see the file, and go on from the same epoch or refuse it together.

        Raises:
            ValueError: the file is damaged, and so is the one before it; or it is of another run.
        """
        state, reason = ranks.broadcast(self._find() if not ranks.rank() else None)
        if reason:
            raise ValueError(f"{self.path} is not a checkpoint of this run ({reason}): move it away to start afresh")
        if not state:
            return {}
        if ranks.rank():
            self._restore(state)
        if state["device"] != (device := self.device.type):
            warnings.warn(
                f"{self.path} was written on {state['device']}, and training goes on on {device}: its random numbers "
                "start afresh there, so the result is not that of a run without interruption; delete the file to "
                "train from the beginning",
                stacklevel=3,
            )
        return state["history"]

    def _find(self) -> tuple[dict, str]:
        """What is in the file, restored, or in the one before it; {} without a file, and why if it is refused."""
        refused: list[Exception] = []
        for file in (self.path, previous(self.path)) if self.path is not None else ():
            if not file.exists():
                continue
            try:
                state = self._load(file)
                self._restore(state)
            except Exception as error:
                refused.append(error)
                continue
            if refused:
                print(f"{self.path} is damaged ({artefacts.short_reason(refused[0])}): going on from the one before it")
            return state, ""
        return {}, artefacts.short_reason(refused[0]) if refused else ""

    def _load(self, file: Path) -> dict:
        with files.open_plain(file) as opened:
            content, seal, sha256 = opened.read().rpartition(_SEAL)
        if not seal or hashlib.sha256(content).hexdigest().encode() != sha256:
            raise ValueError("it is damaged, or of an older version of kdlib")
        state = load_tensors(io.BytesIO(content))
        if state["key"] != self.key:
            raise ValueError(
                "it is of a run with another network, other first weights, other data, another objective or recipe"
            )
        return state

    def _restore(self, state: dict) -> None:
        for name, part in self.parts.items():
            if isinstance(part, torch.optim.Optimizer):  # its settings are this device's, and the recipe's
                state[name]["param_groups"] = part.state_dict()["param_groups"]
            if state[name]:  # of a scaler that was not needed there is none
                part.load_state_dict(state[name])
        if state["device"] == self.device.type:
            saved = state.get("generators") or [state["generator"]]  # as older versions have it
            for generator, own in zip(self.generators, saved, strict=True):
                generator.set_state(own)
        self.random |= {kind: saved for kind, saved in state.get("random", {}).items() if kind in self.random}

    def _seed_by_rank(self) -> None:
        """With several processes, seed the global generators for the epoch to come, on each rank with another number.

        Else dropout would draw the same on all. The first generator is alike on all, and no epoch leaves it as it was:
        it and the rank tell the numbers, so those of one rank need not be in the file for all to go on as they would.
        """
        if ranks.world() > 1:
            seed = self.generators[0].get_state().numpy().tobytes() + str(ranks.rank()).encode()
            number = int.from_bytes(hashlib.sha256(seed).digest()[:4], "big")
            _set_random_states(_seeded(self.device, number), self.device)

    def save(self, history: dict) -> None:
        """Write all of it, if the last time is long enough ago; and if a signal came, let it take its course.

        If it cannot be written, a warning says so, and training goes on.
        """
        wait = pause_after(self.cost)
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
        self._seed_by_rank()

    def _write(self, history: dict) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"key": self.key, "device": self.device.type, "random": _random_states(self.device)}
        state["generators"] = [generator.get_state() for generator in self.generators]
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


def _seeded(device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """The states that global generators have once they are seeded so: the CPU's and that of `device`."""
    devices = {"cpu": "cpu", device.type: device}
    return {kind: torch.Generator(device).manual_seed(seed).get_state() for kind, device in devices.items()}


def _random_states(device: torch.device) -> dict[str, torch.Tensor]:
    """The states of the global generators now: the CPU's, and that of `device`."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(*_named(device))
    return states


def _set_random_states(states: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], *_named(device))


def _named(device: torch.device) -> tuple[torch.device, ...]:
    return () if device.type == "mps" else (device,)  # there is one only, and its functions take none


def pause_after(cost: float) -> float:
    """The seconds to the next checkpoint if one takes `cost` seconds: where that is slow, a 300th of the time."""
    return CHECKPOINT_SECONDS * max(1.0, 5 * cost)


def previous(path: Path) -> Path:
    """Where the checkpoint before the last one lies."""
    return path.with_name(f"{path.name}.previous")


def remove_checkpoint(path: Path) -> None:
    """Delete a run's checkpoints: what it made is saved."""
    for file in (previous(path), path):
        files.remove(file)
