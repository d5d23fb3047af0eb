"""Measurements as rows of a JSON file: saved one by one, so that a run that was interrupted goes on where it stopped.

A row is what one case measured with one seed. It is saved as soon as it is measured, and not measured again as long as
it was made from the same. The claims lie in the same file. Tables, figures and verdicts are computed from it alone.
"""

from __future__ import annotations

import base64
import contextlib
import glob
import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from kdlib import gpu
from kdlib.records import artefacts
from kdlib.records.documents import read_document, save_document

Job = tuple[str, int]  # case, seed
ABOUT_A_ROW = ("case", "seed", "fingerprint", "made_from", "sha256", "device", "seconds")  # all else are its measures


class RowStore:
    """The rows of one experiment: those in its file, and those that this run has asked for.

    Args:
        path: the file; created if it does not exist.
        about: what is saved beside the rows, such as the profile and the data set.

    Raises:
        ValueError: the file exists and is not a row store's, or a row in it was changed.
        RuntimeError: ``torchrun`` started several processes.
    """

    def __init__(self, path: Path, **about: object):
        gpu.ranks.refuse_several("an experiment is measured")  # which locks its file and waits for nobody
        self.path, self.about = Path(path), about
        self.rows: list[dict] = []  # those asked for, measured in this run or before
        self._read()
        self._before = list(self._saved)  # the rows that were there when this run began
        self._kept: list[dict] = []  # those that are in a backup

    def measure(
        self, case: str, seeds: Sequence[int], run: Callable[[int], Mapping], *, made_from: Mapping
    ) -> list[dict]:
        """The rows of one case, one per seed: from the file if they were made from the same, otherwise measured now.

        Args:
            run: ``seed -> {measure: value}``. A value is a number, a truth value (saved as 0 or 1), or truth values
                (N,), one per image: the row then holds the share of true ones, and which they are, so that a
                comparison can allow for the choice of images.
            made_from: everything that decides the outcome beside the seed (data, networks, recipes, objective),
                JSON-able. Rows made from something else are measured again; a backup keeps the old ones, and if they
                are asked for once more, they come from there.

        Returns:
            One dict per seed, in the order of `seeds`: case, seed, fingerprint (of `made_from`), sha256 (of the
            measures), device, seconds, and the measures.

        Raises:
            TypeError: `made_from` is not JSON-able: what stands for an object would change from run to run.
            ValueError: a measure is neither a finite number nor truth values.
        """
        wanted = {(case, seed): made_from for seed in seeds}
        return list(self.measure_all(wanted, lambda jobs, _: [run(seed) for _, seed in jobs]).values())

    def measure_all(
        self,
        wanted: Mapping[Job, Mapping],
        run: Callable[[list[Job], Path], Sequence[Mapping]],
        *,
        group: Callable[[list[Job]], list[list[Job]]] | None = None,
    ) -> dict[Job, dict]:
        """The rows of many cases and seeds, several of which may be measured at once; see :meth:`measure`.

        Args:
            wanted: ``(case, seed) -> made_from``.
            run: ``[(case, seed), ...], partial -> [{measure: value}, ...]``, in the same order. `partial` is where it
                may keep what is unfinished: an interrupted run finds it there, and it is deleted with the rows saved.
            group: splits the jobs that are missing into those that one call of `run` measures; by default one per call.
        """
        fingerprints = {job: artefacts.digest(made_from) for job, made_from in wanted.items()}
        with artefacts.lock(self.path):  # a second run of the same experiment waits, and finds these rows measured
            self._read()
            if restored := self._in_backups({j: f for j, f in fingerprints.items() if self._find(j, f) is None}):
                self._save(restored)
            missing = [job for job, fingerprint in fingerprints.items() if self._find(job, fingerprint) is None]
            self._remove_partial()
            for jobs in group(missing) if group else [[job] for job in missing]:
                start = time.perf_counter()
                measured = run(jobs, self._partial([(*job, fingerprints[job]) for job in jobs]))
                seconds = (time.perf_counter() - start) / len(jobs)
                self._save([_row(j, fingerprints[j], seconds, m) for j, m in zip(jobs, measured, strict=True)])
                self._remove_partial()
        rows = {job: self._find(job, fingerprint) for job, fingerprint in fingerprints.items()}
        self.rows += [row for row in rows.values() if row not in self.rows]
        return rows

    def finish(self, claims: Sequence = ()) -> dict:
        """Write the file with only the rows that were asked for and the claims, and return its content.

        Rows of other cases that another run has added since this one began stay in the file too.

        Args:
            claims: of :class:`kdlib.lab.Claim`.

        Raises:
            ValueError: a claim compares what was not measured.
        """
        experiment = json.loads(json.dumps(self._content(self.rows, [asdict(claim) for claim in claims])))
        for claim in experiment["claims"]:
            for c in claim["comparisons"]:
                weighted(experiment, c["measure"], c["weights"])
        with artefacts.lock(self.path):
            self._read()
            cases = {row["case"] for row in self.rows}
            others = [row for row in self._saved if row["case"] not in cases and row not in self._before]
            self._back_up([row for row in self._saved if row not in self.rows and row not in others])
            save_document(self.path, experiment | {"rows": experiment["rows"] + others})
            self._saved, self._claims = experiment["rows"] + others, experiment["claims"]
        return experiment

    def _read(self) -> None:
        """What is in the file now, and of this run's rows those that another run has removed from it."""
        saved = load(self.path) if self.path.exists() else {"rows": []}
        taken = set(map(_job, saved["rows"]))
        mine = [row for row in self.rows if _job(row) not in taken]
        self._saved, self._claims = saved["rows"] + mine, saved.get("claims", [])

    def _find(self, job: Job, fingerprint: str) -> dict | None:
        """The row in the file, if it was made from the same; a legacy row never was."""
        same = (row for row in self._saved if (*_job(row), row.get("fingerprint")) == (*job, fingerprint))
        return next(same, None)

    def _in_backups(self, wanted: Mapping[Job, str]) -> list[dict]:
        """The rows with those fingerprints that left the file, because another run did not ask for them."""
        found: dict[Job, dict] = {}
        for backup in self.path.parent.glob(f"{glob.escape(self.path.stem)}.*.json") if wanted else ():
            with contextlib.suppress(ValueError, FileNotFoundError):  # a damaged backup holds nothing
                rows = load(backup)["rows"]
                found |= {_job(r): r for r in rows if r.get("fingerprint", 0) == wanted.get(_job(r))}
        return list(found.values())

    def _partial(self, jobs: Sequence[tuple[str, int, str]]) -> Path:
        """The name of an unfinished measurement of these (case, seed, fingerprint): of the first, and of all."""
        return self.path.with_name(f"{self.path.stem}.{artefacts.digest(jobs[0])}-{artefacts.digest(jobs)}.partial")

    def _remove_partial(self) -> None:
        """Delete what is left of measurements whose first job is in the file: they are finished."""
        if left := list(self.path.parent.glob(f"{glob.escape(self.path.stem)}.*.partial*")):
            finished = {artefacts.digest((*_job(row), row.get("fingerprint"))) for row in self._saved}
            for path in left:
                if path.name.removeprefix(f"{self.path.stem}.").partition("-")[0] in finished:
                    artefacts.remove(path)

    def _save(self, rows: list[dict]) -> None:
        replaced = set(map(_job, rows))
        self._back_up([row for row in self._saved if _job(row) in replaced])
        self._saved = [row for row in self._saved if _job(row) not in replaced] + rows
        save_document(self.path, self._content(self._saved, self._claims))

    def _back_up(self, dropped: list[dict]) -> None:
        """Keep a copy of the file if rows that no copy holds are about to leave it."""
        if all(row in self._kept for row in dropped):
            return
        backup = self.path.with_name(f"{self.path.stem}.{artefacts.digest(self._saved)}.json")
        content = load(self.path) if self.path.exists() else self._content([], self._claims)
        save_document(backup, content | {"rows": self._saved})
        self._kept += self._saved
        print(f"{self.path.name} holds measurements that this run does not ask for; kept as {backup.name}")

    def _content(self, rows: list[dict], claims: list[dict]) -> dict:
        made = artefacts.provenance("cpu", 0)
        when = {key: made[key] for key in ("versions", "date")}
        return {"experiment": self.path.stem, **self.about, **when, "rows": rows, "claims": claims}


