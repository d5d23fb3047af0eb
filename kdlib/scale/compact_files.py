"""Compact soft labels in files: shards by range of images, written by many processes and read by many.

A folder holds ``shard_00000.npy``, ``shard_00001.npy`` and so on, each with (V, n) rows of a
:class:`kdlib.scale.compact.Layout` for n images, and its record beside it; and ``manifest.json``, which is written
last, under a checksum of its own. It names the data, the teacher, views and k, and the SHA-256 of each shard. Shards
are read through memory maps, and a shard's SHA-256 is checked when it is first read from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kdlib import gpu
from kdlib.checks.logits import check_logits
from kdlib.data import ImageSet
from kdlib.evaluate import outputs_of
from kdlib.gpu import ranks as processes
from kdlib.losses import at_least_float32
from kdlib.records import artefacts
from kdlib.records.documents import load_document, mismatch, read_document
from kdlib.records.identity import digest
from kdlib.scale.compact import CompactSoftLabels, Layout, layout
from kdlib.soft_labels import LiveTeacher
from kdlib.train import progress_bar

MANIFEST = "manifest.json"
AT_MOST = 2**27  # bytes of a shard, which is held in memory while it is made
AT_LEAST = 16  # shards, so that as many processes have something to do
FORM = {"fingerprint": {"data": str, "views": int, "k": int, "classes": int}}
FORM |= {"shards": [{"file": str, "images": [int], "sha256": str}]}  # of a manifest
AGAIN = "call kdlib.scale.generate_compact again with the same arguments, which makes what is missing or damaged alone"


def generate_compact(
    folder: str | PathLike,
    teacher: nn.Module,
    data: ImageSet,
    views: int | None,
    k: int,
    *,
    shard: int | None = None,
    batch_size: int = 512,
    rank: int | None = None,
    ranks: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> CompactSoftLabels | None:
    """The compact soft labels of `data` by `teacher` in `folder`: made, or used again as far as they are there.

    A shard that is there, made from the same and undamaged, is kept; so an interrupted run goes on where it stopped.
    One made from something else is renamed to a backup, and gets its name back when it is wanted again.

    Args:
        data: the images; anything with the interface of :class:`kdlib.data.ImageSet` but its tensor of images.
        views: how many views of each image; None: all there are.
        k: how many logits of each image are kept; the number of classes: all of them, as dense soft labels do.
        shard: images per shard; None: so many that there are 16 shards or more, of 134 MB or less. Their content
            identifies the soft labels, so with another value, a student that learned from them is trained again.
        batch_size: images at once; changes the speed only.
        rank, ranks: which of how many processes this is; None: as ``torchrun`` started them. Each makes every
            `ranks`-th shard, and the last one to finish writes the manifest. Their number may change between runs.

    Returns:
        The soft labels. None if `rank` was given and shards of others are not there yet: nobody waits for a process
        that may have died, and :func:`load_compact` loads them later.

    Raises:
        ValueError: `views`, `k`, `shard` or `rank` out of range, or a teacher that gives no finite (B, classes) logits.
    """
    folder, views, rows = Path(folder), data.resolve_views(views), layout(data.classes, k)
    together = rank is None and ranks is None
    rank, ranks = (processes.rank(), processes.world()) if together else (rank or 0, ranks or 1)
    if not 0 <= rank < ranks:
        raise ValueError(f"rank is {rank} of {ranks}: expected a rank from 0 to {ranks - 1}")
    if views * rows.bytes > AT_MOST:  # such as all views of images whose views have no end
        raise ValueError(f"views is {views:,}: expected at most {AT_MOST // rows.bytes:,} for k={k}, in one shard")
    if shard is None:
        shard = max(1, min(AT_MOST // (views * rows.bytes), math.ceil(len(data) / AT_LEAST)))
    for name, value in {"shard": shard, "batch_size": batch_size}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}: expected a whole number of at least 1 image")
    made_from = {"data": data.identity, "teacher": LiveTeacher(teacher).identity, "views": views, **rows._asdict()}
    wanted = {
        f"shard_{number:05}.npy": made_from | {"images": [first, min(first + shard, len(data))]}
        for number, first in enumerate(range(0, len(data), shard))
    }
    of_all = made_from | {"shard": shard}
    _make_room(folder / MANIFEST, of_all)
    device, ask = gpu.pick_device(device), None
    own = list(wanted.items())[rank::ranks]
    with progress_bar(len(own), progress, unit="shard") as bar:
        for file, fingerprint in own:
            with artefacts.lock(folder / file):
                path = artefacts.find(folder, file, fingerprint)
                if path != folder / file or not _is_undamaged(path):
                    start, ask = time.perf_counter(), ask or _prepare(teacher, data, device, batch_size)
                    table = _shard(ask, rows, views, *fingerprint["images"])
                    made = artefacts.provenance(device, time.perf_counter() - start)
                    artefacts.save_array(folder / file, table, fingerprint=fingerprint, provenance=made)
            bar.update()
    complete = _finish(folder / MANIFEST, of_all, wanted)
    if together:
        processes.barrier()  # the last one has written the manifest
        complete = True
    return load_compact(folder, data) if complete else None


def load_compact(folder: str | PathLike, data: ImageSet) -> CompactSoftLabels:
    """The compact soft labels of a folder, read through memory maps: hardly any of them is in memory.

    Raises:
        FileNotFoundError: the folder holds no manifest.
        ValueError: a manifest that is damaged, or soft labels of other images. A damaged shard raises it when it is
            first read from.
    """
    path = Path(folder) / MANIFEST
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: the soft labels are not complete; {AGAIN}")
    manifest = load_document(path, "manifest of soft labels", AGAIN, legacy=False)
    if wrong := mismatch(manifest, FORM):
        raise ValueError(f"{path} is not a manifest of soft labels ({wrong}): {AGAIN}")
    made_from = manifest["fingerprint"]
    if made_from["data"] != data.identity:
        raise ValueError(
            f"{folder} holds the soft labels of {made_from['data']}, the images are {data.identity}: expected the same "
            "images in the same order; generate them for these, in another folder"
        )
    rows = Layout(made_from["classes"], made_from["k"])
    table = Shards(path.parent, manifest["shards"], made_from["views"], rows)
    return CompactSoftLabels(table, rows, made_from["data"], digest([rows, manifest["shards"]]), path.parent)


class Shards:
    """The rows of many shards as one table (V, N, bytes), of which only what is asked for is read.

    Args:
        shards: ``{"file", "images": [first, last + 1], "sha256"}`` of each, as the manifest has them.
    """

    def __init__(self, folder: Path, shards: list[dict], views: int, rows: Layout):
        self.folder, self.shards, self.rows = folder, shards, rows
        self.firsts = np.array([shard["images"][0] for shard in shards])
        self.shape = (views, shards[-1]["images"][1], rows.bytes)
        self._maps: dict[int, np.ndarray] = {}

    def __getitem__(self, at: tuple[Tensor, Tensor]) -> Tensor:
        """The bytes (B, bytes) of the images at indices (B,) in views (B,), on the device of these two."""
        views, indices = (numbers.cpu().numpy() for numbers in at)
        found = np.empty((len(indices), self.rows.bytes), np.uint8)
        shard_of = np.searchsorted(self.firsts, indices, side="right") - 1
        for number in np.unique(shard_of):
            here = shard_of == number
            found[here] = self._map(number)[views[here], indices[here] - self.firsts[number]]
        return torch.from_numpy(found).to(at[0].device)

    def to(self, device: torch.device | str) -> Tensor | Shards:
        """All of them in a GPU's memory if they take less than half of what is free there; otherwise the same."""
        size = math.prod(self.shape)
        if torch.device(device).type != "cuda" or size > torch.cuda.mem_get_info(device)[0] // 2:
            return self
        return self.read(device)

    def read(self, device: torch.device | str = "cpu") -> Tensor:
        """All of them: (V, N, bytes) uint8, in the memory of `device`."""
        table = torch.empty(self.shape, dtype=torch.uint8, device=device)
        for number, shard in enumerate(self.shards):
            table[:, slice(*shard["images"])] = torch.from_numpy(np.array(self._map(number))).to(device)
        return table

    def _map(self, number: int) -> np.ndarray:
        """The bytes (V, n, bytes) of one shard, checked when they are first asked for."""
        if number not in self._maps:
            shard = self.shards[number]
            path, (first, last) = self.folder / shard["file"], shard["images"]
            if not path.exists():
                raise FileNotFoundError(
                    f"{path}, images {first} to {last - 1} of the soft labels, is not there: {AGAIN}"
                )
            if (found := artefacts.file_digest(path)) != shard["sha256"]:
                raise ValueError(
                    f"{path}, images {first} to {last - 1} of the soft labels, has changed since it was made: its "
                    f"SHA-256 is {found}, expected {shard['sha256']}; {AGAIN}"
                )
            table = np.load(path, mmap_mode="r", allow_pickle=False)
            self._maps[number] = table.view(np.uint8).reshape(*table.shape, self.rows.bytes)
        return self._maps[number]


