"""Students beside the book's own: two that its origin had planned, and candidates for a record. For a GPU.

    python tools/students.py train resnet18           # alone and distilled; stops after 9 minutes, then goes on
    python tools/students.py search convmixer         # learning rates, on the validation images
    python tools/students.py status
    python tools/students.py publish                  # book/published/<profile>/students.json

Everything lies in the profile's folder of artefacts, where the book's teacher is found. The record to beat is the test
accuracy of the best published network under a million parameters that was trained without distillation. The candidate
that stands for the book is chosen by its mean validation accuracy, and the test set is read for no other.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import platform
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import stale
import torch
import torch.nn.functional as F
from candidates import CANDIDATES, Training, trainings
from notebooks import BOOK, Failed, Refused, choices, exit_status
from records import keep, pin

import book
import kdlib
from kdlib import evaluate, gpu, lab, plots
from kdlib.data import Data
from kdlib.lab.students import load_students, record_rows, student_rows
from kdlib.profiles import Profile
from kdlib.published import Network
from kdlib.records import artefacts, identity
from kdlib.records.documents import as_read, as_text, differences, save_document, sealed
from kdlib.train import fingerprint

TO_BEAT = 0.9603  # ConvMixer-256/8 on CIFAR-10: https://github.com/locuslab/convmixer/issues/15
BELOW = 1_000_000  # parameters


def resolved(options: argparse.Namespace) -> Profile:
    """The profile, in little if that is wanted."""
    settings = book.resolve(options.profile)
    return kdlib.resolve(settings.name, limit=40, epochs=1, views=2, run="miniature") if options.miniature else settings


# --- commands ------------------------------------------------------------------------------------------------------


class Stopped(BaseException):
    """The time is over, or SIGTERM came; not an Exception, which kdlib may catch on the way."""


@contextlib.contextmanager
def stopping_after(minutes: float) -> Iterator[None]:
    """Send SIGTERM to this process after so many minutes; a training then finishes its epoch, and writes a checkpoint.

    Raises:
        Failed: it came.
    """

    def stop(number: int, frame: object) -> None:
        raise Stopped

    timer = threading.Timer(60 * minutes, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon, before = True, signal.signal(signal.SIGTERM, stop)
    try:
        timer.start()
        yield
    except Stopped:
        raise Failed("stopped before all was trained: the same command goes on from there") from None
    finally:
        timer.cancel()  # first: a timer that comes later would kill
        signal.signal(signal.SIGTERM, before)


def train(options: argparse.Namespace) -> None:
    """Train what a candidate lacks."""
    settings = resolved(options)
    wanted = trainings(options.candidate, settings)
    if options.seeds is not None:
        if unknown := sorted(set(options.seeds) - (known := {one.seed for one in wanted})):
            raise Refused(f"--seeds has {unknown[0]}: expected some of {', '.join(map(str, sorted(known)))}")
        wanted = [one for one in wanted if one.seed in options.seeds]
    with stopping_after(options.minutes):
        data = kdlib.load_data(settings.dataset, **settings.images)
        distilled = any(one.role == "distilled" for one in wanted)
        teacher = kdlib.load_teacher(settings, data) if distilled else None
        for one in wanted:
            network = one.load_or_train(data, teacher)
            print(f"{one.path}: {told(network.history.accuracy, network.history.seconds)}", flush=True)


def search(options: argparse.Namespace) -> None:
    """Search a candidate's learning rate with few epochs and a seed that is never reported."""
    settings = resolved(options)
    with stopping_after(options.minutes):
        data = kdlib.load_data(settings.dataset, **settings.images)
        one = trainings(options.candidate, settings)[-1]
        loss_fn, targets = one.objective(kdlib.load_teacher(settings, data))
        epochs = min(options.epochs, one.recipe.epochs)
        recipe = dataclasses.replace(one.recipe, epochs=epochs)
        setup = lab.TrainingSetup(one.candidate.network, data.train, loss_fn, recipe, lambda seed: targets)
        store = lab.RowStore(settings.folder / "students_search.json", profile=settings.name, dataset=settings.dataset)
        rates = sorted(set(options.rates or [factor * recipe.learning_rate for factor in (0.5, 1, 2)]))
        seeds = settings.search_seeds[:1]
        found = lab.tune(store, {one.name: setup}, {"learning_rate": rates}, seeds, data.validation)[one.name]
    tried = [[f"{rate:g}", f"{accuracy:.2%}"] for rate, accuracy in found.tried["learning_rate"].items()]
    print(plots.text_table(["learning rate", f"validation accuracy after {epochs} epochs"], tried))
    rate = found.best["learning_rate"] / settings.student_recipe.learning_rate
    print(f"to train with the best of them, give {one.name} rate={rate:g} in tools/candidates.py")


