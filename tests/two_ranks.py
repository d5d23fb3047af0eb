"""What tests/test_ranks.py has two processes compute, started with ``torchrun … tests/two_ranks.py TASK FOLDER``."""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from conftest import make_images
from torch import nn

import kdlib
from kdlib import evaluate
from kdlib.gpu import pick_device, ranks
from kdlib.lab import RowStore
from kdlib.records import artefacts, checkpoint
from kdlib.scale import generate_compact

training = importlib.import_module("kdlib.train")
distilled = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.3)
RECIPE = kdlib.Recipe(epochs=4, batch_size=9, learning_rate=0.2, seed=3)  # of a batch, one has 4 images and one has 5
STEPS = 20  # of the recipe with 47 images
QUIET = {"device": "cpu", "progress": False}
ERROR = "the second process fails in its third epoch"


def compute() -> dict[str, dict[str, torch.Tensor]]:
    """What one process and two compute alike: trainings, soft labels and logits."""
    results = {}
    for dtype in (torch.float64, torch.float32):
        with default_dtype(dtype):
            for name, train in TRAININGS.items():
                results[f"{name}, {dtype}"] = train()
    data = make_images(1100, seed=5)  # more than one batch for each process
    logits = [kdlib.predict_logits(teacher(), data, batch_size=size, device="cpu") for size in (100, 512, 2000)]
    made = kdlib.generate(teacher(), data, 3, **QUIET)
    return results | {"logits": dict(enumerate(logits)), "soft labels of all": {"logits": torch.from_numpy(made)}}


def trained(change: dict | None = None, *, times: int = 1, targets=None, loss_fn=F.cross_entropy, network="tiny_cnn"):
    """The weights after training, and the history."""
    data = make_images(47, padding=1, flip=True)
    model = kdlib.build(network, data.classes, data.channels, seed=1)
    about = {"targets": targets and targets(data), "validation": make_images(20, seed=1), **QUIET}
    for _ in range(times):
        history = kdlib.train(model, data, loss_fn, replace(RECIPE, **(change or {})), **about)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    return tensors | {"loss": torch.tensor(history.loss), "accuracy": torch.tensor(history.accuracy)}


def teacher() -> torch.nn.Module:
    """With batch norm; in eval mode it predicts the same for an image, whichever others are in the batch."""
    return kdlib.build("digits_cnn", 4, 1, seed=7).eval()


