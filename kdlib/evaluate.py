"""Measuring: logits, accuracy, likelihood, calibration, agreement, intervals, latency, and the table of results."""

from __future__ import annotations

import datetime
import platform
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import gpu
from kdlib.data import ImageSet
from kdlib.gpu import ranks
from kdlib.losses import at_least_float32
from kdlib.records.documents import RESULTS, load_document, mismatch, save_document

BINS = 15  # of confidence, for calibration
ROLES = ("teacher", "student", "distilled")


@torch.no_grad()
def predict_logits(
    model: nn.Module,
    data: ImageSet,
    *,
    view: int = 0,
    batch_size: int = 512,
    device: str | torch.device | None = None,
) -> Tensor:
    """The network's logits for every image of `data`, in order: (N, C) on the CPU, in float32.

    The network runs in eval mode, so that its logits for an image do not depend on which images share the batch, and is
    left in the mode in which it came. In float64 only if the network is. Under ``torchrun`` every process calls this,
    predicts its share of the batches, and returns the logits of all.

    Args:
        model: moved to `device`.
        view: which view of the images (see ``ImageSet.view_table``); 0 is the clean image.
        batch_size: images at once; changes the speed only.
    """
    device = gpu.pick_device(device)
    was_training = model.training
    data = data.to(device)
    order, logits = torch.arange(len(data), device=device), []
    if device.type == "cuda" and len(data) > batch_size:
        order = F.pad(order, (0, -len(data) % batch_size))  # all batches of one size, so that cuDNN tries only once
    rows, views = order.split(batch_size), torch.full_like(order, view).split(batch_size)
    share = ranks.share_of(len(rows))
    try:
        layout = gpu.place(model.eval(), device, data.example)
        with gpu.tuned_convolutions(device), gpu.mixed_precision(device):
            for batch in data.load(rows[share], views[share]):
                logits.append(at_least_float32(outputs_of(model(gpu.lay_out(batch.images, layout)))))
    finally:
        model.train(was_training)
    return ranks.gather(torch.cat(logits), of=len(rows))[: len(data)].cpu()


def outputs_of(made: object) -> Tensor:
    """The tensor among what a network returns: itself, the first of a tuple, or the logits of a mapping or object."""
    if hasattr(made, "logits"):
        made = made.logits
    if isinstance(made, Mapping):
        made = next((made[key] for key in ("logits", "out", "output", "pred") if key in made), None)
    if isinstance(made, (tuple, list)) and made:
        made = made[0]
    if not isinstance(made, Tensor):
        raise ValueError(f"the network returns a {type(made).__name__}: expected a tensor of logits, or what holds one")
    return made


