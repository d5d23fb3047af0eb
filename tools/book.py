"""The workshop: runs, renders and publishes the notebooks in book/. It knows the notebooks, not distillation.

    python tools/book.py book --profile quick --chapters "02 05" --params "temperature=8 seed=1"

``make`` calls it; ``python tools/book.py --help`` lists what it does.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import papermill
import torch
import yaml
from nbformat import NotebookNode

import kdlib
from kdlib import artefacts, evaluate, experiments, plots, profiles
from kdlib.models import pick_device
from kdlib.soft_labels import generate, load_published, load_soft_labels

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
RUNS = ROOT / "runs"  # executed notebooks and rendered sites; never committed
STAMP = "kdlib_published"  # the key of the stamp in a notebook's metadata
PUBLISHED_VIEWS = 8_000_000  # bytes of soft labels to publish: as many views as fit
# of kdlib: where they change, published outputs are stale
STAMPED_FILES = ("data.py", "fused.py", "losses.py", "models.py", "train.py")


class Refused(Exception):
    """What was asked for cannot be done as asked; nothing was run. Exit status 2."""


class Failed(Exception):
    """A chapter or the rendering failed; the message says where. Exit status 1."""


@dataclasses.dataclass(frozen=True)
class Chapter:
    """One notebook of the book."""

    path: Path

    @property
    def number(self) -> str:
        return self.path.name[:2]

    @property
    def title(self) -> str:
        return self.read().cells[0].source.splitlines()[0].lstrip("# ")

    def read(self) -> NotebookNode:
        return nbformat.read(self.path, 4)


def chapters(selected: str = "") -> list[Chapter]:
    """The chapters of that selection, such as ``02 05``, in the book's order; all of them where it is empty."""
    found = {path.name[:2]: Chapter(path) for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}
    wanted = {name: name[:2].rjust(2, "0") for name in selected.replace(",", " ").split()}
    for name, number in wanted.items():
        if number not in found or name not in (number, str(int(number)), found[number].path.stem):
            raise Refused(f"chapter {name!r} is not there: expected some of {' '.join(found)}")
    return [found[number] for number in sorted(wanted.values() if wanted else found)]


# --- parameters ----------------------------------------------------------------------------------------------------


def read_parameters(text: str, selected: list[Chapter]) -> dict[Chapter, dict]:
    """What each chapter is given of ``temperature=8 seed=1``: the parameters that it has.

    Where there are any, the chapters also get `run`, a hash of all of them, so that they share a folder.
    """
    known = {chapter: papermill.inspect_notebook(chapter.path) for chapter in selected}
    hints = {name: p["inferred_type_name"] for found in known.values() for name, p in found.items()}
    values = {}
    for item in shlex.split(text):
        name, equals, value = item.partition("=")
        if not equals or not name:
            raise Refused(f"parameter {item!r}: expected name=value, such as temperature=8")
        if name == "profile":
            raise Refused(f"parameter {item!r}: the profile is chosen with --profile {value} (make: PROFILE={value})")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            numbers = " ".join(chapter.number for chapter in selected)
            names = ", ".join(sorted(hints.keys() - {"profile"})) or "none, they have no parameters"
            raise Refused(f"parameter {name!r} is unknown to the chapters {numbers}: expected one of {names}{hint}")
        values[name] = parse(name, value, hints[name])
    if values:
        values.setdefault("run", artefacts.digest(values))
    return {chapter: {n: v for n, v in values.items() if n in found} for chapter, found in known.items()}


def parse(name: str, text: str, hint: str) -> object:
    """The value that `text` stands for, as papermill reads it; Refused where it is not of the parameter's type."""
    if text == "None" or hint not in ("int", "float", "bool"):
        return None if text == "None" else text
    with contextlib.suppress(ValueError, KeyError):
        return {"int": int, "float": float, "bool": {"True": True, "False": False}.__getitem__}[hint](text)
    expected = {"int": "a whole number", "float": "a number", "bool": "True or False"}[hint]
    raise Refused(f"parameter {name} is {text!r}: expected {expected}, or None")


# --- running -------------------------------------------------------------------------------------------------------


