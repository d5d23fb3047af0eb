"""Nothing lost, nothing silently wrong: whatever interrupts the writing, and whoever else writes."""

import builtins
import importlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dying
import kill
import numpy as np
import pytest
import rot
import together
import torch
from dying import OTHER, RECIPE, Died, dies_at, linear, student

from kdlib import evaluate
from kdlib.lab import RowStore
from kdlib.lab.rows import load
from kdlib.records import artefacts, files

checkpoints = importlib.import_module("kdlib.records.checkpoint")
pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize("situation", dying.SITUATIONS)
def test_a_process_that_dies_at_any_file_operation_leaves_what_the_next_one_goes_on_from(
    image_set, tmp_path, situation
):
    found = list(dying.crash_points(situation, tmp_path, image_set()))
    assert len(found) > 5
    assert {number: wrong for number, wrong in enumerate(found, 1) if wrong} == {}


def test_what_was_there_before_is_not_trained_again_after_a_death(image_set, tmp_path, monkeypatch):
    data, trained = image_set(), []
    training = importlib.import_module("kdlib.train")
    train = training.train
    monkeypatch.setattr(training, "train", lambda *args, **rest: trained.append(args[3].seed) or train(*args, **rest))
    student(tmp_path / "start", data)
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    with dies_at(float("inf")) as operations:
        student(tmp_path / "whole", data, OTHER)
    for number in range(1, operations.count + 1):
        shutil.copytree(tmp_path / "start", tmp_path / str(number))
        with pytest.raises(Died), dies_at(number):
            student(tmp_path / str(number), data, OTHER)
        trained.clear()
        student(tmp_path / str(number), data)
        assert trained == [], number


