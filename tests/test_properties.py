"""Whatever the input: the loss is right to a stated tolerance, and parameters and arrays are valid or refused by name.

Hypothesis chooses the examples, always the same ones.
"""

import itertools
import math
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_images
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from kdlib import Recipe, distillation_loss, load_data, resolve
from kdlib.profiles import PARAMETERS
from kdlib.records import artefacts
from kdlib.sources.arrays import checked, read_npz

pytestmark = pytest.mark.usefixtures("isolated")


def some(number: int):
    """So many examples, the same in every run, however long each takes."""
    return settings(max_examples=number, derandomize=True, deadline=None, database=None)


# --- the loss --------------------------------------------------------------------------------------------------------

EPSILON = torch.finfo(torch.float32).eps


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def reference(student, teacher, labels, temperature, alpha, beta) -> float:
    """The loss in float64, from its definition."""
    log_p, log_q = (log_softmax(z / temperature) for z in (teacher, student))
    soft = (np.exp(log_p) * (log_p - log_q)).sum(1).mean()
    hard = 0.0 if labels is None else -(labels * log_softmax(student)).sum(1).mean()
    return alpha * hard + beta * temperature**2 * soft


def tolerance(largest: float, classes: int, temperature: float, alpha: float, beta: float) -> float:
    """How far float32 may be off: each logarithm of a probability is rounded in its last digits.

    The soft term multiplies that by T squared: at T = 1e4 it is good to some tens only, as the docstring of
    distillation_loss says.
    """
    hard, soft = (1 + math.log(classes) + 2 * largest / t for t in (1, temperature))
    return 8 * EPSILON * (alpha * hard + beta * temperature**2 * soft)


@st.composite
def losses(draw):
    """Logits of any scale, temperature, weights and kind of labels."""
    random = np.random.RandomState(draw(st.integers(0, 10**6)))
    shape = draw(st.tuples(st.integers(1, 6), st.integers(1, 12)))
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    scale = 10 ** draw(st.floats(-3, 4))
    student = torch.from_numpy(random.uniform(-scale, scale, shape)).to(dtype)
    near = draw(st.sampled_from([0.0, 1e-3, 1.0]))  # how far the teacher is from the student
    teacher = student.double() * (1 - near) + near * torch.from_numpy(random.uniform(-scale, scale, shape))
    teacher = teacher.to(dtype)
    kind = draw(st.sampled_from(["none", "indices", "probabilities"]))
    alpha = 0.0 if kind == "none" else draw(st.sampled_from([0.0, 1.0]) | st.floats(1e-3, 1))
    beta = draw(st.one_of(st.none(), st.just(0.0), st.floats(1e-3, 10)))
    labels = {"none": None, "indices": torch.from_numpy(random.randint(0, shape[1], shape[0]))}.get(kind, "x")
    if kind == "probabilities":
        labels = torch.from_numpy(random.dirichlet(np.ones(shape[1]), shape[0]))
    return student, teacher, labels, 10 ** draw(st.floats(-3, 4)), alpha, beta


@given(losses())
@some(300)
def test_the_loss_is_finite_and_right_at_any_scale_and_temperature(case):
    student, teacher, labels, temperature, alpha, beta = case
    student.requires_grad_()
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    assert loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(loss, student)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    classes, weight = student.shape[1], 1 - alpha if beta is None else beta
    s, t = (z.detach().double().numpy() for z in (student, teacher))
    if labels is not None:
        labels = (np.eye(classes)[labels] if labels.ndim == 1 else labels.float().double().numpy()) if alpha else None
    wanted = reference(s, t, labels, temperature, alpha, weight)
    largest = max(abs(s).max(), abs(t).max())
    assert abs(loss.item() - wanted) <= tolerance(largest, classes, temperature, alpha, weight) + 1e-6 * abs(wanted)
    if largest / temperature < 100 and temperature <= 100:  # as in the book: right to a few parts in a thousand
        close = 64 * EPSILON * (1 + weight) * (temperature**2 + largest)
        assert loss.item() == pytest.approx(wanted, rel=2e-3, abs=close)


@given(losses())
@some(100)
def test_in_float64_the_loss_is_right_to_ten_digits_of_its_largest_term(case):
    student, teacher, labels, temperature, alpha, beta = case
    student, teacher = student.double(), teacher.double()
    loss = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    classes, weight = student.shape[1], 1 - alpha if beta is None else beta
    if labels is not None:
        labels = (np.eye(classes)[labels] if labels.ndim == 1 else labels.numpy()) if alpha else None
    wanted = reference(student.numpy(), teacher.numpy(), labels, temperature, alpha, weight)
    largest = max(student.abs().max().item(), teacher.abs().max().item())
    close = tolerance(largest, classes, temperature, alpha, weight) * torch.finfo(torch.float64).eps / EPSILON
    assert abs(loss.item() - wanted) <= 8 * close


