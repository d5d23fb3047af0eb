"""Data sets: their order, their splits, files and folders, and the download against a server on this machine."""

import contextlib
import functools
import gzip
import hashlib
import http.server
import io
import pickle
import re
import socket
import tarfile
import threading

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from kdlib.data import mean_and_std
from kdlib.datasets import DATA_SETS, data_folder, load_data
from kdlib.sources.arrays import read_npz
from kdlib.sources.order import in_canonical_order
from kdlib.sources.splits import Part, stratified

pytestmark = pytest.mark.usefixtures("isolated")


def make_arrays(train: int = 120, test: int = 40, classes: int = 4, size=(6, 8), channels: int = 3) -> dict:
    """The arrays of a data set, all images different, in an order that is not the canonical one."""
    random = np.random.RandomState(0)
    shape = (*size, channels)
    return {
        "train_images": random.randint(0, 256, (train, *shape)).astype(np.uint8),
        "train_labels": (np.arange(train) % classes).astype(np.int64),
        "test_images": random.randint(0, 256, (test, *shape)).astype(np.uint8),
        "test_labels": (np.arange(test) % classes).astype(np.int64),
        "class_names": np.array([f"class {c}" for c in range(classes)]),
    }


def keys(images) -> list[bytes]:
    return [np.asarray(image).tobytes() for image in images]


@pytest.fixture
def toy(tmp_path):
    """The path of a small data set."""
    np.savez(tmp_path / "toy.npz", **make_arrays())
    return tmp_path / "toy.npz"


# --- order ---------------------------------------------------------------------------------------------------------


def test_the_canonical_order_is_that_of_the_images_digests_and_keeps_each_label_with_its_image():
    arrays = make_arrays()
    images, labels = in_canonical_order(arrays["train_images"], arrays["train_labels"])
    digests = [hashlib.sha256(image.tobytes()).digest() for image in images]
    assert digests == sorted(digests)
    before = dict(zip(keys(arrays["train_images"]), arrays["train_labels"], strict=True))
    assert [before[k] for k in keys(images)] == labels.tolist()


def test_the_canonical_order_is_the_same_whatever_the_order_before_and_stays_as_it_is():
    arrays = make_arrays()
    first = in_canonical_order(arrays["train_images"], arrays["train_labels"])
    shuffled = np.random.RandomState(1).permutation(120)
    for images, labels in (first, (arrays["train_images"][shuffled], arrays["train_labels"][shuffled])):
        again = in_canonical_order(images, labels)
        np.testing.assert_array_equal(again[0], first[0])
        np.testing.assert_array_equal(again[1], first[1])


def test_of_equal_images_the_one_with_the_smaller_label_comes_first():
    images = np.zeros((3, 2, 2, 1), np.uint8)
    assert in_canonical_order(images, np.array([2, 0, 1]))[1].tolist() == [0, 1, 2]


def test_a_files_order_does_not_matter(toy, tmp_path):
    arrays, shuffled = make_arrays(), np.random.RandomState(2).permutation(120)
    for name in ("train_images", "train_labels"):
        arrays[name] = arrays[name][shuffled]
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "toy.npz", **arrays)
    for one, other in zip(load_data(toy), load_data(tmp_path / "other" / "toy.npz"), strict=True):
        assert torch.equal(one.images, other.images)
        assert one.fingerprint == other.fingerprint


# --- splits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 4, 9, 30])
def test_no_validation_or_test_image_is_a_training_image(toy, limit):
    train, validation, test = (set(keys(split.images)) for split in load_data(toy, limit=limit))
    assert not train & validation
    assert not (train | validation) & test


def test_a_tenth_of_a_small_training_set_is_held_out_evenly_by_class(toy):
    train, validation, test = load_data(toy)
    assert (len(train), len(validation), len(test)) == (108, 12, 40)
    assert validation.labels.bincount().tolist() == [3, 3, 3, 3]
    assert set(keys(train.images)) | set(keys(validation.images)) == set(keys(make_arrays()["train_images"]))


def test_2500_images_of_a_large_training_set_are_held_out(tmp_path):
    np.savez(tmp_path / "large.npz", **make_arrays(train=26_000, size=(2, 2), channels=1))
    train, validation, _ = load_data(tmp_path / "large.npz")
    assert (len(train), len(validation)) == (23_500, 2_500)
    assert validation.labels.bincount().tolist() == [625] * 4


