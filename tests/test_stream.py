"""Images larger than memory: read once, kept in one file, and seen through the interface of images in memory."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_ranks import torchrun
from torch import nn

import kdlib
from kdlib import LiveTeacher, Recipe, distillation_loss, generate, load_or_generate, predict_logits, train
from kdlib.data import ImageSet, batches
from kdlib.records import artefacts
from kdlib.scale import SeededViews, load_images, mixup_pair, stream, stream_cache
from kdlib.scale.stream_cache import CachedImages, cache_images, index_path
from kdlib.scale.stream_sources import find_sources
from kdlib.scale.views import MOST, blend
from kdlib.sources.pictures import read_picture

pytestmark = pytest.mark.usefixtures("isolated")
VIEWS = SeededViews(8, rand_augment=(1, 9))
quiet = {"progress": False}


def draw(path: Path, seed: int, shape=(20, 24, 3), **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape).astype(np.uint8)).save(path, **options)


@pytest.fixture
def tree(tmp_path) -> Path:
    """ImageNet's layout: training images of three classes, and validation images; no test images with labels."""
    root = tmp_path / "photos"
    for k, name in enumerate(("n01", "n02", "n03")):
        for i in range(8):
            draw(root / "train" / name / f"{name}_{i}.JPEG", 100 * k + i)
        for i in range(2):
            draw(root / "val" / name / f"{i}.JPEG", 1000 + 100 * k + i)
    return root


@pytest.fixture
def load(tree, tmp_path):
    """A function that loads the tree, with a cache of its own."""
    options = {"cache": tmp_path / "cache", "views": VIEWS, "workers": 0, "progress": False}
    return lambda root=tree, size=10, **more: load_images(root, size, **{**options, **more})


class Dropout(nn.Sequential):
    """A network whose training draws from the global generator."""

    def __init__(self, classes: int, channels: int):
        super().__init__(nn.Flatten(), nn.Linear(64 * channels, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, classes))


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


# --- what is read ----------------------------------------------------------------------------------------------------


def test_a_tree_is_read_in_order_of_class_and_path(tree, load, capsys):
    data = load()
    assert "21 training images (n01 7, n02 7, n03 7); 3 validation images held out; 6 test images; 3 classes" in (
        capsys.readouterr().out
    )
    files = sorted((tree / "train").rglob("*.JPEG"))
    held_out = [files[7], files[15], files[23]]  # the last of each class
    assert data.validation.images[:].equal(pixels(held_out))
    assert data.train.images[:].equal(pixels([file for file in files if file not in held_out]))
    assert data.test.images[:].equal(pixels(sorted((tree / "val").rglob("*.JPEG"))))  # its labels are published
    assert data.train.labels.tolist() == [0] * 7 + [1] * 7 + [2] * 7
    assert data.test.class_names == ("n01", "n02", "n03")
    everything = pixels([file for file in files if file not in held_out]).double() / 255
    assert data.train.mean == pytest.approx(everything.mean((0, 1, 2)).tolist(), abs=1e-6)
    assert data.test.std == pytest.approx(everything.std((0, 1, 2), correction=0).tolist(), abs=1e-6)


def pixels(files) -> torch.Tensor:
    return torch.from_numpy(np.stack([read_picture(file, 10)[0] for file in files]))


