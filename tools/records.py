"""The records of a run: what book/published holds of it for readers without a GPU. tools/publish.py writes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import stale
import torch
from notebooks import BOOK, ROOT, Failed

import kdlib
from kdlib import evaluate, profiles, published
from kdlib.records import artefacts

PUBLISHED_VIEWS = 8_000_000  # bytes of soft labels to publish: as many views as fit
PINS = ROOT / "kdlib" / "records" / "published.json"
SPLITS = ("validation", "test")  # whose clean logits are published


def keep_run(profile: profiles.Profile, folder: Path) -> None:
    """Keep in `folder` what a reader without a GPU can start from: the records of a complete run of that profile.

    The soft labels in the views that fit, the logits of validation and test of every network, the histories of all,
    the figures that needed live weights, and the distilled students' weights in half precision. Each has its record.
    """
    networks = {profile.file("teacher"): profile.teacher} | {
        profile.file(role, network, seed): network
        for role in ("student", "distilled")
        for network in profile.students
        for seed in profile.seeds
    }
    records = {file: artefacts.record(profile.folder / file) for file in networks}
    if missing := [file for file, known in records.items() if not known]:
        raise Failed(
            f"the run in {profile.folder} is not complete (no {', '.join(missing)}): run chapters 02 to 06 first"
        )
    made_from = {file: known["fingerprint"] for file, known in records.items()}
    commit = stale.commit()
    made = records[profile.file("teacher")]["provenance"] | {"commit": commit}

    path = profile.folder / "soft_labels.npy"
    array, known = artefacts.load_array(path), artefacts.record(path)
    array = array[: max(1, PUBLISHED_VIEWS // array[0].nbytes)]
    about = known["fingerprint"] | {"views": len(array)}
    keep(folder / path.name, array_bytes(array), about, known["provenance"] | {"commit": commit})

    data = kdlib.load_data(profile.dataset)
    logits = [clean_logits(profile.folder / file, network, data) for file, network in networks.items()]
    about = {split: getattr(data, split).identity for split in SPLITS}
    about |= {"teacher": known["fingerprint"]["teacher"], "networks": made_from}
    keep(folder / "logits.npy", array_bytes(np.stack(logits)), about, made)

    distilled = {profile.file("distilled", network, seed) for network in profile.students for seed in profile.seeds}
    remove_outdated(folder, distilled)
    for file in sorted(distilled):
        model = artefacts.load_weights(
            profile.folder / file, kdlib.build(networks[file], data.test.classes, data.test.channels)
        )
        content = io.BytesIO()  # not a file, whose name torch.save would write into it
        torch.save(model.half().state_dict(), content)
        own = records[file]["provenance"] | {"commit": commit}
        more = {"precision": "half", "format": data.train.format}
        keep(folder / file, content.getvalue(), made_from[file], own, **more)

    about = {
        file: {
            "provenance": known["provenance"] | {"commit": commit},
            "megabytes": evaluate.file_megabytes(profile.folder / file),
            "weights": file in distilled,
        }
        for file, known in records.items()
    }
    histories = json.dumps({file: known["history"] for file, known in records.items()}) + "\n"
    more = {"settings": published.described(profile), "networks": about}
    keep(folder / "histories.json", histories.encode(), made_from, made, **more)
    figures, of_run = profile.folder / "measured.json", {"settings": more["settings"], "n_seeds": profile.n_seeds}
    if figures.exists():
        keep(folder / figures.name, figures.read_bytes(), of_run, made)
    else:  # those of an earlier run are not this one's
        for path in folder.glob("measured.json*"):
            path.unlink()
    print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def clean_logits(weights: Path, network: str, data) -> np.ndarray:
    """A saved network's logits of the clean validation and test images, one after the other: (N, C) float16.

    They are those that chapter 06 computes: half precision holds every bfloat16 below its largest number.
    """
    model = artefacts.load_weights(weights, kdlib.build(network, data.test.classes, data.test.channels))
    logits = torch.cat([kdlib.predict_logits(model, getattr(data, split)) for split in SPLITS])
    largest = torch.finfo(torch.float16).max
    return logits.clamp(-largest, largest).half().numpy()


def remove_outdated(folder: Path, weights: set[str]) -> None:
    """Delete published weights other than those, and the file of the teacher's logits alone."""
    for path in (*folder.glob("student_*"), *folder.glob("teacher_logits.npy*")):
        if path.name.removesuffix(".json") not in weights:
            path.unlink()


def keep(path: Path, content: bytes, fingerprint: dict, provenance: dict, **more: object) -> None:
    """Write a file to publish and its record, in place of what was published before."""
    artefacts.save_bytes(path, content, fingerprint=fingerprint, provenance=provenance, **more)


def pin() -> None:
    """Keep the SHA-256 of every published file's record in kdlib: what is fetched without a clone is checked by it."""
    records = sorted(path for path in (BOOK / "published").glob("*/*.json") if path.with_suffix("").is_file())
    pinned = {f"{path.parent.name}/{path.name}": artefacts.file_digest(path) for path in records}
    artefacts.save_json(PINS, pinned)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as an ``.npy`` file holds it."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


if __name__ == "__main__":
    pin()  # as publishing does