def _prepare(
    teacher: nn.Module, data: ImageSet, device: torch.device, batch_size: int
) -> Callable[[Tensor, int], Iterator[Tensor]]:
    """A function from image numbers and a view to the teacher's logits, batch by batch; the teacher is examined."""
    data, teacher = data.to(device), teacher.eval().to(device)
    model, images = teacher, gpu.place(teacher, device, data.example)

    @torch.no_grad()
    def ask(order: Tensor, view: int) -> Iterator[Tensor]:
        order = order.to(data.labels.device)
        chosen = order.split(batch_size)
        with gpu.tuned_convolutions(device), gpu.mixed_precision(device):
            for batch in data.load(chosen, torch.full_like(order, view).split(batch_size)):
                logits = at_least_float32(outputs_of(model(gpu.lay_out(batch.images, images))))
                if not logits.isfinite().all():
                    odd = batch.indices[~logits.isfinite().all(1)].tolist()
                    raise ValueError(
                        f"the teacher's logits are not finite for {len(odd)} of {len(logits)} images of {data.name} in "
                        f"view {view}, first for image {odd[0]}: expected numbers. It may have overflowed in half "
                        "precision (try .float()), or its weights may not be loaded"
                    )
                yield logits

    some = torch.linspace(0, len(data) - 1, min(500, len(data))).long()
    labels = data.labels[some.to(data.labels.device)].cpu()
    no_pixels = torch.zeros(len(some), 1, 1, 1, dtype=torch.uint8)  # only labels and names are looked at
    asked = ImageSet(data.name, no_pixels, labels, tuple(data.class_names), (0.0,), (1.0,))
    check_logits(torch.cat(list(ask(some, 0))).cpu(), asked)
    model = gpu.optimize_for_gpu(teacher, device, images, for_inference=True)
    return ask


