"""Sweeps: every combination is a run of its own, none is repeated, one that fails stops no other; runs are listed."""

import csv
import json
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
from workshop import change_cell, start, tiny_book, tool

STUDENT = """
import json, os, pathlib
folder = pathlib.Path(os.environ["KDLIB_OUTPUTS"]) / f"quick-{run}"
folder.mkdir(parents=True, exist_ok=True)
if temperature == 2:
    raise RuntimeError("no such temperature")
for role, better in (("_alone", 0), ("", temperature / 100)):
    for k in range(seed, seed + 5):  # as profile quick has it: two runs share the seeds that they have in common
        history = {"loss": [], "seconds": [], "accuracy": [0.5, 0.9 + better + k / 1000]}
        of_seed = "" if k == seed else f"_seed{k}"
        (folder / f"student_perceptron{role}{of_seed}.pth.json").write_text(json.dumps({"history": history}))
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """A tiny book whose chapter 01 leaves records of made-up students; it was swept, and one temperature fails."""
    tree = tiny_book(tmp_path_factory.mktemp("sweep"))
    change_cell(tree / "book" / "01_tiny.ipynb", "body", STUDENT)
    done = sweep(tree)
    return tree, done


def sweep(tree, grid="temperature=1,2 seed=0,1", **more):
    return start(tree, "tools/book.py", "sweep", "--profile", "quick", "--chapters", "01", "--grid", grid, **more)


def test_every_combination_is_a_run_of_its_own_and_a_failing_one_stops_no_other(swept):
    tree, done = swept
    assert done.returncode == 1, done.stderr
    assert "4 runs: 0 done before, 4 to do" in done.stdout
    failed = r"temperature=2 seed=1: failed: chapter 01 failed in cell \[\d\]: RuntimeError: no such temperature"
    assert re.search(failed, done.stdout)
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert [re.split(r" {2,}", line) for line in lines if re.match(r"[12] +\d of 2", line)] == [
        ["1", "2 of 2", "90.25 % ± 0.19", "91.25 % ± 0.19", "+1.00 ± 0.00"],  # of six seeds, 0 to 5
        ["2", "0 of 2", "–", "–", "–"],
    ]
    assert "error: 2 of 4 runs did not finish, such as temperature=2 seed=0" in done.stderr
    (folder,) = (tree / "runs").glob("sweep-*")
    assert (folder / "sweep.md").read_text().splitlines()[0] == "| temperature | runs | alone | distilled | gain |"
    assert (folder / "sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = list(csv.DictReader((folder / "sweep.csv").read_text().splitlines()))
    assert [(line["temperature"], line["seed"]) for line in lines] == [(t, s) for t in "12" for s in "01"]
    for line in lines:
        assert (tree / "runs" / line["folder"].rpartition("/")[2] / "01_tiny.ipynb").exists()
        failed = line["temperature"] == "2"
        assert line["outcome"].startswith("failed" if failed else "done")
        assert line["gain"] == "" if failed else float(line["gain"]) == pytest.approx(0.01)


def test_what_is_done_is_not_repeated_unless_a_notebook_changed(swept):
    tree, _ = swept
    assert "4 runs: 2 done before, 2 to do" in sweep(tree).stdout
    change_cell(tree / "book" / "01_tiny.ipynb", "body", STUDENT.replace("== 2", "== 3"))
    assert "1 runs: 0 done before, 1 to do" in sweep(tree, "temperature=1 seed=1").stdout
    assert "1 runs: 1 done before, 0 to do" in sweep(tree, "temperature=1 seed=1").stdout


def test_runs_are_listed_and_two_are_compared(swept, capsys):
    tree, _ = swept
    book = tool(tree)

    def say(*arguments):
        status = book.main(list(arguments))
        said = capsys.readouterr()
        return status, said.out, said.err

    start(tree, "tools/book.py", "run", "--profile", "quick", "--chapters", "01", "--params", "temperature=8 seed=0")
    listed = say("runs")[1].splitlines()
    assert "temperature=8.0" in listed[-1]
    assert "alone 90.20%, distilled 98.20%, gain +8.00 points" in listed[-1]
    names = [line.split()[0] for line in listed if "temperature=" in line and "failed" not in line]
    _, compared, _ = say("compare", "--runs", f"{names[0]} {names[-1]}")
    assert re.search(r"temperature +\S+ +8\.0", compared)
    assert re.search(r"gain +\+\S+ ± \S+ +\+8\.00", compared)
    status, _, error = say("compare", "--runs", f"{names[0]} {names[-1]}x")
    assert (status, f"did you mean {names[-1]!r}?" in error) == (2, True)
    assert "1 runs: expected two" in say("compare", "--runs", names[0])[2]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("", "no grid: expected one such as"),
        ("temperature", r"grid 'temperature': expected name=value,value"),
        ("temperature=", r"grid 'temperature=': expected name=value,value"),
        ("temperature=1,1", "with different values"),
        ("temperature=1,1.0", "the runs 'temperature=1' and 'temperature=1.0' are the same"),
        ("temperature=1 temperature=2", "grid has temperature twice"),
        ("temprature=1,2", "parameter 'temprature' is unknown .* did you mean 'temperature'"),
        ("temperature=1,hot", "parameter temperature is 'hot': expected a number"),
        ("temperature=1,-1", r"temperature is -1\.0: expected a number above 0"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused_before_anything_is(swept, capsys, grid, message):
    status = tool(swept[0]).main(["sweep", "--profile", "quick", "--chapters", "01", "--grid", grid])
    said = capsys.readouterr()
    assert status == 2
    assert re.search(message, said.err)
    assert "runs:" not in said.out


def test_a_damaged_record_is_skipped(swept, monkeypatch, capsys):
    tree, _ = swept
    sweeps = tool(tree, "sweep")
    (tree / "runs" / "broken").mkdir()
    for content in ("{", "{}", "[]"):
        (tree / "runs" / "broken" / "run.json").write_text(content)
        known = sweeps.recorded()
        assert "broken" not in known
        assert "broken/run.json is not a record of a run" in capsys.readouterr().err
    assert all(json.dumps(one) for one in known.values())


def test_two_sweeps_at_once_make_each_run_once(swept):
    tree, _ = swept
    counting = "import os, pathlib\nran = pathlib.Path(os.environ['KDLIB_OUTPUTS']) / f'ran-{run}-{os.getpid()}'\n"
    change_cell(tree / "book" / "01_tiny.ipynb", "body", counting + "ran.touch()\nassert temperature > 4, seed")
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda _: sweep(tree, "temperature=5"), range(2)))
    assert [done.returncode for done in both] == [0, 0], both
    assert len(list((tree / "outputs").glob("ran-*"))) == 1