def test_tiny_imagenet_tells_its_validation_labels_in_a_list(tmp_path, load):
    root = tmp_path / "tiny-imagenet-200"
    lines = []
    for k, name in enumerate(("n09", "n05")):
        for i in range(4):
            draw(root / "train" / name / "images" / f"{name}_{i}.JPEG", 100 * k + i)
        (root / "train" / name / f"{name}_boxes.txt").write_text("n09_0.JPEG\t0\t0\t9\t9\n")
        draw(root / "val" / "images" / f"val_{k}.JPEG", 1000 + k)
        draw(root / "test" / "images" / f"test_{k}.JPEG", 2000 + k)
        lines.append(f"val_{k}.JPEG\t{name}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    (root / "wnids.txt").write_text("n09\nn05\n")
    data = load(root)
    assert data.test.class_names == ("n05", "n09")
    assert data.test.labels.tolist() == [0, 1]
    assert data.test.images[:].equal(pixels([root / "val" / "images" / f"val_{k}.JPEG" for k in (1, 0)]))
    assert [len(split) for split in data] == [6, 2, 2]
    shown = {path.name for path in (tmp_path / "cache").glob("*.npy")}
    assert shown == {"tiny-imagenet-200-train-10.npy", "tiny-imagenet-200-validation-10.npy"}


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.png\tn1\t0", "b.png\tn2\t0", "a.png\tn2\t0"], r"annotations.txt:3 names a.png, which an earlier line"),
        (["a.png\tn1\t0"], r"b.png has no line in val_annotations.txt"),
        (["a.png\tn1\t0", "b.png n2 0"], r"annotations.txt:2 is 'b.png n2 0': expected a file and its class"),
        (["a.png\tn1", "c.png\tn2", "b.png\tn2"], r"annotations.txt:2 names c.png: expected a picture at .*c.png"),
    ],
)
def test_a_wrong_list_of_tiny_imagenet_is_refused(tmp_path, lines, message):
    for file in ("train/n1/0.png", "train/n2/0.png", "val/images/a.png", "val/images/b.png"):
        draw(tmp_path / "tiny" / file, 0)
    (tmp_path / "tiny" / "val" / "val_annotations.txt").write_text("\n".join(lines))
    with pytest.raises(ValueError, match=message):
        find_sources(tmp_path / "tiny", "tiny")


def test_three_splits_are_taken_as_they_are(tree, load):
    for k, name in enumerate(("n01", "n02", "n03")):
        draw(tree / "test" / name / "0.png", 3000 + k)
    data = load()
    assert [len(split) for split in data] == [24, 6, 3]
    assert [len(split) for split in load(limit=3)] == [3, 3, 3]


class HuggingFace:
    """What :mod:`kdlib.scale` asks of a ``datasets.Dataset``: columns, features, rows by index, a fingerprint."""

    column_names = ("image", "label")

    def __init__(self, files, labels, fingerprint):
        self.files, self.labels, self._fingerprint = files, labels, fingerprint
        self.features = {"label": type("ClassLabel", (), {"names": ["n01", "n02", "n03"]})()}

    def __len__(self):
        return len(self.files)

    def __getitem__(self, key):
        if isinstance(key, str):
            return {"label": self.labels}[key]
        return {"image": Image.open(self.files[key]), "label": self.labels[key]}


def as_table(folder: Path, fingerprint: str = "0123456789abcdef") -> HuggingFace:
    files = sorted(folder.rglob("*.JPEG"))
    return HuggingFace(files, [int(file.parent.name[1:]) - 1 for file in files], fingerprint)


def test_a_hugging_face_data_set_gives_the_same_images(tree, load):
    from_tree = load(name="photos")
    splits = {"train": as_table(tree / "train"), "validation": as_table(tree / "val")}
    from_table = load(splits, name="table")
    for one, other in zip(from_tree, from_table, strict=True):
        assert one.fingerprint == other.fingerprint
        assert one.images[:].equal(other.images[:])
    nameless = as_table(tree / "train")
    nameless.features = {}
    with pytest.raises(ValueError, match="table names no classes"):
        load({"train": nameless}, name="table")
    nameless.features, nameless.column_names = splits["train"].features, ("picture", "label")
    with pytest.raises(ValueError, match="columns picture, label: expected images under one of image, img"):
        load({"train": nameless}, name="table")
    with pytest.raises(ValueError, match="without a fingerprint"):
        load({"train": as_table(tree / "train", None)}, name="table")
    splits["train"].labels[0] = -1
    with pytest.raises(ValueError, match="labels run from -1 to 2, expected 0 to 2"):
        load(splits, name="unlabelled")


