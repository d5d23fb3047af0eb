"""What a file would take is measured before it is taken, and what is legitimate and large is still read."""

import io
import pickletools
import tracemalloc
import zipfile

import attacks
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from kdlib.records import artefacts, documents, limits
from kdlib.sources import pictures
from kdlib.sources.arrays import read_npz
from kdlib.sources.weights import weights_for


@pytest.fixture
def arrays():
    count = 2000
    blank = np.zeros((count, 16, 16, 1), np.uint8)
    return {f"{s}_{k}": v for s in ("train", "test") for k, v in (("images", blank), ("labels", np.arange(count) % 4))}


def test_what_expands_to_too_much_is_refused_with_the_way_out_and_that_works(tmp_path, arrays, monkeypatch):
    path = tmp_path / "blank.npz"
    np.savez_compressed(path, **arrays)
    assert read_npz(path)["train_images"].shape == (2000, 16, 16, 1)
    monkeypatch.setattr(limits, "EXPANDED", 500_000)
    with pytest.raises(
        ValueError, match=r"would expand to 1 MB, expected at most .*; .*again without compression, as num"
    ):
        read_npz(path)
    np.savez(path, **arrays)
    assert read_npz(path)["train_images"].shape == (2000, 16, 16, 1)


def test_what_photographs_expand_to_is_never_too_much(tmp_path, arrays, monkeypatch):
    monkeypatch.setattr(limits, "EXPANDED", 0)
    random = np.random.RandomState(0)
    lines = random.randint(0, 2, (2000, 16, 16, 1)).astype(np.uint8) * 255  # the little that a pixel can hold
    np.savez_compressed(tmp_path / "lines.npz", **arrays | {"train_images": lines, "test_images": lines})
    assert read_npz(tmp_path / "lines.npz")["train_images"].sum() == lines.astype(int).sum()


def test_what_takes_more_memory_than_there_is_is_refused_before_it_is_read(tmp_path, arrays, monkeypatch):
    np.savez(tmp_path / "d.npz", **arrays)
    np.save(tmp_path / "a.npy", np.zeros(10_000))
    monkeypatch.setattr(limits, "memory", lambda: 50_000)
    for read, name in ((read_npz, "d.npz"), (artefacts.load_array, "a.npy")):
        with pytest.raises(ValueError, match=rf"{name} is not .* GB of memory: read it on a machine with more"):
            read(tmp_path / name)


def test_the_memory_there_is_is_that_of_the_machine_or_less():
    assert 2**28 < limits.memory() < 2**50


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_makes_data_from_nothing_is_refused_before_it_does(tmp_path, old):
    content, path = attacks.calls("builtins\nbytearray", 10**8), tmp_path / "w.pth"
    assert any(argument == "builtins bytearray" for _, argument, _ in pickletools.genops(content))
    path.write_bytes(content) if old else attacks.with_pickle(path, content)
    tracemalloc.start()
    for read in (lambda: artefacts.load_weights(path, nn.Linear(2, 2)), lambda: weights_for(nn.Linear(2, 2), path)):
        with pytest.raises(ValueError, match=r"w\.pth .*it calls builtins\.bytearray, which makes data of any size"):
            read()
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_tensors_of_more_numbers_than_the_file_holds_are_refused(tmp_path):
    torch.save({"weight": torch.ones(1).expand(10**6, 2), "bias": torch.ones(2)}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"weight promises 8,000,000 bytes, and the file holds [\d,]+: save it with"):
        artefacts.load_weights(tmp_path / "w.pth", nn.Linear(2, 2))


def test_weights_of_before_2020_are_read(tmp_path):
    network = nn.Linear(3, 2)
    torch.save({"model": network.state_dict()}, tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    found = weights_for(nn.Linear(3, 2), tmp_path / "w.pth")
    assert all(torch.equal(found[name], value) for name, value in network.state_dict().items())


def test_an_archive_whose_entries_are_compressed_otherwise_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("train_images.npy", bytes(1000))
    with pytest.raises(ValueError, match="is compressed in an unusual way: expected stored or deflated"):
        read_npz(tmp_path / "d.npz")


def test_a_picture_may_claim_fifty_times_its_file_or_a_fair_size(tmp_path, monkeypatch):
    path = tmp_path / "p.png"
    Image.new("RGB", (400, 300)).save(path)
    assert pictures.read_picture(path)[0].shape == (300, 400, 3)
    monkeypatch.setattr(pictures, "PIXELS", 1000)
    with pytest.raises(ValueError, match=r"p\.png .*400x300 pixels in [\d,]+ bytes: expected at most 50 times as many"):
        pictures.read_picture(path)
    noise = np.random.RandomState(0).randint(0, 256, (300, 400, 3)).astype(np.uint8)
    Image.fromarray(noise).save(path)
    np.testing.assert_array_equal(pictures.read_picture(path)[0], noise)


def test_a_picture_that_another_program_would_draw_is_not_opened(tmp_path):
    path = tmp_path / "p.png"
    content = io.BytesIO()
    Image.new("L", (8, 8)).save(content, "EPS")
    path.write_bytes(content.getvalue())
    with pytest.raises(ValueError, match=r"p\.png is not an image that can be read \(cannot identify"):
        pictures.read_picture(path)


def test_a_document_that_could_not_be_read_again_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "d.json"
    documents.save_document(path, {"a": 1})
    monkeypatch.setattr(documents, "JSON_BYTES", 200)
    with pytest.raises(ValueError, match=r"d\.json would have 0 MB, expected at most 0 MB"):
        documents.save_document(path, {"a": "x" * 300})
    assert documents.read_document(path) == {"a": 1}


FORM = {"name": str, "runs": [{"seeds": [int], "time": documents.NUMBER}], "by": {...: {...: float}}}
GOOD = {"name": "a", "runs": [{"seeds": [0], "time": 1}, {"seeds": [], "time": 0.5, "more": None}], "by": {"x": {}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, ""),
        ({"more": 3}, ""),
        ({"name": 3}, "it.name is a int, expected str"),
        ({"runs": {}}, "it.runs is a dict, expected a list"),
        ({"runs": [3]}, "it.runs[0] is a int, expected a dict"),
        ({"runs": [{"seeds": [0]}]}, "it.runs[0] has no time"),
        ({"runs": [{"seeds": [True], "time": 1}]}, "it.runs[0].seeds[0] is a bool, expected int"),
        ({"runs": [{"seeds": [], "time": "1"}]}, "it.runs[0].time is a str, expected int or float"),
        ({"by": {"x": {"y": None}}}, "it.by.x.y is a NoneType, expected float"),
    ],
)
def test_a_value_of_another_form_is_described(change, message):
    assert documents.mismatch(GOOD | change, FORM) == message
    assert documents.mismatch({k: v for k, v in GOOD.items() if k != "by"}, FORM) == "it has no by"
