"""Measuring: accuracy, likelihood, calibration, agreement, intervals, latency, and the table of results."""

from __future__ import annotations

import datetime
import json
import platform
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.optimize
import scipy.stats
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlib import artefacts
from kdlib.models import count_parameters, mixed_precision, pick_device, predict_logits

BINS = 15  # of confidence, for calibration
ROLES = ("teacher", "student", "distilled")


@dataclass(frozen=True)
class Scores:
    """How good a network's answers are."""

    accuracy: float  # fraction of 1
    nll: float  # negative log-likelihood of the labels, nats an image
    ece: float  # expected calibration error, fraction of 1


def scores(logits: Tensor, labels: Tensor) -> Scores:
    """Accuracy, likelihood and calibration of logits (N, C) against labels (N,)."""
    correct = (logits.argmax(1) == labels).double()
    nll = F.cross_entropy(logits.double(), labels)
    return Scores(correct.mean().item(), nll.item(), calibration_error(logits, labels))


def evaluate(model: nn.Module, data, *, device: str | torch.device | None = None) -> Scores:
    """The scores of a network on every image of `data`, each in its clean view."""
    return scores(predict_logits(model, data, device=device), data.labels.cpu())


@dataclass(frozen=True)
class Calibration:
    """What a network says of its own certainty, and what comes true, in bins of equal width over the confidence."""

    confidence: np.ndarray  # (bins,) mean of the largest probability; nan where a bin is empty
    accuracy: np.ndarray  # (bins,) how many of those answers are right; nan likewise
    count: np.ndarray  # (bins,) images


def calibration(logits: Tensor, labels: Tensor, bins: int = BINS) -> Calibration:
    """The reliability diagram's numbers (Guo et al., arXiv 1706.04599, section 2)."""
    confidence, answer = logits.double().softmax(1).max(1)
    correct = (answer == labels).double().numpy()
    place = np.clip(np.ceil(confidence.numpy() * bins).astype(int) - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):
        mean_confidence = np.bincount(place, confidence.numpy(), bins) / count
        mean_accuracy = np.bincount(place, correct, bins) / count
    return Calibration(mean_confidence, mean_accuracy, count)


def calibration_error(logits: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """Expected calibration error: the gap between confidence and accuracy, averaged over the images."""
    found = calibration(logits, labels, bins)
    gap = np.nan_to_num(np.abs(found.confidence - found.accuracy))
    return float((gap * found.count).sum() / found.count.sum())


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """The temperature that makes ``logits / T`` most likely (Guo et al., arXiv 1706.04599); fit it on validation."""
    logits = logits.double()

    def nll(log_temperature: float) -> float:
        return F.cross_entropy(logits / np.exp(log_temperature), labels).item()

    return float(np.exp(scipy.optimize.minimize_scalar(nll, bounds=(-3, 3), method="bounded").x))


def agreement(logits: Tensor, other: Tensor, where: Tensor | None = None) -> float:
    """Share of images on which two networks give the same answer; of those in the mask `where` (N,), if given."""
    same = logits.argmax(1) == other.argmax(1)
    return same[where].double().mean().item() if where is not None else same.double().mean().item()


def paired_interval(better: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Where the mean of per-image differences (N,) lies: a bootstrap interval over the images.

    `better` holds, per test image, how much more often one network was right than the other (averaged over seeds).
    Resampling the images tells how far the figure would move with another test set, not with other seeds.
    """
    found = scipy.stats.bootstrap(
        (better,), np.mean, confidence_level=level, n_resamples=2000, method="percentile", rng=0, batch=100
    )
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def latency(model: nn.Module, image_shape: tuple[int, int, int], batch: int, device: str | torch.device) -> float:
    """Median milliseconds for one batch of images (C, H, W) through the network, warmed up, in eval mode."""
    device = pick_device(device)
    model = model.to(device, memory_format=torch.channels_last).eval()
    images = torch.zeros(batch, *image_shape, device=device).to(memory_format=torch.channels_last)
    times: list[float] = []
    with torch.inference_mode(), mixed_precision(device):
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


def describe_run(
    role: str,
    network: str,
    model: nn.Module,
    file: Path,
    *,
    seeds: list[int],
    measured: list[Scores],
    agreements: list[float],
    seconds: list[float],
    device: str,
    latency_ms: dict[str, dict[str, float]],
) -> dict:
    """One row of ``results.json``: lists run over the seeds, accuracies and errors are fractions of 1."""
    if role not in ROLES:
        raise ValueError(f"role is {role!r}: expected one of {', '.join(ROLES)}")
    return {
        "role": role,
        "network": network,
        "parameters": count_parameters(model),
        "size_mb": round(file_megabytes(file), 3),
        "seeds": seeds,
        "accuracy": [s.accuracy for s in measured],
        "nll": [s.nll for s in measured],
        "ece": [s.ece for s in measured],
        "agreement": agreements,
        "seconds": seconds,
        "device": device,
        "latency_ms": latency_ms,
    }


def save_results(path: Path, profile: str, dataset: str, runs: list[dict]) -> dict:
    """Write ``results.json``, and return what was written."""
    results = {
        "profile": profile,
        "dataset": dataset,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
        },
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "runs": runs,
    }
    artefacts.save_json(path, results)
    return results


def load_results(path: Path) -> dict:
    """What :func:`save_results` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is not such results.
    """
    if not path.exists():
        raise FileNotFoundError(f"results {path} are not there: run chapter 06 first")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        missing = {"profile", "dataset", "runs"} - results.keys()
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path} is not a results file ({error}): run chapter 06 again") from error
    if missing:
        raise ValueError(f"{path} is not a results file (no {', '.join(sorted(missing))}): run chapter 06 again")
    return results


NAMES = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}


def results_rows(results: dict, *, latency: bool = True) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of results: the networks of ``results.json`` in words.

    Args:
        results: the content of ``results.json``.
        latency: with columns for the milliseconds on each device.
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
    """``96.80 ± 0.70 %``: mean and standard deviation over the seeds; without the latter for a single one."""
    mean = f"{100 * np.mean(fractions):.2f}"
    return f"{mean} ± {100 * np.std(fractions, ddof=1):.2f} %" if len(fractions) > 1 else f"{mean} %"