def test_the_splits_of_the_digits_are_disjoint_stratified_and_complete():
    train, validation, test = load_data("digits")
    assert (len(train), len(validation), len(test)) == (150, 1147, 500)
    assert test.labels.bincount().tolist() == [50] * 10
    counts = validation.labels.bincount()
    assert counts.max() - counts.min() <= 1
    assert (train.classes, train.channels, train.images.shape[1:]) == (10, 1, (8, 8, 1))
    assert train.images.max() == 255
    splits = [set(keys(split.images)) for split in (train, validation, test)]
    assert sum(map(len, splits)) == len(set.union(*splits)) == 1797


def test_every_label_stays_with_its_image(toy):
    arrays = make_arrays()
    for part, splits in (("train", load_data(toy)[:2]), ("test", load_data(toy)[2:])):
        label = dict(zip(keys(arrays[f"{part}_images"]), arrays[f"{part}_labels"].tolist(), strict=True))
        for split in splits:
            assert [label[k] for k in keys(split.images)] == split.labels.tolist()


@pytest.mark.parametrize("limit", [4, 10, 30, 50, 1000])
def test_a_limit_takes_evenly_from_every_class_and_never_moves_an_image_between_splits(toy, limit):
    for whole, part in zip(load_data(toy), load_data(toy, limit=limit), strict=True):
        assert len(part) == min(limit, len(whole))
        assert set(keys(part.images)) <= set(keys(whole.images))
        counts = part.labels.bincount(minlength=4)
        assert counts.max() - counts.min() <= 1


def test_a_larger_limit_contains_a_smaller_one(toy):
    small, large = (set(keys(load_data(toy, limit=limit).train.images)) for limit in (20, 40))
    assert small < large


def test_the_scale_is_that_of_the_training_images_alone(toy):
    data = load_data(toy)
    pixels = data.train.images.numpy().reshape(-1, 3) / 255
    for split in data:
        np.testing.assert_allclose(split.mean, pixels.mean(0), atol=1e-6)
        np.testing.assert_allclose(split.std, pixels.std(0), atol=1e-6)


def test_normalised_training_images_have_mean_zero_and_standard_deviation_one(toy):
    train = load_data(toy).train
    pixels = train.batch(torch.arange(len(train)), torch.zeros(len(train), dtype=torch.int64))
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(pixels.std((0, 2, 3)), torch.ones(3), atol=1e-3, rtol=0)


def test_a_channel_that_never_varies_stays_finite(tmp_path):
    arrays = make_arrays()
    arrays["train_images"][..., 1] = 7
    np.savez(tmp_path / "flat.npz", **arrays)
    data = load_data(tmp_path / "flat.npz").train
    assert torch.isfinite(data.batch(torch.arange(4), torch.zeros(4, dtype=torch.int64))).all()