def told(accuracy: list[float], seconds: list[float]) -> str:
    """How a training ended, in words."""
    each = seconds[-1] / len(seconds)
    return f"validation accuracy {accuracy[-1]:.2%}, {seconds[-1]:,.0f} s, {each:.2f} s per epoch"


def status(options: argparse.Namespace) -> None:
    """Print what is trained, and what is not."""
    settings, rows = resolved(options), []
    for name, candidate in CANDIDATES.items():
        for one in trainings(name, settings):
            state, history = one.state(), artefacts.record(one.path).get("history", {})
            end = told(history["accuracy"], history["seconds"]) if state == "trained" else ""
            rows.append([name, candidate.kind, one.role, str(one.seed), str(one.recipe.epochs), state, end])
    print(plots.text_table(["candidate", "for", "role", "seed", "epochs", "", ""], rows))


# --- measuring -----------------------------------------------------------------------------------------------------


def publish(options: argparse.Namespace) -> None:
    """Measure the candidates whose every training is done; what was published of others stays."""
    settings = resolved(options)
    path = BOOK / "published" / settings.name / "students.json"
    path = settings.folder / path.name if settings.run else path
    before = load_students(path)["runs"] if path.exists() else []
    wanted = {name: trainings(name, settings) for name in CANDIDATES}
    for name in list(wanted):
        if missing := [one.path.name for one in wanted[name] if one.state() != "trained"]:
            print(f"{name}: not measured, since it lacks {', '.join(missing)}")
            del wanted[name]
    if not wanted:
        raise Failed(f"no candidate is trained in {settings.folder}: python tools/students.py train CANDIDATE")
    data = kdlib.load_data(settings.dataset, **settings.images)
    teacher = existing_teacher(settings, data)
    for name in list(wanted):
        if outdated := "; ".join(filter(None, (outdated_by(one, data, teacher) for one in wanted[name]))):
            print(f"{name}: not measured, since {outdated}: train it again")
            del wanted[name]
    if not wanted:
        raise Failed(f"no candidate in {settings.folder} is as it would be trained now")
    complete, trained = list(wanted), {}
    for one in (one for name in complete for one in wanted[name]):
        trained.setdefault((one.name, one.role), {})[one] = one.load_or_train(data, teacher)
    runs = [described(networks, data, teacher) for networks in trained.values()]
    runs += [run for run in before if run["candidate"] not in complete]
    check_runs(runs, before)
    order = list(CANDIDATES)  # what was published of a candidate that is none any more comes last
    runs.sort(key=lambda run: order.index(run["candidate"]) if run["candidate"] in order else len(order))
    chosen = choose(runs)
    was_tested = {run["candidate"] for run in before if "accuracy" in run}  # and is shown, whatever it is now
    for run in runs:
        name = run["candidate"]
        if name in complete and (run["kind"] == "students" or name == chosen or name in was_tested):
            run |= tested(trained[name, run["role"]].values(), data, teacher)
        elif name == chosen and "accuracy" not in run:
            raise Failed(f"{name} is the best on validation, and its networks are not in {settings.folder}")
    document = {
        "profile": settings.name,
        "dataset": settings.dataset,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "runs": runs,
        "record": {
            "to_beat": TO_BEAT if settings.dataset == "cifar10" else None,  # test accuracy, a fraction of 1
            "below": BELOW,  # parameters
            "tried": [run["candidate"] for run in runs if run["kind"] == "record"],
            "chosen": chosen,
            "chosen_by": "mean validation accuracy over the seeds",
        },
    }
    save_document(settings.folder / path.name, document)
    if not settings.run:
        newest = max(runs, key=lambda run: run["date"])
        made = {name: newest[name] for name in ("device", "date")} | {"commit": stale.commit()}
        keep(path, as_text(sealed(document)).encode(), {"profile": settings.name}, made)
        pin()
    for table in (student_rows, record_rows):
        print(plots.text_table(*table(document)) + "\n")
    print(f"kept in {path}")


def existing_teacher(settings: Profile, data: Data) -> Network:
    """The book's teacher, which is never trained for a measurement."""
    path = settings.folder / settings.file("teacher")
    wanted = fingerprint(settings.teacher, data.train, F.cross_entropy, settings.teacher_recipe)
    if wrong := made_otherwise(path, wanted):
        raise Failed(f"{wrong}: run chapter 02 again, then train the students, then publish")
    return kdlib.load_teacher(settings, data)


