"""The reader's own images: strange folders, any data set asked by index, views that fit, images without labels."""

import re
import signal
import subprocess
import sys
import tracemalloc
import warnings
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import strange
import torch
from PIL import Image

import kdlib
from kdlib import LiveTeacher, Recipe, SoftLabels, distillation_loss, generate
from kdlib.datasets import data_folder, from_dataset, load_data
from kdlib.lab import train_many

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.fixture(autouse=True)
def never_for_long():
    """A reading that hangs ends in an error."""

    def too_long(*_):
        raise TimeoutError("reading took more than 60 seconds")

    signal.signal(signal.SIGALRM, too_long)
    signal.alarm(60)
    yield
    signal.alarm(0)


def content(images) -> Counter:
    pairs = zip(images.images, images.labels.tolist(), strict=True)
    return Counter((image.numpy().tobytes(), label) for image, label in pairs)


def truth(pairs) -> Counter:
    return Counter((np.ascontiguousarray(pixels).tobytes(), label) for pixels, label in pairs)


# --- folders -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", strange.KINDS, ids=lambda kind: kind.__name__)
def test_a_strange_folder_is_read_as_it_is_or_refused_with_the_reason(kind, tmp_path, contents):
    folder = strange.Folder(tmp_path / "photos")
    expected = kind(folder)
    before = contents(tmp_path)
    if isinstance(expected, str):
        with pytest.raises(ValueError, match=expected):
            load_data(folder.root, **folder.options)
    else:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            data = load_data(folder.root, **folder.options)
        assert data.train.class_names == folder.names
        read, held_out = content(data.train), content(data.validation)
        if "test" in folder.truth:
            assert content(data.test) == truth(folder.truth["test"])
        else:
            read += content(data.test)
        if "validation" in folder.truth:
            assert held_out == truth(folder.truth["validation"])
        else:
            read += held_out
        assert read == truth(folder.truth["train"])
        said = " ".join(str(warning.message) for warning in warned)
        assert re.search(expected["warning"] if expected else "^$", said)
    assert contents(tmp_path) == before


def test_what_was_read_is_said_in_one_line(tmp_path, capsys):
    folder = strange.Folder(tmp_path / "photos")
    strange.thumbs_and_notes(folder)
    strange.finder_copy(folder)
    strange.eight_bits_of_grey(folder)
    load_data(folder.root)
    assert capsys.readouterr().out == (
        "photos: 23 training images (cat 12, dog 11); 2 validation images held out; 6 test images; 2 classes; "
        "10x8 pixels, 3 channels; 30 RGB, 1 L; skipped: 1 hidden, 5 no pictures (.csv, .db, .json, .md, …)\n"
    )


# --- any data set that is asked by index ---------------------------------------------------------------------------


class Plain(torch.utils.data.Dataset):
    """(image, label) by index."""

    def __init__(self, images, labels, **attributes):
        self.images, self.labels = images, labels
        self.__dict__.update(attributes)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return self.images[k], self.labels[k]


class Rows(Plain):
    """Mappings by index, as Hugging Face's data sets give them."""

    def __getitem__(self, k):
        return {"id": k, self.keys[0]: self.images[k], self.keys[1]: self.labels[k]}


PIXELS = np.random.RandomState(0).randint(0, 256, (40, 8, 6, 3)).astype(np.uint8)
LABELS = [k % 2 for k in range(40)]


def splits(make):
    return make(PIXELS[:30], LABELS[:30]), make(PIXELS[30:], LABELS[30:])


class Names:
    names = ("cat", "dog")


AS_THEY_COME = {
    "arrays": lambda x, y: Plain(x, y),
    "PIL": lambda x, y: Plain([Image.fromarray(i) for i in x], y),
    "uint8 tensors": lambda x, y: Plain(torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(y)),
    "ToTensor": lambda x, y: Plain(torch.from_numpy(x).permute(0, 3, 1, 2) / 255, y),
    "NumPy labels": lambda x, y: Plain(x, np.array(y, np.uint8)),
    "float labels": lambda x, y: Plain(x, np.array(y, np.float32)),
    "a list": lambda x, y: list(zip(x, y, strict=True)),
    "rows of image and label": lambda x, y: Rows([Image.fromarray(i) for i in x], y, keys=("image", "label")),
    "rows of img and fine_label": lambda x, y: Rows(x, y, keys=("img", "fine_label")),
    "tensor data set": lambda x, y: torch.utils.data.TensorDataset(
        torch.from_numpy(x).permute(0, 3, 1, 2), torch.tensor(y)
    ),
    "subset": lambda x, y: torch.utils.data.Subset(Plain(x, y), range(len(y))),
}


