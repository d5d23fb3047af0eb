"""The named data sets, each kept as one file in canonical order; downloaded once."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kdlib.records import artefacts
from kdlib.sources.arrays import read_npz
from kdlib.sources.known import DATA_SETS
from kdlib.sources.order import put_in_order


def read_stored(name: str, folder: Path) -> dict[str, np.ndarray]:
    """The arrays of one of ``DATA_SETS`` from ``<folder>/<name>.npz``, which is downloaded and written if need be.

    A file that was put there by hand has no record, and is taken as it is.

    Raises:
        FileNotFoundError: it is not there and cannot be downloaded.
        ValueError: the file is damaged, or not the one that was written.
    """
    if name == "digits":
        return DATA_SETS[name].load(folder)  # it comes with scikit-learn: nothing to download, nothing to keep
    path = folder / f"{name}.npz"
    if path.exists():
        return _read(path)
    with artefacts.lock(path):
        if path.exists():  # another process has made it
            return _read(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            arrays = DATA_SETS[name].load(folder)
        except (OSError, RuntimeError) as error:  # torchvision raises RuntimeError if an archive is not its own
            raise FileNotFoundError(
                f"data set {name!r}: {path} is not there, and downloading it failed ({error}). Either let this machine "
                f"reach the network once, or put the file there from another machine, or set KDLIB_DATA to the folder "
                f"that holds {name}.npz"
            ) from error
        put_in_order(arrays)
        artefacts.save_arrays(path, arrays, fingerprint={"dataset": name})
    return arrays


def _read(path: Path) -> dict[str, np.ndarray]:
    arrays = read_npz(path)
    try:
        artefacts.check_content(path)
    except ValueError as error:
        record = artefacts.record_path(path).name
        raise ValueError(f"{error}. If you put {path.name} there yourself, delete {record} only") from error
    return arrays
