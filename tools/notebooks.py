"""The notebooks of the book: finding, executing and writing them; and what the tools' command lines share."""

from __future__ import annotations

import argparse
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat
import papermill
from nbformat import NotebookNode

from kdlib import gpu, profiles
from kdlib.records import artefacts

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"
RUNS = ROOT / "runs"  # executed notebooks and rendered sites; never committed
STAMP = "kdlib_published"  # the key of the stamp in a notebook's metadata
PENDING = "kdlib_pending"  # in a cell's metadata: its output could not be carried over, and comes with the next run


class Refused(Exception):
    """What was asked for cannot be done as asked; nothing was run. Exit status 2."""


class Failed(Exception):
    """A chapter or a check failed; the message says where. Exit status 1."""


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
    """The selected chapters, such as ``02 05``, in the book's order; all of them if nothing is selected."""
    known = {path.name[:2]: Chapter(path) for path in sorted(BOOK.glob("[0-9][0-9]_*.ipynb"))}
    wanted = {name: name[:2].rjust(2, "0") for name in selected.replace(",", " ").split()}
    for name, number in wanted.items():
        if number not in known or name not in (number, str(int(number)), known[number].path.stem):
            raise Refused(f"chapter {name!r} does not exist: expected some of {' '.join(known)}")
    return [known[number] for number in sorted(wanted.values() if wanted else known)]


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


def execute(chapter: Chapter, output: Path, parameters: dict, profile: str, folder: Path = BOOK) -> NotebookNode:
    """Run one chapter in `folder` through papermill into `output`, and return it cleaned, with how it was run.

    Raises:
        Failed: a cell failed. The notebook up to that cell, with the traceback, is in `output`.
    """
    start = time.perf_counter()
    output.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            chapter.path,
            output,
            parameters,
            cwd=folder,
            kernel_name="python3",
            progress_bar=False,
            stderr_file=sys.stderr if sys.stderr.isatty() else None,  # progress bars are for a terminal
            extra_arguments=["--log-level=CRITICAL"],  # else ipykernel 7 warns that it talks to us over TCP
        )
    except papermill.PapermillExecutionError as error:
        code = "\n".join(f"    {line}" for line in error.source.splitlines()[:6])
        raise Failed(
            f"chapter {chapter.number} failed in cell [{error.exec_count}]: {error.ename}: {error.evalue}\n{code}\n"
            f"(the whole traceback is in {output})"
        ) from error
    except Exception as error:  # a kernel that died or did not start
        raise Failed(f"chapter {chapter.number} was cut off: {type(error).__name__}: {error}") from error
    notebook = cleaned(nbformat.read(output, 4), chapter.read())
    notebook.metadata[STAMP] = {
        "profile": profile,
        "parameters": {name: value for name, value in parameters.items() if name != "run"},
        "device": gpu.device_name(gpu.pick_device()),
        **{k: v for k, v in artefacts.provenance("cpu", 0).items() if k in ("versions", "date")},
        "seconds": round(time.perf_counter() - start, 1),
    }
    write(notebook, output)
    return notebook


def cleaned(notebook: NotebookNode, original: NotebookNode) -> NotebookNode:
    """An executed notebook without what differs from run to run: papermill's notes, timings, progress bars."""
    notebook.metadata = NotebookNode(original.metadata)
    for cell in notebook.cells:
        for key in ("papermill", "execution", PENDING):
            cell.metadata.pop(key, None)
        if not cell.metadata.get("tags"):
            cell.metadata.pop("tags", None)
        kept = []
        for output in cell.get("outputs", []):
            if output.output_type == "stream" and output.name == "stderr":
                continue
            if output.output_type == "stream" and kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text  # a bar stood between the two
            else:
                kept.append(output)
        if cell.cell_type == "code":
            cell.outputs = kept
    return notebook


def without(notebook: NotebookNode, tag: str) -> NotebookNode:
    """An executed notebook without the cells of that tag, as if they had not been run."""
    notebook.cells = [cell for cell in notebook.cells if tag not in cell.metadata.get("tags", [])]
    ran = (cell for cell in notebook.cells if cell.cell_type == "code" and cell.execution_count)
    for count, cell in enumerate(ran, 1):
        for counted in (cell, *(output for output in cell.outputs if output.output_type == "execute_result")):
            counted.execution_count = count
    return notebook


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook as a whole: an interruption leaves the old one or the new one."""
    with artefacts.atomic_write(path) as partial:
        partial.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")


def one_by_one(selected: list[Chapter]) -> Iterator[tuple[str, Chapter]]:
    """The chapters, each with how it is announced."""
    for count, chapter in enumerate(selected, 1):
        yield f"chapter {count} of {len(selected)}: {chapter.number} {chapter.title}", chapter


# --- the tools' command lines --------------------------------------------------------------------------------------


def choices(command: argparse.ArgumentParser, *names: str) -> None:
    """Give a command those of the options that several tools share."""
    if "profile" in names:
        command.add_argument("--profile", default="auto", help=f"{', '.join(profiles.PROFILES)}, or auto (default)")
    if "chapters" in names:
        command.add_argument("--chapters", default="", help='such as "02 05"; all if not given')
    if "params" in names:
        command.add_argument("--params", default="", help='such as "temperature=8 seed=1"')


def exit_status(action: Callable[[argparse.Namespace], object], options: argparse.Namespace) -> int:
    """What a command returns to the shell: 0 if it succeeded, otherwise its error is printed."""
    # a network of the user's own is imported here and in the kernels, whose working folder is another
    sys.path.append(os.getcwd())
    folders = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    os.environ["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, [*folders, os.getcwd()]))
    try:
        action(options)
    except (Refused, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    except KeyboardInterrupt:
        print("\ninterrupted: the chapters that had finished are kept", file=sys.stderr)
        return 130
    return 0