def outdated_by(one: Training, data: Data, teacher: Network) -> str:
    """In which way a network was made otherwise than it would be now; empty if in none."""
    loss_fn, targets = one.objective(teacher)
    return made_otherwise(one.path, fingerprint(one.candidate.network, data.train, loss_fn, one.recipe, targets))


def made_otherwise(path: Path, wanted: dict) -> str:
    """In which way a file was made otherwise than `wanted`; empty if in none."""
    wrong = differences(artefacts.record(path).get("fingerprint"), as_read(wanted))
    return f"{path} is not what would be trained now ({wrong})" if wrong else ""


def check_runs(runs: list[dict], before: list[dict]) -> None:
    """Failed if runs do not belong together, or if a recipe was changed after its test accuracy was known."""
    if len(teachers := {run["teacher"] for run in runs}) > 1:
        raise Failed(
            f"the students have {len(teachers)} teachers, expected one: train all of them under the teacher of now, or "
            "remove the others' runs from what is published"
        )
    for old in (run for run in before if run["kind"] == "record" and "accuracy" in run):
        for run in runs:
            if (run["candidate"], run["role"]) == (old["candidate"], old["role"]) and run["recipe"] != old["recipe"]:
                raise Failed(
                    f"{run['candidate']} was tested with another recipe ({differences(old['recipe'], run['recipe'])}): "
                    "give it the new recipe under another name"
                )


def described(networks: dict[Training, Network], data: Data, teacher: Network) -> dict[str, object]:
    """A run as in ``results.json``, with its recipe and its validation accuracy, and without the test images."""
    one, first = next(iter(networks.items()))
    parameters, kind = kdlib.count_parameters(first.model), one.candidate.kind
    if kind == "record" and parameters >= BELOW:
        raise Failed(f"{one.name} has {parameters:,} parameters: expected fewer than {BELOW:,} for the record")
    recipe = dataclasses.asdict(one.recipe)
    del recipe["seed"]
    if one.role == "distilled":
        recipe |= one.weights
        recipe["targets"] = "live teacher" if kind == "record" else f"soft labels in {teacher.soft_labels.views} views"
    shape = (data.test.channels, *data.test.images.shape[1:3])
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    batches = (1, 2) if one.settings.run else (1, 256)
    labels = data.validation.labels
    return {
        "candidate": one.name,
        "kind": kind,
        "role": one.role,
        "network": one.candidate.network,
        "parameters": parameters,
        "size_mb": round(first.megabytes, 3),
        "seeds": [training.seed for training in networks],
        "validation_accuracy": [evaluate.scores(n.logits["validation"], labels).accuracy for n in networks.values()],
        "seconds": [network.history.seconds[-1] for network in networks.values()],
        "device": ", ".join(dict.fromkeys(network.provenance["device"] for network in networks.values())),
        "date": max(network.provenance["date"] for network in networks.values()),
        "latency_ms": {
            gpu.device_name(device): {str(n): evaluate.latency(first.model, shape, n, device) for n in batches}
            for device in devices
        },
        "recipe": recipe,
        "teacher": identity.weights(teacher.model),  # which one: 16 digits of the SHA-256 of its weights
    }


def choose(runs: list[dict]) -> str | None:
    """The candidate for the record with the highest mean validation accuracy; None if there is none."""
    of_record = {run["candidate"]: np.mean(run["validation_accuracy"]) for run in runs if run["kind"] == "record"}
    return max(of_record, key=of_record.__getitem__, default=None)


def tested(networks: Iterable[Network], data: Data, teacher: Network) -> dict[str, list[float]]:
    """What the test images say of networks."""
    logits = [network.logits["test"] for network in networks]
    scores = [evaluate.scores(own, data.test.labels) for own in logits]
    found = {name: [getattr(own, name) for own in scores] for name in ("accuracy", "nll", "ece")}
    return found | {"agreement": [evaluate.agreement(own, teacher.logits["test"]) for own in logits]}


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status: 1 if not all is trained yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for action in (train, search, status, publish):
        command = commands.add_parser(action.__name__, help=action.__doc__.splitlines()[0])
        command.set_defaults(action=action)
        choices(command, "profile")
        command.set_defaults(profile="full")
        command.add_argument("--miniature", action="store_true", help="the profile in little: 40 images, 1 epoch")
        if action in (train, search):
            command.add_argument("candidate", choices=CANDIDATES)
            command.add_argument("--minutes", type=float, default=9, help="stop in time, with a checkpoint")
        if action is train:
            command.add_argument("--seeds", type=int, nargs="+", help="some of the candidate's")
        if action is search:
            command.add_argument("--rates", type=float, nargs="+", help="learning rates; half, once and twice its own")
            command.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args(arguments)
    return exit_status(options.action, options)


if __name__ == "__main__":
    sys.exit(main())
