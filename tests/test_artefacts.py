"""Saving: whole or not at all, beside its fingerprint; loading: only what fits, and nothing that would be executed."""

import datetime
import hashlib
import json
import os
import pickle
import platform
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import Recipe, build, load_or_train
from kdlib.records.artefacts import (
    atomic_write,
    base_folder,
    check_content,
    check_room,
    check_writable,
    did_you_mean,
    digest,
    file_digest,
    find,
    load_array,
    load_weights,
    provenance,
    record,
    record_path,
    save_array,
    save_json,
    save_record,
    save_weights,
    short_reason,
)

pytestmark = pytest.mark.usefixtures("isolated")

WANTED = {"network": "digits_cnn", "recipe": {"epochs": 3, "seed": 0}}
OTHER = {"network": "digits_cnn", "recipe": {"epochs": 2, "seed": 0}}


def student(seed: int = 0) -> nn.Module:
    return build("digits_cnn", 4, 1, seed=seed)


def same(first: nn.Module, second: nn.Module) -> bool:
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Full(Exception):
    """The disk is full, or the machine gone."""


# --- whole or not at all ---------------------------------------------------------------------------------------------


def test_a_file_appears_when_it_is_complete_and_replaces_the_one_before(tmp_path):
    path = tmp_path / "new" / "folder" / "file.txt"
    with atomic_write(path) as partial:
        partial.write_text("first")
        assert partial.parent == path.parent  # one file system, so that the renaming is one step
        assert not path.exists()
    assert path.read_text() == "first"
    with atomic_write(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with atomic_write(path) as partial:
            partial.write_text("ne")
            raise Full

    with pytest.raises(Full):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["weights", "array", "json"])
def test_saving_again_loses_nothing_if_it_fails(tmp_path, monkeypatch, contents, kind):
    def save(seed: int) -> None:
        if kind == "weights":
            save_weights(tmp_path / "file.pth", student(seed), fingerprint=WANTED)
        elif kind == "array":
            save_array(tmp_path / "file.npy", np.full(5, seed), fingerprint=WANTED)
        else:
            save_json(tmp_path / "file.json", {"seed": seed})

    def fail(*given, **_) -> None:
        target = next(g for g in given if hasattr(g, "write") or hasattr(g, "write_bytes"))
        target.write_bytes(b"half") if hasattr(target, "write_bytes") else target.write(b"half")
        raise Full

    save(0)
    before = contents(tmp_path)
    monkeypatch.setattr(torch, "save", fail)
    monkeypatch.setattr(np, "save", fail)
    monkeypatch.setattr(type(tmp_path), "write_text", fail)
    with pytest.raises(Full):
        save(1)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("save", [save_weights, save_array])
def test_a_folder_that_cannot_be_written_is_named_with_what_chooses_another(tmp_path, save):
    (tmp_path / "file").write_text("in the way")  # root may write anywhere but below a file
    message = (
        rf"{re.escape(str(tmp_path))}/file/quick cannot be written \(Not a directory\): choose another folder for "
        r"artefacts with KDLIB_OUTPUTS, or for data sets with KDLIB_DATA"
    )
    given = student() if save is save_weights else np.zeros(3)
    with pytest.raises(OSError, match=message):
        save(tmp_path / "file" / "quick" / "x", given, fingerprint={})
    with pytest.raises(OSError, match=message):
        check_writable(tmp_path / "file" / "quick")
    assert (tmp_path / "file").read_text() == "in the way"


def test_checking_a_folder_makes_it_and_leaves_nothing_in_it(tmp_path):
    check_writable(tmp_path / "a" / "b")
    assert list((tmp_path / "a" / "b").iterdir()) == []


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_come_back_as_they_were_their_buffers_included(tmp_path):
    model = student()
    model(torch.randn(8, 1, 8, 8))  # moves the running statistics
    save_weights(tmp_path / "w.pth", model, fingerprint=WANTED, history={"loss": [1, 2]})
    loaded = student(1)
    assert not same(loaded, model)
    assert load_weights(tmp_path / "w.pth", loaded) is loaded
    assert same(loaded, model)
    sha256 = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert record(tmp_path / "w.pth") == {"fingerprint": WANTED, "sha256": sha256, "history": {"loss": [1, 2]}}


