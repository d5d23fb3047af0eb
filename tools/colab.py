"""Runs chapters as Colab does: a notebook alone in an empty folder, and kdlib from nowhere but its set-up cell.

    python tools/colab.py --python python3.12 --chapters "04 05"

It builds a wheel, makes an environment with the given Python and the oldest versions that pyproject.toml promises, and
runs the chapters there at profile quick. The first call installs about 6 GB; the environment is kept in runs/.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
from notebooks import ROOT, RUNS, Chapter, Failed, Refused, chapters, exit_status, one_by_one
from render import set_up_cell

PROBE = "import kdlib, os; print('kdlib from', os.path.dirname(kdlib.__file__))"


def build_wheel(folder: Path) -> Path:
    """kdlib's wheel, as an installation from the repository would build it."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    _run([*command, "--wheel-dir", str(folder), str(ROOT)])
    (wheel,) = folder.glob("kdlib-*.whl")
    return wheel


def environment(folder: Path, python: str) -> Path:
    """An environment as Colab's may be: that Python, the oldest promised packages, and what runs notebooks."""
    interpreter, complete = folder / "bin" / "python", folder / "complete"
    packages = [*oldest(), "papermill", "ipykernel"]
    if not complete.exists() or complete.read_text() != " ".join(packages):
        print(f"setting up {folder} …", flush=True)
        _run([python, "-m", "venv", "--clear", str(folder)])
        _run([str(interpreter), "-m", "pip", "install", "--quiet", *packages])
        complete.write_text(" ".join(packages))
    return interpreter


def oldest() -> list[str]:
    """The packages that kdlib needs, the extra `deploy` included, each at the oldest version that it promises."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["deploy"]]
    return [re.sub(r">=([\d.]+).*", r"==\1.*", one) for one in wanted]


def run_alone(chapter: Chapter, folder: Path, interpreter: Path, wheel: Path) -> str:
    """Run a chapter by itself in an empty folder; returns where kdlib came from.

    Raises:
        Failed: a cell failed.
    """
    folder.mkdir(parents=True)
    notebook = chapter.read()
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            cell.source = f"{set_up_cell(str(wheel))}\n{PROBE}"
    path = folder / chapter.path.name
    nbformat.write(notebook, path)
    environment = {"PATH": f"{interpreter.parent}:/usr/bin:/bin", "HOME": str(folder), "TQDM_DISABLE": "1"}
    command = [str(interpreter), "-m", "papermill", "--log-level", "ERROR", "--no-progress-bar", "-k", "python3"]
    done = subprocess.run(
        [*command, path.name, path.name, "-p", "profile", "quick"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise Failed(f"chapter {chapter.number} failed in an empty folder ({folder}):\n{done.stderr[-2000:]}")
    ran = nbformat.read(path, 4)
    printed = "".join(o.get("text", "") for c in ran.cells if c.cell_type == "code" for o in c.outputs)
    return next((line for line in printed.splitlines() if line.startswith("kdlib from")), "without kdlib")


def colab(options: argparse.Namespace) -> None:
    """Run the chapters one after the other, each in a folder of its own."""
    if shutil.which(options.python) is None:
        raise Refused(f"--python {options.python!r} is not there: expected a Python such as python3.12")
    interpreter = environment(RUNS / "colab" / "environment", options.python)
    shutil.rmtree(RUNS / "colab" / "ran", ignore_errors=True)
    wheel = build_wheel(RUNS / "colab" / "ran" / "wheel")
    for say, chapter in one_by_one(chapters(options.chapters)):
        _run([str(interpreter), "-m", "pip", "uninstall", "--quiet", "--yes", "kdlib"])  # each installs it itself
        told = run_alone(chapter, RUNS / "colab" / "ran" / chapter.number, interpreter, wheel)
        print(f"{say}: {told}", flush=True)
    print(f"all ran, with {', '.join(oldest())}")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Failed(f"{' '.join(command[:6])} … failed:\n{done.stderr[-2000:]}")


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", default="python3.12", help="the interpreter of the environment")
    parser.add_argument("--chapters", default="", help='such as "04 05"; all by default')
    options = parser.parse_args(arguments)
    return exit_status(colab, options)


if __name__ == "__main__":
    sys.exit(main())
