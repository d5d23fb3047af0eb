"""Killed at random moments and started again: the outcome is that of a run that nobody disturbed, and nothing is left.

    python -m tests.kill            # 90 kills, and every file operation as a crash point: ten minutes on two cores

What is killed with SIGKILL: trainings (a teacher, its soft labels, a student that learns from them), experiments of
the lab (students trained together and one by one), a sweep, and chapters of the book at profile quick. It is killed up
to four times, then it may finish, and all that is in its folders is compared with that of an undisturbed run: weights,
soft labels and rows bit for bit, notebooks executed to the end, and no file more or less. Of commands that start
others, by lot the whole group of processes is killed or the first one alone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # where its neighbours are, also without pytest

import dying
import nbformat
import torch
from conftest import make_images
from workshop import ROOT, change_cell, copy_book, tiny_book

from kdlib.records import artefacts
from kdlib.records.files import LOCKS

WAIT = 600  # seconds after which a run counts as hanging
LOG = "command.log"  # what a command that starts others says
NOT_COMPARED = (LOCKS, ".jupyter", "live")  # folders: locks stay and block nobody, the others are Jupyter's and npm's
SWEPT = """
import kdlib
import torch.nn.functional as F
from kdlib.records import checkpoint

checkpoint.CHECKPOINT_SECONDS = 0
settings, data = kdlib.resolve("quick", run=run), kdlib.load_data("digits", limit=200)
for own in settings.seeds:
    recipe = kdlib.Recipe(epochs=10, batch_size=20, learning_rate=temperature / 20, seed=own)
    for role in ("student", "distilled"):
        file, more = settings.file(role, "perceptron", own), {"validation": data.validation}
        kdlib.load_or_train(settings.folder, file, "perceptron", data.train, F.cross_entropy, recipe, **more)
"""


# --- what is killed --------------------------------------------------------------------------------------------------


class Child:
    """A function of tests/victims.py in a process of its own."""

    def __init__(self, server: subprocess.Popen, name: str, folder: Path):
        self.server = server
        server.stdin.write(json.dumps([name, str(folder)]).encode() + b"\n")
        self.number = int(server.stdout.readline())

    def wait(self, seconds: float) -> int | None:
        """The exit status, if it ends within so many seconds."""
        ended, _, _ = select.select([self.server.stdout], [], [], seconds)
        return int(self.server.stdout.readline()) if ended else None

    def kill(self, whole: bool) -> None:
        os.kill(self.number, signal.SIGKILL)
        self.server.stdout.readline()


class Command:
    """A command that starts others."""

    def __init__(self, arguments: list[str], folder: Path):
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KDLIB_", "PYTEST_"))}
        kept |= {"PYTHONPATH": str(folder), "KDLIB_OUTPUTS": str(folder / "outputs"), "OMP_NUM_THREADS": "1"}
        with open(folder / LOG, "w") as log:
            command = [sys.executable, *arguments]
            streams = {"stdout": log, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, cwd=folder, env=kept, start_new_session=True, **streams)

    def wait(self, seconds: float) -> int | None:
        """The exit status, if it ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def kill(self, whole: bool) -> None:
        os.killpg(self.process.pid, signal.SIGKILL) if whole else self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class Victim:
    """What is killed."""

    name: str
    kills: int  # of 90
    start: Callable[[Path], Child | Command]  # in this folder
    prepare: Callable[[Path], object] = lambda folder: folder.mkdir(parents=True)


def swept_book(folder: Path) -> None:
    folder.mkdir(parents=True)
    change_cell(tiny_book(folder) / "book" / "01_tiny.ipynb", "body", SWEPT)


def real_book(folder: Path) -> None:
    folder.mkdir(parents=True)
    copy_book(folder)


def chapter(number: str) -> Victim:
    run = ["tools/book.py", "run", "--profile", "quick", "--chapters", number]
    return Victim(f"chapter {number}", 4, partial(Command, run), real_book)


GRID = ["tools/book.py", "sweep", "--profile", "quick", "--chapters", "01", "--grid", "temperature=1,2"]
COMMANDS = (Victim("sweep", 12, partial(Command, GRID), swept_book), *map(chapter, ("02", "03", "05")))