def test_weights_that_are_not_there_are_named_and_the_network_is_not_left_random_in_silence(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights .*/w\.pth are not there: run the chapter that trains"):
        load_weights(tmp_path / "w.pth", student())


def refuse_weights(path, message: str, model: nn.Module | None = None) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message) as refusal:
        load_weights(path, model or student())
    assert "weights_only" not in str(refusal.value)  # torch advises to execute what is in the file
    assert path.read_bytes() == before


@pytest.mark.parametrize("kept", [0, 1, 100, 2000, -1, -100])
def test_a_truncated_weights_file_is_refused_with_what_to_do(tmp_path, kept):
    path = tmp_path / "w.pth"
    save_weights(path, student(), fingerprint={})
    path.write_bytes(path.read_bytes()[:kept])
    refuse_weights(path, r"w\.pth is not a weights file \(.+\): expected named tensors .*delete it and run its chapter")


def test_a_text_file_is_no_weights_file(tmp_path):
    (tmp_path / "w.pth").write_text("not found\n")
    refuse_weights(tmp_path / "w.pth", r"w\.pth is not a weights file \(.+\): expected named tensors")


@pytest.mark.parametrize(
    "held", [{"epoch": 3}, [torch.zeros(2)], torch.zeros(2), {"model": {"weight": torch.zeros(2)}}]
)
def test_a_file_of_anything_but_named_tensors_is_refused(tmp_path, held):
    torch.save(held, tmp_path / "w.pth")
    refuse_weights(tmp_path / "w.pth", r"w\.pth is not a weights file \(it holds something other than named tensors\)")


def test_a_whole_network_instead_of_its_weights_is_refused(tmp_path):
    torch.save(student(), tmp_path / "w.pth")
    message = r"w\.pth is not a weights file \(it holds Python objects, which are not executed\): expected .*state_dict"
    refuse_weights(tmp_path / "w.pth", message)


@pytest.mark.parametrize("how", ["torch", "pickle"])
def test_a_python_object_in_a_weights_file_is_never_executed(tmp_path, side_effect, how):
    path = tmp_path / "w.pth"
    if how == "torch":
        torch.save({**student().state_dict(), "extra": side_effect}, path)
    else:
        path.write_bytes(pickle.dumps({"extra": side_effect}, protocol=2))
    refuse_weights(path, r"w\.pth is not a weights file \(it holds Python objects, which are not executed\)")
    assert not side_effect.folder.exists()
    side_effect.__reduce__()[0](*side_effect.__reduce__()[1])  # it would have made the folder
    assert side_effect.folder.exists()


@pytest.mark.parametrize(("network", "classes"), [("tiny_cnn", 4), ("digits_cnn", 5), ("wide_resnet14", 4)])
def test_the_weights_of_another_network_are_refused(tmp_path, network, classes):
    save_weights(tmp_path / "w.pth", build(network, classes, 1), fingerprint={})
    refuse_weights(
        tmp_path / "w.pth",
        r"w\.pth holds the weights of another network than PlainCNN \(.+\): name the network that it was saved from",
    )


@pytest.mark.parametrize("change", ["missing", "extra"])
def test_weights_with_a_tensor_missing_or_too_many_are_of_another_network(tmp_path, change):
    state = student().state_dict()
    if change == "missing":
        del state["classifier.bias"]
    else:
        state["another.bias"] = torch.zeros(4)
    torch.save(state, tmp_path / "w.pth")
    name = "classifier.bias" if change == "missing" else "another.bias"
    refuse_weights(
        tmp_path / "w.pth", rf"w\.pth holds the weights of another network than PlainCNN \(.*{name}.*\): name"
    )


# --- arrays ----------------------------------------------------------------------------------------------------------