def set_environment(profile: str) -> None:
    """What the kernels inherit: the profile, the folders, and none of the user's own Jupyter or IPython settings."""
    os.environ["KDLIB_PROFILE"] = profile
    os.environ["KDLIB_OUTPUTS"] = str(profiles.outputs_folder().resolve())  # the kernels' working folder is book/
    if os.environ.get("KDLIB_DATA"):
        os.environ["KDLIB_DATA"] = str(Path(os.environ["KDLIB_DATA"]).expanduser().resolve())
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        (RUNS / ".jupyter").mkdir(parents=True, exist_ok=True)
        os.environ[name] = str(RUNS / ".jupyter")
    os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"  # this environment's kernel, not one that the user registered
    os.environ["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"


def execute(chapter: Chapter, output: Path, parameters: dict, profile: str) -> NotebookNode:
    """Run one chapter through papermill into `output`, and return it cleaned and stamped.

    Raises:
        Failed: a cell failed. The notebook as far as it came, with the traceback, is in `output`.
    """
    start = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    live = sys.stderr if sys.stderr.isatty() else None  # progress bars are for a terminal
    try:
        papermill.execute_notebook(
            chapter.path,
            output,
            parameters,
            cwd=BOOK,
            kernel_name="python3",
            progress_bar=False,
            stderr_file=live,
            extra_arguments=["--log-level=CRITICAL"],  # else ipykernel 7 warns that it talks to us over TCP
        )
    except papermill.PapermillExecutionError as error:
        code = "\n".join(f"    {line}" for line in error.source.splitlines()[:6])
        raise Failed(
            f"chapter {chapter.number} failed in cell [{error.exec_count}]:\n{code}\n"
            f"{error.ename}: {error.evalue}\n(the whole traceback is in {output})"
        ) from error
    except Exception as error:  # a kernel that died or did not start
        raise Failed(f"chapter {chapter.number} was cut off: {type(error).__name__}: {error}") from error
    notebook = cleaned(nbformat.read(output, 4), chapter.read())
    notebook.metadata[STAMP] = {
        "profile": profile,
        "parameters": {name: value for name, value in parameters.items() if name != "run"},
        "device": artefacts.device_name(pick_device()),
        **{k: v for k, v in artefacts.provenance("cpu", 0).items() if k in ("versions", "date")},
        "seconds": round(time.perf_counter() - start, 1),
        "hash": hashes(chapter, profile),
    }
    write(notebook, output)
    return notebook


def cleaned(notebook: NotebookNode, original: NotebookNode) -> NotebookNode:
    """An executed notebook without what differs from run to run: papermill's notes, timings, progress bars."""
    notebook.metadata = NotebookNode(original.metadata)
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text  # a bar stood between the two
            else:
                kept.append(output)
        cell.outputs = kept
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook as a whole: whatever interrupts this leaves the old one or the new one."""
    with artefacts.written_whole(path) as partial:
        partial.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


def hashes(chapter: Chapter, profile: str) -> dict[str, str]:
    """What a chapter's outputs depend on, part by part: its code cells, its resolved recipe, and kdlib's own code."""
    # the set-up cell installs kdlib, and its address may change
    cells = [c for c in chapter.read().cells if c.cell_type == "code" and "setup" not in c.metadata.get("tags", [])]
    recipe = dataclasses.asdict(kdlib.resolve(profile))
    del recipe["start_from"]  # what is published always starts from scratch
    found = {
        "code cells": artefacts.digest([cell.source for cell in cells]),
        "recipe": artefacts.digest(recipe),
    }
    for name in STAMPED_FILES:
        found[name] = hashlib.sha256((ROOT / "kdlib" / name).read_bytes()).hexdigest()[:8]
    return found


def changed(chapter: Chapter, stamp: dict) -> list[str]:
    """Which of the things that a chapter's outputs depend on are not as they were when it was run."""
    now = hashes(chapter, stamp["profile"])
    return [name for name in now if stamp["hash"].get(name) != now[name]]


def run(options: argparse.Namespace) -> None:
    """Execute chapters into runs/, stopping at the first cell that fails."""
    run_chapters(options)


def run_chapters(options: argparse.Namespace) -> tuple[profiles.Profile, dict[Chapter, NotebookNode]]:
    """The profile with its parameters, and the executed chapters; all that was asked for is checked before any runs."""
    given = read_parameters(options.params, chapters(options.chapters))
    profile = resolved(options, given)
    set_environment(profile.name)
    done = {}
    for count, (chapter, parameters) in enumerate(given.items(), 1):
        say = f"chapter {count} of {len(given)}: {chapter.number} {chapter.title}"
        print(say, "…", flush=True)
        done[chapter] = execute(chapter, RUNS / profile.folder.name / chapter.path.name, parameters, profile.name)
        print(f"{say}: {done[chapter].metadata[STAMP]['seconds']:.0f} s", flush=True)
    return profile, done


def resolved(options: argparse.Namespace, given: dict[Chapter, dict] | None = None) -> profiles.Profile:
    """The profile with all its parameters; Refused where kdlib finds one of them out of range."""
    values = {name: value for parameters in (given or {}).values() for name, value in parameters.items()}
    values = {name: value for name, value in values.items() if name in (*profiles.PARAMETERS, "run")}
    try:
        return kdlib.resolve(options.profile, **values)
    except ValueError as error:
        raise Refused(str(error)) from error


def book(options: argparse.Namespace) -> None:
    """Run, render what was run, and print the table of results and where the page is."""
    profile, done = run_chapters(options)
    page = render(RUNS / profile.folder.name, done, strict=False)
    if any(chapter.number == "06" for chapter in done):
        print("\n" + results_table(profile.folder / "results.json"))
    else:
        print("\nNo table of results: chapter 06, which measures them, was not among the chapters run.")
    print(f"\nThe book: {page.as_uri()}")


def results_table(path: Path) -> str:
    """``results.json`` as text in columns."""
    return plots.text_table(*evaluate.results_rows(evaluate.load_results(path)))


def verify(options: argparse.Namespace) -> None:
    """Reload what a run left, or what is published, and recompute its results: every figure must come out again."""
    if options.published and options.params:
        raise Refused(f"--params {options.params!r} with --published: what is published was run without parameters")
    profile = resolved(options, read_parameters(options.params, chapters()))
    try:
        (recompute_published if options.published else recompute)(profile)
    except (OSError, ValueError) as error:  # kdlib's word on a file that is missing or damaged
        raise Failed(str(error)) from error


def recompute(profile: profiles.Profile) -> None:
    """Every figure of a run's ``results.json`` from its saved weights; Failed where one does not come out again."""

    def saved(name: str) -> Path:  # a run with parameters uses what fits of the one without
        own, base = profile.folder / name, artefacts.base_folder(profile.folder) / name
        return own if own.exists() else base

    data = kdlib.load_data(profile.dataset, limit=profile.limit)
    wrong = [f"{split.name}: a class is missing" for split in data if len(split.labels.unique()) < split.classes]
    results = evaluate.load_results(profile.folder / "results.json")
    for run in results["runs"]:
        for place, seed in enumerate(run["seeds"]):
            path = saved(profile.file(run["role"], run["network"], seed))
            model = kdlib.build(run["network"], data.test.classes, data.test.channels)
            found = evaluate.evaluate(artefacts.load_weights(path, model), data.test)
            if not np.isfinite(artefacts.record(path)["history"]["loss"]).all():
                wrong.append(f"{path.name}: its training loss was not finite")
            for name in ("accuracy", "nll", "ece"):
                told, again = run[name][place], getattr(found, name)
                if not abs(told - again) <= 0.0005:  # 0.05 point: half precision rounds otherwise on another device
                    wrong.append(f"{path.name}: {name} is {again:.4f}, results.json says {told:.4f}")
            print(f"{path.name}: accuracy {found.accuracy:.2%}, results.json {run['accuracy'][place]:.2%}", flush=True)
            if run["role"] == "teacher":
                soft_labels = load_soft_labels(saved("soft_labels.npy"), data.train)
                clean = soft_labels.logits[0].float()
                # by its typical size, not its largest: in half precision a few of a million answers are well off
                apart = ((kdlib.predict_logits(model, data.train) - clean).norm() / clean.norm()).item()
                if not apart <= 0.03:
                    wrong.append(f"soft_labels.npy: the clean view's logits are off by {apart:.1%} of their size")
                print(f"soft_labels.npy: {tuple(soft_labels.logits.shape)}, clean view off by {apart:.2%}", flush=True)
    if wrong:
        raise Failed("what was saved and what was reported differ:\n" + "\n".join(wrong))
    print(f"all figures of {profile.folder / 'results.json'} come out again")


def recompute_published(profile: profiles.Profile) -> None:
    """The published accuracies from the published weights and answers; Failed where one does not come out again.

    The students trained alone are not published, so theirs are left out.
    """
    path = BOOK / "published" / profile.name / "results.json"
    if not path.exists():
        raise Failed(f"profile {profile.name} is not published (no {path}): `make publish PROFILE={profile.name}`")
    data = kdlib.load_data(profile.dataset)
    teacher_logits = load_published(profile, data)[1]["test"]
    wrong = []
    for run in evaluate.load_results(path)["runs"]:
        if run["role"] == "student":
            continue
        for seed, told in zip(run["seeds"], run["accuracy"], strict=True):
            if run["role"] == "teacher":
                name, found = "teacher_logits.npy", evaluate.scores(teacher_logits, data.test.labels)
            else:
                name = profile.file(run["role"], run["network"], seed)
                weights = artefacts.published(profile.name, name, profile.folder)
                model = kdlib.build(run["network"], data.test.classes, data.test.channels)
                found = evaluate.evaluate(artefacts.load_weights(weights, model), data.test)
            print(f"{name}: accuracy {found.accuracy:.2%}, results.json {told:.2%}", flush=True)
            if not abs(told - found.accuracy) <= 0.0005:
                wrong.append(f"{name}: accuracy is {found.accuracy:.4f}, results.json says {told:.4f}")
    if wrong:
        raise Failed(
            f"what is published at profile {profile.name} and what {path} says differ by more than 0.05 point:\n"
            + "\n".join(wrong)
            + f"\npublish both anew: `make publish PROFILE={profile.name}` runs chapters that are not current"
        )
    print(f"the published accuracies of {path} come out again from the published weights and answers")


# --- rendering -----------------------------------------------------------------------------------------------------


def site(options: argparse.Namespace) -> None:
    """Render what is committed, without executing it; a warning is an error."""
    print(f"The book: {render(RUNS / 'site', {}, strict=True).as_uri()}")


def render(folder: Path, executed: dict[Chapter, NotebookNode], *, strict: bool) -> Path:
    """Render a staged copy of the book, with those notebooks put in, to HTML in `folder`; returns the first page."""
    for name in ("source", "_build"):
        shutil.rmtree(folder / name, ignore_errors=True)
    source = folder / "source"
    shutil.copytree(BOOK, source / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    shutil.copy(ROOT / "_toc.yml", source)
    (source / "_config.yml").write_text(yaml.safe_dump(site_settings(), allow_unicode=True), encoding="utf-8")
    for chapter in chapters():
        notebook = executed.get(chapter) or chapter.read()
        title, _, rest = notebook.cells[0].source.partition("\n")
        title = f"# {chapter.number} · {title.lstrip('# ')}"
        notebook.cells[0].source = f"{title}\n\n{stamp_note(chapter, notebook)}\n\n{rest}"
        nbformat.write(notebook, source / "book" / chapter.path.name)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source)]
    command += ["--path-output", str(folder), "-q", *(["-W", "-n", "--keep-going"] if strict else [])]
    print("rendering …", flush=True)
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = re.sub(r"\x1b\[[\d;]*m", "", outcome.stderr or outcome.stdout).strip()  # Sphinx writes colours
    if outcome.returncode:
        raise Failed(f"rendering {source} failed:\n{said}")
    if outcome.stderr:
        print(said)
    return folder / "_build" / "html" / "index.html"