@pytest.mark.parametrize("make", AS_THEY_COME.values(), ids=AS_THEY_COME)
def test_any_data_set_with_an_index_gives_the_same_images(make):
    wanted = from_dataset(*splits(Plain))
    data = from_dataset(*splits(make))
    assert [split.identity for split in data] == [split.identity for split in wanted]
    assert content(wanted.test) == truth(zip(PIXELS[30:], LABELS[30:], strict=True))
    assert content(wanted.train) + content(wanted.validation) == truth(zip(PIXELS[:30], LABELS[:30], strict=True))


def test_the_names_of_the_classes_are_those_that_the_data_set_has():
    train, test = splits(Plain)
    assert from_dataset(train, test).train.class_names == ("0", "1")
    assert from_dataset(Plain(train.images, train.labels, classes=["cat", "dog"]), test).test.class_names == (
        "cat",
        "dog",
    )
    rows = Rows(train.images, train.labels, keys=("image", "label"), features={"image": None, "label": Names})
    assert from_dataset(rows, test).train.class_names == ("cat", "dog")
    assert from_dataset(rows, test, class_names=["a", "b"], name="pets").train.class_names == ("a", "b")


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        ({1: "dog", 0: "cat"}, ("cat", "dog")),
        ({"dog": 1, "cat": 0}, ("cat", "dog")),
        (np.array(["cat", "dog"]), ("cat", "dog")),
        (2, ("0", "1")),  # a number of classes, as some data sets have it
    ],
)
def test_names_come_in_the_order_of_their_numbers(classes, names):
    train, test = splits(Plain)
    assert from_dataset(Plain(train.images, train.labels, classes=classes), test).train.class_names == names


def test_data_sets_that_number_their_classes_differently_are_refused():
    train, test = (Plain(one.images, one.labels) for one in splits(Plain))
    train.classes, test.classes = ["cat", "dog"], ["dog", "cat"]
    with pytest.raises(ValueError, match="class 0 is 'cat' in train and 'dog' in test: expected the same classes"):
        from_dataset(train, test)
    test.classes = ["cat"]
    with pytest.raises(ValueError, match="class 1 is 'dog' in train and 'nothing' in test"):
        from_dataset(train, test)
    assert from_dataset(train, test, class_names=["a", "b"]).train.class_names == ("a", "b")
    with pytest.raises(ValueError, match=r"own: the classes are numbered \[1, 2\]: expected 0 to 1"):
        from_dataset(train, test, class_names={1: "a", 2: "b"})


def test_splits_in_grey_and_in_colour_become_alike():
    train = splits(Plain)[0]
    grey = Plain(PIXELS[30:, ..., 0], LABELS[30:])
    assert from_dataset(train, grey).test.channels == 3
    opaque = np.concatenate([PIXELS[30:], np.full_like(PIXELS[30:, ..., :1], 255)], axis=3)
    data = from_dataset(train, Plain(opaque, LABELS[30:]))
    assert data.test.identity == from_dataset(train, Plain(PIXELS[30:], LABELS[30:])).test.identity


def test_a_file_that_is_missing_is_named_with_the_index_of_its_item():
    class Lazily(Plain):
        def __getitem__(self, k):
            return Image.open("nowhere/7.png"), 0

    with pytest.raises(ValueError, match=r"own/train\[0\]: .*nowhere/7\.png"):
        from_dataset(Lazily(PIXELS, LABELS), [])
    with pytest.raises(ValueError, match=r"own/train\[0\]: there is no 0"):
        from_dataset({"train": 1}, [])


def test_a_label_beyond_all_images_is_refused_before_memory_is_filled():
    train, test = splits(AS_THEY_COME["a list"])
    train[3] = (PIXELS[3], 2**30)
    with pytest.raises(ValueError, match=r"own: a label is 1,073,741,824, and there are 40 images"):
        from_dataset(train, test)


def test_a_picture_that_is_a_line_takes_little_memory(tmp_path):
    Image.new("RGB", (60_000, 1)).save(tmp_path / "line.png")
    tracemalloc.start()
    kdlib.sources.pictures.read_picture(tmp_path / "line.png", 224)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6