@dataclass(frozen=True)
class Scores:
    """How good a network's predictions are."""

    accuracy: float  # fraction of 1
    nll: float  # negative log-likelihood of the labels, nats per image
    ece: float  # expected calibration error, fraction of 1


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Accuracy, likelihood and calibration of logits (N, C) against labels (N,)."""
    correct = (logits.argmax(1) == labels).double()
    nll = F.cross_entropy(logits.double(), labels)
    return Scores(correct.mean().item(), nll.item(), calibration_error(logits, labels))


def evaluate(model: nn.Module, data: ImageSet, *, device: str | torch.device | None = None) -> Scores:
    """The scores of a network on every image of `data`, each in its clean view."""
    return scores(predict_logits(model, data, device=device), data.labels.cpu())


@dataclass(frozen=True)
class Calibration:
    """A network's confidence and its observed accuracy, in bins of equal width over the confidence."""

    confidence: np.ndarray  # (bins,) mean of the largest probability; nan for an empty bin
    accuracy: np.ndarray  # (bins,) share of correct predictions; nan for an empty bin
    count: np.ndarray  # (bins,) images


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """What a reliability diagram shows (Guo et al., arXiv 1706.04599, section 2), of logits (N, C) and labels (N,)."""
    confidence, predicted = logits.double().softmax(1).max(1)
    correct = (predicted == labels).double().numpy()
    bin_of = np.clip(np.ceil(confidence.numpy() * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(bin_of, confidence.numpy(), bins) / count
        mean_accuracy = np.bincount(bin_of, correct, bins) / count
    return Calibration(mean_confidence, mean_accuracy, count)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over the images."""
    binned = calibration(logits, labels, bins)
    gap = np.nan_to_num(np.abs(binned.confidence - binned.accuracy))
    return float((gap * binned.count).sum() / binned.count.sum())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes ``logits / T`` most likely (Guo et al., arXiv 1706.04599); fit it on validation."""
    logits = logits.double()

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits / np.exp(log_temperature), labels).item()

    return float(np.exp(scipy.optimize.minimize_scalar(nll, bounds=(-3, 3), method="bounded").x))


def agreement(logits: Tensor, other: Tensor, where: Tensor | None = None) -> float:
    """Share of images for which two networks predict the same class; of those in the mask `where` (N,), if given."""
    same = logits.argmax(1) == other.argmax(1)
    return same[where].double().mean().item() if where is not None else same.double().mean().item()


def paired_interval(better: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """An interval for the mean of per-image differences (N,): a bootstrap over the images.

    `better` holds, per test image, how much more often one network was right than the other (averaged over seeds).
    Resampling the images shows how the figure varies between test sets, not between seeds.
    """
    bootstrap = scipy.stats.bootstrap(
        (better,), np.mean, confidence_level=level, n_resamples=2000, method="percentile", rng=0, batch=100
    )
    return float(bootstrap.confidence_interval.low), float(bootstrap.confidence_interval.high)


def latency(model: nn.Module, image_shape: tuple[int, int, int], batch: int, device: str | torch.device) -> float:
    """Median milliseconds for one batch of images (C, H, W) through the network, warmed up, in eval mode."""
    device = gpu.pick_device(device)
    images = torch.zeros(batch, *image_shape, device=device)
    images = gpu.lay_out(images, gpu.place(model.eval(), device, images))
    times: list[float] = []
    with torch.inference_mode(), gpu.mixed_precision(device):
        while len(times) < 5 or sum(times[3:]) < 0.15:
            start = time.perf_counter()
            model(images)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # the call only queues the work
            times.append(time.perf_counter() - start)
    return float(np.median(times[3:])) * 1000  # the first three warm up


def file_megabytes(path: Path) -> float:
    """The size of a file in megabytes (10**6 bytes)."""
    return path.stat().st_size / 1e6


def save_results(path: Path, profile: str, dataset: str, runs: list[dict]) -> dict:
    """Write ``results.json``, and return what was written."""
    results = {
        "profile": profile,
        "dataset": dataset,
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "runs": runs,
    }
    save_document(path, results)
    return results


def load_results(path: Path) -> dict:
    """What :func:`save_results` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not such results.
    """
    if not path.exists():
        raise FileNotFoundError(f"results {path} are not there: run chapter 06 first")
    results = load_document(path, "results file", "run chapter 06 again")
    wrong = mismatch(results, RESULTS)
    if wrong := wrong or next((f"a role is {r['role']!r}" for r in results["runs"] if r["role"] not in ROLES), ""):
        raise ValueError(f"{path} is not a results file ({wrong}): run chapter 06 again")
    return results


NAMES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}


def results_rows(results: dict, *, latency: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results, one row per network of ``results.json``.

    Args:
        results: the content of ``results.json``.
        latency: whether to add columns for the milliseconds on each device.
    """
    devices = list(dict.fromkeys(d for run in results["runs"] for d in run["latency_ms"]))
    batches = list(dict.fromkeys(b for run in results["runs"] for d in run["latency_ms"].values() for b in d))
    header = ["", "network", "test accuracy", "seeds", "parameters", "file, MB"]
    timed = [(d, b) for d in devices for b in batches] if latency else []
    header += [f"ms for {b} on {d}" for d, b in timed]
    rows = []
    for run in results["runs"]:
        row = [
            NAMES[run["role"]],
            run["network"],
            percent(run["accuracy"]),
            str(len(run["seeds"])),
            f"{run['parameters']:,}",
            f"{run['size_mb']:.2f}",
        ]
        row += [f"{run['latency_ms'].get(d, {}).get(b, float('nan')):.2f}" for d, b in timed]
        rows.append(row)
    return header, rows


def percent(fractions: list[float]) -> str:
    """``96.80 ± 0.70 %``: mean and standard deviation over the seeds; of a single seed the mean alone."""
    mean = f"{100 * np.mean(fractions):.2f}"
    return f"{mean} ± {100 * np.std(fractions, ddof=1):.2f} %" if len(fractions) > 1 else f"{mean} %"