@pytest.mark.filterwarnings("ignore")  # of its own
def test_datasets_of_hugging_face_itself(tree, load, tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["n01", "n02", "n03"])})
    made = {}
    for split, folder in (("train", "train"), ("validation", "val")):
        table = as_table(tree / folder)
        columns = {"image": [str(file) for file in table.files], "label": table.labels}
        made[split] = datasets.Dataset.from_dict(columns, features=features)
    datasets.DatasetDict(made).save_to_disk(tmp_path / "saved")
    data = load(datasets.load_from_disk(tmp_path / "saved"), name="table", workers=1)
    assert data.train.fingerprint == load(name="photos").train.fingerprint


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train").rename(root / "training"), "has no folder train with a folder for each class"),
        (
            lambda root: draw(root / "val" / "n04" / "0.JPEG", 0),
            "class 'n04' has pictures in only one of train and val",
        ),
        (lambda root: [f.unlink() for f in (root / "train" / "n02").iterdir()], "class 'n02' has pictures in only one"),
        (lambda root: (root / "train" / "n01" / "n01_3.JPEG").write_bytes(b"x"), "n01_3.JPEG is not an image"),
    ],
)
def test_other_trees_are_refused(tree, load, change, message):
    change(tree)
    with pytest.raises(ValueError, match=message):
        load()


def test_options_that_contradict_each_other_are_refused(load):
    with pytest.raises(ValueError, match="in_memory is True and views are given"):
        load(in_memory=True)
    with pytest.raises(ValueError, match="padding is 2 and flip False: expected them with in_memory=True"):
        load(padding=2)
    with pytest.raises(ValueError, match="expected SeededViews, which shift and mirror"):
        replace(load().train, flip=True)
    for validation in (-3, 0, 2.5, True):
        with pytest.raises(ValueError, match=f"validation is {validation}: expected a whole number of images fr"):
            load(validation=validation)
    with pytest.raises(ValueError, match="class 'n01' has no validation image"):  # not: more than a side has pixels
        load(validation=10_000)
    with pytest.raises(ValueError, match="workers is -1: expected a whole number of processes from 0"):
        load(workers=-1)


# --- what is kept ----------------------------------------------------------------------------------------------------


class Counted:
    """A source that counts what is read of it, and may fail."""

    class_names = ("a", "b")

    def __init__(self, count=30, fails_at=None, identity="counted"):
        self.labels, self.fails_at, self.identity, self.read_images = np.arange(count) % 2, fails_at, identity, []

    def __len__(self):
        return len(self.labels)

    def read(self, index, size):
        if index == self.fails_at:
            raise ValueError(f"picture {index} is not an image")
        self.read_images.append(index)
        seed = int.from_bytes(f"{index} {self.identity}".encode()) % 2**32
        return np.random.RandomState(seed).randint(0, 256, (size, size, 3)).astype(np.uint8)


@pytest.fixture
def by_tens(monkeypatch):
    """What is kept is written ten images of 4x4 pixels at a time."""
    monkeypatch.setattr(stream_cache, "AT_ONCE", 10 * 4 * 4 * 3)


def test_the_reading_goes_on_where_it_was_stopped(tmp_path, by_tens):
    whole = cache_images(Counted(), tmp_path / "whole.npy", 4, **quiet)
    with pytest.raises(ValueError, match="picture 27 is not an image"):
        cache_images(Counted(fails_at=27), tmp_path / "some.npy", 4, **quiet)
    again = Counted()
    made = cache_images(again, tmp_path / "some.npy", 4, **quiet)
    assert again.read_images == list(range(20, 30))
    assert made[:].equal(whole[:])
    assert made.digest == whole.digest
    assert made.mean_and_std() == whole.mean_and_std()
    assert not list(tmp_path.glob("*.partial*"))
    third = Counted()
    cache_images(third, tmp_path / "some.npy", 4, **quiet)
    assert third.read_images == []


