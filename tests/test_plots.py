"""Every figure renders, small and without a warning, and shows what it was given; tables are Markdown."""

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import matplotlib.pyplot as plt
import nbclient
import nbformat
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from kdlib import evaluate, plots
from kdlib.evaluate import calibration

RANDOM = np.random.RandomState(0)
GREY = RANDOM.randint(0, 256, (12, 8, 8, 1)).astype(np.uint8)
COLOUR = RANDOM.randint(0, 256, (12, 32, 32, 3)).astype(np.uint8)
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DIGITS = [str(d) for d in range(10)]
SHARES = RANDOM.dirichlet(np.ones(10), 6)
LOGITS = torch.from_numpy(3 * RANDOM.randn(500, 10))
BINS = calibration(LOGITS, torch.from_numpy(RANDOM.randint(0, 10, 500)))

FIGURES = {
    "a grid of grey images": lambda: plots.image_grid(GREY, [f"title {n}" for n in range(12)]),
    "a grid of colour images": lambda: plots.image_grid(torch.from_numpy(COLOUR), columns=4, row_names=["a", "b", "c"]),
    "bars": lambda: plots.bars(CLASSES, {"train": range(10)}, "images"),
    "bars in groups": lambda: plots.bars(
        DIGITS, {"one": range(10), "two": SHARES[0]}, "share", errors={"one": [0.1] * 10}, bottom=0
    ),
    "lines": lambda: plots.lines([1, 2, 4, 8], {"norm": [1, 2, 3, 4]}, "T", "norm", log_x=True, log_y=True),
    "lines with bands": lambda: plots.lines(
        range(40),
        {"alone": RANDOM.rand(5, 40), "distilled": RANDOM.rand(5, 40), "teacher": RANDOM.rand(40)},
        "epoch",
        "accuracy",
        ylim=(0, None),
        marks={"warm-up ends": 4},
    ),
    "a heatmap": lambda: plots.heatmap(SHARES @ SHARES.T, CLASSES[:6], CLASSES[:6], colorbar="similarity", top=0.3),
    "a heatmap with gaps": lambda: plots.heatmap(
        np.where(np.eye(10), np.nan, 0.5), DIGITS, DIGITS, ylabel="y", xlabel="x"
    ),
    "a histogram": lambda: plots.histogram({"train": RANDOM.rand(100)}, "entropy"),
    "two histograms": lambda: plots.histogram({"a": RANDOM.rand(100), "b": RANDOM.rand(50)}, "entropy", log_y=True),
    "soft targets": lambda: plots.soft_targets(COLOUR[:6], {"T = 1": SHARES, "T = 4": SHARES}, CLASSES, CLASSES[:6]),
    "soft targets of digits": lambda: plots.soft_targets(GREY[:2], {"T = 1": SHARES}, DIGITS),
    "a reliability diagram": lambda: plots.reliability({"teacher": BINS, "alone": BINS, "distilled": BINS}),
    "pairs": lambda: plots.paired(
        ("alone", "distilled"), {"tiny_cnn": ([0.96, 0.97], [0.98, 0.99])}, "accuracy", reference={"teacher": 0.995}
    ),
    "results": lambda: plots.results(
        {
            "runs": [
                {"role": "teacher", "network": "resnet50", "parameters": 23_520_842, "accuracy": [0.96]},
                {"role": "student", "network": "cnn", "parameters": 816_202, "accuracy": [0.91, 0.92]},
                {"role": "distilled", "network": "cnn", "parameters": 816_202, "accuracy": [0.93, 0.94]},
            ]
        }
    ),
    "named points": lambda: plots.scatter(
        {"alone": {"a": (10, [0.9, 0.8]), "b": (100, 0.95)}, "distilled": {"a": (10, [0.95, 0.9])}},
        "parameters",
        "accuracy",
        log_x=True,
        joined=True,
        front=[(10, 0.92), (100, 0.95)],
        levels={"teacher": 0.99},
    ),
    "named points with two spreads": lambda: plots.scatter({"": {"a": ([0.9, 0.8], [0.7, 0.8])}}, "x", "y"),
    "rows of dots": lambda: plots.dots({"labels": {"hard": [0.95]}, "teacher": {"soft": [0.97, 0.98]}}, "accuracy"),
    "pairs of two networks": lambda: plots.paired(
        ("alone", "distilled"), {"a": ([0.96], [0.98]), "b": ([0.9, 0.8], [0.95, 0.9])}, "accuracy"
    ),
}


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_renders_to_a_small_png_without_a_warning(name):
    figure = FIGURES[name]()
    assert isinstance(figure, Figure)
    assert plt.get_fignums() == []  # a notebook would show an open figure a second time
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    assert file.getvalue().startswith(b"\x89PNG")
    assert 3_000 < len(file.getvalue()) < 150_000