def load(path: Path) -> dict:
    """The content of a row store's file: ``rows``, ``claims``, and what the experiment is about.

    Rows that were published before rows had a SHA-256 (with the key ``made_from`` in place of ``fingerprint``) are read
    as they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a row store's, or a row's measures are not those that its SHA-256 was computed from.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"measurements {path} are not there: run the chapter that makes them first")
    try:
        experiment = read_document(path)
        for row in experiment["rows"]:
            legacy = "fingerprint" not in row
            required = {"case", "seed", "seconds"} | ({"made_from"} if legacy else {"fingerprint", "sha256"})
            if lacking := sorted(required - row.keys()):
                raise ValueError(f"a row lacks {', '.join(lacking)}")
            if not legacy and row["sha256"] != (actual := _sha256(row)):
                raise ValueError(
                    f"the row of case {row['case']!r}, seed {row['seed']}, was changed since it was measured: the "
                    f"SHA-256 of its measures is {actual}, expected {row['sha256']}"
                )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an experiment's file ({artefacts.short_reason(error)}): move it away and run its chapter"
        ) from error
    return experiment


def values(experiment: Mapping, case: str, measure: str) -> dict[int, float]:
    """One measure of one case, by seed, in ascending order.

    Raises:
        ValueError: no such case or measure in `experiment`.
    """
    cases = list(dict.fromkeys(row["case"] for row in experiment["rows"]))
    if case not in cases:
        raise ValueError(f"case {case!r} was not measured: expected one of {', '.join(cases)}")
    rows = [row for row in experiment["rows"] if row["case"] == case]
    if lacking := [row["seed"] for row in rows if measure not in row]:
        raise ValueError(f"measure {measure!r} of case {case!r} is not there for seeds {lacking}")
    return {row["seed"]: row[measure] for row in sorted(rows, key=lambda row: row["seed"])}


def weighted(experiment: Mapping, measure: str, weights: Mapping[str, float]) -> tuple[list[int], np.ndarray]:
    """The weighted sum of a measure over cases, such as ``{"distilled": 1, "alone": -1}``, paired by seed and image.

    Returns:
        The seeds that all cases have, ascending, and an array (seeds, images); (seeds, 1) if some rows do not hold
        which images the measure is true for.

    Raises:
        ValueError: no such case or measure, no seed that all cases have, or cases measured on other numbers of images.
    """
    by_seed = {case: values(experiment, case, measure) for case in weights}
    seeds = sorted(set.intersection(*map(set, by_seed.values())))
    if not seeds:
        raise ValueError(f"cases {' and '.join(map(repr, weights))} share no seed: expected the same seeds in all")
    by_image = {case: _truth_values(experiment, measure, case, seeds) for case in weights}
    if any(array is None for array in by_image.values()):
        by_image = {case: np.array([[own[seed]] for seed in seeds]) for case, own in by_seed.items()}
    if len(images := {array.shape[1] for array in by_image.values()}) > 1:
        counts = " and ".join(map(str, sorted(images)))
        raise ValueError(f"{measure!r} was measured on {counts} images: expected the same in all cases")
    return seeds, sum(weight * by_image[case] for case, weight in weights.items())


def _truth_values(experiment: Mapping, measure: str, case: str, seeds: Sequence[int]) -> np.ndarray | None:
    """Whether the measure is true, (seeds, images) as 0 or 1; None if a row does not hold it."""
    rows = {row["seed"]: row for row in experiment["rows"] if row["case"] == case}
    if any(measure not in rows[seed].get("by image", {}) for seed in seeds):
        return None
    packed = [rows[seed]["by image"][measure] for seed in seeds]
    bits = [np.unpackbits(np.frombuffer(base64.b64decode(p["bits"]), np.uint8)) for p in packed]
    return np.stack([one[: p["images"]] for one, p in zip(bits, packed, strict=True)]).astype(np.float64)


def cost(experiment: Mapping) -> float:
    """The seconds that all measurements took together."""
    return float(sum(row["seconds"] for row in experiment["rows"]))


def _job(row: Mapping) -> Job:
    return row["case"], row["seed"]


def _row(job: Job, fingerprint: str, seconds: float, measures: Mapping[str, object]) -> dict:
    """A row as it is saved: numbers, and of truth values per image their share and their bits."""
    case, seed = job
    numbers, by_image = {}, {}
    for name, value in measures.items():
        array = np.asarray(value)
        if array.dtype == bool and array.ndim == 1:
            by_image[name] = {"images": len(array), "bits": base64.b64encode(np.packbits(array)).decode()}
            value = array.mean()
        elif array.ndim or array.dtype.kind not in "biuf":
            raise ValueError(
                f"measure {name!r} of case {case!r} is {array.dtype} {array.shape}: expected a number, or truth values "
                "(N,), one per image; reduce it to a number, or compare it with what it should be"
            )
        numbers[name] = int(value) if array.dtype == bool and not array.ndim else float(value)
        if not math.isfinite(numbers[name]):
            raise ValueError(f"measure {name!r} of case {case!r} is {numbers[name]}: expected a finite number")
    row = {"case": case, "seed": seed, "fingerprint": fingerprint, "sha256": None}
    row |= {"device": gpu.device_name(gpu.pick_device()), "seconds": round(seconds, 3), **numbers}
    row |= {"by image": by_image} if by_image else {}
    return row | {"sha256": _sha256(row)}


def _sha256(row: Mapping) -> str:
    """The SHA-256 of a row's measures as canonical JSON: sorted keys, no spaces."""
    measures = {key: value for key, value in row.items() if key not in ABOUT_A_ROW}
    return hashlib.sha256(json.dumps(measures, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
