"""Every figure and table of the book. Each function returns what it drew, and a cell's last line shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib.figure
import matplotlib.pyplot as plt
import numpy as np
from IPython.core.pylabtools import print_figure, retina_figure
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from kdlib.evaluate import NAMES, Calibration

# Okabe and Ito's palette, legible with any colour vision; each network keeps its colour through the book
TEACHER, ALONE, DISTILLED = "#0072B2", "#D55E00", "#009E73"
PALETTE = (TEACHER, ALONE, DISTILLED, "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
DPI = 110  # pixels per inch at which a figure is shown
# from a dot to its label, in points; the better positions first
LABEL_OFFSETS = ((5, 4), (5, -11), (-5, 4), (-5, -11), (5, 14), (5, -21), (-5, 14), (-5, -21))
STYLE = {
    "figure.dpi": DPI,
    "savefig.dpi": DPI,
    "figure.facecolor": "white",  # opaque, so that the figure is legible on a dark page too
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.prop_cycle": plt.cycler(color=PALETTE),
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "image.interpolation": "nearest",
}


class Figure(matplotlib.figure.Figure):
    """A figure that a notebook shows as SVG, or as PNG of twice the resolution if it holds photographs.

    It publishes itself, so that this needs no configuration of the kernel. Saved to a file it is like any other.
    """

    photographs = False

    def _ipython_display_(self) -> None:
        plain, metadata = {"text/plain": repr(self)}, {}
        if self.photographs:
            image, size = retina_figure(self, base64=True)
            # no height, since an image that is too wide for the page could not keep its proportions
            metadata["image/png"] = {"width": size["width"]}
            display({"image/png": image, **plain}, metadata=metadata, raw=True)
            return
        # Letters are drawn as outlines, since labels are placed by the widths of this font. The same figure gives the
        # same bytes: no date, and no random names of its parts.
        with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "kdlib"}):
            image = print_figure(self, fmt="svg", dpi=2 * DPI, metadata={"Date": None, "Creator": None})
        # its size in pixels, not in points of 1/72 inch
        image = re.sub(r'(width|height)="([\d.]+)pt"', lambda m: f'{m[1]}="{float(m[2]) * DPI / 72:g}"', image, count=2)
        display({"image/svg+xml": image, **plain}, raw=True)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markdown:
    """A table; columns of figures are right-aligned, the first and those of words left-aligned."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    sides = [":--" if n == 0 or not all(map(_is_number, column)) else "--:" for n, column in enumerate(columns)]
    lines = [header, sides, *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))


def _is_number(cell: object) -> bool:
    """Whether a cell is short and begins with a number, or is empty or a dash."""
    return len(str(cell)) < 25 and re.match(r"[*~<+±−–-]*\s*(\d|$)", str(cell)) is not None


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same for a terminal, in columns; the first two left-aligned."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(w) if n < 2 else cell.rjust(w) for n, (cell, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def _figure(rows: int = 1, columns: int = 1, size: tuple[float, float] = (7, 3), **kw) -> tuple[Figure, np.ndarray]:
    """A figure of `size` inches, and its axes (rows, columns)."""
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows, columns, figsize=size, squeeze=False, layout="constrained", FigureClass=Figure, **kw
        )
    plt.close(figure)  # otherwise the notebook would show it a second time
    return figure, axes


def _single(size: tuple[float, float]) -> tuple[Figure, Axes]:
    figure, axes = _figure(size=size)
    return figure, axes[0, 0]


def _legend(ax: Axes, entries: int, **position: object) -> None:
    if entries > 1:
        ax.legend(frameon=False, **position)


