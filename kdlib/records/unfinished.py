"""What a process left that died between saving a file and its record."""

from __future__ import annotations

import contextlib
import glob
from pathlib import Path

from kdlib.records.documents import read_document
from kdlib.records.files import file_digest, replace


def finish_saving(path: Path, record: Path) -> None:
    """Give a file without a record the one that was written for it, and only had to be renamed."""
    if path.is_file() and not record.exists():
        for written in path.parent.glob(f".*-{glob.escape(record.name)}"):
            with contextlib.suppress(OSError, ValueError):  # half written
                if read_document(written).get("sha256") == file_digest(path):
                    replace(written, record)
                    return