@contextlib.contextmanager
def children() -> Iterator[tuple[Victim, ...]]:
    """The victims that need no command, and in the block a process that starts them."""
    command = [sys.executable, str(Path(__file__).with_name("victims.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "env": environment}
    kills = {"training": 40, "experiment": 26}
    with subprocess.Popen(command, bufsize=0, **pipes) as server:  # what is not read yet, `select` has to see
        server.stdout.readline()  # it is ready
        yield tuple(Victim(name, number, partial(Child, server, name)) for name, number in kills.items())


# --- what comes of it ------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, object]:
    """What is in a folder, by file: what must be the same after a kill."""
    roots = [folder / name for name in ("outputs", "runs")]
    files = [path for root in (roots if roots[1].exists() else [folder]) for path in root.rglob("*") if path.is_file()]
    files = [path for path in files if not set(path.parts) & set(NOT_COMPARED)]
    return {str(path.relative_to(folder)): content(path) for path in sorted(files)}


def content(path: Path) -> object:
    """Of weights, soft labels and rows, what they hold; of a notebook, whether every cell was executed."""
    if path.suffix in (".pth", ".npy"):
        return artefacts.file_digest(path), (artefacts.record(path).get("history") or {}).get("loss")
    if path.suffix == ".ipynb":
        cells = [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
        failed = [o for cell in cells for o in cell.outputs if o.output_type == "error"]
        return all(cell.execution_count for cell in cells) and not failed
    if path.name == "run.json":
        known = json.loads(path.read_text(encoding="utf-8"))
        return known["outcome"], known["results"]
    if path.suffix == ".json" and "rows" in (known := json.loads(path.read_text(encoding="utf-8"))):
        return [(row["case"], row["seed"], row["fingerprint"], row["sha256"]) for row in known["rows"]]
    return "there"


def differences(found: dict[str, object], wanted: dict[str, object]) -> list[str]:
    """In words, how two outcomes differ."""
    left = [f"{name} is left over" for name in found if name not in wanted]
    missing = [f"{name} is missing" for name in wanted if name not in found]
    return left + missing + [f"{name} is another" for name in found if found[name] != wanted.get(name, found[name])]


def campaign(victim: Victim, kills: int, random_: random.Random, root: Path) -> Counter:
    """So many kills of a victim: how many, how many of them were survived, and what was wrong."""
    counts, whole = Counter(), root / victim.name / "whole"
    victim.prepare(whole)
    begun = time.perf_counter()
    if status := victim.start(whole).wait(WAIT):
        said = (whole / LOG).read_text(encoding="utf-8")[-500:] if (whole / LOG).exists() else ""
        raise RuntimeError(f"{victim.name}: exit status {status} though nobody killed it\n{said}")
    duration, wanted = time.perf_counter() - begun, outcome(whole)
    for number in range(4 * kills):  # more than enough: a run may be done before it is to be killed
        if counts["kills"] == kills:
            break
        folder, killed, wrong = root / victim.name / str(number), 0, []
        victim.prepare(folder)
        planned, status = min(random_.randint(1, 4), kills - counts["kills"]), None
        while status is None:
            running, last = victim.start(folder), killed == planned
            if (status := running.wait(WAIT if last else random_.uniform(0, 0.7 * duration))) is None:
                running.kill(whole=last or random_.random() < 0.5)
                if last:
                    wrong.append("it hangs")
                    break
                killed += 1
        wrong += [f"exit status {status}"] if status else []
        wrong += differences(outcome(folder), wanted)
        counts["kills"] += killed
        counts["survived"] += 0 if wrong else killed
        counts.update(f"WRONG: {what}" for what in wrong)
        if not wrong:
            shutil.rmtree(folder)
    return counts


def crash_points(root: Path) -> Counter:
    """Every file operation as a crash point."""
    counts, data = Counter(), make_images()
    for k, situation in enumerate(dying.SITUATIONS):
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            for wrong in dying.crash_points(situation, root / f"crash{k}", data):
                counts["crash points"] += 1
                counts["survived"] += not wrong
                counts.update(f"WRONG: {situation}: {what}" for what in wrong)
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--victims", default="", help='such as "training, sweep"; all if not given')
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "the teacher agrees")
    torch.set_num_threads(1)
    begun, random_ = time.perf_counter(), random.Random(options.seed)
    wanted = [name.strip() for name in options.victims.split(",") if name.strip()]
    total = Counter()
    with tempfile.TemporaryDirectory() as name, children() as short:
        root = Path(os.path.realpath(name))
        for victim in (*short, *COMMANDS):
            if not wanted or victim.name in wanted:
                counts = campaign(victim, victim.kills, random_, root)
                print(f"{victim.name:12}" + ", ".join(f"{n} {what}" for what, n in counts.items()), flush=True)
                total += counts
        points = crash_points(root) if not wanted else Counter()
        print(*(f"{n} {what}" for what, n in points.items() if what.startswith("WRONG")), sep="\n", end="")
    print(
        f"{total['kills']} kills, {total['survived']} survived; {points['crash points']} crash points, "
        f"{points['survived']} survived; {time.perf_counter() - begun:.0f} seconds"
    )
    if not wanted:
        from tests.campaigns import record

        figures = {"kills": total["kills"], "kills_survived": total["survived"]}
        figures |= {"crash_points": points["crash points"], "crash_points_survived": points["survived"]}
        record("kill", figures, time.perf_counter() - begun)
    return int(total["kills"] != total["survived"] or points["crash points"] != points["survived"])


if __name__ == "__main__":
    sys.exit(main())