@pytest.mark.parametrize("where", ["student", "teacher", "both"])
def test_a_row_that_is_masked_whole_gives_a_loss_that_is_not_finite(where):
    """There is no such distribution: training stops and names the step."""
    logits = {name: torch.randn(3, 4, generator=torch.Generator().manual_seed(1)) for name in ("student", "teacher")}
    for name in logits if where == "both" else [where]:
        logits[name][1] = -math.inf
    loss = distillation_loss(logits["student"], logits["teacher"], None, temperature=4, alpha=0)
    assert not loss.isfinite()


# --- parameters ------------------------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.sampled_from([10**20, -(10**20), 2**32, 2**31, 10**9]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.5, 1.0, 4, 0.1]),
)
OTHERS = st.one_of(
    st.none(), st.booleans(), st.text(max_size=8), st.just([]), st.just({"a": 1}), st.just(b"x"), st.just(1j)
)
ANYTHING = st.one_of(NUMBERS, OTHERS)
WHOLE = ("epochs", "batch_size", "views", "cutout", "seed")
FINITE = NUMBERS.filter(math.isfinite)
FIELDS = tuple(Recipe.__dataclass_fields__)


def attempt(function, *args, **keywords) -> tuple[object, Exception | None]:
    """What a function returns, or the error of the documented kind that it raises."""
    try:
        return function(*args, **keywords), None
    except (ValueError, TypeError) as error:
        return None, error


def names(error: Exception, values: dict) -> bool:
    """Whether a message shows one of the values."""
    shown = [repr(value) for value in values.values()] + [str(value) for value in values.values()]
    shown += [str(float(value)) for value in values.values() if isinstance(value, int)]  # as temperature=4
    return any(text in str(error) for text in shown)


@given(st.fixed_dictionaries({}, optional={name: ANYTHING if name in WHOLE else FINITE for name in FIELDS}))
@some(300)
def test_a_recipe_is_valid_or_names_the_value_that_is_not(values):
    recipe, error = attempt(Recipe, **{"epochs": 2, "batch_size": 4, "learning_rate": 0.1} | values)
    if error:
        assert names(error, values), error
        return
    numbers = [value for value in vars(recipe).values() if value is not None]
    assert all(isinstance(value, (int, float)) and math.isfinite(value) for value in numbers)
    assert recipe.epochs >= 1
    assert recipe.batch_size >= 1
    assert 0 <= recipe.seed < 2**32


@given(
    st.sampled_from(["quick", "laptop", "full"]),
    st.dictionaries(st.sampled_from(PARAMETERS), ANYTHING, min_size=1, max_size=2),
)
@example("quick", {"n_seeds": 10**9})
@example("quick", {"seed": 2**32 - 1})
@example("quick", {"seed": 10**20})
@example("quick", {"size": -1})
@example("quick", {"padding": 1.5})
@example("quick", {"flip": "yes"})
@some(300)
def test_a_profile_is_valid_or_names_the_value_that_is_not(name, values):
    profile, error = attempt(resolve, name, **values)
    torch.set_num_threads(1)  # as conftest.py does; a profile may set another number
    if error:
        assert names(error, values), error
        return
    assert len(profile.seeds) == profile.n_seeds
    assert 0 <= profile.seeds[0] <= profile.search_seeds[-1] < 2**32
    assert math.isfinite(profile.temperature)
    assert profile.folder.parent.name == "outputs"
    assert profile.views is None or profile.views >= 1


@given(
    st.text(max_size=12)
    | st.sampled_from(["x/..", "..", ".", "/", "a/b", "a\\b", "a\0", "-", "a\n", "a" * 200, "~", "é"])
)
@some(150)
def test_a_run_is_a_plain_name_or_refused(run):
    profile, error = attempt(resolve, "quick", run=run, temperature=3.0)
    if error:
        assert repr(run) in str(error)
        return
    assert profile.folder.name.startswith("quick-")
    assert profile.folder.resolve().parent == resolve("quick").folder.parent.resolve()


@given(views=ANYTHING)
@some(100)
def test_views_are_as_many_as_there_are_or_refused(views):
    data = make_images(8)
    found, error = attempt(data.resolve_views, views)
    if error:
        assert repr(views) in str(error)
    else:
        assert 1 <= found <= len(data.view_table) == 9


@given(st.dictionaries(st.sampled_from(["limit", "size", "padding", "flip"]), ANYTHING, min_size=1))
@some(25)
def test_images_are_read_as_asked_for_or_the_option_is_named(values):
    data, error = attempt(load_data, "digits", **values)
    if error:
        assert names(error, values), error
        return
    assert data.train.images.dtype == torch.uint8
    assert min(map(len, data)) > 0