def exact(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation per channel, from a float64 copy of the images."""
    pixels = images.reshape(-1, images.shape[3]) / 255
    return pixels.mean(0), pixels.std(0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("low", "high"), [(0, 256), (0, 2), (254, 256), (100, 130)])
def test_the_histogram_gives_the_mean_and_standard_deviation_of_the_pixels(channels, low, high):
    images = np.random.RandomState(0).randint(low, high, (50, 7, 5, channels)).astype(np.uint8)
    mean, std = mean_and_std(images)
    assert all(isinstance(value, float) and value == round(value, 6) for value in mean + std)
    for ours, reference in zip((mean, std), exact(images), strict=True):
        np.testing.assert_allclose(ours, reference, atol=6e-7)


def test_the_scale_of_the_digits_is_as_it_was_published():
    train = load_data("digits").train
    assert (train.mean, train.std) == ((0.312843,), (0.379744,))
    assert train.identity == "digits/train 35b85d71ece6e809"


@pytest.mark.parametrize("shade", [0, 7, 85, 255])
def test_a_channel_that_never_varies_has_the_standard_deviation_one(shade):
    images = np.full((30, 3, 3, 1), shade, np.uint8)
    assert mean_and_std(images) == ((round(shade / 255, 6),), (1.0,))


@pytest.mark.parametrize("count", [0, 1, 5, 11, 40])
def test_a_stratified_choice_takes_the_first_of_each_class_and_as_many_of_each(count):
    labels = np.random.RandomState(0).permutation(np.arange(40) % 4)
    chosen = stratified(labels, count, 4)
    assert len(chosen) == count
    assert (np.diff(chosen) > 0).all()
    for c in range(4):
        of_class = chosen[labels[chosen] == c]
        assert len(of_class) - count // 4 in (0, 1)
        np.testing.assert_array_equal(of_class, np.flatnonzero(labels == c)[: len(of_class)])


# --- files -------------------------------------------------------------------------------


def test_the_data_folder_is_the_environments_or_a_cache(monkeypatch, tmp_path):
    assert data_folder() == tmp_path / "data"
    monkeypatch.delenv("KDLIB_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert data_folder() == tmp_path / "cache" / "kdlib"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert data_folder() == tmp_path / ".cache" / "kdlib"


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist"])
def test_if_the_file_is_there_nothing_is_downloaded(name, monkeypatch, tmp_path):
    monkeypatch.setattr(torchvision.datasets.utils, "_urlretrieve", None)
    (tmp_path / "data").mkdir()
    np.savez(tmp_path / "data" / f"{name}.npz", **make_arrays(size=(32, 32)))
    train = load_data(name).train
    assert train.name == f"{name}/train"
    assert (train.padding, train.flip) == DATA_SETS[name][:2]


def test_the_digits_need_no_file(tmp_path):
    load_data("digits")
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize(("name", "hint"), [("cifar11", r"; did you mean 'cifar10'\?"), ("imagenet", "test/<class>/")])
def test_an_unknown_data_set_is_refused_with_the_known_names(name, hint):
    message = rf"data set '{name}' is unknown: expected one of digits, cifar10, .*the path of an \.npz file.*{hint}$"
    with pytest.raises(ValueError, match=message):
        load_data(name)


def test_a_path_that_holds_no_data_set_is_refused_with_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"mine\.npz': no such file or folder; expected one of digits, cifar10"):
        load_data(tmp_path / "mine.npz")
    with pytest.raises(
        FileNotFoundError, match=r"mine': no such file or folder; expected one of digits, .*or of a folder"
    ):
        load_data(tmp_path / "mine")
    (tmp_path / "mine.csv").write_text("1,2")
    with pytest.raises(
        FileNotFoundError, match=r"mine\.csv': neither an \.npz file nor a folder; expected one of digits"
    ):
        load_data(tmp_path / "mine.csv")


def test_a_limit_that_is_no_whole_number_is_refused(toy):
    with pytest.raises(ValueError, match=r"limit is 2\.5: expected a whole number of images per split"):
        load_data(toy, limit=2.5)


@pytest.mark.parametrize("limit", [0, -1, 3])
def test_a_limit_below_one_image_per_class_is_refused(toy, limit):
    with pytest.raises(ValueError, match=rf"limit is {limit}: expected at least 4, one image per class of toy"):
        load_data(toy, limit=limit)


def assert_refused(path, message: str) -> None:
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        load_data(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_a_truncated_file_is_refused_with_what_to_do(toy, save, share):
    save(toy, **make_arrays())
    whole = toy.read_bytes()
    toy.write_bytes(whole[: int(share * len(whole))])
    assert_refused(
        toy, r"toy\.npz is not a data set \(.+\): expected an \.npz file with the arrays.*if it was cut off, delete"
    )


def test_a_file_with_a_changed_byte_is_refused(toy):
    # wherever the byte is, the archive's checksum or the decompression shows it
    arrays = make_arrays()
    arrays["train_images"] //= 64  # few values, so that it is compressed
    np.savez_compressed(toy, **arrays)
    whole = toy.read_bytes()
    for part in range(2, 9):
        damaged = bytearray(whole)
        damaged[len(damaged) // part] ^= 0xFF
        toy.write_bytes(damaged)
        assert_refused(toy, r"toy\.npz is not a data set \(.+\): expected an \.npz file")


def test_a_single_array_is_no_data_set(toy):
    with open(toy, "wb") as file:
        np.save(file, np.zeros(3))
    assert_refused(toy, r"toy\.npz is not a data set \(it is a single array\): expected an \.npz file with the arrays")


def test_python_objects_in_a_file_are_refused_and_not_executed(toy, side_effect):
    np.savez(toy, **{**make_arrays(), "train_labels": np.array([side_effect] * 120, dtype=object)})
    assert_refused(toy, r"toy\.npz is not a data set .*none of them of Python objects")
    assert not side_effect.folder.exists()


def test_a_pickle_under_the_name_of_a_data_set_is_not_executed(toy, side_effect):
    toy.write_bytes(pickle.dumps(side_effect))
    assert_refused(toy, r"toy\.npz is not a data set .*none of them of Python objects")
    assert not side_effect.folder.exists()


def test_missing_arrays_are_named(toy):
    arrays = make_arrays()
    del arrays["test_labels"], arrays["train_images"]
    np.savez(toy, **arrays)
    assert_refused(
        toy,
        r"it has no train_images, test_labels, but train_labels, test_images, class_names\): expected .* train_images",
    )


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_images", lambda a: a / 128, r"train_images is float64 \(120, 6, 8, 3\), with values from 0 to 1.99"),
        ("train_images", lambda a: a.astype(np.int16) - 1, r"train_images is int16 .*, with values from -1 to 254"),
        (
            "train_images",
            lambda a: a.astype(np.uint16) * 257,
            r"train_images is uint16 .*, with values from 0 to 65535",
        ),
        ("train_images", lambda a: np.where(a == 0, np.nan, a / 255), r"train_images is float64 .* from nan to nan"),
        ("train_images", lambda a: a[..., 0, 0], r"train_images is uint8 \(120, 6\), expected \(N, H, W, C\)"),
        ("train_images", lambda a: a.repeat(4, 3), r"train_images is uint8 \(120, 6, 8, 12\), .*1 to 4 channels"),
        ("train_images", lambda a: a.astype(str), r"train_images is <U3 .*, expected uint8, or numbers"),
        ("test_images", lambda a: a[:0], r"test_images is uint8 \(0, 6, 8, 3\), expected .*not empty"),
        ("train_labels", lambda a: np.eye(4)[a], r"train_labels is float64 \(120, 4\), .*of one-hot rows, save argmax"),
        ("train_labels", lambda a: a + 0.5, r"train_labels is float64 \(120,\), expected whole numbers"),
        ("train_labels", lambda a: a * np.nan, r"train_labels is float64 \(120,\), expected whole numbers"),
        ("train_labels", lambda a: a.astype(str), r"train_labels is <U21 \(120,\), expected whole numbers"),
        ("train_labels", lambda a: a == 1, r"train_labels is bool \(120,\), expected whole numbers"),
    ],
)
def test_an_array_that_cannot_be_cast_is_refused_by_name(toy, name, change, message):
    arrays = make_arrays()
    np.savez(toy, **{**arrays, name: change(arrays[name])})
    assert_refused(toy, rf"{re.escape(str(toy))}: {message}.*save the file again")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "test_images",
            lambda a: a[:, :5],
            r"test_images are \(5, 8, 3\), the training images \(6, 8, 3\): expected one",
        ),
        ("train_labels", lambda a: a[:-1], "119 train_labels for 120 train_images: expected one label per image"),
        (
            "class_names",
            lambda a: np.arange(4),
            r"class_names is int64 \(4,\), expected str \(K,\), one name per class",
        ),
        ("class_names", lambda a: a[None], r"class_names is <U7 \(1, 4\), expected str \(K,\), one name per class"),
        ("class_names", lambda a: a[[0, 1, 1, 3]], "class_names has 'class 1' twice: expected a name of its own"),
    ],
)
def test_arrays_that_do_not_fit_each_other_are_refused(toy, name, change, message):
    arrays = make_arrays()
    np.savez(toy, **{**arrays, name: change(arrays[name])})
    assert_refused(toy, rf"{re.escape(str(toy))}: {message}")


AS_OTHERS_WRITE_THEM = {
    "labels uint8": lambda a: {n: a[n].astype(np.uint8) for n in ("train_labels", "test_labels")},
    "labels float": lambda a: {n: a[n].astype(np.float32) for n in ("train_labels", "test_labels")},
    "labels in a column": lambda a: {n: a[n][:, None] for n in ("train_labels", "test_labels")},
    "channels first": lambda a: {n: a[n].transpose(0, 3, 1, 2) for n in ("train_images", "test_images")},
    "int64 pixels": lambda a: {n: a[n].astype(np.int64) for n in ("train_images", "test_images")},
    "whole floats": lambda a: {n: a[n].astype(np.float32) for n in ("train_images", "test_images")},
    "floats to 1": lambda a: {n: a[n].astype(np.float32) / 255 for n in ("train_images", "test_images")},
    "names in bytes": lambda a: {"class_names": a["class_names"].astype("S")},
}


@pytest.mark.parametrize("change", AS_OTHERS_WRITE_THEM.values(), ids=AS_OTHERS_WRITE_THEM)
def test_arrays_as_others_write_them_are_the_same_set(toy, tmp_path, change):
    arrays = make_arrays()
    (tmp_path / "other").mkdir()
    np.savez(tmp_path / "other" / "toy.npz", **{**arrays, **change(arrays)})
    for one, other in zip(load_data(toy), load_data(tmp_path / "other" / "toy.npz"), strict=True):
        assert one.identity == other.identity


def test_keras_and_medmnist_names_are_known_and_their_validation_images_are_used(toy, tmp_path):
    arrays = make_arrays()
    wanted = load_data(toy)
    keras = {"x_train": "train_images", "y_train": "train_labels", "x_test": "test_images", "y_test": "test_labels"}
    np.savez(tmp_path / "toy.npz", **{name: arrays[ours] for name, ours in keras.items()})
    assert torch.equal(load_data(tmp_path / "toy.npz").train.images, wanted.train.images)
    own = make_arrays(train=20)
    more = {"val_images": 255 - own["train_images"], "val_labels": own["train_labels"][:, None]}
    np.savez(tmp_path / "toy.npz", **arrays, **more)
    data = load_data(tmp_path / "toy.npz")
    assert [len(split) for split in data] == [120, 20, 40]
    assert set(keys(data.validation.images)) == set(keys(more["val_images"]))


def test_grey_images_need_no_axis_for_channels_and_classes_no_names(tmp_path):
    arrays = make_arrays(channels=1)
    del arrays["class_names"]
    np.savez(tmp_path / "grey.npz", **{n: a[..., 0] if a.ndim == 4 else a for n, a in arrays.items()})
    data = load_data(tmp_path / "grey.npz")
    assert data.test.images.shape == (40, 6, 8, 1)
    assert data.train.class_names == ("0", "1", "2", "3")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("train_labels", lambda a: a + 1, "train_labels run from 1 to 4, expected 0 to 3: there are 4 class names"),
        ("test_labels", lambda a: a - 1, "test_labels run from -1 to 2, expected 0 to 3: there are 4 class names"),
        ("class_names", lambda a: a[:3], "train_labels run from 0 to 3, expected 0 to 2: there are 3 class names"),
    ],
)
def test_labels_out_of_range_are_refused_with_their_range(toy, name, change, message):
    arrays = make_arrays()
    np.savez(toy, **{**arrays, name: change(arrays[name])})
    assert_refused(toy, f"{message}; number the classes from 0, or name them all")


# --- a folder of images -------------------------------------------------------------------


@pytest.fixture
def image_folder(tmp_path):
    """``photos/train/<class>/*.png`` and ``photos/test/<class>/*.png``, 5x7 pixels, two classes."""
    random = np.random.RandomState(0)
    for split, count in (("train", 10), ("test", 3)):
        for name in ("cat", "dog"):
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.fromarray(random.randint(0, 256, (5, 7, 3)).astype(np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


def test_a_folder_of_class_folders_is_a_data_set(image_folder):
    data = load_data(image_folder)
    assert data.train.name == "photos/train"
    assert data.train.class_names == ("cat", "dog")
    assert [len(split) for split in data] == [18, 2, 6]
    assert data.test.images.shape == (6, 5, 7, 3)
    expected = {
        np.asarray(Image.open(file)).tobytes(): label
        for label, name in enumerate(("cat", "dog"))
        for file in (image_folder / "test" / name).iterdir()
    }
    assert dict(zip(keys(data.test.images), data.test.labels.tolist(), strict=True)) == expected


def test_an_empty_class_is_refused_by_name(image_folder, contents):
    for file in (image_folder / "train" / "dog").iterdir():
        file.unlink()
    (image_folder / "train" / "dog" / "notes.txt").write_text("no image")
    before = contents(image_folder)
    with pytest.raises(ValueError, match=r"photos/train/dog holds no image: remove the folder or add some \(\.jpg"):
        load_data(image_folder)
    assert contents(image_folder) == before


def test_a_class_of_one_split_only_is_refused_by_name(image_folder):
    (image_folder / "test" / "emu").mkdir()
    with pytest.raises(ValueError, match=r"class 'emu' is in test only, expected .* add the missing folder"):
        load_data(image_folder)


def test_a_missing_split_is_refused_with_the_layout(image_folder):
    (image_folder / "test").rename(image_folder / "tests")
    with pytest.raises(
        ValueError, match=r"has no folder test \(it has tests, train\): expected train/<class>/ and test/"
    ):
        load_data(image_folder)


def test_an_image_of_another_size_is_refused_by_name(image_folder):
    Image.new("RGB", (4, 9)).save(image_folder / "test" / "dog" / "odd.png")
    with pytest.raises(ValueError, match=r"dog/odd\.png is 4x9, expected 7x5 like the others: .*size=5, to resize"):
        load_data(image_folder)


@pytest.mark.parametrize("kept", [0, 40, 100])
def test_a_damaged_image_is_refused_by_name(image_folder, kept):
    file = image_folder / "train" / "cat" / "3.png"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ValueError, match=r"cat/3\.png is not an image that can be read \(.+\): replace or remove it"):
        load_data(image_folder)


# --- the download -------------------------------------------------------------------------


@contextlib.contextmanager
def serving(folder, monkeypatch):
    """A web server of the files in `folder` on this machine; gives its address and the paths of the requests."""
    requests: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            requests.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def refusing_address() -> str:
    """The address of a port of this machine at which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{held.getsockname()[1]}/"


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


CIFAR10 = torchvision.datasets.CIFAR10
CIFAR_CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
# newer Pythons warn of how torchvision unpacks archives
tar_warning = pytest.mark.filterwarnings("ignore:Python 3.14 will, by default, filter extracted tar:DeprecationWarning")


@pytest.fixture
def tiny_cifar10(tmp_path, monkeypatch):
    """An archive with CIFAR-10's files, 20 images in each; torchvision expects its checksums."""
    random = np.random.RandomState(0)
    files, images = {}, {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        data = random.randint(0, 256, (20, 3072)).astype(np.uint8)  # rows of all red pixels, then green, blue
        labels = [n % 10 for n in range(20)]
        entry = {"batch_label": name, "labels": labels, "data": data, "filenames": ["x.png"] * 20}
        files[name] = pickle.dumps(entry, protocol=2)
        split = images.setdefault("test" if name == "test_batch" else "train", {})
        split |= {row.reshape(3, 32, 32).transpose(1, 2, 0).tobytes(): n % 10 for n, row in enumerate(data)}
    files["batches.meta"] = pickle.dumps({"label_names": CIFAR_CLASSES, "num_vis": 3072}, protocol=2)
    folder = tmp_path / "served"
    folder.mkdir()
    with tarfile.open(folder / CIFAR10.filename, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5((folder / CIFAR10.filename).read_bytes()))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, part, [[name, md5(files[name])] for name, _ in getattr(CIFAR10, part)])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    return folder, images


@tar_warning
def test_cifar10_is_downloaded_once_and_kept_as_one_file(tiny_cifar10, tmp_path, monkeypatch):
    folder, images = tiny_cifar10
    with serving(folder, monkeypatch) as (address, requests):
        monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
        first = load_data("cifar10")
        assert requests
    monkeypatch.setattr(CIFAR10, "url", refusing_address())
    again = load_data("cifar10")  # from the file
    assert [split.fingerprint for split in again] == [split.fingerprint for split in first]
    assert [len(split) for split in first] == [90, 10, 20]
    assert list(first.train.class_names) == CIFAR_CLASSES
    arrays = read_npz(tmp_path / "data" / "cifar10.npz")
    for part in ("train", "test"):
        labelled = zip(keys(arrays[f"{part}_images"]), arrays[f"{part}_labels"].tolist(), strict=True)
        assert dict(labelled) == images[part]


@pytest.fixture
def tiny_mnist(tmp_path, monkeypatch):
    """MNIST's four files in their idx format, 30 and 10 images; torchvision expects their checksums."""
    random = np.random.RandomState(0)
    folder = tmp_path / "served"
    folder.mkdir()
    resources, images = [], {}
    for split, count in (("train", 30), ("t10k", 10)):
        pixels = random.randint(0, 256, (count, 28, 28)).astype(np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        # idx: two zeros, the type (8: unsigned bytes), how many dimensions, their sizes in big-endian order
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            name = f"{split}-{kind}-ubyte.gz"
            (folder / name).write_bytes(gzip.compress(header + array.tobytes()))
            resources.append((name, md5((folder / name).read_bytes())))
        images["train" if split == "train" else "test"] = dict(zip(keys(pixels), labels.tolist(), strict=True))
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    return folder, images


def test_mnist_is_downloaded_and_its_classes_are_the_digits(tiny_mnist, tmp_path, monkeypatch):
    folder, images = tiny_mnist
    with serving(folder, monkeypatch) as (address, _):
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [address])
        data = load_data("mnist")
    assert data.train.class_names == tuple("0123456789")
    assert data.train.images.shape == (27, 28, 28, 1)
    arrays = read_npz(tmp_path / "data" / "mnist.npz")
    for part in ("train", "test"):
        labelled = zip(keys(arrays[f"{part}_images"]), arrays[f"{part}_labels"].tolist(), strict=True)
        assert dict(labelled) == images[part]


@pytest.mark.parametrize("name", ["cifar10", "mnist"])
def test_if_the_download_is_refused_the_message_names_the_file_that_would_help(name, tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(CIFAR10, "url", refusing_address() + CIFAR10.filename)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [refusing_address()])
    file = tmp_path / "data" / f"{name}.npz"
    message = (
        rf"(?s)data set '{name}': {re.escape(str(file))} is not there, and downloading it failed \(.*refused.*\)\. "
    )
    with pytest.raises(FileNotFoundError, match=message + r".*put the file there.* set KDLIB_DATA to the folder"):
        load_data(name)
    assert not file.exists()


@tar_warning
def test_a_damaged_download_is_refused_and_the_next_attempt_starts_afresh(tiny_cifar10, tmp_path, monkeypatch):
    folder, _ = tiny_cifar10
    archive = folder / CIFAR10.filename
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with serving(folder, monkeypatch) as (address, _):
        monkeypatch.setattr(CIFAR10, "url", address + CIFAR10.filename)
        with pytest.raises(FileNotFoundError, match=r"cifar10\.npz is not there, .*is not what was expected: its md5"):
            load_data("cifar10")
        assert not (tmp_path / "data" / "cifar10.npz").exists()
        archive.write_bytes(whole)
        assert len(load_data("cifar10").train) == 90


def test_a_data_folder_that_cannot_be_written_is_named(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "file" / "data"))
    with pytest.raises(
        FileNotFoundError, match=r"file/data/cifar10\.npz is not there.*Not a directory.*set KDLIB_DATA"
    ):
        load_data("cifar10")
    assert (tmp_path / "file").read_text() == "in the way"


# --- parts of the training images -----------------------------------------------------------------------------------


def of_images(data):
    return {image.numpy().tobytes() for image in data.train.images}


def test_blocks_of_the_training_images_are_disjoint_and_even_and_leave_the_rest_whole():
    whole = load_data("digits")
    blocks = [load_data("digits", limit=Part(30, block)) for block in range(3)]
    for block in blocks:
        counts = block.train.labels.bincount()
        assert counts.max() - counts.min() <= 1
        assert torch.equal(block.test.images, whole.test.images)
        assert torch.equal(block.validation.images, whole.validation.images)
    assert len(set.union(*map(of_images, blocks))) == 90
    assert set.union(*map(of_images, blocks)) < of_images(whole)
    assert torch.equal(blocks[0].train.images, load_data("digits", limit=30).train.images)


@pytest.mark.parametrize("limit", [Part(50, 3), Part(151), Part(9), Part(50, -1)])
def test_a_part_that_is_not_there_is_refused(limit):
    with pytest.raises(ValueError, match=r"limit is Part.*expected"):
        load_data("digits", limit=limit)
