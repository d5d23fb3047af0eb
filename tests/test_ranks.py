"""Two processes that train together equal one: weights, soft labels, artefacts, and going on after a death."""

import importlib
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two_ranks
from workshop import ROOT

import kdlib
from kdlib.deploy import cli
from kdlib.gpu import ranks
from kdlib.lab import RowStore
from kdlib.records import artefacts
from kdlib.scale import generate_compact
from kdlib.scale.cli import _tell, changed_profile
from kdlib.train import History

CLOSE = {"torch.float64": 1e-9, "torch.float32": 1e-5}  # absolute, on weights of the order of 1


def torchrun(*command: str | Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Two processes on this machine's CPU, on a port that is free."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = (
        os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} | environment
    )
    done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True, timeout=300)
    assert not check or done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def death(folder) -> subprocess.CompletedProcess:
    """A run whose second process fails in the third epoch; it leaves a checkpoint."""
    return torchrun(ROOT / "tests" / "two_ranks.py", "die", folder, check=False)


@pytest.fixture(scope="module")
def both(folder, death) -> list[dict]:
    """What each of two processes computed and did, after that death."""
    two_ranks.load_or_train(folder / "made by one", "digits_cnn")
    torchrun(ROOT / "tests" / "two_ranks.py", "compute", folder)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone() -> dict:
    """The same computed by this process."""
    return two_ranks.compute()


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", two_ranks.TRAININGS)
def test_two_processes_train_to_the_weights_of_one(both, alone, name, dtype):
    wanted = alone[f"{name}, {dtype}"]
    for process in both:
        found = process[f"{name}, {dtype}"]
        assert found.keys() == wanted.keys()
        for part, tensor in wanted.items():
            assert tensor.dtype == found[part].dtype
            torch.testing.assert_close(found[part], tensor, rtol=0, atol=CLOSE[dtype], msg=f"{part}: {{}}".format)


def test_they_predict_and_generate_to_the_bit(both, alone):
    for process in both:
        for name in ("logits", "soft labels of all"):
            assert all(torch.equal(process[name][key], tensor) for key, tensor in alone[name].items())


def test_each_asks_the_teacher_about_its_share(both):
    # some images are looked at beforehand, in one batch on each; then there are three batches in each of three views
    assert [p["did"]["soft labels"]["batches"] for p in both] == [1 + 3 * 1, 1 + 3 * 2]
    assert torch.equal(both[0]["did"]["soft labels"]["logits"], both[0]["soft labels of all"]["logits"])


def test_one_of_them_saves_and_both_load(both, folder):
    for name, steps in {"new": two_ranks.STEPS, "new, again": 0, "soft labels": 0, "soft labels, again": 0}.items():
        assert [p["did"][name]["steps"] for p in both] == [steps, steps]
        first = not name.endswith("again")
        assert [p["did"][name]["saved"] for p in both] == [int(first), 0]
    saved = artefacts.load_weights(folder / "new" / "net.pth", kdlib.build("tiny_cnn", 4, 1).double())
    for process in both:
        for name in ("new", "new, again"):
            assert all(map(torch.equal, process["did"][name]["weights"].values(), saved.state_dict().values()))
    assert sorted(path.name for path in folder.glob("new/*.*")) == [".locks", "net.pth", "net.pth.json"]


def test_shards_of_soft_labels_are_made_by_both_and_read_by_both(both, tmp_path):
    images, teacher = two_ranks.make_images(60, seed=5), two_ranks.teacher()
    alone = generate_compact(tmp_path, teacher, images, 2, 2, shard=9, progress=False)
    for process, shards in zip(both, (4, 3), strict=True):
        assert process["did"]["shards"]["saved"] == shards
        assert process["did"]["shards, again"]["saved"] == 0
        assert torch.equal(process["did"]["shards"]["table"], alone.table.read())