def soft_labels(data) -> kdlib.SoftLabels:
    logits = torch.randn(18, len(data), 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    return kdlib.SoftLabels(logits.half(), data.identity)


TRAININGS = {
    "labels": trained,
    "twice the same network": partial(trained, times=2, change={"epochs": 2}),
    "weight decay, two views": partial(trained, {"weight_decay": 0.01, "views": 2}),
    "even shares": partial(trained, {"batch_size": 8}),
    "more than all images": partial(trained, {"batch_size": 99, "epochs": 5}),
    "cutout": partial(trained, {"cutout": 3}),
    "mixup": partial(trained, {"mixup": 0.5}),
    "cutout and mixup": partial(trained, {"cutout": 3, "mixup": 0.5}),
    "soft labels": partial(trained, targets=soft_labels, loss_fn=distilled),
    "live teacher": partial(trained, targets=lambda _: kdlib.LiveTeacher(teacher()), loss_fn=distilled),
    "live teacher, mixup": partial(
        trained, {"mixup": 0.5}, targets=lambda _: kdlib.LiveTeacher(teacher()), loss_fn=distilled
    ),
}


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In the block, networks and images are of that dtype."""
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def counted(module, name: str) -> Iterator[list]:
    """A list that grows with each call of that function."""
    function, calls = getattr(module, name), []
    setattr(module, name, lambda *args, **kwargs: calls.append(name) or function(*args, **kwargs))
    try:
        yield calls
    finally:
        setattr(module, name, function)


def load_or_train(folder: Path, network: str = "tiny_cnn", recipe: kdlib.Recipe = RECIPE) -> training.Trained:
    with default_dtype(torch.float64):
        return kdlib.load_or_train(folder, "net.pth", network, make_images(47), F.cross_entropy, recipe, **QUIET)


def save(folder: Path) -> dict:
    """What this process did while artefacts were made and found again: by folder, steps taken and files saved."""
    did = {}

    def note(name: str, make, saver: str) -> object:
        with counted(training, "augment") as steps, counted(artefacts, saver) as saved:
            made = make()
        did[name] = {"steps": len(steps), "saved": len(saved)}
        return made

    for name in ("killed", "new", "new, again"):
        made = note(name, partial(load_or_train, folder / name.partition(",")[0]), "save_weights")
        did[name]["weights"] = made.model.state_dict()
    for name in ("made by one", "batch norm", "batch norm, again"):
        made = note(name, partial(load_or_train, folder / name.partition(",")[0], "digits_cnn"), "save_weights")
        did[name] |= {"fingerprint": made.fingerprint, "weights": made.model.state_dict()}
    for name in ("soft labels", "soft labels, again"):
        make = partial(kdlib.load_or_generate, folder / "soft labels", teacher(), make_images(1100, seed=5), 3, **QUIET)
        with counted(evaluate, "outputs_of") as batches:
            logits = note(name, make, "save_array").logits
        did[name] |= {"logits": logits, "batches": len(batches)}
    shards = partial(generate_compact, folder / "shards", teacher(), make_images(60, seed=5), 2, 2, shard=9, **QUIET)
    for name in ("shards", "shards, again"):
        table = note(name, shards, "save_array").table
        did[name]["table"] = table.read()
    return did


# --- what processes must not do apart from one another ----------------------------------------------------------------


class Functional(nn.Module):
    """Dropout that no module tells of."""

    def forward(self, images):
        return F.dropout(images, 0.01, self.training)


class Centred(nn.Module):
    """Each image beside the others of its batch."""

    def forward(self, images):
        return images - 0.01 * images.mean(0)


class SinglePrecision(nn.Module):
    """What cannot be tried in double precision."""

    def forward(self, images):
        return images @ torch.ones(8, 8, dtype=torch.float32)


def network(*middle: nn.Module, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*middle, nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)).eval()


DEPENDENT = {
    "batch norm": nn.BatchNorm2d(1),
    "dropout": nn.Dropout(0.5),
    "functional dropout": Functional(),
    "random slopes": nn.RReLU(),
    "running statistics": nn.InstanceNorm2d(1, track_running_stats=True),
    "a batch's mean": Centred(),
    "what cannot be tried": SinglePrecision(),
}
INDEPENDENT = {"group norm": nn.GroupNorm(1, 1), "instance norm": nn.InstanceNorm2d(1), "nothing": nn.Identity()}


def only_even(student_logits, labels):
    return F.cross_entropy(student_logits[labels % 2 == 0], labels[labels % 2 == 0])


def between_images(student_logits, labels):
    return F.cross_entropy(student_logits - student_logits.mean(0), labels)


def sure_only(student_logits, teacher_logits, labels):
    sure = teacher_logits.softmax(1).amax(1) > 0.5
    return F.cross_entropy(student_logits[sure], labels[sure])


def labelled_only(student_logits, teacher_logits, labels):
    return F.cross_entropy(student_logits[labels >= 0], labels[labels >= 0])


NO_MEANS = {
    "class weights": partial(F.cross_entropy, weight=torch.tensor([1.0, 5.0, 1.0, 0.2])),
    **{f"class {number} ignored": partial(F.cross_entropy, ignore_index=number) for number in range(4)},
    "a sum": partial(F.cross_entropy, reduction="sum"),
    "some images": only_even,
    "compared images": between_images,
    "where the teacher is sure": sure_only,
    "where there are labels": labelled_only,
}


class Same(nn.Module):
    """The same logits for every image, as a last layer of zeros makes at first: no loss tells the images apart."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(4))

    def forward(self, images):
        return self.bias.expand(len(images), 4)


def refusals() -> dict[str, str]:
    """What is said of the losses that are no mean over images."""
    said = {}
    for name, loss_fn in NO_MEANS.items():
        targets, data = None, make_images(47)
        if loss_fn in (sure_only, labelled_only):
            targets = kdlib.LiveTeacher(network())
        if loss_fn is labelled_only:
            data = replace(data, labels=data.labels.where(data.labels > 0, -1))
        try:
            kdlib.train(Same(), data, loss_fn, RECIPE, targets=targets, **QUIET)
        except (ValueError, FloatingPointError) as error:  # the second where it was not refused
            said[name] = str(error)
    return said


def resumed_apart(folder: Path) -> dict:
    """A finished run whose file only rank 0 sees, and then a damaged one; each process makes a network of its own."""
    path, found = folder / f"seen by {ranks.rank()}.partial", {}
    go = partial(kdlib.train, data=make_images(47), loss_fn=F.cross_entropy, recipe=RECIPE, checkpoint=path, **QUIET)
    for name in ("first", "again"):
        model = kdlib.build("tiny_cnn", 4, 1, seed=ranks.rank())
        with counted(training, "augment") as steps:
            history = go(model)
        found[name] = {"steps": len(steps), "loss": history.loss, "weights": model.state_dict()}
        if ranks.rank():
            path.unlink(missing_ok=True)
            checkpoint.previous(path).unlink(missing_ok=True)
    if not ranks.rank():
        path.write_bytes(path.read_bytes()[:-1])
        checkpoint.previous(path).unlink()
    try:
        go(kdlib.build("tiny_cnn", 4, 1))
    except ValueError as error:
        found["damaged"] = str(error)
    return found


def masks(folder: Path) -> dict[str, list[torch.Tensor]]:
    """What dropout left of each step's images: in a run, and in one that was stopped in its third epoch."""
    seen: dict[str, list[torch.Tensor]] = {"whole": [], "stopped": []}
    augment, dropout = training.augment, F.dropout

    def go(name: str, stop: int | None = None) -> None:
        def watched(images, share, training, inplace):
            outputs = dropout(images, share, training, inplace)
            if training:
                seen[name].append((outputs != 0).flatten())
            return outputs

        def stopping(*about):
            if len(seen[name]) == stop:
                raise InterruptedError
            return augment(*about)

        training.augment, F.dropout, path = stopping, watched, folder / f"{name}.partial"
        try:
            kdlib.train(network(nn.Dropout()), make_images(47), F.cross_entropy, RECIPE, checkpoint=path, **QUIET)
        except InterruptedError:
            del seen[name][STEPS // 2 :]  # what was not saved
        finally:
            training.augment, F.dropout = augment, dropout

    go("whole")
    go("stopped", stop=STEPS // 2 + 2)
    go("stopped")
    return seen


def apart(folder: Path) -> dict:
    """All of it, with a checkpoint after every epoch."""
    checkpoint.CHECKPOINT_SECONDS, found = 0, {}
    try:
        RowStore(folder / "rows" / "rows.json")
    except RuntimeError as error:
        found["experiment"] = str(error)
    images = make_images(2).example
    layers = {**DEPENDENT, **INDEPENDENT}
    models = {name: network(layer) for name, layer in layers.items()}
    before = torch.get_rng_state()
    found["marked"] = [name for name, model in models.items() if ranks.depends_on_processes(model, images)]
    found["random state kept"] = torch.equal(before, torch.get_rng_state())
    return found | {"refused": refusals(), "resumed": resumed_apart(folder), "masks": masks(folder)}


def die(folder: Path) -> None:
    """Train with a checkpoint after every epoch, and have the second process fail."""
    augment, taken = training.augment, []

    def failing(*args):
        taken.append(args)
        if ranks.rank() == 1 and len(taken) > STEPS // 2:
            raise RuntimeError(ERROR)
        return augment(*args)

    training.augment, checkpoint.CHECKPOINT_SECONDS = failing, 0
    load_or_train(folder / "killed")


if __name__ == "__main__":
    task, where = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    pick_device()
    if task == "die":
        die(where)
    done = compute() | {"did": save(where)}
    try:
        kdlib.train(
            kdlib.build("tiny_cnn", 4, 1), make_images(9), F.cross_entropy, replace(RECIPE, batch_size=1), **QUIET
        )
    except ValueError as error:
        done["too small"] = str(error)
    done["apart"] = apart(where)
    torch.save(done, where / f"rank{ranks.rank()}.pt")
    ranks.stop()
