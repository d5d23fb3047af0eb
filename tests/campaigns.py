"""What the campaigns measured, kept for the page *How this book is tested*.

Each campaign is a command of its own, such as ``python -m tests.rot``. `make test` runs a short form of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kdlib.records import artefacts
from kdlib.records.documents import load_document, save_document

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "book" / "published" / "campaigns.json"


def record(name: str, figures: Mapping[str, float], seconds: float) -> None:
    """Keep a campaign's figures, in place of those that it measured before.

    Args:
        name: of the campaign's module.
        seconds: that the campaign took.
    """
    with artefacts.lock(RECORD):
        known = load_document(RECORD, "file of campaigns", "delete it") if RECORD.exists() else {}
        known[name] = {"figures": dict(figures), **artefacts.provenance("cpu", seconds)}
        save_document(RECORD, dict(sorted(known.items())))
    print(f"kept in {RECORD.relative_to(ROOT)}; `python tools/publish.py --pages` writes the page")
