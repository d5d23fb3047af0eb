"""JSON files that hold a checksum of themselves, so that a change of what they say is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kdlib.records.files import atomic_write

CHECKSUM = "checksum"  # a document's key for the SHA-256 of all the rest, as canonical JSON


def save_json(path: Path, value: object) -> None:
    """Write a value as JSON, as a whole."""
    with atomic_write(path) as partial:
        partial.write_text(as_text(value), encoding="utf-8")


def save_document(path: Path, value: Mapping) -> None:
    """Write a JSON object with its checksum, as a whole."""
    save_json(path, sealed(value))


def sealed(value: Mapping) -> dict:
    """The same with its checksum."""
    return {**value, CHECKSUM: _checksum(value)}


def load_document(path: Path, kind: str, mend: str) -> dict:
    """As :func:`read_document`; the error says which file is not of which kind, and how to mend it."""
    try:
        return read_document(path)
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind} ({error}): {mend}") from error


def read_document(path: Path) -> dict:
    """A JSON object without its checksum, which is verified; a legacy file has none.

    Raises:
        OSError: no such file.
        ValueError: it is no JSON object, or was changed since it was written.
    """
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a plain file")  # a pipe would be waited for
        value = json.loads(path.read_bytes().decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds a {type(value).__name__}, expected an object")
        expected = value.pop(CHECKSUM, None)
        if altered := [key for key in value if _differ(key, CHECKSUM) == 1]:  # or it would pass for a legacy file
            raise ValueError(f"it was changed since it was written: it has {altered[0]!r} in place of {CHECKSUM!r}")
        if expected is not None and expected != (found := _checksum(value)):
            raise ValueError(f"it was changed since it was written: its checksum is {found}, expected {expected}")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return value


def as_text(value: object) -> str:
    """A value as it is written."""
    return json.dumps(value, indent=1) + "\n"


def as_read(value: object) -> object:
    """A value as a file gives it back: tuples are lists there, and keys strings."""
    return json.loads(json.dumps(value))


def _differ(first: str, second: str) -> int:
    """In how many letters two names of one length differ; of others, all."""
    return sum(map(str.__ne__, first, second)) if len(first) == len(second) else len(second)


def _checksum(value: Mapping) -> str:
    return hashlib.sha256(json.dumps(as_read(value), sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def differences(found: object, wanted: dict, prefix: str = "") -> str:
    """In words, where two fingerprints differ; empty if they do not."""
    if not isinstance(found, dict):
        return "it has no record of what it was made from"
    reasons = []
    for key in sorted(found.keys() | wanted.keys()):
        a, b = (fingerprint.get(key, "missing") for fingerprint in (found, wanted))
        if isinstance(a, dict) and isinstance(b, dict):
            reasons.append(differences(a, b, f"{prefix}{key}."))
        elif a != b:
            reasons.append(f"{prefix}{key} is {a}, not {b}")
    return "; ".join(r for r in reasons if r)
