"""Saving: whole or not at all, beside its fingerprint; loading: only what fits, and nothing that would be executed."""

import datetime
import email.message
import hashlib
import importlib.metadata
import json
import pickle
import platform
import re
import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import artefacts, build
from kdlib.artefacts import (
    base_folder,
    check_writable,
    digest,
    find,
    load_array,
    load_weights,
    provenance,
    published,
    record,
    repository_address,
    save_array,
    save_json,
    save_weights,
    short_reason,
    written_whole,
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
    with written_whole(path) as partial:
        partial.write_text("first")
        assert partial.parent == path.parent  # one file system, so that the renaming is one step
        assert not path.exists()
    assert path.read_text() == "first"
    with written_whole(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert list(path.parent.iterdir()) == [path]


def test_a_failure_in_the_middle_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write() -> None:
        with written_whole(path) as partial:
            partial.write_text("ne")
            raise Full

    with pytest.raises(Full):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", ["weights", "array", "json"])
def test_saving_again_loses_nothing_where_it_fails(tmp_path, monkeypatch, contents, kind):
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
    save_weights(tmp_path / "w.pth", model, fingerprint=WANTED, history=[1, 2])
    loaded = student(1)
    assert not same(loaded, model)
    assert load_weights(tmp_path / "w.pth", loaded) is loaded
    assert same(loaded, model)
    assert record(tmp_path / "w.pth") == {"fingerprint": WANTED, "history": [1, 2]}


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
    assert record(tmp_path / "a.npy") == {"fingerprint": WANTED}


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
    assert re.fullmatch("[0-9a-f]{8}", digest({}))


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


def test_a_record_that_is_missing_or_damaged_tells_nothing(tmp_path):
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


def test_what_does_not_fit_is_never_used_and_in_the_profiles_folder_stays_where_it_is(tmp_path, contents):
    save_array(tmp_path / "quick" / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    assert find(tmp_path / "quick-1a2b", "a.npy", WANTED) is None
    assert contents(tmp_path) == before


def test_what_does_not_fit_is_set_aside_unchanged_and_the_message_says_why(tmp_path, contents, capsys):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    assert find(tmp_path, "a.npy", WANTED) is None
    aside = f"a.{digest(OTHER)}.npy"
    assert contents(tmp_path) == {aside: before["a.npy"], f"{aside}.json": before["a.npy.json"]}
    assert capsys.readouterr().out == (
        f"{tmp_path}/a.npy is not what this run needs (recipe.epochs is 2, not 3); kept as {aside}\n"
    )


def test_saving_sets_aside_too_what_is_of_something_else(tmp_path, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)
    save_array(tmp_path / "a.npy", np.ones(1), fingerprint=WANTED)
    aside = f"a.{digest(OTHER)}.npy"
    assert contents(tmp_path)[aside] == before["a.npy"]
    assert load_array(tmp_path / "a.npy") == [1]


def test_what_was_set_aside_comes_back_when_it_is_wanted_again(tmp_path, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    save_array(tmp_path / "a.npy", np.ones(1), fingerprint=WANTED)
    before = contents(tmp_path)
    assert load_array(find(tmp_path, "a.npy", OTHER)) == [0]
    assert load_array(find(tmp_path, "a.npy", WANTED)) == [1]
    assert contents(tmp_path) == before
    (tmp_path / f"a.{digest(OTHER)}.npy.json").unlink()  # nothing tells any more what that one was made from
    assert find(tmp_path, "a.npy", OTHER) is None


def test_files_of_unknown_origin_are_set_aside_one_beside_the_other(tmp_path, capsys):
    for number in range(3):
        np.save(tmp_path / "a.npy", np.full(1, number))  # without a record
        assert find(tmp_path, "a.npy", WANTED) is None
        assert "nothing tells what it was made from" in capsys.readouterr().out
    assert sorted(int(np.load(p)[0]) for p in tmp_path.glob("a.*.npy")) == [0, 1, 2]


def test_a_fingerprint_matches_after_its_way_through_json(tmp_path):
    fingerprint = {"views": (1, 2), "alpha": 0.1, "nested": {"none": None}}
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=fingerprint)
    assert find(tmp_path, "a.npy", fingerprint) == tmp_path / "a.npy"


@pytest.mark.parametrize(
    ("wanted", "reason"),
    [
        ({"network": "cnn", "recipe": {"epochs": 2, "seed": 0}}, "network is digits_cnn, not cnn"),
        ({"network": "digits_cnn", "recipe": {"epochs": 2}}, "recipe.seed is 0, not None"),
        ({**OTHER, "data": "digits"}, "data is None, not digits"),
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


def test_a_file_that_cannot_be_set_aside_is_named_and_kept(tmp_path, monkeypatch, contents):
    save_array(tmp_path / "a.npy", np.zeros(1), fingerprint=OTHER)
    before = contents(tmp_path)

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(artefacts.os, "replace", refuse)
    with pytest.raises(
        OSError, match=r"a\.npy is not what this run needs \(recipe\.epochs is 2.*cannot be set aside: .*denied"
    ):
        find(tmp_path, "a.npy", WANTED)
    assert contents(tmp_path) == before


# --- what is published -----------------------------------------------------------------------------------------------

ADDRESS = "https://example.org/book"
CONTENT = b"the teacher's answers"


def remote(content: bytes = CONTENT, of: bytes = CONTENT) -> dict[str, bytes]:
    """What the repository's address serves: a file, and the record of the file `of`."""
    place = f"{ADDRESS}/raw/HEAD/book/published/quick/answers.npy"
    return {place: content, f"{place}.json": json.dumps({"sha256": hashlib.sha256(of).hexdigest()}).encode()}


class Response:
    """What urllib gives for an address."""

    def __init__(self, url: str, content: bytes):
        self.url, self.content = url, content

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def read(self) -> bytes:
        return self.content


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """kdlib as installed without a clone; a function that sets what its repository serves, and tells what was asked."""
    monkeypatch.setattr(artefacts, "__file__", str(tmp_path / "site-packages" / "kdlib" / "artefacts.py"))
    monkeypatch.setattr(artefacts, "repository_address", lambda: ADDRESS)

    def serve(files: dict[str, bytes], sent_on: str | None = None) -> list[str]:
        asked = []

        def urlopen(url: str, timeout: float) -> Response:
            assert 0 < timeout <= 60
            asked.append(url)
            if url not in files:
                raise urllib.error.HTTPError(url, 404, "Not Found", {}, None)
            return Response(sent_on or url, files[url])

        monkeypatch.setattr(urllib.request, "urlopen", urlopen)
        return asked

    return serve


def test_a_published_file_of_the_clone_is_checked_and_used_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(artefacts, "__file__", str(tmp_path / "kdlib" / "artefacts.py"))
    place = tmp_path / "book" / "published" / "quick"
    place.mkdir(parents=True)
    (tmp_path / "book" / "intro.md").write_text("# The book")
    with pytest.raises(FileNotFoundError, match=r"answers\.npy is not there: profile quick .*start_from=scratch"):
        published("quick", "answers.npy", tmp_path / "quick")
    for url, content in remote().items():
        (place / url.rpartition("/")[2]).write_bytes(content)
    assert published("quick", "answers.npy", tmp_path / "quick") == place / "answers.npy"
    assert not (tmp_path / "quick").exists()

    (place / "answers.npy").write_bytes(CONTENT + b"!")
    expected, found = (hashlib.sha256(content).hexdigest() for content in (CONTENT, CONTENT + b"!"))
    message = (
        rf"answers\.npy is not what was published: its SHA-256 is {found}, expected {expected}; .*git checkout -- "
    )
    with pytest.raises(ValueError, match=message):
        published("quick", "answers.npy", tmp_path / "quick")
    (place / "answers.npy.json").unlink()
    with pytest.raises(ValueError, match="expected one in its record, which has none"):
        published("quick", "answers.npy", tmp_path / "quick")


def test_without_a_clone_it_is_fetched_once_its_record_first(installed, tmp_path, contents):
    asked = installed(remote())
    path = published("quick", "answers.npy", tmp_path / "quick-1a2b")
    assert path == tmp_path / "quick-1a2b" / "published" / "answers.npy"
    assert path.read_bytes() == CONTENT
    assert asked == list(remote())[::-1]
    assert contents(path.parent).keys() == {"answers.npy", "answers.npy.json"}
    assert published("quick", "answers.npy", tmp_path / "quick-1a2b") == path
    assert len(asked) == 2


def test_a_fetched_file_that_differs_is_refused_with_what_to_do(installed, tmp_path):
    installed(remote(content=b"something else"))
    for _ in range(2):  # also where it is there already
        with pytest.raises(ValueError, match=r"SHA-256 is \w+, expected \w+; delete .*published, .*start_from=scratch"):
            published("quick", "answers.npy", tmp_path)


@pytest.mark.parametrize("kept", [0, 1])
def test_what_cannot_be_fetched_names_its_address_and_leaves_no_part_of_a_file(installed, tmp_path, kept):
    missing = list(remote())[::-1][kept]
    installed({url: content for url, content in remote().items() if url != missing})
    with pytest.raises(
        FileNotFoundError, match=re.escape(missing) + r" cannot be fetched \(HTTP Error 404: Not Found\): cl"
    ):
        published("quick", "answers.npy", tmp_path)
    assert not (tmp_path / "published" / "answers.npy").exists()


@pytest.mark.parametrize("address", ["http://example.org/book", "file:///book"])
def test_nothing_is_fetched_but_by_https(installed, tmp_path, monkeypatch, address):
    asked = installed({})
    monkeypatch.setattr(artefacts, "repository_address", lambda: address)
    with pytest.raises(FileNotFoundError, match=r"expected an address that begins with https://"):
        published("quick", "answers.npy", tmp_path)
    assert asked == []
    monkeypatch.setattr(artefacts, "repository_address", lambda: ADDRESS)
    installed(remote(), sent_on="http://example.org/elsewhere")
    with pytest.raises(FileNotFoundError, match=r"it leads to http://example\.org/elsewhere, expected one"):
        published("quick", "answers.npy", tmp_path)
    assert not (tmp_path / "published").exists()


def test_the_repositorys_address_is_that_of_the_installed_package(monkeypatch):
    def metadata(*urls):
        message = email.message.Message()
        for url in urls:
            message["Project-URL"] = url
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: message)

    metadata("homepage, https://example.org", f"repository, {ADDRESS}/")
    assert repository_address() == ADDRESS
    metadata()
    with pytest.raises(FileNotFoundError, match="names no repository to fetch from: clone the repository"):
        repository_address()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    with pytest.raises(FileNotFoundError, match="names no repository"):
        repository_address()