def test_without_batch_norm_a_record_does_not_tell_how_many_processes_there_were(both, folder, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kdlib.train"), "train", None)  # that it is not trained again
    assert "processes" not in two_ranks.load_or_train(folder / "new").fingerprint


def test_a_batch_smaller_than_the_processes_is_refused(both):
    assert {p["too small"] for p in both} == {"a batch of 1 for 2 processes: expected an image for each or more"}


# --- what processes must not do apart from one another ----------------------------------------------------------------


def test_an_experiment_is_refused_before_anything_is_locked(both, folder, tmp_path, monkeypatch):
    message = "an experiment is measured by one process, and there are 2: start it without torchrun"
    assert [p["apart"]["experiment"] for p in both] == [message] * 2
    assert not (folder / "rows").exists()
    for name in ranks.STARTED_BY_TORCHRUN:
        monkeypatch.setenv(name, "2")
    with pytest.raises(RuntimeError, match=message):  # before the process has joined the others
        RowStore(tmp_path / "rows.json")


def test_networks_that_depend_on_the_share_are_marked(both):
    for process in both:
        assert process["apart"]["marked"] == list(two_ranks.DEPENDENT)
        assert process["apart"]["random state kept"]


@pytest.mark.parametrize("name", two_ranks.NO_MEANS)
def test_a_loss_that_is_no_mean_over_images_is_refused_by_both(both, name):
    first, second = (p["apart"]["refused"].get(name, "trained") for p in both)
    assert first == second
    assert re.match(r"the loss of two parts \(.+\) together is \S+, the mean .+: expected a mean over images; ", first)


def test_a_checkpoint_that_only_rank_0_sees_serves_both(both):
    first, second = (p["apart"]["resumed"] for p in both)
    for found in (first, second):
        assert (found["first"]["steps"], found["again"]["steps"]) == (two_ranks.STEPS, 0)
        assert found["again"]["loss"] == first["first"]["loss"]
        assert all(map(torch.equal, found["again"]["weights"].values(), first["first"]["weights"].values()))
    assert first["damaged"] == second["damaged"].replace("seen by 1", "seen by 0")
    assert "is not a checkpoint of this run (it is damaged" in first["damaged"]


def test_dropout_draws_for_each_process_and_goes_on_as_without_a_stop(both):
    first, second = (p["apart"]["masks"] for p in both)
    for seen in (first, second):
        assert len(seen["whole"]) == two_ranks.STEPS
        assert all(map(torch.equal, seen["whole"], seen["stopped"]))
    for one, other in zip(first["whole"], second["whole"], strict=True):
        size = min(len(one), len(other))
        assert not torch.equal(one[:size], other[:size])


# --- batch norm ------------------------------------------------------------------------------------------------------


def test_what_two_processes_made_of_a_network_with_batch_norm_is_not_taken_for_what_one_makes(both, folder, capsys):
    first, second = (p["did"]["batch norm"] for p in both)
    assert first["fingerprint"]["processes"] == second["fingerprint"]["processes"] == 2
    assert all(map(torch.equal, first["weights"].values(), second["weights"].values()))  # running statistics too
    assert both[0]["did"]["batch norm, again"]["steps"] == 0
    mine = two_ranks.load_or_train(folder / "batch norm", "digits_cnn")
    assert "processes is 2, not missing" in capsys.readouterr().out
    assert mine.fingerprint == {name: x for name, x in first["fingerprint"].items() if name != "processes"}


def test_what_one_process_made_serves_two(both):
    assert [p["did"]["made by one"]["steps"] for p in both] == [0, 0]
    assert "processes" not in both[0]["did"]["made by one"]["fingerprint"]


# --- a process that dies ---------------------------------------------------------------------------------------------


def test_the_death_of_one_process_ends_the_run_with_its_error(death):
    assert death.returncode
    assert f"RuntimeError: {two_ranks.ERROR}" in death.stderr


def test_the_run_goes_on_from_its_checkpoint(both, tmp_path):
    assert [p["did"]["killed"]["steps"] for p in both] == [two_ranks.STEPS // 2] * 2
    wanted = two_ranks.load_or_train(tmp_path).model.state_dict()
    for process in both:
        for name, tensor in process["did"]["killed"]["weights"].items():
            torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=CLOSE["torch.float64"])


# --- the command -----------------------------------------------------------------------------------------------------

VALUES = {"epochs": 2, "teacher": "tiny_cnn", "views": 3, "n_seeds": 1}


def test_the_command_makes_what_a_chapter_then_finds(isolated, tmp_path, monkeypatch):
    arguments = [f"{name}={value}" for name, value in VALUES.items()]
    command = ["-m", "kdlib", "train", "--role", "distilled", "--profile", "quick", "--set", *arguments]
    done = torchrun(*command, KDLIB_OUTPUTS=os.environ["KDLIB_OUTPUTS"], KDLIB_DATA=os.environ["KDLIB_DATA"])
    files = ("teacher_tiny_cnn.pth", "soft_labels.npy", "student_perceptron.pth")
    settings = kdlib.resolve("quick", **VALUES)
    lines = [line.partition(": ")[0] for line in done.stdout.splitlines()]
    assert lines == [str(settings.folder / file) for file in files]

    for module in ("kdlib.train", "kdlib.soft_labels"):  # nothing is made again
        monkeypatch.setattr(importlib.import_module(module), "train" if "train" in module else "generate", None)
    data = kdlib.load_data(settings.dataset, **settings.images)
    teacher = kdlib.load_teacher(settings, data)
    student = kdlib.load_student(settings, data, teacher, "distilled", "perceptron", 0)
    assert [teacher.path.name, teacher.soft_labels.path.name, student.path.name] == list(files)


@pytest.mark.parametrize("mark", [{}, {"processes": 2}])
def test_the_command_says_what_a_chapter_will_not_take(tmp_path, capsys, mark):
    path = tmp_path / "net.pth"
    artefacts.save_weights(path, kdlib.build("tiny_cnn", 4, 1), fingerprint={"data": "toy", **mark})
    made = {"seconds": 3.2, "device": "CPU"}
    _tell(kdlib.Network(None, History([1.0], [0.5], [3.2]), {}, made, 0.1, path))
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: validation accuracy 50.00% after 1 epoch; trained in 3 s on CPU"
    assert [line.partition(",")[0] for line in said[1:]] == (["  made by 2 processes"] if mark else [])


def test_a_changed_recipe_is_of_the_role_and_has_a_folder_of_its_own(isolated):
    plain = changed_profile("quick", "student", {})
    assert plain == kdlib.resolve("quick")
    assert changed_profile("quick", "student", {"epochs": 3}) == kdlib.resolve("quick", epochs=3)
    assert changed_profile("quick", "student", {"learning_rate": plain.student_recipe.learning_rate}) == plain
    student, teacher = (changed_profile("quick", role, {"learning_rate": 0.5}) for role in ("student", "teacher"))
    assert student.student_recipe.learning_rate == teacher.teacher_recipe.learning_rate == 0.5
    assert (student.teacher_recipe, teacher.student_recipe) == (plain.teacher_recipe, plain.student_recipe)
    folders = {plain.folder, student.folder, teacher.folder}
    assert len(folders) == 3
    assert {artefacts.base_folder(folder) for folder in folders} == {plain.folder}


def test_the_command_names_what_is_wrong(isolated, capsys):
    for value, message in {
        "learning_rat=1": "learning_rat is unknown: expected one of dataset, ",
        "learning_rate": "--set 'learning_rate': expected NAME=VALUE",
        "learning_rate=high": "learning_rate is 'high': expected a number above 0",
        "epochs=true": "epochs is True: expected a whole number of at least 1",
    }.items():
        assert cli.main(["train", "--role", "student", "--profile", "quick", "--set", value]) == 1
        assert message in capsys.readouterr().err


# --- one process -----------------------------------------------------------------------------------------------------


def test_alone_there_is_nothing_to_share():
    rows = torch.ones(3, 2)
    assert (ranks.rank(), ranks.world(), ranks.share_of(5)) == (0, 1, slice(0, 5))
    assert ranks.broadcast(rows) is ranks.gather(rows, of=3) is ranks.mean(rows) is rows


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 100])
def test_shares_cover_everything_once_and_differ_by_one_at_most(monkeypatch, world, count):
    monkeypatch.setattr(ranks, "world", lambda: world)
    shares = []
    for rank in range(world):
        monkeypatch.setattr(ranks, "rank", lambda rank=rank: rank)
        shares.append(list(range(count))[ranks.share_of(count)])
    if count < world:
        assert shares == [list(range(count))] * world
    else:
        assert list(itertools.chain(*shares)) == list(range(count))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