def _shard(
    ask: Callable[[Tensor, int], Iterator[Tensor]], rows: Layout, views: int, first: int, last: int
) -> np.ndarray:
    """The rows (V, n) of the images from `first` to before `last`."""
    table = np.empty((views, last - first), rows.dtype)
    for view in range(views):
        encoded = torch.cat([rows.encode(logits) for logits in ask(torch.arange(first, last), view)])
        table[view] = encoded.cpu().numpy().view(rows.dtype)[:, 0]
    return table


def _is_undamaged(path: Path) -> bool:
    try:
        artefacts.check_content(path)
    except ValueError as error:
        print(f"{artefacts.short_reason(error)}: it is made again")
        return False
    return True


def _make_room(path: Path, fingerprint: dict) -> None:
    """Rename a manifest of other soft labels, or a damaged one, to a backup: it does not tell what will be there."""
    with artefacts.lock(path):
        if not path.exists():
            return
        try:
            reason = mismatch(found := read_document(path, legacy=False), FORM)
        except ValueError as error:
            reason = str(error)
        if reason or found["fingerprint"] != fingerprint:
            backup = path.with_name(f"{path.stem}.{artefacts.file_digest(path)[:16]}{path.suffix}")
            artefacts.replace(path, backup)
            print(f"{path} is not what this run needs ({reason or 'other soft labels'}); kept as {backup.name}")


def _finish(path: Path, fingerprint: dict, wanted: dict[str, dict]) -> bool:
    """Write the manifest if all shards are there, and rename what else is called a shard to a backup."""
    folder = path.parent
    with artefacts.lock(path):
        known = {file: artefacts.record(folder / file) for file in wanted if (folder / file).exists()}
        if any(known.get(f, {}).get("fingerprint") != artefacts.as_read(made) for f, made in wanted.items()):
            return False
        for other in folder.glob("shard_[0-9]*.npy"):
            if other.name not in wanted and other.stem[6:].isdigit():
                artefacts.find(folder, other.name, fingerprint)
        shards = [
            {"file": file, "images": made_from["images"], "sha256": known[file]["sha256"]}
            for file, made_from in wanted.items()
        ]
        artefacts.save_document(path, {"fingerprint": fingerprint, "shards": shards})
    return True