@pytest.mark.parametrize("damage", ["flip", "cut", "log", "header", "line"])
def test_what_was_damaged_meanwhile_is_read_again(tmp_path, by_tens, damage):
    whole = cache_images(Counted(), tmp_path / "whole.npy", 4, **quiet)
    with pytest.raises(ValueError, match="picture 29"):
        cache_images(Counted(fails_at=29), tmp_path / "some.npy", 4, **quiet)
    partial_file = next(tmp_path.glob("*.partial"))
    log = Path(f"{partial_file}.txt")
    content = bytearray(partial_file.read_bytes())
    if damage == "flip":
        content[-1] ^= 1  # in the second ten
    elif damage == "cut":
        del content[-5:]
    elif damage == "header":
        content[20] ^= 1
    elif damage == "log":
        log.write_text("nonsense")
    else:
        log.write_text(log.read_text()[:-3])
    partial_file.write_bytes(content)
    with pytest.raises(ValueError, match="picture 29"):  # twice, so that the log of the second time counts
        cache_images(Counted(fails_at=29), tmp_path / "some.npy", 4, **quiet)
    again = Counted()
    made = cache_images(again, tmp_path / "some.npy", 4, **quiet)
    assert again.read_images == list(range(20, 30))
    assert made.digest == whole.digest
    assert hashlib.sha256(made.path.read_bytes()).hexdigest() == made.sha256


def test_a_changed_source_takes_nothing_from_what_was_kept(tmp_path, capsys):
    path = tmp_path / "kept.npy"
    first = cache_images(Counted(), path, 4, **quiet)
    before, figures = first[:], first.mean_and_std()
    other = cache_images(Counted(identity="other"), path, 4, **quiet)
    assert "is not what this run needs" in capsys.readouterr().out
    assert not other[:].equal(before)
    back = Counted()
    assert cache_images(back, path, 4, **quiet)[:].equal(before)  # its backup got the name again
    assert back.read_images == []
    assert CachedImages(path).mean_and_std() == figures  # with the index that belongs to it


def test_what_is_kept_serves_without_the_tree(tree, load, tmp_path):
    fingerprints = [split.fingerprint for split in load()]
    tree.rename(tmp_path / "elsewhere")
    assert [split.fingerprint for split in load()] == fingerprints
    with pytest.raises(FileNotFoundError, match=r"nor does .*cache hold photos in 12x12"):
        load(size=12)


def test_what_is_kept_of_another_folder_is_not_used(tree, load, tmp_path, capsys):
    load()
    other = shutil.copytree(tree, tmp_path / "other" / "photos")
    draw(other / "train" / "n01" / "n01_0.JPEG", 7)
    shutil.rmtree(other / "val")
    fingerprints = [split.fingerprint for split in load(other)]  # the cache holds val of the first, train of the other
    with pytest.raises(FileNotFoundError, match=r"photos-train-10.npy is of .*other.photos; give that path"):
        load(tmp_path / "nowhere" / "photos")
    shutil.rmtree(other)
    capsys.readouterr()
    assert [split.fingerprint for split in load(other)] == fingerprints
    assert "is not there; what" in capsys.readouterr().out
    load()  # both splits again of the first
    tree.rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=r"photos-train-10.npy is of .*photos"):
        load(other)
    cache_images(Counted(), tmp_path / "cache" / "photos-validation-10.npy", 10, **quiet)
    with pytest.raises(FileNotFoundError, match=r"photos-validation-10.npy is not there or of another folder"):
        load()


def test_a_copy_elsewhere_serves_without_its_folder(tree, load, tmp_path):
    fingerprint = load().train.fingerprint
    other = shutil.copytree(tree, tmp_path / "other" / "photos")
    load(other)  # nothing is read again, but where it lies is noted
    shutil.rmtree(other)
    assert load(other).train.fingerprint == fingerprint


def test_splits_of_different_classes_are_refused(load, monkeypatch):
    original = stream.read_index

    def renamed(path, sha256):
        index = original(path, sha256)
        return {**index, "class_names": index["class_names"][::-1]} if "validation" in path.name else index

    monkeypatch.setattr(stream, "read_index", renamed)
    with pytest.raises(ValueError, match=r"photos-validation-10.npy has other classes than the training images"):
        load()


def test_an_index_belongs_to_its_images(load, tmp_path):
    images = load().train.images
    other = cache_images(Counted(), tmp_path / "other.npy", 10, **quiet).path
    for of in (index_path, lambda file: artefacts.record_path(index_path(file))):
        shutil.copy(of(other), of(images.path))
    with pytest.raises(ValueError, match=r"photos-train-10.index.npz cannot be read \(it belongs to images with"):
        images.mean_and_std()