def site_settings() -> dict:
    """``_config.yml``, with buttons to the repository and to Colab where the repository is one on github.com."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    if config["repository"]["url"].startswith("https://github.com/"):  # elsewhere they would lead nowhere
        config["html"] |= {"use_repository_button": True, "use_issues_button": True}
        config["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
    return config


def stamp_note(chapter: Chapter, notebook: NotebookNode) -> str:
    """Under a page's title: how, where and when what it shows was run, and whether that still holds."""
    stamp = notebook.metadata.get(STAMP)
    if stamp is None:
        return "```{warning}\n:class: stamp\nNot run yet: run it with `make publish`.\n```"
    text = describe(stamp)
    if parts := changed(chapter, stamp):
        text += f". The code has changed since (`{'`, `'.join(parts)}`): run it again with `make publish`"
    return f"```{{{'warning' if parts else 'note'}}}\n:class: stamp\n{text}.\n```"


def describe(stamp: dict) -> str:
    """A stamp in words."""
    parameters = "".join(f", {name}={value}" for name, value in stamp.get("parameters", {}).items())
    torch, date = stamp["versions"]["torch"].partition("+")[0], stamp["date"]
    return (
        f"Run at profile {stamp['profile']}{parameters} on {stamp['device']} · torch {torch} · {date} · "
        f"{stamp['seconds']:.0f} s"
    )