def test_an_array_comes_back_as_it_was(tmp_path):
    array = np.arange(6, dtype=np.float16).reshape(1, 2, 3)
    save_array(tmp_path / "a.npy", array, fingerprint=WANTED)
    found = load_array(tmp_path / "a.npy")
    assert found.dtype == np.float16
    np.testing.assert_array_equal(found, array)
    sha256 = hashlib.sha256((tmp_path / "a.npy").read_bytes()).hexdigest()
    assert record(tmp_path / "a.npy") == {"fingerprint": WANTED, "sha256": sha256}


def test_an_array_of_python_objects_is_not_saved(tmp_path, side_effect):
    with pytest.raises(ValueError, match="Object arrays cannot be saved"):
        save_array(tmp_path / "a.npy", np.array([side_effect]), fingerprint={})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kept", [0, 50, -1])
def test_a_truncated_array_is_refused_with_what_to_do(tmp_path, kept):
    path = tmp_path / "a.npy"
    np.save(path, np.zeros(100))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"a\.npy is not an array file \(.+\): expected \.npy .*delete it and run its"):
        load_array(path)
    assert path.exists()


def test_python_objects_in_an_array_file_are_never_executed(tmp_path, side_effect):
    np.save(tmp_path / "a.npy", np.array([side_effect]), allow_pickle=True)
    with pytest.raises(ValueError, match=r"a\.npy is not an array file \(.+\): expected \.npy without Python objects"):
        load_array(tmp_path / "a.npy")
    assert not side_effect.folder.exists()


@pytest.mark.parametrize("archive", [True, False])
def test_what_is_not_a_single_array_is_refused(tmp_path, archive):
    if archive:
        np.savez(tmp_path / "a.npz", x=np.zeros(3))
        (tmp_path / "a.npz").rename(tmp_path / "a.npy")
    else:
        (tmp_path / "a.npy").write_bytes(b"PK\x03\x04 and then nothing")  # an archive's first bytes
    with pytest.raises(ValueError, match=r"a\.npy is not an array file \(.+\): expected \.npy without Python objects"):
        load_array(tmp_path / "a.npy")


# --- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_digest_tells_values_apart_and_not_the_order_of_keys():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len({digest(x) for x in ({"a": 1}, {"a": 2}, {"b": 1}, {"a": "1"}, None)}) == 5
    assert re.fullmatch("[0-9a-f]{16}", digest({}))


def test_provenance_tells_versions_device_date_and_seconds():
    found = provenance("cpu", 1.23456)
    assert found["versions"] == {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }
    assert found["device"] == "CPU, 1 thread"  # so many conftest.py sets
    assert abs(datetime.date.fromisoformat(found["date"]) - datetime.datetime.now(datetime.UTC).date()).days <= 1
    assert found["seconds"] == 1.23
    json.dumps(found)


def test_a_record_that_is_missing_or_damaged_is_empty(tmp_path):
    assert record(tmp_path / "a.npy") == {}
    (tmp_path / "a.npy.json").write_text('{"fingerprint": ')
    assert record(tmp_path / "a.npy") == {}


@pytest.mark.parametrize(
    ("folder", "base"), [("out/quick", "out/quick"), ("out/quick-1a2b3c4d", "out/quick"), ("full-my-run", "full")]
)
def test_the_folder_of_a_run_with_overrides_belongs_to_its_profiles(tmp_path, folder, base):
    assert base_folder(tmp_path / folder) == tmp_path / base


def test_the_own_folder_comes_before_the_profiles(tmp_path):
    own, base = tmp_path / "quick-1a2b", tmp_path / "quick"
    assert find(own, "a.npy", WANTED) is None
    save_array(base / "a.npy", np.zeros(1), fingerprint=WANTED)
    assert find(own, "a.npy", WANTED) == base / "a.npy"
    save_array(own / "a.npy", np.ones(1), fingerprint=WANTED)
    assert find(own, "a.npy", WANTED) == own / "a.npy"
    assert find(base, "a.npy", WANTED) == base / "a.npy"