@pytest.fixture
def published(monkeypatch):
    """What figures publish to a notebook: a list of (bundle, metadata)."""
    bundles = []
    monkeypatch.setattr(plots, "display", lambda bundle, *, raw, metadata=None: bundles.append((bundle, metadata)))
    return bundles


def photographs(name: str) -> bool:
    return name.startswith(("a grid", "soft targets"))


@pytest.mark.parametrize("name", [name for name in FIGURES if not photographs(name)])
def test_a_notebook_shows_a_figure_as_a_small_svg_of_the_size_of_its_png(name, published):
    figure = FIGURES[name]()
    figure._ipython_display_()
    ((bundle, metadata),) = published
    assert bundle.keys() == {"image/svg+xml", "text/plain"}
    assert bundle["text/plain"] == repr(figure)
    assert not metadata
    image = bundle["image/svg+xml"]
    assert 5_000 < len(image) < 150_000
    root = ElementTree.fromstring(image)
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    height, width = plt.imread(io.BytesIO(file.getvalue()), format="png").shape[:2]
    assert (float(root.get("width")), float(root.get("height"))) == pytest.approx((width, height), abs=8)
    assert root.get("viewBox")  # so that it keeps its proportions when it is scaled
    assert "<text" not in image  # outlines: the reader's machine needs no font
    assert "dc:date" not in image