# --- publishing ----------------------------------------------------------------------------------------------------


def publish(options: argparse.Namespace) -> None:
    """Execute chapters in place, one after the other; those that are current at that profile are left alone."""
    profile, selected = resolved(options).name, chapters(options.chapters)
    set_environment(profile)
    for count, chapter in enumerate(selected, 1):
        say = f"chapter {count} of {len(selected)}: {chapter.number} {chapter.title}"
        stamp = chapter.read().metadata.get(STAMP)
        if stamp and stamp["profile"] == profile and not changed(chapter, stamp) and not options.force:
            print(f"{say}: current (--force runs it again)", flush=True)
            continue
        if stamp and (stamp["profile"], profile) == ("full", "quick") and not options.force:
            print(f"{say}: stays as published at profile full (--force replaces it)", flush=True)
            continue
        print(say, "…", flush=True)
        notebook = execute(chapter, RUNS / "publish" / chapter.path.name, {}, profile)
        del notebook.metadata[STAMP]["parameters"]
        write(notebook, chapter.path)
        print(f"{say}: {notebook.metadata[STAMP]['seconds']:.0f} s", flush=True)
        if chapter.number == "06":
            fill_results(evaluate.load_results(kdlib.resolve(profile).folder / "results.json"))
            publish_artefacts(kdlib.resolve(profile))
        measured = kdlib.resolve(profile).folder / f"{chapter.path.stem}.json"
        if measured.exists():
            fill_findings(experiments.load(measured))


