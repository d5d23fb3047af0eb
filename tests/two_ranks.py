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

import kdlib
from kdlib import evaluate
from kdlib.gpu import pick_device, ranks
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
    torch.save(done, where / f"rank{ranks.rank()}.pt")
    ranks.stop()