def _picture(ax: Axes, image: np.ndarray) -> None:
    """One image (H, W, C) uint8; grey ones dark on light, like ink on paper."""
    if image.shape[2] == 1:
        ax.imshow(255 - image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        ax.imshow(image, interpolation="nearest")
    ax.set(xticks=[], yticks=[])
    ax.grid(False)
    for spine in ax.spines.values():
        spine.set(visible=True, color="#999999", linewidth=0.6)
    ax.figure.photographs = True


def image_grid(
    images, titles: Sequence[str] = (), *, columns: int = 10, row_names: Sequence[str] = (),
    size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Images (N, H, W, C) uint8 in a grid, each under its title."""
    rows = -(-len(images) // columns)
    height = 0.95 if titles else 0.75
    figure, axes = _figure(rows, columns, size or (0.75 * columns, height * rows + 0.1))
    for number, ax in enumerate(axes.flat):
        if number >= len(images):
            ax.set_axis_off()
            continue
        _picture(ax, np.asarray(images[number]))
        if number < len(titles):
            ax.set_title(titles[number], fontsize=8)
    for row, name in enumerate(row_names):
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def bars(
    names: Sequence[str], groups: Mapping[str, Sequence[float]], ylabel: str, *,
    errors: Mapping[str, Sequence[float]] | None = None, colors: Sequence[str] = PALETTE,
    bottom: float | None = None, size: tuple[float, float] = (7, 3),
) -> Figure:  # fmt: skip
    """Bars side by side: one cluster per name, one colour per group; `errors` are drawn as whiskers."""
    figure, ax = _single(size)
    width = 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        error = errors.get(group) if errors else None
        ax.bar(x, values, width * 0.92, yerr=error, label=group, color=colors[number], capsize=2)
    ax.set(xticks=range(len(names)), ylabel=ylabel)
    long = max(map(len, names)) > 6
    ax.set_xticklabels(names, rotation=30 if long else 0, ha="right" if long else "center")
    ax.grid(axis="x", visible=False)
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    _legend(ax, len(groups), loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def lines(
    x: Sequence[float], curves: Mapping[str, Sequence[float] | np.ndarray], xlabel: str, ylabel: str, *,
    colors: Sequence[str] = PALETTE, log_x: bool = False, log_y: bool = False,
    ylim: tuple[float | None, float | None] | None = None, marks: Mapping[str, float] | None = None,
    size: tuple[float, float] = (7, 3),
) -> Figure:  # fmt: skip
    """Curves over `x`. A curve of shape (seeds, len(x)) is drawn as its mean with a band of one standard deviation.

    `marks` are named vertical lines at these x.
    """
    figure, ax = _single(size)
    for number, (name, values) in enumerate(curves.items()):
        values = np.atleast_2d(np.asarray(values, float))
        color = colors[number % len(colors)]
        dashes = ("-", "--", ":", "-.")[number % 4]  # so that the curves differ by more than their colour
        mean, marker = values.mean(0), "o" if len(x) < 12 else None
        ax.plot(x, mean, label=name, color=color, linestyle=dashes, marker=marker, markersize=4)
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    for number, (name, position) in enumerate((marks or {}).items()):
        # each name is lower than the one before, since two lines may be close
        ax.axvline(position, color="#555555", linewidth=0.8, linestyle=":")
        ax.annotate(name, (position, 1), xycoords=("data", "axes fraction"), xytext=(3, -10 - 11 * number),
                    textcoords="offset points", fontsize=8, color="#555555")  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if log_x:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if log_y:
        ax.set_yscale("log")
    if ylim is not None:
        ax.set_ylim(ylim)  # after the scale; without limits Matplotlib chooses them
    _legend(ax, len(curves))
    return figure


def heatmap(
    values, row_names: Sequence[str], column_names: Sequence[str], *, ylabel: str = "", xlabel: str = "",
    style: str = "{:.2f}", colorbar: str = "", size: tuple[float, float] = (6, 4.5), top: float | None = None,
    bottom: float | None = None,
) -> Figure:  # fmt: skip
    """A matrix as colours, each with its number in the format `style`; `top` and `bottom` end the colour scale."""
    values = np.asarray(values, float)
    figure, ax = _single(size)
    top = np.nanmax(values) if top is None else top
    shown = ax.imshow(values, cmap="Blues", vmin=bottom, vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if style and np.isfinite(value):
            color = "white" if value > (shown.norm.vmin + shown.norm.vmax) / 2 else "black"
            ax.text(column, row, style.format(value), ha="center", va="center", fontsize=8, color=color)
    long = max(map(len, column_names)) > 4
    ax.set_xticks(range(len(column_names)), column_names, rotation=45 if long else 0, ha="right" if long else "center")
    ax.set_yticks(range(len(row_names)), row_names)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(False)
    if colorbar:
        figure.colorbar(shown, label=colorbar, shrink=0.9)
    return figure


def histogram(
    samples: Mapping[str, Sequence[float]], xlabel: str, *, bins: int = 30, log_y: bool = False,
    colors: Sequence[str] = PALETTE, size: tuple[float, float] = (7, 3),
) -> Figure:  # fmt: skip
    """How often each value occurs, as a share of its sample, so that samples of any size compare."""
    figure, ax = _single(size)
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, float) for v in samples.values()]), bins)
    for number, (name, values) in enumerate(samples.items()):
        weights, color = np.full(len(values), 1 / len(values)), colors[number]
        ax.hist(values, edges, weights=weights, label=name, histtype="stepfilled", color=color, alpha=0.25)
        ax.hist(values, edges, weights=weights, histtype="step", color=color, linewidth=1.5)
    ax.set(xlabel=xlabel, ylabel="share of images")
    if log_y:
        ax.set_yscale("log")
    _legend(ax, len(samples))
    return figure


def soft_targets(
    images, probabilities: Mapping[str, np.ndarray], class_names: Sequence[str], titles: Sequence[str] = ()
) -> Figure:
    """One row per image: the picture (H, W, C) uint8, then for each name its class probabilities, of (N, C)."""
    figure, axes = _figure(
        len(images), 1 + len(probabilities), (7.5, 1.15 * len(images) + 0.6),
        width_ratios=[1] + [2.6] * len(probabilities), sharex="col",
    )  # fmt: skip
    for row, image in enumerate(images):
        _picture(axes[row, 0], np.asarray(image))
        if row < len(titles):
            axes[row, 0].set_ylabel(titles[row], rotation=0, ha="right", va="center", fontsize=9)
        for column, (name, values) in enumerate(probabilities.items(), start=1):
            ax = axes[row, column]
            share = np.asarray(values[row], float)
            colors = [ALONE if c == share.argmax() else TEACHER for c in range(len(share))]
            ax.bar(range(len(share)), share, color=colors)
            ax.set(ylim=(0, 1), yticks=(0, 0.5, 1), xticks=range(len(class_names)))
            ax.set_xticklabels(class_names, rotation=90 if max(map(len, class_names)) > 2 else 0, fontsize=8)
            ax.tick_params(axis="y", labelsize=7)
            ax.grid(axis="x", visible=False)
            if row == 0:
                ax.set_title(name, fontsize=10)
    return figure


def reliability(calibrations: Mapping[str, Calibration], *, size: tuple[float, float] | None = None) -> Figure:
    """Reliability diagrams from :func:`kdlib.evaluate.calibration`: accuracy against confidence, one panel each.

    The area of a dot is proportional to the images in its bin; a calibrated network's dots lie on the diagonal.
    """
    figure, axes = _figure(1, len(calibrations), size or (2.6 * len(calibrations), 2.9), sharey=True)
    for number, (ax, (name, bins)) in enumerate(zip(axes[0], calibrations.items(), strict=True)):
        ax.plot([0, 1], [0, 1], color="#999999", linewidth=0.8)
        ax.scatter(bins.confidence, bins.accuracy, s=8 + 300 * bins.count / bins.count.sum(),
                   color=PALETTE[number], alpha=0.7, linewidth=0, clip_on=False)  # fmt: skip
        ticks = (0, 0.25, 0.5, 0.75, 1)
        ax.set(xlim=(0, 1), ylim=(0, 1), title=name, xlabel="confidence", aspect="equal", xticks=ticks, yticks=ticks)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
    axes[0, 0].set_ylabel("accuracy")
    return figure


def paired(
    names: tuple[str, str], pairs: Mapping[str, tuple[Sequence[float], Sequence[float]]], ylabel: str,
    *, reference: Mapping[str, float] | None = None, size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """One panel per network: the two measurements of each seed joined by a line; `reference` as dashed lines."""
    figure, axes = _figure(1, len(pairs), size or (1.0 + 3.0 * len(pairs), 3.2))
    for ax, (title, (first, second)) in zip(axes[0], pairs.items(), strict=True):
        shift = 0.03 * (np.arange(len(first)) - (len(first) - 1) / 2)  # so that equal values do not hide each other
        for dx, a, b in zip(shift, first, second, strict=True):
            ax.plot([dx, 1 + dx], [a, b], color="#BBBBBB", linewidth=1, zorder=1)
        for x, values, color in ((0, first, ALONE), (1, second, DISTILLED)):
            ax.scatter(x + shift, values, color=color, zorder=2)
            ax.plot([x - 0.15, x + 0.15], [np.mean(values)] * 2, color=color, linewidth=2.5, zorder=3)
        for name, level in (reference or {}).items():
            ax.axhline(level, color=TEACHER, linestyle="--", linewidth=1.2)
            ax.annotate(name, (0.5, level), ha="center", va="bottom", fontsize=8, color=TEACHER)
        ax.set(xticks=(0, 1), xlim=(-0.4, 1.4), ylabel=ylabel, title=title)
        ax.set_xticklabels(names)
        ax.grid(axis="x", visible=False)
    return figure


def scatter(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float] | float, Sequence[float] | float]]], xlabel: str,
    ylabel: str, *, colors: Sequence[str] = PALETTE, log_x: bool = False, joined: bool = False,
    front: Sequence[tuple[float, float]] = (), levels: Mapping[str, float] | None = None,
    size: tuple[float, float] = (7, 4),
) -> Figure:  # fmt: skip
    """Labelled points: a dot at the means of x and y, with whiskers of one standard deviation if there are several.

    A group has a colour and a shape; within it a point is given as ``name: (x, y)``, each a number or one per seed.

    Args:
        joined: connect the points of one name across the groups; only the last of them is labelled.
        front: a staircase through these (x, y), rising from left to right.
        levels: dashed lines at these heights, each with its name.
    """
    figure, ax = _single(size)
    labels, levels = [], levels or {}
    means = {g: {n: tuple(np.mean(v) for v in xy) for n, xy in points.items()} for g, points in groups.items()}
    for number, (group, points) in enumerate(groups.items()):
        for rank, (name, xy) in enumerate(points.items()):
            spread = [np.std(v, ddof=1) if np.size(v) > 1 else 0 for v in xy]
            ax.errorbar(*means[group][name], xerr=spread[0] or None, yerr=spread[1] or None,
                        color=colors[number], fmt="osD^v"[number % 5], markersize=5, elinewidth=1,
                        label=None if rank else group)  # fmt: skip
            later = [g for g in list(groups)[number + 1 :] if name in groups[g]]
            if joined and later:
                ends = np.array([means[group][name], means[later[0]][name]])
                ax.plot(*ends.T, color="#BBBBBB", linewidth=1, zorder=1)
            else:
                labels.append((name, means[group][name]))
    if len(front):
        ax.step(*zip(*front, strict=True), where="post", color="#555555", linewidth=1, linestyle=":", label="front")
    for level in levels.values():
        ax.axhline(level, color="#555555", linestyle="--", linewidth=0.8)
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1000 else EngFormatter(sep="")(x))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.12)  # room for the labels
    _legend(ax, len(groups) + len(front))
    _label_points(ax, labels, levels, [xy for points in means.values() for xy in points.values()])
    return figure


def _label_points(
    ax: Axes, labels: Sequence[tuple[str, tuple]], levels: Mapping[str, float], dots: Sequence[tuple[float, float]]
) -> None:
    """Write `labels` (name, (x, y)) and the names of `levels` where they cover no dot, whisker or line, if possible."""
    ax.figure.draw_without_rendering()  # positions in pixels are known only then
    around = np.array([[-1, -1], [1, 1]])
    occupied = [ax.transData.transform(xy) + 4 * around for xy in dots]
    whiskers = [segment for bars in ax.collections for segment in bars.get_segments()]
    occupied += [np.sort(ax.transData.transform(ends), axis=0) + around for ends in whiskers]
    along = ax.get_yaxis_transform()  # x from 0, the left edge, to 1
    occupied += [along.transform([(0, level), (1, level)]) + around for level in levels.values()]
    for name, level in levels.items():
        options = [(x, level, dx, dy) for x, dx in ((0, 3), (1, -3), (0.3, 3), (0.6, 3)) for dy in (2, -9)]
        _place_label(ax, name, options, occupied, xycoords=along, color="#555555")
    for name, xy in labels:
        _place_label(ax, name, [(*xy, dx, dy) for dx, dy in LABEL_OFFSETS], occupied)


def _place_label(ax: Axes, name: str, options: Sequence[tuple], occupied: list[np.ndarray], **settings: object) -> None:
    """Write a label where it overlaps least with the boxes ((x0, y0), (x1, y1)) `occupied`, in pixels; append its own.

    Args:
        options: where it may be, the better ones first: x, y, and from there to where the label begins or ends, in
            points.
        settings: passed on to ``Axes.annotate``.
    """
    tried = []
    for x, y, dx, dy in options:
        side = "left" if dx > 0 else "right"
        text = ax.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, ha=side, **settings)
        box = text.get_window_extent().get_points()
        overlap = sum(np.prod(np.clip(np.minimum(box[1], b[1]) - np.maximum(box[0], b[0]), 0, None)) for b in occupied)
        tried.append((overlap, len(tried), text, box))
    best = min(tried, key=lambda option: option[:2])
    for option in tried:
        if option is not best:
            option[2].remove()
    occupied.append(best[3])


def results(content: Mapping) -> Figure:
    """The test accuracies in the content of ``results.json``: a row per network, a dot per seed, a bar at the mean."""
    colors, runs = {"teacher": TEACHER, "student": ALONE, "distilled": DISTILLED}, content["runs"]
    figure, ax = _single((7, 0.9 + 0.5 * len(runs)))
    for row, run in enumerate(runs):
        accuracy = 100 * np.asarray(run["accuracy"])
        ax.scatter(accuracy, np.full(len(accuracy), row), color=colors[run["role"]], alpha=0.6, linewidth=0)
        ax.plot([accuracy.mean()] * 2, [row - 0.28, row + 0.28], color=colors[run["role"]], linewidth=2.5)
    names = [f"{NAMES[run['role']]}\n{run['network']}, {run['parameters']:,} parameters" for run in runs]
    ax.set_yticks(range(len(runs)), names)
    ax.set(xlabel="test accuracy, %", ylim=(len(runs) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return figure


def dots(
    groups: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, *, colors: Sequence[str] = PALETTE,
    size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Named measurements, a row each, the first on top: a dot per seed, a bar at the mean, a colour per group."""
    rows = [(number, name, values) for number, group in enumerate(groups.values()) for name, values in group.items()]
    figure, ax = _single(size or (7, 0.9 + 0.28 * len(rows)))
    in_legend = set()
    for row, (number, _, values) in enumerate(rows):
        values, group = np.asarray(values, float), list(groups)[number]
        ax.scatter(values, np.full(len(values), row), color=colors[number], alpha=0.5, linewidth=0, s=22)
        label = None if group in in_legend else group
        ax.plot([values.mean()] * 2, [row - 0.3, row + 0.3], color=colors[number], linewidth=2.5, label=label)
        in_legend.add(group)
    ax.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    _legend(ax, len(groups), loc="upper left", bbox_to_anchor=(1, 1))
    return figure