def test_a_mixture_of_images_without_labels_has_no_labels():
    batch = kdlib.data.Batch(torch.rand(4, 1, 2, 2), torch.tensor([0, -1, 1, -1]), torch.arange(4), None)
    mixed = kdlib.data.mixup(batch, 1.0, 2, torch.Generator().manual_seed(0))
    assert mixed.labels[[1, 3]].isnan().all()


def test_grey_pictures_among_those_in_colour_become_colour():
    train, test = splits(Plain)
    pictures = [Image.fromarray(i) for i in train.images]
    for first, later in ((True, False), (False, True)):
        mixed = [p.convert("L") if first == (k < 15) and first != later else p for k, p in enumerate(pictures)]
        assert from_dataset(Plain(mixed, train.labels), test).train.channels == 3
    grey = Plain([p.convert("L") for p in pictures], train.labels)
    assert from_dataset(grey, Plain(PIXELS[30:, ..., 0], LABELS[30:])).train.channels == 1


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ((PIXELS[0] / 100, 0), r"own/train\[7\]: floats from 0\S* to 2\.\d+: expected a range from 0 to 1"),
        ((PIXELS[0], "cat"), r"own/train\[7\]: its label is 'cat': expected a whole number"),
        ((PIXELS[0], 0.5), r"own/train\[7\]: its label is 0\.5: expected a whole number"),
        ((PIXELS[0], True), r"own/train\[7\]: its label is True: expected a whole number"),
        ((PIXELS[0, :5], 0), r"own/train\[7\] is \(5, 6, 3\), expected .*\(8, 6, 3\) like the others: give a size"),
        ((PIXELS[0].reshape(-1), 0), r"own/train\[7\]: its image is uint8 \(144,\)"),
        ((PIXELS[0].astype(int) - 1, 0), r"own/train\[7\]: its image is int64: expected whole numbers to 255"),
        (PIXELS[0], r"own/train\[7\]: it is a ndarray: expected \(image, label\)"),
        ({"picture": PIXELS[0]}, r"own/train\[7\]: it has picture: expected an image under image, img"),
    ],
)
def test_an_item_that_is_something_else_is_refused_with_its_index(item, message):
    train, test = splits(AS_THEY_COME["a list"])
    train[7] = item
    with pytest.raises(ValueError, match=message):
        from_dataset(train, test)


def test_a_stream_is_refused():
    with pytest.raises(TypeError, match=r"own/train is a list_iterator: expected a data set with len\(\) and an index"):
        from_dataset(iter([]), [])
    with pytest.raises(ValueError, match="own/train is empty"):
        from_dataset([], [])


def test_images_of_many_sizes_are_resized_and_cropped():
    def make(x, y):
        return [
            (Image.fromarray(np.ascontiguousarray(i[: 4 + k % 5])), label)
            for k, (i, label) in enumerate(zip(x, y, strict=True))
        ]

    assert from_dataset(*splits(make), size=5).train.images.shape[1:] == (5, 5, 3)
    assert from_dataset(*splits(Plain), size=4).train.images.shape[1:] == (4, 4, 3)


# --- memory, paths, options ----------------------------------------------------------------------------------------

MEMORY = """
import resource, sys
import numpy as np
import kdlib

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

class Lazy:
    def __len__(self):
        return 500
    def __getitem__(self, k):
        return np.random.RandomState(k).randint(0, 256, (224, 224, 3)).astype(np.uint8), k % 10

few = [(np.full((224, 224, 3), k, np.uint8), k % 10) for k in range(20)]
kdlib.from_dataset(few, few[::-1][:10], name="warm")
before = peak()
if sys.argv[1] == "index":
    kdlib.from_dataset(Lazy(), few)
else:
    kdlib.load_data(sys.argv[1])
print((peak() - before) / (500 * 224 * 224 * 3))
"""


@pytest.mark.parametrize("kind", ["index", "npz"])
def test_reading_takes_less_than_two_and_a_half_times_the_memory_of_the_images(kind, tmp_path):
    path = kind
    if kind == "npz":
        path = tmp_path / "photos.npz"
        images, labels = (
            np.random.RandomState(0).randint(0, 256, (500, 224, 224, 3)).astype(np.uint8),
            np.arange(500) % 10,
        )
        np.savez(path, train_images=images, train_labels=labels, test_images=images[:10], test_labels=labels[:10])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", MEMORY, str(path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout.split()[-1]) < 2.5