@pytest.mark.parametrize("name", [name for name in FIGURES if photographs(name)])
def test_a_notebook_shows_photographs_as_png_of_twice_the_resolution(name, published):
    figure = FIGURES[name]()
    figure._ipython_display_()
    ((bundle, metadata),) = published
    assert bundle.keys() == {"image/png", "text/plain"}
    assert bundle["text/plain"] == repr(figure)
    assert len(bundle["image/png"]) < 300_000
    width = plt.imread(io.BytesIO(base64.b64decode(bundle["image/png"])), format="png").shape[1]
    assert metadata == {"image/png": {"width": width // 2}}
    file = io.BytesIO()
    figure.savefig(file, format="png", bbox_inches="tight")
    assert width // 2 == pytest.approx(plt.imread(io.BytesIO(file.getvalue()), format="png").shape[1], abs=2)


@pytest.mark.parametrize("name", ["lines", "a heatmap", "named points", "soft targets of digits"])
def test_the_same_figure_is_published_as_the_same_bytes(name, published):
    for _ in range(2):
        RANDOM.seed(5)
        FIGURES[name]()._ipython_display_()
    assert published[0] == published[1]


def test_in_a_notebook_a_figure_is_published_once_and_without_its_own_display_as_plain_png(monkeypatch, tmp_path):
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")  # the kernel of this environment
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    cells = [
        "from kdlib import plots; from IPython.display import display",
        'plots.lines([1, 2], {"a": [1, 2]}, "x", "y")',
        'display(plots.lines([1, 2], {"a": [1, 2]}, "x", "y"))',
        'figure = plots.lines([1, 2], {"a": [1, 2]}, "x", "y")',
        'plots.lines([1, 2], {"a": [1, 2]}, "x", "y");',
        'del plots.Figure._ipython_display_; plots.lines([1, 2], {"a": [1, 2]}, "x", "y")',
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.execute(notebook, kernel_name="python3", extra_arguments=["--log-level=CRITICAL"])
    outputs = [[output.data for output in cell.outputs] for cell in notebook.cells]
    assert [[set(data) for data in cell] for cell in outputs] == [
        [],
        [{"image/svg+xml", "text/plain"}],
        [{"image/svg+xml", "text/plain"}],
        [],
        [],
        [{"image/png", "text/plain"}],
    ]
    assert outputs[1][0]["image/svg+xml"] == outputs[2][0]["image/svg+xml"]
    png = plt.imread(io.BytesIO(base64.b64decode(outputs[5][0]["image/png"])), format="png")
    assert png.shape[:2] == pytest.approx((330, 770), abs=15)  # 7 by 3 inches of 110 pixels


def test_every_public_drawing_function_is_drawn_above():
    drawing = {n for n, f in vars(plots).items() if callable(f) and getattr(f, "__module__", "") == plots.__name__}
    drawing = {n for n in drawing if not n.startswith("_")} - {"Figure", "table", "text_table"}
    drawn = {used for draw in FIGURES.values() for used in draw.__code__.co_names}
    assert drawing <= drawn


def test_the_palette_has_seven_different_colours_and_each_network_keeps_its_own():
    assert len(set(plots.PALETTE)) == 7
    assert plots.PALETTE[:3] == (plots.TEACHER, plots.ALONE, plots.DISTILLED)
    # legible on a white page, and without colour vision: no two of the networks' colours are equally light
    grey = sorted(float(np.dot(to_rgb(color), (0.299, 0.587, 0.114))) for color in plots.PALETTE[:3])
    assert min(np.diff(grey)) > 0.01
    assert grey[-1] < 0.75


def test_a_style_is_used_for_the_figure_alone():
    before = dict(plt.rcParams)
    figure = plots.lines([1, 2], {"a": [1, 2]}, "x", "y")
    assert dict(plt.rcParams) == before
    assert figure.get_facecolor() == (1, 1, 1, 1)  # opaque, for dark pages
    assert not figure.axes[0].spines["top"].get_visible()


def test_curves_are_drawn_as_given_and_differ_by_more_than_colour():
    seeds = np.array([[1.0, 2.0, 3.0], [3.0, 4.0, 7.0]])
    ax = plots.lines([0, 1, 2], {"plain": [5, 6, 7], "seeds": seeds}, "epoch", "loss").axes[0]
    plain, mean = ax.lines
    assert plain.get_ydata().tolist() == [5, 6, 7]
    assert mean.get_ydata().tolist() == [2, 3, 5]
    assert (plain.get_color(), mean.get_color()) == plots.PALETTE[:2]
    assert plain.get_linestyle() != mean.get_linestyle()
    # one standard deviation of (1, 3) is sqrt(2)
    (band,) = ax.collections
    at_zero = [y for x, y in band.get_paths()[0].vertices if x == 0]
    assert (min(at_zero), max(at_zero)) == pytest.approx((2 - 2**0.5, 2 + 2**0.5))
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["plain", "seeds"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("epoch", "loss")


def test_bars_are_as_high_as_their_values():
    ax = plots.bars(["a", "b"], {"one": [1, 2], "two": [3, 4]}, "y").axes[0]
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 3, 4]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    assert centres == pytest.approx([-0.2, 0.8, 0.2, 1.2])  # each cluster around its name


def test_a_heatmap_writes_its_numbers_and_leaves_gaps_empty():
    ax = plots.heatmap([[0.25, np.nan], [0.5, 1.0]], ["a", "b"], ["c", "d"]).axes[0]
    assert sorted(text.get_text() for text in ax.texts) == ["0.25", "0.50", "1.00"]
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


def test_histograms_of_samples_of_different_size_compare():
    ax = plots.histogram({"many": [0.1] * 90 + [0.9] * 10, "few": [0.9] * 5}, "x", bins=4).axes[0]
    tops = [patch.get_xy()[:, 1].max() for patch in ax.patches[::2]]
    assert tops == pytest.approx([0.9, 1.0])


def test_a_pair_is_joined_and_its_networks_keep_their_colours():
    ax = plots.paired(("alone", "distilled"), {"net": ([0.5, 0.7], [0.6, 0.9])}, "accuracy").axes[0]
    heights = [(line.get_color(), list(line.get_ydata())) for line in ax.lines]
    named = {color: values for color, values in heights if color in plots.PALETTE}
    assert [values for color, values in heights if color not in plots.PALETTE] == [[0.5, 0.6], [0.7, 0.9]]
    assert named[plots.ALONE] == pytest.approx([0.6, 0.6])  # the means
    assert named[plots.DISTILLED] == pytest.approx([0.75, 0.75])


def test_the_likeliest_class_of_a_soft_target_has_its_own_colour():
    figure = plots.soft_targets(GREY[:1], {"T = 1": np.array([[0.2, 0.7, 0.1]])}, ["a", "b", "c"])
    bars = figure.axes[1].patches
    assert [bar.get_height() for bar in bars] == [0.2, 0.7, 0.1]
    assert [bar.get_facecolor()[:3] for bar in bars] == [to_rgb(c) for c in (plots.TEACHER, plots.ALONE, plots.TEACHER)]


def test_grey_images_are_drawn_dark_on_light_and_the_grid_has_room_for_all():
    axes = plots.image_grid(GREY[:7], columns=3).axes
    assert len(axes) == 9
    shown = [ax.images[0].get_array() for ax in axes if ax.images]
    assert len(shown) == 7
    np.testing.assert_array_equal(shown[0], 255 - GREY[0, ..., 0])


def test_the_results_name_every_role_as_the_table_of_results_does():
    runs = [{"role": role, "network": "cnn", "parameters": 1000, "accuracy": [0.9]} for role in evaluate.NAMES]
    labels = [label.get_text() for label in plots.results({"runs": runs}).axes[0].get_yticklabels()]
    assert labels == [f"{name}\ncnn, 1,000 parameters" for name in evaluate.NAMES.values()]


def test_a_table_is_markdown_with_its_first_column_on_the_left():
    table = plots.table(["", "accuracy"], [["teacher", "99.60 %"], ["student", 7]])
    assert table.data.split("\n") == [
        "|  | accuracy |",
        "| :-- | --: |",
        "| teacher | 99.60 % |",
        "| student | 7 |",
    ]
    assert all(re.fullmatch(r"\|.*\|.*\|", line) for line in table.data.split("\n"))


def test_a_labelled_point_is_at_its_means_and_is_labelled_once():
    groups = {"alone": {"a": (10, [0.9, 0.8]), "b": (100, 0.5)}, "distilled": {"a": (10, [0.95, 0.85])}}
    ax = plots.scatter(groups, "parameters", "accuracy", joined=True, front=[(10, 0.9), (100, 0.95)]).axes[0]
    dots = [line.get_xydata() for line in ax.lines if line.get_marker() in ("o", "s")]
    np.testing.assert_allclose(np.concatenate(dots), [[10, 0.85], [100, 0.5], [10, 0.9]])
    joins = [line.get_xydata() for line in ax.lines if line.get_color() == "#BBBBBB"]
    np.testing.assert_allclose(joins, [[[10, 0.85], [10, 0.9]]])
    assert [text.get_text() for text in ax.texts] == ["b", "a"]
    np.testing.assert_allclose([text.xy for text in ax.texts], [(100, 0.5), (10, 0.9)])
    (stairs,) = (line for line in ax.lines if line.get_label() == "front")
    np.testing.assert_allclose(stairs.get_xydata(), [[10, 0.9], [100, 0.95]])
    assert ax.get_legend_handles_labels()[1].count("alone") == 1


def test_labels_keep_off_levels_and_whiskers():
    points = {"left": (1, [0.1, 0.5]), "name": (2, 0.5), "right": (3, [0.1, 0.5])}
    ax = plots.scatter({"": points}, "x", "y", levels={"the name of a level": 0.515}).axes[0]
    height = ax.get_yaxis_transform().transform((0, 0.515))[1]
    boxes = {text.get_text(): text.get_window_extent() for text in ax.texts}
    assert not boxes["name"].y0 < height < boxes["name"].y1
    ends = [ax.transData.transform((x, 0.3))[0] for x in (1, 3)]  # whiskers from 0.02 to 0.58, on both sides
    assert ends[0] < boxes["the name of a level"].x0 < boxes["the name of a level"].x1 < ends[1]


def test_rows_of_dots_are_beside_their_names_with_a_bar_at_the_mean():
    groups = {"labels": {"hard": [0.95]}, "teacher": {"soft": [0.96, 0.98], "softer": [1.0]}}
    ax = plots.dots(groups, "accuracy").axes[0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["hard", "soft", "softer"]
    placed = [row.get_offsets().tolist() for row in ax.collections]
    assert placed == [[[0.95, 0]], [[0.96, 1], [0.98, 1]], [[1.0, 2]]]
    np.testing.assert_allclose([bar.get_xdata()[0] for bar in ax.lines], [0.95, 0.97, 1.0])
    assert ax.get_legend_handles_labels()[1] == ["labels", "teacher"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first name on top


@pytest.mark.parametrize(
    ("cells", "side"),
    [
        (["99.60 %", 7], "--:"),
        (["**+1.76**", "–", ""], "--:"),
        (["-0.28 to 1.2", "−3", "± 0.4", "1,200"], "--:"),
        (["cnn", "7"], ":--"),
        (["holds", "not seen here"], ":--"),
        (["`cnn`"], ":--"),
        (["+0.16 ± 0.81 points (n = 5)"], ":--"),
    ],
)
def test_a_column_of_numbers_is_right_aligned(cells, side):
    table = plots.table(["", "column"], [["row", cell] for cell in cells])
    assert table.data.splitlines()[1] == f"| :-- | {side} |"


def test_text_table_stands_in_columns():
    assert plots.text_table(["", "network", "ms"], [["teacher", "cnn", "10.25"], ["x", "resnet18", "3"]]) == (
        "         network      ms\n-----------------------\nteacher  cnn       10.25\nx        resnet18      3"
    ).replace("-" * 23, "-" * 24)