def fill_results(results: dict) -> None:
    """Keep results in book/published, and show them in the README and the introduction, so that nobody types a figure.

    Those of profile quick are kept, but not shown where there are some of profile full.
    """
    published = BOOK / "published"
    artefacts.save_json(published / results["profile"] / "results.json", results)
    if results["profile"] != "full" and (published / "full" / "results.json").exists():
        return
    with artefacts.written_whole(published / "results.png") as partial:
        plots.results(results).savefig(partial)
    for path in (ROOT / "README.md", BOOK / "intro.md"):
        if path.exists():
            parts = re.split(r"(<!-- results: (?:begin|end) -->\n?)", path.read_text(encoding="utf-8"))
            if len(parts) == 5:
                parts[2] = shown_results(results, os.path.relpath(published / "results.png", path.parent))
                replace_text(path, "".join(parts))


def shown_results(results: dict, picture: str) -> str:
    """The figure and the table of results, in Markdown."""
    alt = "The test accuracy of the teacher, the student alone and the distilled student, a dot for each seed"
    where = f"Profile {results['profile']} ({results['dataset']}) on {results['runs'][0]['device']}, {results['date']}"
    table = plots.table(*evaluate.results_rows(results, latency=False)).data
    return f"\n![{alt}]({picture})\n\n{table}\n\n{where}; written by `make publish`.\n\n"