def test_a_damaged_cache_is_noticed_where_it_is_streamed(load):
    path = load().train.images.path
    content = path.read_bytes()
    path.write_bytes(content[:128] + bytes(len(content) - 128))
    with pytest.raises(ValueError, match=r"photos-train-10.npy has changed since it was saved"):
        load()
    path.write_bytes(content + content[128:])
    with pytest.raises(ValueError, match=r"cannot be mapped into memory \(it has 14,528 bytes, .* tells of 7,328\)"):
        load()
    path.write_bytes(content)
    load()


def test_a_file_is_hashed_once_per_process(load, monkeypatch):
    path = load().train.images.path
    monkeypatch.setattr(artefacts, "file_digest", lambda path: pytest.fail(f"{path} is read again"))
    CachedImages(path).check()


def test_two_processes_make_one_cache(tree, tmp_path):
    program = f"""
import json
from pathlib import Path
from kdlib.gpu import pick_device, ranks
from kdlib.scale import load_images, stream_cache
pick_device("cpu")
write, calls = stream_cache._write, []
stream_cache._write = lambda *args: calls.append(args) or write(*args)
data = load_images({str(tree)!r}, 10, cache={str(tmp_path / "cache")!r}, workers=0, progress=False)
told = [len(calls), data.train.images[:].flatten().long().sum().item(), data.train.identity]
Path({str(tmp_path)!r}, f"rank{{ranks.rank()}}.json").write_text(json.dumps(told))
ranks.stop()
"""
    (tmp_path / "program.py").write_text(program)
    torchrun(tmp_path / "program.py")
    both = [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2)]
    assert [told[0] for told in both] == [2, 0]  # rank 0 alone writes train and validation
    assert both[0][1:] == both[1][1:]
    path = tmp_path / "cache" / "photos-train-10.npy"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == artefacts.record(path)["sha256"]


def test_damaged_files_are_named(tree, load, tmp_path):
    path = load().train.images.path
    tree.rename(tmp_path / "elsewhere")  # otherwise they would be made again
    index, content = index_path(path), path.read_bytes()
    whole = index.read_bytes()
    index.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"photos-train-10.index.npz cannot be read"):
        load()
    index.write_bytes(whole)
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=r"photos-train-10.npy cannot be mapped into memory"):
        load()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"photos-train-10.npy has changed since it was saved"):
        load(in_memory=True, views=None)
    (tmp_path / "cache" / "photos-train-10.npy.json").unlink()
    with pytest.raises(ValueError, match=r"photos-train-10.npy has no record"):
        load()


def test_the_fingerprint_says_what_the_images_are(tree, load, tmp_path):
    data = load()
    assert data.train.identity == load(workers=2).train.identity  # how they are read does not count
    train_images = data.train
    others = [
        train_images,
        data.validation,
        data.test,
        replace(train_images, views=SeededViews(8)),
        replace(train_images, mean=(0.1, 0.2, 0.3)),
        replace(train_images, class_names=("a", "b", "c")),
        replace(train_images, labels=train_images.labels.flip(0)),
        replace(train_images, images=CachedImages(train_images.images.path, np.arange(21)[::-1].copy())),
        replace(train_images, images=train_images.images[:]),
        load(size=11).train,
    ]
    assert len({images.fingerprint for images in others}) == len(others)
    before = train_images.fingerprint
    train_images.labels[0] = 2
    assert train_images.fingerprint != before
    draw(tree / "train" / "n01" / "n01_0.JPEG", 7)  # another picture of nearly the same size
    assert load().train.fingerprint not in {images.fingerprint for images in others}


def test_the_fingerprint_touches_no_pixel(load, monkeypatch):
    data = load().train
    _ = data.images.shape
    monkeypatch.setattr(CachedImages, "__getitem__", None)
    assert len(data.fingerprint) == 16


def test_what_fits_can_be_loaded_into_memory(load):
    data = load(in_memory=True, views=None, padding=1, flip=True)
    assert type(data.train) is ImageSet
    assert data.train.images.equal(load().train.images[:])
    assert data.train.resolve_views(None) == 18
    assert data.train.mean == load().train.mean


# --- the interface of images in memory -------------------------------------------------------------------------------