def test_what_does_not_fit_is_never_used_and_stays_where_it_is_in_the_profiles_folder(tmp_path, contents):
    save_array(tmp_path / "quick" / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    assert find(tmp_path / "quick-1a2b", "a.npy", WANTED) is None
    assert contents(tmp_path) == before


def test_what_does_not_fit_becomes_a_backup_unchanged_and_the_message_says_why(tmp_path, contents, capsys):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    assert find(tmp_path, "a.npy", WANTED) is None
    backup = f"a.{digest(OTHER)}.npy"
    assert contents(tmp_path) == {backup: before["a.npy"], f"{backup}.json": before["a.npy.json"]}
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.npy is not what this run needs (recipe.epochs is 2, not 3); kept as {backup}\n"
    )


def test_saving_makes_a_backup_too_of_what_is_of_something_else(tmp_path, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    save_array(tmp_path / "a.npy", np.ones(1), fingerprint=WANTED)
    backup = f"a.{digest(OTHER)}.npy"
    assert contents(tmp_path)[backup] == before["a.npy"]
    assert load_array(tmp_path / "a.npy") == [1]


def test_a_backup_comes_back_when_it_is_wanted_again(tmp_path, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    save_array(tmp_path / "a.npy", np.ones(1), fingerprint=WANTED)
    before = contents(tmp_path)
    assert load_array(find(tmp_path, "a.npy", OTHER)) == [0]
    assert load_array(find(tmp_path, "a.npy", WANTED)) == [1]
    assert contents(tmp_path) == before
    (tmp_path / f"a.{digest(OTHER)}.npy.json").unlink()  # without its record it is of unknown origin
    assert find(tmp_path, "a.npy", OTHER) is None


def test_files_of_unknown_origin_become_backups_beside_each_other(tmp_path, capsys):
    for number in range(3):
        np.save(tmp_path / "a.npy", np.full(1, number))  # without a record
        assert find(tmp_path, "a.npy", WANTED) is None
        assert "it has no record of what it was made from" in capsys.readouterr().out
    assert sorted(int(np.load(p)[0]) for p in tmp_path.glob("a.*.npy")) == [0, 1, 2]


def test_a_fingerprint_matches_after_its_way_through_json(tmp_path):
    fingerprint = {"views": (1, 2), "alpha": 0.1, "nested": {"none": None}}
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=fingerprint)
    assert find(tmp_path, "a.npy", fingerprint) == tmp_path / "a.npy"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"network": "cnn", "recipe": {"epochs": 2, "seed": 0}}, "network is digits_cnn, not cnn"),
        ({"network": "digits_cnn", "recipe": {"epochs": 2}}, "recipe.seed is 0, not missing"),
        ({**OTHER, "data": "digits"}, "data is missing, not digits"),
        ({**OTHER, "beta": None}, "beta is missing, not None"),  # left out is not the same as None
        (
            {"network": "digits_cnn", "recipe": {"epochs": 3, "seed": 1}},
            "recipe.epochs is 2, not 3; recipe.seed is 0, not 1",
        ),
    ],
)
def test_the_reason_names_every_difference(tmp_path, capsys, wanted, reason):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    assert find(tmp_path, "a.npy", wanted) is None
    assert f"({reason});" in capsys.readouterr().out


def test_the_first_sentence_of_an_exception_is_its_reason():
    assert short_reason(ValueError("It is cut off. Try again.\nOr not.")) == "It is cut off"
    assert short_reason(ValueError("at 1.5 of 2\nmore")) == "at 1.5 of 2"
    assert short_reason(EOFError()) == "EOFError"


def test_a_file_that_cannot_be_renamed_is_named_and_kept(tmp_path, monkeypatch, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        OSError, match=r"a\.npy is not what this run needs \(recipe\.epochs is 2.*cannot be renamed: .*denied"
    ):
        find(tmp_path, "a.npy", WANTED)
    assert contents(tmp_path) == before


