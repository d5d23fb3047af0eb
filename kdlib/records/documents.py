"""JSON files that hold a checksum of themselves, so that a change of what they say is noticed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from kdlib.records.files import atomic_write
from kdlib.records.limits import JSON_BYTES, read_json

NUMBER = (int, float)
HISTORY = {"loss": [NUMBER], "accuracy": [NUMBER], "seconds": [NUMBER]}  # the fields of kdlib.History
_RUN = {"role": str, "network": str, "parameters": int, "size_mb": NUMBER, "seeds": [int], "accuracy": [NUMBER]}
RESULTS = {"profile": str, "dataset": str, "runs": [_RUN | {"latency_ms": {...: {...: NUMBER}}}]}  # results.json
_FIELDS = {"fingerprint": dict, "sha256": str, "provenance": dict, "settings": dict, "format": dict}  # of a record
_FIELDS |= {"networks": {...: dict}, "history": {...: [NUMBER]}}
CHECKSUM = "checksum"  # a document's key for the SHA-256 of all the rest, as canonical JSON


def save_json(path: Path, value: object) -> None:
    """Write a value as JSON, as a whole; ValueError for one that is too large to be read again."""
    text = as_text(value)
    if len(text) > JSON_BYTES:
        raise ValueError(f"{path} would have {len(text) / 1e6:,.0f} MB, expected at most {JSON_BYTES / 1e6:,.0f} MB")
    with atomic_write(path) as partial:
        partial.write_text(text, encoding="utf-8")


def save_document(path: Path, value: Mapping) -> None:
    """Write a JSON object with its checksum, as a whole."""
    save_json(path, sealed(value))


def sealed(value: Mapping) -> dict:
    """The same with its checksum."""
    return {**value, CHECKSUM: _checksum(value)}


def load_document(path: Path, kind: str, mend: str, *, legacy: bool = True) -> dict:
    """As :func:`read_document`; the error says which file is not of which kind, and how to mend it."""
    try:
        return read_document(path, legacy=legacy)
    except ValueError as error:
        raise ValueError(f"{path} is not a {kind} ({error}): {mend}") from error


def read_document(path: Path, *, legacy: bool = True) -> dict:
    """A JSON object without its checksum, which is verified; a legacy file has none.

    Args:
        legacy: whether files of this kind were once written without a checksum.

    Raises:
        OSError: no such file.
        ValueError: it is no JSON object, was changed since it was written, or has no checksum and is not legacy.
    """
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, expected an object")
    expected = value.pop(CHECKSUM, None)
    if expected is None and not legacy:
        raise ValueError(f"it was changed since it was written: it has no {CHECKSUM}")
    if altered := [key for key in value if _differ(key, CHECKSUM) == 1]:  # or it would pass for a legacy file
        raise ValueError(f"it was changed since it was written: it has {altered[0]!r} in place of {CHECKSUM!r}")
    try:
        found = expected if expected is None else _checksum(value)
    except RecursionError as error:  # reading takes less of the stack than writing
        raise ValueError("it is nested too deeply") from error
    if expected != found:
        raise ValueError(f"it was changed since it was written: its checksum is {found}, expected {expected}")
    return value


def read_record(path: Path) -> dict:
    """The record of a file, whose known fields have the form that they should have; other fields may be added.

    Raises:
        OSError: no such file.
        ValueError: as for :func:`read_document`, or a field of another form.
    """
    value = read_document(path)
    known = {name: form for name, form in _FIELDS.items() if value.get(name) is not None or name == "fingerprint"}
    if wrong := mismatch(value, {name: form for name, form in known.items() if name in value}):
        raise ValueError(wrong)
    if unknown := (value.get("history") or {}).keys() - HISTORY.keys():
        raise ValueError(f"its history has {min(unknown)!r}, expected {', '.join(HISTORY)}")
    return value


def mismatch(value: object, form: object, where: str = "it") -> str:
    """In words, where a JSON value has another form than expected; empty if it has not.

    Args:
        form: a type, or a tuple of types; ``[form]``: a list of such; ``{name: form}``: an object that has at least
            those fields; ``{...: form}``: an object with any names.
    """
    if isinstance(form, (dict, list)) and type(value) is not type(form):
        return f"{where} is a {type(value).__name__}, expected a {type(form).__name__}"
    if isinstance(form, dict):
        every = form.get(...)
        if missing := sorted(form.keys() - value.keys() - {...}):
            return f"{where} has no {', '.join(missing)}"
        wanted = [(name, every or form[name], f"{where}.{name}") for name in (value if every else form)]
        return next((wrong for name, of, at in wanted if (wrong := mismatch(value[name], of, at))), "")
    if isinstance(form, list):
        return next((wrong for k, item in enumerate(value) if (wrong := mismatch(item, form[0], f"{where}[{k}]"))), "")
    types = form if isinstance(form, tuple) else (form,)
    expected = " or ".join(kind.__name__ for kind in types)
    return "" if type(value) in types else f"{where} is a {type(value).__name__}, expected {expected}"


def read_form(path: Path, form: object, mend: str) -> object:
    """What a JSON file without checksum holds; ValueError, with how to mend it, if it has another form."""
    try:
        value = read_json(path)
        wrong = mismatch(value, form)
    except ValueError as error:
        wrong = str(error)
    if wrong:
        raise ValueError(f"{path} is not the file that it should be ({wrong}): {mend}")
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