def test_the_checkpoint_outlives_the_weights_and_their_record(image_set, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    order, replace_, remove = [], files.replace, files.remove
    for module in (artefacts, files):
        monkeypatch.setattr(module, "replace", lambda a, b: order.append(("written", b.name)) or replace_(a, b))
        monkeypatch.setattr(module, "remove", lambda p: order.append(("removed", p.name)) or remove(p))
    student(tmp_path, image_set())
    last = [name for what, name in order if name.startswith("student")][-5:]
    assert last[:3] == ["student.pth.json", "student.pth", "student.pth.json"]
    assert all(".partial" in name for name in last[3:])


# --- files of processes that died ------------------------------------------------------------------------------------


def test_what_dead_processes_left_is_swept_and_what_live_ones_write_is_not(tmp_path):
    leave = (
        "import sys, os; from pathlib import Path; from kdlib.records import files\n"
        "with files.temporary(Path(sys.argv[1])) as partial:\n    partial.write_text('half')\n    os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", leave, str(tmp_path / "a.npy")], check=True, env=environment)
    (left,) = tmp_path.iterdir()
    mine = tmp_path / "other.npy"
    with files.temporary(mine) as partial:
        partial.write_text("half")
        artefacts.save_array(tmp_path / "b.npy", np.zeros(2), fingerprint={})
        assert not left.exists()
        assert partial.exists()
    old = tmp_path / f".{'0' * 8}-1-{'0' * 8}-c.npy"  # of another machine
    old.write_text("half")
    files.check_writable(tmp_path)
    assert old.exists()
    os.utime(old, (1, 1))
    files.check_writable(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.npy", "b.npy.json"]


def test_a_full_disk_shows_itself_before_the_training_in_one_line(image_set, tmp_path, monkeypatch):
    def full(path, mode="r", *rest, **more):
        file = open_(path, mode, *rest, **more)
        if "w" in mode and "student" in str(path):
            file.close()
            raise OSError(28, "No space left on device", str(path))
        return file

    open_ = builtins.open
    monkeypatch.setattr(builtins, "open", full)
    message = (
        r"student\.pth cannot be written \(No space left on device; [\d,.]+ MB are free there\): choose another folder "
        r"for artefacts with KDLIB_OUTPUTS, or for data sets with KDLIB_DATA$"
    )
    with pytest.raises(OSError, match=message):
        student(tmp_path, image_set())
    assert [path.name for path in tmp_path.iterdir()] == [files.LOCKS]


# --- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_writes_a_checkpoint_and_the_next_run_goes_on_from_it(image_set, tmp_path, monkeypatch, number):
    data, training = image_set(), importlib.import_module("kdlib.train")
    wanted, recipe = student(tmp_path / "whole", data, replace(RECIPE, epochs=4)), replace(RECIPE, epochs=4)
    taken, augment = [], training.augment
    ended = []
    monkeypatch.setattr(signal, "raise_signal", lambda n: ended.append((n, signal.getsignal(n))))
    before = signal.getsignal(number)

    class Ended(BaseException):
        pass

    def counted(batch, *rest):
        taken.append(batch)
        if len(taken) == 4:  # in the second epoch
            os.kill(os.getpid(), number)
        if ended:
            raise Ended
        return augment(batch, *rest)

    monkeypatch.setattr(training, "augment", counted)
    with pytest.raises(Ended):
        student(tmp_path, data, recipe)
    assert ended == [(number, before)]  # as if nobody had caught it
    assert signal.getsignal(number) == before
    ended.clear()
    taken[:] = [None] * 4
    assert student(tmp_path, data, recipe) == wanted
    assert len(taken) == 4 + 2 * 3  # the last two epochs


def test_the_same_signal_again_ends_training_at_once(image_set, tmp_path, monkeypatch):
    training = importlib.import_module("kdlib.train")
    augment, taken = training.augment, []

    def counted(batch, *rest):
        taken.append(batch)
        if len(taken) == 1:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
        return augment(batch, *rest)

    monkeypatch.setattr(training, "augment", counted)
    with pytest.raises(KeyboardInterrupt):
        student(tmp_path, image_set())
    assert len(taken) == 1
    assert not list(tmp_path.glob("*.partial"))


# --- checkpoints -----------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    """Training stopped."""


@pytest.fixture
def interrupted(image_set, tmp_path, monkeypatch):
    """A training that was interrupted in its fourth epoch: a function that goes on, and its last checkpoint's path."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    training, recipe = importlib.import_module("kdlib.train"), replace(RECIPE, epochs=4)
    augment, taken = training.augment, []

    def counted(batch, *rest):
        taken.append(batch)
        if len(taken) == 10:
            raise Interrupted
        return augment(batch, *rest)

    monkeypatch.setattr(training, "augment", counted)
    data = image_set()
    with pytest.raises(Interrupted):
        student(tmp_path, data, recipe)
    (path,) = tmp_path.glob("*.partial")
    wanted = student(tmp_path / "whole", data, recipe)
    taken.clear()

    def go_on():
        assert student(tmp_path, data, recipe) == wanted
        return len(taken) // 3  # epochs

    return go_on, path


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(interrupted, capsys):
    go_on, path = interrupted
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    assert go_on() == 2
    assert "is damaged (it is damaged, or of an older version of kdlib): going on from the one before it" in (
        capsys.readouterr().out
    )


def test_two_damaged_checkpoints_are_refused(interrupted):
    go_on, path = interrupted
    for file in (path, checkpoints.previous(path)):
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"\.partial is not a checkpoint of this run \(it is damaged, .*: move it away"
    ):
        go_on()


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written(image_set, tmp_path, monkeypatch):
    data = image_set()
    wanted = student(tmp_path / "whole", data)
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    write = checkpoints.Checkpoint._write

    def full(self, history):
        with files.temporary(self.path) as partial:
            partial.write_text("half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.Checkpoint, "_write", full)
    with pytest.warns(UserWarning, match=r"the checkpoint is not saved, and training goes on: .*\.partial cannot be"):
        assert student(tmp_path, data) == wanted
    monkeypatch.setattr(checkpoints.Checkpoint, "_write", write)


# --- rows ------------------------------------------------------------------------------------------------------------


def measure(store, case, values, rate=0.1):
    return store.measure(case, range(len(values)), lambda seed: {"accuracy": values[seed]}, made_from={"rate": rate})


def test_two_experiments_on_one_file_lose_no_row(tmp_path):
    path = tmp_path / "x.json"
    first, second = RowStore(path), RowStore(path)  # both began before there was a row
    for k in range(5):
        measure(first, f"first {k}", [0.1, 0.2])
        measure(second, f"second {k}", [0.3, 0.4])
    assert len(load(path)["rows"]) == 20
    assert len(first.finish()["rows"]) == 10  # its own
    assert len(load(path)["rows"]) == 20
    second.finish()
    assert len(load(path)["rows"]) == 20
    assert list(tmp_path.glob("x.*.json")) == []


def test_a_second_run_uses_what_the_first_measured(tmp_path):
    path = tmp_path / "x.json"
    first, second = RowStore(path), RowStore(path)
    wanted = measure(first, "a", [0.1, 0.2])
    assert measure(second, "a", [0.7, 0.8]) == wanted


def test_every_row_that_leaves_the_file_is_in_a_backup(tmp_path):
    path = tmp_path / "x.json"
    store = RowStore(path)
    measure(store, "a", [0.1], rate=0.1)
    for rate in (0.2, 0.3):
        measure(RowStore(path), "a", [rate], rate=rate)
    measure(store, "a", [0.4], rate=0.4)
    assert json.loads(path.read_text())["rows"][0]["accuracy"] == 0.4
    kept = [row["accuracy"] for backup in tmp_path.glob("x.*.json") for row in load(backup)["rows"]]
    assert sorted(kept) == [0.1, 0.2, 0.3]
    again = measure(store, "a", [0.9], rate=0.2)  # what is asked for once more is not measured once more
    assert again[0]["accuracy"] == load(path)["rows"][0]["accuracy"] == 0.2


# --- short forms of the campaigns ------------------------------------------------------------------------------------


def test_flipped_bits_and_truncations_are_noticed_in_all_kinds_of_files():
    counts = rot.campaign(flips=420, truncations=140)
    assert {kind: found["silent"] for kind, found in counts.items() if found["silent"]} == {}
    assert sum(map(sum, (found.values() for found in counts.values()))) == 560


def test_two_processes_at_once_mix_up_nothing_and_lose_no_row():
    for kind, found in together.campaign(8).items():
        assert found.pop("pairs") == 2
        assert set(found) <= {"waited"}, kind


def test_hostile_files_are_refused_in_time_by_name_and_execute_nothing():
    command = [sys.executable, "-m", "tests.hostile", "--share", "60"]
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, cwd=root, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)}
    )
    found = re.search(r"(\d+) files: .* 0 wrongly read, 0 executed, 0 hanging, 0 without a message; ", done.stdout)
    assert found, done.stdout + done.stderr
    assert int(found[1]) > 30
    assert done.returncode == 0


def test_what_is_killed_at_random_and_started_again_comes_out_as_if_it_had_not_been(tmp_path):
    with kill.children() as victims:
        for victim in victims:
            assert kill.campaign(victim, 4, random.Random(0), tmp_path) == {"kills": 4, "survived": 4}


def test_a_kill_that_changed_something_is_noticed(tmp_path):
    for name, content in {"whole": "[1]", "killed": "[1, 2]"}.items():
        store = RowStore(tmp_path / name / "05_x.json")
        store.measure("a", json.loads(content), lambda seed: {"accuracy": 0.5}, made_from={})
        (tmp_path / name / "student.pth").write_text(content)
    (tmp_path / "killed" / "x.1a2b.partial").touch()
    found, wanted = kill.outcome(tmp_path / "killed"), kill.outcome(tmp_path / "whole")
    assert kill.differences(wanted, wanted) == []
    assert sorted(kill.differences(found, wanted)) == [
        "05_x.json is another",
        "student.pth is another",
        "x.1a2b.partial is left over",
    ]
    assert kill.differences({}, wanted) == ["05_x.json is missing", "student.pth is missing"]


# --- absurd input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["[]", "3", "null", "[" * 100_000, '{"a":' * 5000 + "1" + "}" * 5000, "{", "\xff"])
def test_json_of_another_kind_is_refused_by_name(tmp_path, text):
    for name, read in {"results.json": evaluate.load_results, "05_x.json": RowStore}.items():
        (tmp_path / name).write_text(text, encoding="latin-1")
        with pytest.raises(ValueError, match=rf"{name} is not a"):
            read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes with names")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    readers = {"w.pth": lambda path: artefacts.load_weights(path, linear(4, 1)), "a.npy": artefacts.load_array}
    for name, read in (readers | {"results.json": evaluate.load_results, "05_x.json": RowStore}).items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(ValueError, match=rf"{name} is not an? .*it is not a plain file"):
            read(tmp_path / name)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1j])
def test_weights_that_are_not_finite_real_numbers_are_refused(tmp_path, value):
    model = linear(4, 1)
    state = model.state_dict()
    state["1.bias"] = torch.full((4,), value)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(
        ValueError, match=r"w\.pth is not a weights file \(1\.bias holds values that are not finite real"
    ):
        artefacts.load_weights(tmp_path / "w.pth", model)


@pytest.mark.parametrize("seed", [10**20, -1, 2**32, "1", 0.5])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match=r"seed is .*: expected a whole number from 0"):
        replace(RECIPE, seed=seed)


def test_an_array_whose_header_promises_more_than_the_file_holds_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((4, 4), np.float32))
    content = (tmp_path / "a.npy").read_bytes()
    for shape in (b"(9999999,9999999,)", b"(-1, 4,)"):
        (tmp_path / "a.npy").write_bytes(content.replace(b"(4, 4), }" + b" " * (len(shape) - 6), shape + b", }"))
        with pytest.raises(ValueError, match=r"a\.npy is not an array file"):
            artefacts.load_array(tmp_path / "a.npy")