def publish_artefacts(profile: profiles.Profile) -> None:
    """Keep in book/published what a reader without a GPU can start from: small artefacts of a run that is complete.

    The soft labels in the views that fit, the teacher's logits for the other two splits, the distilled students'
    weights in half precision, and the histories of all. Each with its record, which holds the file's SHA-256.
    """
    folder = BOOK / "published" / profile.name
    data = kdlib.load_data(profile.dataset)
    networks = {profile.file("teacher"): profile.teacher} | {
        profile.file(role, network, seed): network
        for role in ("student", "distilled")
        for network in profile.students
        for seed in profile.seeds
    }
    records = {name: artefacts.record(profile.folder / name) for name in networks}

    path = profile.folder / "soft_labels.npy"
    logits, known = artefacts.load_array(path), artefacts.record(path)
    logits = logits[: max(1, PUBLISHED_VIEWS // logits[0].nbytes)]
    keep(folder / path.name, array_bytes(logits), known["fingerprint"] | {"views": len(logits)}, known["provenance"])

    teacher = kdlib.build(profile.teacher, data.test.classes, data.test.channels)
    artefacts.load_weights(profile.folder / profile.file("teacher"), teacher)
    start = time.perf_counter()
    clean = np.concatenate([generate(teacher, split, 1, progress=False)[0] for split in (data.validation, data.test)])
    made = artefacts.provenance(pick_device(), time.perf_counter() - start)
    made_from = {
        "validation": f"{data.validation.name} {data.validation.fingerprint}",
        "test": f"{data.test.name} {data.test.fingerprint}",
        "teacher": records[profile.file("teacher")]["fingerprint"],
    }
    keep(folder / "teacher_logits.npy", array_bytes(clean), made_from, made)

    distilled = {profile.file("distilled", network, seed) for network in profile.students for seed in profile.seeds}
    for path in folder.glob("student_*"):  # of another network or seed than there are now
        if path.name.removesuffix(".json") not in distilled:
            path.unlink()
    for name in sorted(distilled):
        model = kdlib.build(networks[name], data.test.classes, data.test.channels)
        weights = artefacts.load_weights(profile.folder / name, model).half().state_dict()
        content = io.BytesIO()  # not a file, whose name torch.save would write into it
        torch.save(weights, content)
        known = records[name]
        keep(folder / name, content.getvalue(), known["fingerprint"], known["provenance"], precision="half")

    histories = json.dumps({name: known["history"] for name, known in records.items()}) + "\n"
    made_from = {name: known["fingerprint"] for name, known in records.items()}
    keep(folder / "histories.json", histories.encode(), made_from, records[profile.file("teacher")]["provenance"])
    print(f"{folder.relative_to(ROOT)}: {sum(path.stat().st_size for path in folder.iterdir()) / 1e6:.1f} MB")


def keep(path: Path, content: bytes, fingerprint: dict, provenance: dict, **known: object) -> None:
    """Write a file to publish and its record, in place of what was published before."""
    with artefacts.written_whole(path) as partial:
        partial.write_bytes(content)
    known = {
        "fingerprint": fingerprint,
        "sha256": hashlib.sha256(content).hexdigest(),
        "provenance": provenance,
        **known,
    }
    artefacts.save_json(path.with_name(f"{path.name}.json"), known)


def array_bytes(array: np.ndarray) -> bytes:
    """An array as an ``.npy`` file holds it."""
    content = io.BytesIO()
    np.save(content, array, allow_pickle=False)
    return content.getvalue()


def fill_findings(found: dict) -> None:
    """Keep an experiment's measurements in book/published, and write the page of verdicts anew from all of them."""
    artefacts.save_json(BOOK / "published" / found["profile"] / f"{found['experiment']}.json", found)
    page = BOOK / "what_we_found.md"
    if page.exists():
        parts = re.split(r"(<!-- findings: (?:begin|end) -->\n?)", page.read_text(encoding="utf-8"))
        if len(parts) == 5:
            parts[2] = shown_findings()
            replace_text(page, "".join(parts))


def shown_findings() -> str:
    """Of each chapter that made measurements its claims and verdicts, in Markdown: at profile full where there are any.

    Everything is computed from the files in book/published.
    """
    sections, verdicts = [], []
    for chapter in chapters():
        files = (BOOK / "published" / profile / f"{chapter.path.stem}.json" for profile in ("full", "quick"))
        path = next((path for path in files if path.exists()), None)
        if path is None:
            continue
        found = experiments.load(path)
        verdicts += [experiments.judge(claim, found).verdict for claim in found["claims"]]
        devices = ", ".join(dict.fromkeys(row["device"] for row in found["rows"]))
        table = plots.table(*experiments.verdict_rows(found)).data
        sections.append(
            f"## [{chapter.number} {chapter.title}]({chapter.path.name})\n\n{table}\n\n"
            f"Profile {found['profile']} ({found['dataset']}) on {devices}, {found['date']}: {len(found['rows'])} "
            f"measurements, {duration(experiments.cost(found))} in all.\n"
        )
    plural = {experiments.HOLDS: "hold", experiments.PARTLY: "hold partly", experiments.NOT_SEEN: "were not seen here"}
    counted = ", ".join(f"**{verdicts.count(verdict)}** {words}" for verdict, words in plural.items())
    total = f"Of {len(verdicts)} claims {counted}. Written by `make publish` from the files in `book/published/`."
    return "\n" + "\n".join([total + "\n", *sections]) + "\n"


def duration(seconds: float) -> str:
    """Seconds, or minutes where that is easier to read."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def status(options: argparse.Namespace) -> None:
    """Say of each chapter how it was published, and whether that still holds."""
    for chapter in chapters():
        stamp = chapter.read().metadata.get(STAMP)
        if stamp is None:
            print(f"{chapter.number} {chapter.path.stem[3:]:24} never published")
            continue
        parts = changed(chapter, stamp)
        state = f"stale: {', '.join(parts)} changed" if parts else "current"
        print(f"{chapter.number} {chapter.path.stem[3:]:24} {state} · {describe(stamp)}")


def address(options: argparse.Namespace) -> None:
    """Carry the repository's address from pyproject.toml (set there first where a URL is given) to where it stands."""
    project = ROOT / "pyproject.toml"
    if options.url:
        if not re.fullmatch(r"https://[\w.-]+(/[\w.-]+)+", options.url):
            raise Refused(f"address {options.url!r}: expected one such as https://github.com/owner/repository")
        text = project.read_text(encoding="utf-8")
        text = re.sub(r'(?m)^repository = ".*"$', f'repository = "{options.url}"', text)
        replace_text(project, text)
    url = project_address()
    config = ROOT / "_config.yml"
    old = yaml.safe_load(config.read_text(encoding="utf-8"))["repository"]["url"]
    for path in (config, ROOT / "README.md", ROOT / "CITATION.cff", *sorted(BOOK.glob("*.ipynb"))):
        if path.exists():
            text = path.read_text(encoding="utf-8").replace(old, url)
            replace_text(path, re.sub(r"(%pip install [^\n]*git\+)[^\s\"\\]+", rf"\g<1>{url}", text))
    print(f"The repository's address is {url}")


def project_address() -> str:
    """The repository's address: it lives in pyproject.toml, and everything else has it from there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["urls"]["repository"]


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a file where it differs from what is there."""
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"changed {path.relative_to(ROOT)}")


def test(options: argparse.Namespace) -> None:
    """Run every check, also where an earlier one fails: ruff, the tests, and the notebooks against their outputs."""
    python = [sys.executable, "-m"]
    own = ["kdlib", "tools", "tests", "book"]  # not runs/, whose notebooks are copies
    checks = {
        "ruff check": [*python, "ruff", "check", "--quiet", *own],
        "ruff format": [*python, "ruff", "format", "--check", "--quiet", *own],
        "tests": [*python, "pytest"],
        "notebooks": [*python, "pytest", "--nbval-lax", "--nbval-current-env", "book"],
    }
    failed = []
    with tempfile.TemporaryDirectory() as outputs:  # neither what the user has computed, nor for the user to keep
        os.environ["KDLIB_OUTPUTS"] = outputs
        for name, command in checks.items():
            print(f"== {name}", flush=True)
            if name == "notebooks":
                set_environment("quick")
                # in the kernels too, warnings of our own code are errors
                modules = ["__main__", *(f"kdlib.{path.stem}" for path in sorted((ROOT / "kdlib").glob("[a-z]*.py")))]
                os.environ["PYTHONWARNINGS"] = ",".join(f"error:::{module}" for module in modules)
            if subprocess.run(command, cwd=ROOT).returncode:
                failed.append(name)
    if failed:
        raise Failed(f"failed: {', '.join(failed)}")


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="command")
    for action in (run, book, verify, site, publish, status, address, test):
        command = commands.add_parser(action.__name__, help=action.__doc__.splitlines()[0])
        command.set_defaults(action=action)
        if action in (run, book, verify, publish):
            command.add_argument("--profile", default="auto", help="quick, full, or auto (default)")
        if action in (run, book, publish):
            command.add_argument("--chapters", default="", help='such as "02 05"; all where not given')
        if action in (run, book, verify):
            command.add_argument("--params", default="", help='such as "temperature=8 seed=1"')
        if action is verify:
            command.add_argument(
                "--published", action="store_true", help="what book/published holds, not a run of yours"
            )
        if action is publish:
            command.add_argument(
                "--force", action="store_true", help="also chapters that are current, and at quick those of full"
            )
        if action is address:
            command.add_argument("url", nargs="?", help="a new address; without it, the one in pyproject.toml")
    options = parser.parse_args(arguments)
    try:
        options.action(options)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Failed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: the chapters that had finished are kept", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
