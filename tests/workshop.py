"""What the tests of the tools share: copies of the book, the tools in them, and small notebooks.

Everything that runs or writes does so in a copy, with folders of its own, as a user would: in a process.
"""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest import mock

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

ROOT = Path(__file__).resolve().parent.parent
CHAPTERS = sorted((ROOT / "book").glob("[0-9][0-9]_*.ipynb"))
RUN_STAMP = ("profile", "device", "versions", "date", "seconds")
TIDIED = {"commit": "abc1234", "proof": "same results at quick in 7 of 8 outputs"}
TOOLS = [path.stem for path in (ROOT / "tools").glob("*.py")]


def copy_tree(folder: Path) -> Path:
    """The tools, kdlib and the settings, in `folder`; without the book's pages."""
    for name in ("tools", "kdlib"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "_config.yml", "_toc.yml"):
        shutil.copy(ROOT / name, folder)
    return folder


def copy_book(folder: Path) -> Path:
    """The book and all that it needs, in `folder`; what npm fetches for the site is fetched once for all copies."""
    copy_tree(folder)
    shutil.copytree(ROOT / "book", folder / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    (folder / "runs").mkdir()
    (ROOT / "runs" / "live").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "live").symlink_to(ROOT / "runs" / "live")
    return folder


def tiny_book(folder: Path) -> Path:
    """A book of three chapters that need no kdlib, so that they run in a second; its canary computes nothing."""
    copy_tree(folder)
    (folder / "tools" / "canary.py").write_text("print('{}')\n", encoding="utf-8")
    (folder / "book").mkdir()
    for number in ("00", "01", "02"):
        cells = [
            new_markdown_cell(f"# Chapter {number}\n\nWhat is it?", id="title"),
            new_code_cell("# nothing to do", id="setup", metadata={"tags": ["setup"]}),
            new_code_cell(
                'profile: str = "auto"  # which\nrun: str = None  # folder\nseed: int = None  # the first seed\n'
                + ("temperature: float = None  # T\n" if number != "00" else ""),
                id="parameters",
                metadata={"tags": ["parameters"]},
            ),
            new_code_cell(
                "import sys\n\nprint('before')\nprint('a bar', file=sys.stderr)\nprint('after', seed)", id="body"
            ),
        ]
        write_notebook(folder / "book" / f"{number}_tiny.ipynb", cells)
    return folder


def write_notebook(path: Path, cells: list) -> None:
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)


def change_cell(path: Path, cell_id: str, source: str) -> None:
    notebook = nbformat.read(path, 4)
    next(cell for cell in notebook.cells if cell.id == cell_id).source = source
    nbformat.write(notebook, path)


def code_cells(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook, tag: str) -> list:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def start(tree: Path, *command: str | Path, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess:
    """Run a Python command in `tree`, with the kdlib and the folders that lie there."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("KDLIB_", "PYTEST_", "TQDM_"))}
    env |= {"PYTHONPATH": str(tree), "KDLIB_OUTPUTS": str(tree / "outputs"), "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=cwd or tree, env=env, capture_output=True, text=True)


def render_site(tree: Path) -> Path:
    """Render a copy of the book in `tree`, without a warning, with stamps of every kind; the folder of its pages."""
    copy_book(tree)
    notes = {"02": {}, "04": {"tidied": TIDIED}, "05": {"composed": {"device": "CPU, 2 threads", "date": "2026-12-24"}}}
    for number, note in notes.items():
        (path,) = (tree / "book").glob(f"{number}_*.ipynb")
        notebook = nbformat.read(path, 4)
        stamp = notebook.metadata["kdlib_published"]
        notebook.metadata["kdlib_published"] = {name: stamp[name] for name in RUN_STAMP} | note
        for cell in notebook.cells:
            cell.metadata.pop("kdlib_pending", None)
        if number == "04":
            code_cells(notebook)[-1].metadata["kdlib_pending"] = True
        nbformat.write(notebook, path)
    done = start(tree, "tools/book.py", "site")
    assert done.returncode == 0, done.stderr
    return tree / "runs" / "site" / "_build" / "html"


def tool(tree: Path, name: str = "book") -> ModuleType:
    """``tools/<name>.py`` of `tree`, as a module: for what neither runs nor renders."""
    for other in TOOLS:
        sys.modules.pop(other, None)
    with mock.patch.object(sys, "path", [str(tree / "tools"), *sys.path]):
        return importlib.import_module(name)