def test_a_batch_holds_the_views_that_its_numbers_name(load):
    data = load().train
    indices, views = torch.tensor([3, 0, 20, 3]), torch.tensor([1, 0, 2**31 - 1, 5])
    (batch,) = data.load([indices], [views])
    assert batch.images.shape == (4, 3, 8, 8)
    assert batch.labels.tolist() == [0, 0, 2, 0]
    assert batch.indices is indices
    assert batch.views is views
    for k, (index, view) in enumerate(zip(indices.tolist(), views.tolist(), strict=True)):
        seen = VIEWS.apply(data.images[index], VIEWS.parameters(view, index))
        assert batch.images[k].equal(data.normalize(seen.permute(2, 0, 1)[None])[0])
    assert data.batch(indices, views).equal(batch.images)
    assert data.example.equal(data.batch(torch.tensor([0]), torch.tensor([0])))
    assert data.format["shape"] == [8, 8, 3]
    assert (len(data), data.classes, data.channels) == (21, 3, 3)
    assert data.to("cpu") is data


def test_views_are_numbered_without_end(load, tmp_path, monkeypatch):
    monkeypatch.setattr(artefacts, "check_room", None)  # 2**31 views would fill any disk
    data = load().train
    assert [data.resolve_views(views) for views in (None, 1, np.int64(400))] == [MOST, 1, 400]
    for views in (0, True, 1.5, MOST + 1):
        with pytest.raises(ValueError, match=f"views is {views}"):
            data.resolve_views(views)
    with pytest.raises(ValueError, match="views is None: expected a number"):
        load_or_generate(tmp_path / "outputs", nn.Identity(), data, None)


def test_the_number_of_workers_changes_nothing(load):
    made = []
    for workers in (0, 1, 2):
        data = load(workers=workers, views=replace(VIEWS, mixup=True))
        torch.manual_seed(3)
        model = kdlib.build(Dropout, 3, 3)
        recipe = Recipe(epochs=2, batch_size=5, learning_rate=0.1, seed=5)
        history = train(model, data.train, F.cross_entropy, recipe, validation=data.validation, **quiet, device="cpu")
        made.append((weights(model), history.loss, predict_logits(model, data.test, batch_size=2, device="cpu")))
    for trained, losses, logits in made[1:]:
        assert trained.equal(made[0][0])
        assert losses == made[0][1]
        assert logits.equal(made[0][2])


def test_reading_leaves_the_global_generator_alone(load):
    for workers in (0, 1):
        data = load(workers=workers).train
        state = torch.get_rng_state()
        list(batches(data, 8, generator=torch.Generator().manual_seed(0)))
        assert torch.get_rng_state().equal(state)


def test_a_pass_within_a_pass_and_one_that_is_given_up(load):
    data = load(workers=1).train
    numbers = torch.arange(21).split(3), torch.zeros(21, dtype=torch.int64).split(3)
    expected = [batch.images for batch in data.load(*numbers)]
    inner = []
    for k, batch in enumerate(data.load(*numbers)):
        assert batch.images.equal(expected[k])
        inner += [other.images for other in data.load(*numbers)] if k == 2 else []
    assert all(map(torch.equal, inner, expected))
    next(data.load(*numbers))  # given up after the first batch
    assert not data._loader._busy  # its workers are free
    assert all(map(torch.equal, (batch.images for batch in data.load(*numbers)), expected))


def test_the_same_network_comes_of_images_in_memory(load, image_set):
    """With one view, streamed images are images in memory whose pixels are the clean views."""
    data = load(views=SeededViews(8)).train
    clean = data.pixels(torch.arange(21), torch.zeros(21, dtype=torch.int64))
    in_memory = ImageSet("photos/train", clean, data.labels, data.class_names, data.mean, data.std)
    made = []
    for images in (data, in_memory):
        model = kdlib.build("digits_cnn", 3, 3)
        recipe = Recipe(epochs=2, batch_size=5, learning_rate=0.05, views=1)
        history = train(model, images, F.cross_entropy, recipe, **quiet, device="cpu")
        made.append((weights(model), history.loss, torch.from_numpy(generate(model, images, 1, **quiet, device="cpu"))))
    assert made[0][0].equal(made[1][0])
    assert made[0][1] == made[1][1]
    assert made[0][2].equal(made[1][2])