# --- the content behind a record -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weights", "array"])
def test_a_file_whose_bytes_changed_under_its_record_is_refused_and_kept(tmp_path, kind):
    path = tmp_path / ("a.pth" if kind == "weights" else "a.npy")

    def save(seed):
        if kind == "weights":
            save_weights(path, student(seed), fingerprint=WANTED)
        else:
            save_array(path, np.full(5, seed), fingerprint=WANTED)

    save(1)
    other = path.read_bytes()  # a good file of the same kind
    save(0)
    expected = file_digest(path)
    path.write_bytes(other)
    message = (
        rf"{re.escape(str(path))} has changed since it was saved: its SHA-256 is {file_digest(path)}, its record says "
        rf"{expected}; delete it and run its chapter again"
    )
    for load in (check_content, (lambda p: load_weights(p, student(2))) if kind == "weights" else load_array):
        with pytest.raises(ValueError, match=message):
            load(path)
    assert path.read_bytes() == other
    path.write_bytes(b"not even of that kind")
    with pytest.raises(ValueError, match="is not a"):
        load_weights(path, student()) if kind == "weights" else load_array(path)


def test_a_network_is_left_as_it_was_if_the_files_content_is_not_that_of_its_record(tmp_path):
    save_weights(tmp_path / "a.pth", student(0), fingerprint=WANTED)
    torch.save(student(1).state_dict(), tmp_path / "a.pth")
    model = student(2)
    with pytest.raises(ValueError, match="has changed since it was saved"):
        load_weights(tmp_path / "a.pth", model)
    assert same(model, student(2))


def test_a_record_from_before_there_were_checksums_is_taken_at_its_word(tmp_path):
    save_array(tmp_path / "a.npy", np.zeros(3), fingerprint=WANTED)
    save_json(record_path(tmp_path / "a.npy"), {"fingerprint": WANTED})
    check_content(tmp_path / "a.npy")
    assert find(tmp_path, "a.npy", WANTED) == tmp_path / "a.npy"
    np.testing.assert_array_equal(load_array(tmp_path / "a.npy"), np.zeros(3))


def test_a_record_can_be_written_for_a_file_that_is_there(tmp_path):
    (tmp_path / "notes.txt").write_text("three rows")
    save_record(tmp_path / "notes.txt", WANTED, rows=3)
    assert record(tmp_path / "notes.txt") == {
        "fingerprint": WANTED,
        "sha256": hashlib.sha256(b"three rows").hexdigest(),
        "rows": 3,
    }
    assert find(tmp_path, "notes.txt", WANTED) == tmp_path / "notes.txt"


@pytest.mark.parametrize("fingerprint", [[1], "text", 3, None])
def test_a_record_whose_fingerprint_is_no_object_is_damaged(tmp_path, capsys, fingerprint):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=WANTED)
    save_json(record_path(tmp_path / "a.npy"), {"fingerprint": fingerprint})
    assert find(tmp_path, "a.npy", WANTED) is None
    assert "its record is damaged" in capsys.readouterr().out
    assert len(list(tmp_path.glob("a.*.npy"))) == 1


def test_a_name_that_is_close_to_a_known_one_is_suggested():
    assert did_you_mean("quik", ["quick", "full"]) == "; did you mean 'quick'?"
    assert did_you_mean("xyz", ["quick", "full"]) == ""
    assert did_you_mean(3, ["quick"]) == did_you_mean("", []) == ""


# --- folders however they are named ----------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", [".", "out", "../out", ""])
def test_a_folder_may_be_a_string_and_the_working_folder(folder, image_set, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    recipe = Recipe(epochs=1, batch_size=8, learning_rate=0.01)
    made = ("student.pth", linear_network, image_set(), torch.nn.functional.cross_entropy, recipe)
    paths = [load_or_train(kind(folder), *made, progress=False).path for kind in (str, Path)]
    assert paths[0] == paths[1]
    assert paths[0].resolve() == (tmp_path / "work" / folder / "student.pth").resolve()
    assert paths[0].exists()


def linear_network(classes, channels):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64 * channels, classes))


def test_room_is_looked_for_without_filling_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(5000, 4000, 1000))
    check_room(tmp_path / "small.npy", 1000)
    with pytest.raises(OSError, match=r"large.npy cannot be written \(No space left on device"):
        check_room(tmp_path / "large.npy", 1001)
    assert list(tmp_path.iterdir()) == []