# --- arrays and folders ----------------------------------------------------------------------------------------------

TYPES = ("u1", "i1", "<u2", ">u2", "<i4", ">i8", "<u8", "<f2", ">f4", "<f8", "?", "<c8", "<U3", "S2", "M8[s]", "V3")
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16]), max_size=5).map(tuple)


@st.composite
def arrays(draw, count: int = 16):
    """An array of any type and layout; often of `count` images."""
    dtype = np.dtype(draw(st.sampled_from(TYPES)))
    shape = draw(st.one_of(SHAPES, st.sampled_from([(count, 4, 4), (count, 4, 4, 1), (count, 3, 4, 4), (count,)])))
    random = np.random.RandomState(draw(st.integers(0, 99)))
    high = draw(st.sampled_from([1, 2, 16, 255, 256, 70_000]))
    values = random.randint(-1 if draw(st.booleans()) else 0, high, shape)
    with np.errstate(all="ignore"):
        array = values.astype(dtype) if dtype.kind not in "V" else np.zeros(shape, dtype)
    if draw(st.booleans()) and dtype.kind == "f" and array.size:
        array.flat[0] = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.5]))
    layout = draw(st.sampled_from(["C", "F", "reversed", "every other", "read only", "broadcast"]))
    if layout == "reversed":
        return array[..., ::-1] if array.ndim else array
    if layout == "every other":
        return np.repeat(array, 2, 0)[::2] if array.ndim else array
    if layout == "broadcast" and array.size and array.ndim:
        return np.broadcast_to(array[:1], array.shape)
    array = np.asarray(array, order="F") if layout == "F" else array
    array.flags.writeable = layout != "read only"
    return array


def plain(count: int) -> dict[str, np.ndarray]:
    return {"images": np.arange(count * 16, dtype=np.uint8).reshape(count, 4, 4, 1), "labels": np.arange(count) % 4}


@given(
    st.dictionaries(st.sampled_from([f"{s}_{k}" for s in ("train", "test") for k in ("images", "labels")]), arrays())
)
@some(300)
def test_arrays_become_a_data_set_or_are_refused_by_name(given_):
    whole = {f"{split}_{kind}": array for split in ("train", "test") for kind, array in plain(16).items()} | given_
    before = {name: array.copy() for name, array in whole.items()}
    found, error = attempt(checked, dict(whole), "mine.npz")
    if error:
        assert str(error).startswith("mine.npz: ")
    for split in () if error else ("train", "test"):
        images, labels = found[f"{split}_images"], found[f"{split}_labels"]
        assert (images.dtype, labels.dtype) == (np.uint8, np.int64)
        assert images.ndim == 4
        assert images.flags.c_contiguous
        assert labels.shape == (len(images),)
        assert labels.max() < len(found["class_names"])
    for name, array in whole.items():  # what was given is as it was
        assert array.tobytes() == before[name].tobytes()


@given(arrays(), st.sampled_from(["train_images", "test_labels", "class_names"]))
@some(60)
def test_files_of_odd_arrays_are_read_or_refused_by_name(array, name):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.npz"
        whole = {f"{split}_{kind}": array for split in ("train", "test") for kind, array in plain(16).items()}
        np.savez(path, **whole | {name: array})
        _, error = attempt(read_npz, path)
        assert error is None or "mine.npz" in str(error)
        single = path.with_suffix(".npy")
        np.save(single, array)
        np.testing.assert_array_equal(artefacts.load_array(single), array)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 3), st.sampled_from(["L", "RGB", "RGBA", "1", "I;16", "F", "CMYK", "P", "LAB", "text"])
        )
    )
)
@some(25)
def test_folders_of_odd_pictures_are_read_or_refused_by_name(pictures):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "photos"
        for k, (split, one) in enumerate(itertools.product(("train", "test"), ("cat", "dog"))):
            (folder / split / one).mkdir(parents=True)
            for j in range(3):
                Image.new("L", (4, 4), 60 * k + 10 * j).save(folder / split / one / f"{j}.png")
        places = list(folder.glob("*/*"))
        for k, (place, mode) in enumerate(pictures):
            path = places[place] / f"odd{k}.tif"
            if mode == "text":
                path.write_text("no picture")
            else:
                Image.new(mode, (4, 4)).save(path)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            data, error = attempt(load_data, folder)
        if error:
            assert "photos" in str(error)
        else:
            assert data.train.images.shape[1:] in ((4, 4, 1), (4, 4, 3))
        assert all("photos" in str(warning.message) for warning in said)