@pytest.mark.parametrize("mixup", [False, True])
def test_soft_labels_are_what_the_live_teacher_says_of_the_same_views(load, toy_teacher, tmp_path, mixup):
    data = load(views=replace(VIEWS, mixup=mixup)).train
    teacher = toy_teacher(replace(data, images=data.images[:]))
    soft_labels = load_or_generate(tmp_path / "outputs", teacher, data, 4, **quiet, device="cpu")
    live = LiveTeacher(teacher)
    for batch in batches(data, 7, views=4, generator=torch.Generator().manual_seed(0)):
        assert torch.allclose(soft_labels(batch), live(batch), atol=0.02, rtol=1e-3)  # float16
    recipe = Recipe(epochs=1, batch_size=7, learning_rate=0.05, views=4)
    loss = partial(distillation_loss, temperature=2.0, alpha=0.3)
    student = kdlib.build(Dropout, 3, 3)
    train(student, data, loss, recipe, targets=soft_labels, **quiet, device="cpu")
    with pytest.raises(ValueError, match="the soft labels are of photos/train"):
        train(student, replace(data, views=SeededViews(8)), loss, recipe, targets=soft_labels, **quiet, device="cpu")
    with pytest.raises(ValueError, match=r"would see 2147483648 views, the soft labels hold 4"):
        train(student, data, loss, replace(recipe, views=None), targets=soft_labels, **quiet, device="cpu")


def test_mixup_blends_images_and_labels(load):
    views = SeededViews(8, mixup=True)
    data = load(views=views).train
    indices, drawn = torch.tensor([3, 3, 19]), torch.tensor([0, 1, 2])
    (batch,) = data.load([indices], [drawn])
    for k, (index, view) in enumerate(zip(indices.tolist(), drawn.tolist(), strict=True)):
        partner, share = mixup_pair(view, index, 21)
        one, other = (views.apply(data.images[i], views.parameters(view, i)) for i in (index, partner))
        expected = blend(one, other, share) if view else one
        assert batch.images[k].equal(data.normalize(expected.permute(2, 0, 1)[None])[0])
        labels = torch.zeros(3)
        labels[data.labels[index]] += share
        labels[data.labels[partner]] += 1 - share
        assert torch.allclose(batch.labels[k], labels)
    assert batch.views is drawn  # soft labels are looked up for the blend


def test_images_travel_to_a_process_by_their_path(load):
    data = load().train
    sent = pickle.dumps(data._prepared)
    assert len(sent) < 2_000
    numbers = np.array([1, 2]), np.array([0, 9])
    assert pickle.loads(sent)[numbers].equal(data._prepared[numbers])


def test_a_process_takes_no_file_that_took_the_place_of_its_own(tree, load, tmp_path):
    images = load().train.images
    sent = pickle.dumps(images)
    assert pickle.loads(sent)[0].equal(images[0])
    other = shutil.copytree(tree, tmp_path / "other" / "photos")
    draw(other / "train" / "n01" / "n01_0.JPEG", 7)
    load(other)
    again = pickle.loads(sent)
    with pytest.raises(ValueError, match=r"photos-train-10.npy is another file than when it was opened"):
        again[0]
    with pytest.raises(ValueError, match="it belongs to images with"):
        images.mean_and_std()


def test_an_error_in_a_worker_says_what_it_is_about(tree):
    (tree / "train" / "n02" / "n02_1.JPEG").write_bytes(b"no picture")
    source = find_sources(tree, "photos")["train"]
    with pytest.raises(ValueError, match=r"n02_1.JPEG is not an image that can be read"):
        cache_images(source, tree.parent / "cache" / "photos.npy", 8, workers=1, **quiet)


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit on a process's memory")
def test_ten_times_the_allowed_memory_is_trained_on(tmp_path):
    command = [sys.executable, "-m", "tests.larger", "--megabytes", "200", "--limit", "20", "--folder", str(tmp_path)]
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    options = {"cwd": root, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["grown_mb"] < 20
    done = subprocess.run([*command, "--in-memory"], **options)
    assert "Unable to allocate" in done.stderr  # the limit is one: what does not stream fails
