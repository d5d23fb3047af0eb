"""The project's files agree with one another: each fact that stands in two places is the same in both."""

import ast
import io
import json
import re
import shutil
import subprocess
import tokenize
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import nbformat
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
ADDRESS = PROJECT["urls"]["repository"]


def test_environment_names_the_versions_of_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    packages = environment["dependencies"]
    pins = next(entry["pip"] for entry in packages if isinstance(entry, dict))
    assert sorted(pins) == sorted([*PROJECT["optional-dependencies"]["book"], "-e ."])
    python = next(entry for entry in packages if str(entry).startswith("python="))
    assert PROJECT["requires-python"] == ">=" + python.removeprefix("python=")


def test_every_pin_is_exact_and_allowed_by_the_package():
    pins = dict(pin.split("==") for pin in PROJECT["optional-dependencies"]["book"])
    least = dict(requirement.split(">=") for requirement in PROJECT["dependencies"])

    def numbers(version):
        return [int(n) for n in re.findall(r"\d+", version)]

    for name, version in least.items():
        assert name not in pins or numbers(pins[name]) >= numbers(version), name


@pytest.mark.parametrize("path", sorted((ROOT / "book").glob("*.ipynb")), ids=lambda path: path.stem)
def test_set_up_cell_installs_from_the_repository(path):
    for cell in nbformat.read(path, 4).cells:
        found = re.findall(r"git\+(\S+)", cell.source)
        assert found in ([], [ADDRESS])


def test_other_files_name_the_same_repository():
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    assert config["repository"]["url"] == ADDRESS
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["repository-code"] == ADDRESS
    assert str(citation["version"]) == PROJECT["version"]
    for clone in re.findall(r"git clone (\S+)", (ROOT / "README.md").read_text(encoding="utf-8")):
        assert clone.removesuffix(".git") == ADDRESS


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_an_old_python_is_refused_before_anything_is_installed(tmp_path):
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "oldpython"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # what the version check does on Python 3.10
    old.chmod(0o755)
    done = subprocess.run(["make", f"PYTHON={old}", "book"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"{old} is not Python 3.11 or newer" in done.stderr
    assert not (tmp_path / ".venv").exists()


# --- where the commands are called ------------------------------------------------------------------------------------


def test_what_runs_elsewhere_calls_commands_that_exist():
    workflows = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    assert [path.stem for path in workflows] == ["monthly", "pages", "test"]
    called = [(ROOT / ".ci" / "run").read_text(encoding="utf-8")]
    for path in workflows:
        workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
        for job in workflow["jobs"].values():
            called += [step["run"] for step in job["steps"] if "run" in step]
    container = json.loads((ROOT / ".devcontainer" / "devcontainer.json").read_text(encoding="utf-8"))
    called.append(container["postCreateCommand"])
    targets = set(re.findall(r"(?m)^([\w./]+):", (ROOT / "Makefile").read_text(encoding="utf-8")))
    wanted = {name for text in called for name in re.findall(r"(?m)(?:^|&& )make ([\w./]+)", text)}
    assert {"test", "site"} <= wanted <= targets


# --- the rooms of the house ------------------------------------------------------------------------------------------

PACKAGE = ROOT / "kdlib"
FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """The modules of kdlib that a file imports when it is imported itself."""
    names = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {id(n) for f in ast.walk(tree) if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names & {module_name(file) for file in FILES}


def test_imports_point_one_way():
    uses = {module_name(path): imported(path) - {"kdlib"} for path in FILES}
    del uses["kdlib"]  # it gathers what the others define
    order = []
    while uses:
        ready = sorted(name for name, wanted in uses.items() if wanted <= set(order) | {name})
        assert ready, f"these import each other in a circle: {uses}"
        order += ready
        uses = {name: wanted for name, wanted in uses.items() if name not in order}


def test_the_main_floor_does_without_the_lab():
    for path in FILES:
        if path.parent.name != "lab":
            assert not any(name.startswith("kdlib.lab") for name in imported(path)), path


def test_a_file_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > 300 and not name.endswith("plots.py")} == {}


def lines_of_code(path: Path) -> int:
    """Lines without blank ones, comments and docstrings."""
    source = path.read_text(encoding="utf-8")
    lines, documentation = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
            documentation |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - documentation)


def test_the_main_floor_can_be_read_in_an_evening():
    floor = [path for path in PACKAGE.glob("*.py") if path.name != "plots.py"]
    assert sum(map(lines_of_code, floor)) <= 1500


def test_the_step_of_train_reads_like_the_method():
    tree = ast.parse((PACKAGE / "train.py").read_text(encoding="utf-8"))
    train = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "train")
    assert train.end_lineno - train.body[1].lineno + 1 <= 60
    step = next(node for node in ast.walk(train) if isinstance(node, ast.FunctionDef) and node.name == "step")
    called = [node.func.id for node in ast.walk(step) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    assert sorted(called) == ["loss_fn", "loss_fn", "targets"]


def test_the_wheel_holds_every_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    wanted = {module_name(path) for path in FILES if path.name == "__init__.py"}
    patterns = settings if isinstance(settings, list) else settings["find"]["include"]
    assert [name for name in sorted(wanted) if not any(fnmatch(name, pattern) for pattern in patterns)] == []
