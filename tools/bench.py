"""How fast the book's code is: four cases, each beside the loop that most tutorials use, and RepDistiller's pair.

    python tools/bench.py                  # a table, and outputs/bench-<device>.json
    python tools/bench.py --publish        # and the page of the book with it

On a GPU the cases are those of profile full (ResNet-50, CIFAR-10's size), on a CPU small ones. The images are noise,
since what they show does not change how long they take.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import os
import sys

import bench_page
import bench_pair
import torch
import torch.nn.functional as F
from bench_epochs import LIVE, SOFT_LABELS, STUDENT, TEACHER, Setting, kdlib_epochs, noise, seconds
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

import kdlib
from kdlib import data, gpu, plots, profiles
from kdlib.records import artefacts


def setting(device: torch.device) -> Setting:
    """Profile full's size on a GPU; on a CPU one that takes seconds."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if device.type == "cuda":
        workers = tuple(n for n in (8, 16) if n <= cores) or (cores,)
        return Setting(50_000, 32, 3, 4, "resnet50", ("cnn", "wide_resnet14"), 512, 3, 8192, workers, 0.2)
    return Setting(1_000, 8, 1, 1, "digits_cnn", ("tiny_cnn",), 50, 9, 1024, (0, cores), 1.0)


def cases(s: Setting) -> list[tuple[str, str]]:
    """What is measured, each with the network that it is about."""
    return [(TEACHER, s.teacher), (SOFT_LABELS, s.teacher)] + [(c, n) for c in (STUDENT, LIVE) for n in s.students]


# --- what is measured ----------------------------------------------------------------------------------------------


def matrix_flops(rows: int, device: torch.device) -> float:
    """Floating-point operations per second of a large matrix product, in the precision that training uses."""
    dtype = gpu.half_precision(device) or torch.float32
    a, b = (torch.randn(rows, rows, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    return 2 * rows**3 / seconds(lambda: a @ b, device, 10)


def forward_flops(network: str, s: Setting) -> float:
    """Floating-point operations of a forward pass of one image; a multiplication and an addition count as two."""
    model = kdlib.build(network, s.classes, s.channels).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, s.channels, s.size, s.size))
    return counter.get_total_flops()


# --- the loop that most tutorials use ------------------------------------------------------------------------------


class Pictures(Dataset):
    """Images as in most tutorials: PIL pictures that go through torchvision's transforms, one by one."""

    def __init__(self, images: data.ImageSet, augment: bool):
        self.pixels, self.labels, s = images.images.numpy(), images.labels.numpy(), images
        steps = [transforms.RandomCrop(s.images.shape[1:3], padding=s.padding)] if augment else []
        steps += [transforms.RandomHorizontalFlip()] if augment and s.flip else []
        self.transform = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(s.mean, s.std)])

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        pixels = self.pixels[index]
        picture = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        return self.transform(picture), int(self.labels[index]), index


def tutorial_epoch(case: str, network: str, s: Setting, count: int, device: torch.device, workers: int) -> float:
    """Seconds per epoch of the same work, as most tutorials write it.

    float32 with TF32 as PyTorch sets it, cuDNN's autotuning on, `.item()` in every step; the teacher runs in the loop,
    or its logits are looked up by the image's index.
    """
    images = noise(s, count)
    loader = DataLoader(
        Pictures(images, augment=case != SOFT_LABELS),
        batch_size=s.batch_size,
        shuffle=case != SOFT_LABELS,
        drop_last=case != SOFT_LABELS,
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )
    teacher = kdlib.build(s.teacher, s.classes, s.channels).to(device).eval()
    model = kdlib.build(network, s.classes, s.channels).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    looked_up = torch.randn(len(images), s.classes, device=device)

    def generate() -> None:
        with torch.no_grad():
            for pictures, _, _ in loader:
                teacher(pictures.to(device, non_blocking=True)).cpu()

    def epoch() -> None:
        model.train()
        total = 0.0
        for pictures, labels, indices in loader:
            pictures, labels = pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            logits = model(pictures)
            loss = F.cross_entropy(logits, labels)
            if case != TEACHER:
                with torch.no_grad():
                    targets = teacher(pictures) if case == LIVE else looked_up[indices.to(device)]
                soft = F.kl_div(F.log_softmax(logits / 4, 1), F.softmax(targets / 4, 1), reduction="batchmean")
                loss = 0.1 * loss + 0.9 * 16 * soft
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.item()

    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        work = generate if case == SOFT_LABELS else epoch
        work()  # starts the workers, and lets cuDNN choose
        return seconds(work, device)
    finally:
        torch.backends.cudnn.benchmark = before


# --- beside each other ---------------------------------------------------------------------------------------------


def measure(case: str, network: str, s: Setting, device: torch.device, peak: float) -> dict:
    """One case: kdlib's epoch, the tutorial's, and how the cost grows with the number of images."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    first, epoch = kdlib_epochs(case, network, s, s.images, device)
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    growth = {count: kdlib_epochs(case, network, s, count, device)[1] for count in (s.images // 4, s.images // 2)}
    growth[s.images] = epoch
    count = int(s.images * s.tutorial_share)
    tutorial = {w: tutorial_epoch(case, network, s, count, device, w) * s.images / count for w in s.workers}
    best = min(tutorial, key=tutorial.get)
    # a backward pass costs about twice a forward pass
    work = forward_flops(network, s) * (1 if case == SOFT_LABELS else 3)
    work += forward_flops(s.teacher, s) if case == LIVE else 0
    flops = work * s.images / epoch
    return {
        "case": case,
        "network": network,
        "images": s.images,
        "batch_size": s.batch_size,
        "seconds_before": first,
        "seconds_an_epoch": epoch,
        "images_a_second": s.images / epoch,
        "tflops": flops / 1e12,
        "share_of_matrix_product": flops / peak,
        "peak_memory_gb": memory,
        "seconds_by_images": {str(k): v for k, v in growth.items()},
        "tutorial_seconds_an_epoch": tutorial[best],
        "tutorial_workers": best,
        "times_as_fast": tutorial[best] / epoch,
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--publish", action="store_true", help="keep the result in book/published and show it")
    parser.add_argument("--images", type=int, help="training images, instead of what the device's setting has")
    options = parser.parse_args(arguments)
    device = gpu.pick_device()
    s = setting(device)
    if options.images is not None:
        least = 8 * s.batch_size
        if options.images < least:
            print(f"error: --images is {options.images}: expected at least {least}", file=sys.stderr)
            return 2
        s = dataclasses.replace(s, images=options.images)
    if device.type == "cpu":
        torch.set_num_threads(1)  # as at profile quick: networks this small gain nothing from a second thread
    peak = matrix_flops(s.matrix, device)
    found = {
        "kind": device.type,
        "device": gpu.device_name(device),
        "torch": torch.__version__.partition("+")[0],
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "matrix_tflops": peak / 1e12,
        "cases": [],
    }
    for case, network in cases(s):
        print(f"{case}, {network} …", flush=True)
        found["cases"].append(measure(case, network, s, device, peak))
    if device.type == "cuda":
        found["pair"] = bench_pair.measure(bench_pair.PAIR, device)
    path = profiles.outputs_folder() / f"bench-{device.type}.json"
    artefacts.save_json(path, found)
    if options.publish:
        bench_page.publish(found)
    for table in (bench_page.rows, bench_page.limit_rows, bench_page.growth_rows):
        print("\n" + plots.text_table(*table(found)))
    print(f"\n{found['device']}; a matrix product reaches {peak / 1e12:.3g} TFLOP/s. Kept in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
