"""Colab: a notebook alone in an empty folder, with kdlib from the wheel that its set-up cell installs."""

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from workshop import ROOT, tool


@pytest.fixture
def without_kdlib(tmp_path) -> Path:
    """An environment with the packages of this one, but for kdlib."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for path in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if "kdlib" not in path.name:
            (packages / path.name).symlink_to(path)
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
    (site,) = home.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{packages}\n")
    return home / "bin" / "python"


def test_a_chapter_runs_alone_with_the_wheel_that_its_set_up_cell_installs(without_kdlib, tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the tools add the working folder to it
    colab, notebooks = tool(ROOT, "colab"), tool(ROOT, "notebooks")
    probe = subprocess.run([without_kdlib, "-c", "import kdlib"], cwd=tmp_path, capture_output=True)
    assert probe.returncode, "the environment has kdlib already"
    (chapter,) = notebooks.chapters("01")
    wheel = colab.build_wheel(tmp_path / "wheel")
    told = colab.run_alone(chapter, tmp_path / "alone", without_kdlib, wheel)
    assert told.startswith(f"kdlib from {without_kdlib.parent.parent}")
    assert {path.name for path in (tmp_path / "alone").glob("*.ipynb")} == {chapter.path.name}


def test_the_oldest_versions_are_those_that_are_promised():
    oldest = tool(ROOT, "colab").oldest()
    assert "torch==2.11.*" in oldest
    assert any(one.startswith("onnxruntime==") for one in oldest)
