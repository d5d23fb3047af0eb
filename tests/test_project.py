"""The project's files agree with one another: each fact that stands in two places is the same in both."""

import re
import shutil
import subprocess
import tomllib
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
