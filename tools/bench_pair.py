"""kdlib's loop on a pair that papers on distillation share, beside RepDistiller's own loop on it. For a GPU.

    python tools/bench_pair.py                # a line, and outputs/bench-pair-<device>.json
    python tools/bench_pair.py --publish      # and in the published bench, on the book's page
    python tools/bench_pair.py --miniature    # the same way in little, on a CPU; nothing is published

The pair is WRN-40-2 and WRN-16-2 with 100 classes at 32x32 pixels; the live teacher is asked about batches of 64, with
temperature 4, and 0.1 of the labels' cross-entropy. ``tools/bench.py`` measures it too, if there is a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys

import bench_page
import torch
from bench_epochs import LIVE, Setting, kdlib_epochs

from kdlib import gpu, profiles
from kdlib.records import artefacts

TEACHER, STUDENT = "kdlib.scale.networks:wrn_40_2", "kdlib.scale.networks:wrn_16_2"
PAIR = Setting(50_000, 32, 3, 4, TEACHER, (STUDENT,), 64, 3, 0, (), 0.0, classes=100)
MINIATURE = Setting(16, 8, 3, 1, TEACHER, (STUDENT,), 8, 2, 0, (), 0.0, classes=100)
# train_student.py --distill kd at its defaults (float32, 8 loader workers) on CIFAR-100, timed once for this book
THEIRS = {"seconds_an_epoch": 12.4, "device": "an H100", "source": "https://github.com/HobbitLong/RepDistiller"}


def measure(s: Setting, device: torch.device) -> dict:
    """Seconds per epoch of kdlib's loop, beside those of RepDistiller's, and on what they were measured."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, epoch = kdlib_epochs(LIVE, s.students[0], s, s.images, device)
    return {
        "teacher": s.teacher,
        "student": s.students[0],
        "images": s.images,
        "batch_size": s.batch_size,
        "seconds_before": first,
        "seconds_an_epoch": epoch,
        "peak_memory_gb": torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None,
        "device": gpu.device_name(device),
        "torch": torch.__version__.partition("+")[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "theirs": THEIRS,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="keep it in book/published and show it")
    parser.add_argument("--miniature", action="store_true", help="in little, to see whether it runs")
    options = parser.parse_args(arguments)
    device = gpu.pick_device()
    if device.type != "cuda" and not options.miniature:
        print("error: this is measured on a GPU, and there is none: --miniature goes the same way", file=sys.stderr)
        return 2
    if options.publish and options.miniature:
        print("error: --miniature measures nothing to publish: leave out one of the two", file=sys.stderr)
        return 2
    published = bench_page.PUBLISHED / f"bench-{device.type}.json"
    if options.publish and not published.exists():
        print(
            f"error: {published} is not there: tools/bench.py --publish writes it, the pair included", file=sys.stderr
        )
        return 2
    pair = measure(MINIATURE if options.miniature else PAIR, device)
    path = profiles.outputs_folder() / f"bench-pair-{device.type}.json"
    artefacts.save_json(path, pair)
    if options.publish:
        bench_page.publish(json.loads(published.read_text(encoding="utf-8")) | {"pair": pair})
    print(f"{bench_page.shown_pair(pair)}\n\nKept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