def test_a_path_is_a_path_even_if_a_known_set_has_its_name(tmp_path, monkeypatch):
    folder = strange.Folder(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    for path in (Path("digits"), "./digits", str(folder.root), folder.root):
        assert load_data(path).train.class_names == strange.CLASSES
    assert load_data("digits").train.classes == 10
    monkeypatch.chdir(folder.root)
    for path in (".", Path(), Path("../digits")):
        assert load_data(path).train.name == "digits/train"


def test_without_a_home_the_environments_folder_will_do(monkeypatch, tmp_path):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    assert data_folder() == tmp_path / "data"
    monkeypatch.delenv("KDLIB_DATA")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert data_folder() == tmp_path / "kdlib"


def test_views_fit_the_images_and_can_be_chosen(tmp_path):
    folder = strange.Folder(tmp_path / "photos").root  # 8 pixels high
    plain = load_data(folder).train
    assert (plain.padding, plain.flip) == (1, False)
    chosen = load_data(folder, padding=np.int64(2), flip=np.bool_(True), limit=np.int32(4)).train
    assert (chosen.padding, chosen.flip, len(chosen)) == (2, True, 4)
    assert len(load_data(folder, padding=0).train.view_table) == 1
    for options, message in (
        ({"padding": 3}, r"padding is 3: expected a whole number of pixels from 0 to 2, a quarter of the shorter side"),
        ({"padding": 1.5}, r"padding is 1\.5: expected a whole number"),
        ({"flip": "yes"}, r"flip is 'yes': expected True or False"),
        ({"size": 1}, r"size is 1: expected a whole number of pixels from 2 to 8,192"),
        ({"size": True}, r"size is True: expected a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            load_data(folder, **options)


def test_known_sets_take_options_too():
    small = load_data("digits", size=6, padding=0).train
    assert small.images.shape[1:] == (6, 6, 1)
    assert len(small.view_table) == 1


def test_large_images_have_no_more_views_than_soft_labels_can_hold():
    noise = np.random.RandomState(0).randint(0, 256, (8, 64, 96, 3)).astype(np.uint8)
    data = from_dataset(Plain(noise, [0, 1] * 4), Plain(noise[::-1][:2] // 2, [0, 1]))
    assert len(data.train.view_table) == 81


# --- images without labels -----------------------------------------------------------------------------------------


def test_a_student_learns_from_a_teacher_alone_what_images_without_labels_show(tmp_path, capsys):
    folder = strange.Folder(tmp_path / "photos")
    strange.nothing_labelled_in_train(folder)
    train = load_data(folder.root).train
    assert train.labels.tolist() == [-1] * 5
    assert "5 training images (without a label 5)" in capsys.readouterr().out
    teacher = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, 2))
    logits = torch.from_numpy(generate(teacher, train, 1, progress=False))
    recipe = Recipe(epochs=2, batch_size=5, learning_rate=0.01, views=1)

    def learn(loss_fn, targets=None, recipe=recipe):
        student = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, 2))
        return kdlib.train(student, train, loss_fn, recipe, targets=targets, progress=False)

    soft_labels = SoftLabels(logits, train.identity)
    from_teacher = partial(distillation_loss, temperature=2.0, alpha=0)
    assert learn(from_teacher, soft_labels).loss[-1] > 0
    assert learn(from_teacher, LiveTeacher(teacher), replace(recipe, mixup=1.0)).loss[-1] > 0
    message = r"5 of 5 images of photos/train have no label \(-1\): expected .* alpha=0, which needs none"
    for loss_fn, targets in (
        (torch.nn.functional.cross_entropy, None),
        (partial(distillation_loss, temperature=2.0, alpha=0.1), soft_labels),
    ):
        with pytest.raises(ValueError, match=message):
            learn(loss_fn, targets)
        students = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(240, 2)) for _ in range(2)]
        with pytest.raises(ValueError, match=message):
            train_many(students, train, [loss_fn] * 2, [recipe] * 2, targets=[targets] * 2, progress=False)


def test_a_limit_takes_images_without_labels_too(tmp_path):
    folder = strange.Folder(tmp_path / "photos")
    strange.unlabelled_pictures(folder)
    assert sorted(load_data(folder.root, limit=6).train.labels.tolist()) == [-1, -1, 0, 0, 1, 1]
