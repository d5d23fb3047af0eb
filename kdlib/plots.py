"""Every figure and table of the book. Each function returns what it drew, and a notebook's last line shows it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

# Okabe and Ito's palette, told apart with any colour vision; each network keeps its colour through the book
TEACHER, ALONE, DISTILLED = "#0072B2", "#D55E00", "#009E73"
PALETTE = (TEACHER, ALONE, DISTILLED, "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F")
# from a dot to its name, in points; the better places first
BESIDE = ((5, 4), (5, -11), (-5, 4), (-5, -11), (5, 14), (5, -21), (-5, 14), (-5, -21))
STYLE = {
    "figure.dpi": 110,
    "savefig.dpi": 110,
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


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markdown:
    """A table; columns of figures are right-aligned, the first and those that hold words left-aligned."""
    columns = list(zip(*rows, strict=True)) or [()] * len(header)
    sides = [":--" if n == 0 or not all(map(_is_figure, column)) else "--:" for n, column in enumerate(columns)]
    lines = [header, sides, *rows]
    return Markdown("\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines))


def _is_figure(cell: object) -> bool:
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
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained", **kw)
    plt.close(figure)  # so that it is shown once, as the cell's result
    return figure, axes


def _picture(axes, image: np.ndarray) -> None:
    """One image (H, W, C) uint8; grey ones dark on light, as ink on paper."""
    if image.shape[2] == 1:
        axes.imshow(255 - image[..., 0], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
    else:
        axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set(visible=True, color="#999999", linewidth=0.6)


def image_grid(
    images, titles: Sequence[str] = (), *, columns: int = 10, row_names: Sequence[str] = (),
    size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Images (N, H, W, C) uint8 in a grid, each under its title."""
    rows = -(-len(images) // columns)
    height = 0.95 if titles else 0.75
    figure, axes = _figure(rows, columns, size or (0.75 * columns, height * rows + 0.1))
    for place, ax in enumerate(axes.flat):
        if place >= len(images):
            ax.set_axis_off()
            continue
        _picture(ax, np.asarray(images[place]))
        if place < len(titles):
            ax.set_title(titles[place], fontsize=8)
    for row, name in enumerate(row_names):
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=9)
    return figure


def bars(
    names: Sequence[str],
    groups: Mapping[str, Sequence[float]],
    ylabel: str,
    *,
    errors: Mapping[str, Sequence[float]] | None = None,
    colors: Sequence[str] = PALETTE,
    bottom: float | None = None,
    size: tuple[float, float] = (7, 3),
) -> Figure:
    """Bars side by side: one cluster a name, one colour a group; `errors` are drawn as whiskers."""
    figure, axes = _figure(size=size)
    ax, width = axes[0, 0], 0.8 / len(groups)
    for number, (group, values) in enumerate(groups.items()):
        x = np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width
        error = errors.get(group) if errors else None
        ax.bar(x, values, width * 0.92, yerr=error, label=group, color=colors[number], capsize=2)
    ax.set(xticks=range(len(names)), ylabel=ylabel)
    ax.set_xticklabels(
        names,
        rotation=30 if max(map(len, names)) > 6 else 0,
        ha="right" if max(map(len, names)) > 6 else "center",
    )
    ax.grid(axis="x", visible=False)
    if bottom is not None:
        ax.set_ylim(bottom=bottom)
    if len(groups) > 1:
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def lines(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float] | np.ndarray],
    xlabel: str,
    ylabel: str,
    *,
    colors: Sequence[str] = PALETTE,
    log_x: bool = False,
    log_y: bool = False,
    ylim: tuple[float | None, float | None] | None = None,
    marks: Mapping[str, float] | None = None,
    size: tuple[float, float] = (7, 3),
) -> Figure:
    """Curves over `x`. A curve of shape (seeds, len(x)) is drawn as its mean with a band of one standard deviation.

    `marks` are vertical lines at positions of `x`, each under its name.
    """
    figure, axes = _figure(size=size)
    ax = axes[0, 0]
    for number, (name, values) in enumerate(curves.items()):
        values = np.atleast_2d(np.asarray(values, float))
        color = colors[number % len(colors)]
        dashes = ("-", "--", ":", "-.")[number % 4]  # so that colour is not all that tells the curves apart
        mean = values.mean(0)
        ax.plot(
            x,
            mean,
            label=name,
            color=color,
            linestyle=dashes,
            marker="o" if len(x) < 12 else None,
            markersize=4,
        )
        if len(values) > 1:
            spread = values.std(0, ddof=1)
            ax.fill_between(x, mean - spread, mean + spread, color=color, alpha=0.2, linewidth=0)
    for number, (name, position) in enumerate((marks or {}).items()):
        # each name is lower than the last, since two lines may be close
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
    if len(curves) > 1:
        ax.legend(frameon=False)
    return figure


def heatmap(
    values, row_names: Sequence[str], column_names: Sequence[str], *, ylabel: str = "", xlabel: str = "",
    style: str = "{:.2f}", colorbar: str = "", size: tuple[float, float] = (6, 4.5), top: float | None = None,
) -> Figure:  # fmt: skip
    """A matrix as colours with its numbers written in; `top` caps the colour scale."""
    values = np.asarray(values, float)
    figure, axes = _figure(size=size)
    ax = axes[0, 0]
    top = np.nanmax(values) if top is None else top
    shown = ax.imshow(values, cmap="Blues", vmax=top, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if style and np.isfinite(value):
            dark = value > (shown.norm.vmin + shown.norm.vmax) / 2
            ax.text(
                column,
                row,
                style.format(value),
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else "black",
            )
    turned = max(map(len, column_names)) > 4
    ax.set_xticks(
        range(len(column_names)),
        column_names,
        rotation=45 if turned else 0,
        ha="right" if turned else "center",
    )
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
    """How often which value occurs, as a share of each sample, so that samples of any size compare."""
    figure, axes = _figure(size=size)
    ax = axes[0, 0]
    edges = np.histogram_bin_edges(np.concatenate([np.asarray(v, float) for v in samples.values()]), bins)
    for number, (name, values) in enumerate(samples.items()):
        weights = np.full(len(values), 1 / len(values))
        ax.hist(
            values,
            edges,
            weights=weights,
            label=name,
            histtype="stepfilled",
            color=colors[number],
            alpha=0.25,
        )
        ax.hist(values, edges, weights=weights, histtype="step", color=colors[number], linewidth=1.5)
    ax.set(xlabel=xlabel, ylabel="share of images")
    if log_y:
        ax.set_yscale("log")
    if len(samples) > 1:
        ax.legend(frameon=False)
    return figure


def soft_targets(
    images, probabilities: Mapping[str, np.ndarray], class_names: Sequence[str], titles: Sequence[str] = ()
) -> Figure:
    """A row an image: the picture (H, W, C) uint8, then its class probabilities (N, C) once for each name."""
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


def reliability(found: Mapping[str, object], *, size: tuple[float, float] | None = None) -> Figure:
    """Reliability diagrams from :func:`kdlib.evaluate.calibration`: accuracy against confidence, one panel each.

    A dot's area tells how many images its bin holds; a calibrated network's dots lie on the diagonal.
    """
    figure, axes = _figure(1, len(found), size or (2.6 * len(found), 2.9), sharey=True)
    for number, (ax, (name, bins)) in enumerate(zip(axes[0], found.items(), strict=True)):
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
    """A panel a network: each seed's two measurements joined by a line, and `reference` as a dashed level."""
    figure, axes = _figure(1, len(pairs), size or (1.0 + 3.0 * len(pairs), 3.2))
    for ax, (title, (first, second)) in zip(axes[0], pairs.items(), strict=True):
        aside = 0.03 * (np.arange(len(first)) - (len(first) - 1) / 2)  # so that equal figures do not hide each other
        for dx, a, b in zip(aside, first, second, strict=True):
            ax.plot([dx, 1 + dx], [a, b], color="#BBBBBB", linewidth=1, zorder=1)
        for x, values, color in ((0, first, ALONE), (1, second, DISTILLED)):
            ax.scatter(x + aside, values, color=color, zorder=2)
            ax.plot([x - 0.15, x + 0.15], [np.mean(values)] * 2, color=color, linewidth=2.5, zorder=3)
        for name, level in (reference or {}).items():
            ax.axhline(level, color=TEACHER, linestyle="--", linewidth=1.2)
            ax.annotate(name, (0.5, level), ha="center", va="bottom", fontsize=8, color=TEACHER)
        ax.set(xticks=(0, 1), xlim=(-0.4, 1.4), ylabel=ylabel, title=title)
        ax.set_xticklabels(names)
        ax.grid(axis="x", visible=False)
    return figure


def scatter(
    groups: Mapping[str, Mapping[str, tuple[Sequence[float] | float, Sequence[float] | float]]],
    xlabel: str,
    ylabel: str,
    *,
    colors: Sequence[str] = PALETTE,
    log_x: bool = False,
    joined: bool = False,
    front: Sequence[tuple[float, float]] = (),
    levels: Mapping[str, float] | None = None,
    size: tuple[float, float] = (7, 4),
) -> Figure:
    """Named points: a dot at the means of x and y, whiskers of one standard deviation where there are several.

    A group has a colour and a shape; within it a point is written ``name: (x, y)``, each a number or one a seed.

    Args:
        joined: connect the points of one name across the groups; the name then stands at the last of them.
        front: a staircase through these (x, y), rising from left to right.
        levels: dashed lines at these heights, each with its name.
    """
    figure, axes = _figure(size=size)
    ax, named = axes[0, 0], []
    means = {g: {n: tuple(np.mean(v) for v in xy) for n, xy in points.items()} for g, points in groups.items()}
    for number, (group, points) in enumerate(groups.items()):
        for place, (name, xy) in enumerate(points.items()):
            spread = [np.std(v, ddof=1) if np.size(v) > 1 else 0 for v in xy]
            ax.errorbar(*means[group][name], xerr=spread[0] or None, yerr=spread[1] or None,
                        color=colors[number], fmt="osD^v"[number % 5], markersize=5, elinewidth=1,
                        label=None if place else group)  # fmt: skip
            later = [g for g in list(groups)[number + 1 :] if name in groups[g]]
            if joined and later:
                ends = np.array([means[group][name], means[later[0]][name]])
                ax.plot(*ends.T, color="#BBBBBB", linewidth=1, zorder=1)
            else:
                named.append((name, means[group][name]))
    if len(front):
        ax.step(*zip(*front, strict=True), where="post", color="#555555", linewidth=1, linestyle=":", label="front")
    for level in (levels or {}).values():
        ax.axhline(level, color="#555555", linestyle="--", linewidth=0.8)
    if log_x:
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x < 1000 else EngFormatter(sep="")(x))
        ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.margins(x=0.12)  # room for the names
    if len(groups) > 1 or len(front):
        ax.legend(frameon=False)
    figure.draw_without_rendering()  # so that it is known where everything stands
    at = [ax.transData.transform(xy) for points in means.values() for xy in points.values()]
    around = np.array([[-1, -1], [1, 1]])
    taken = [xy + 4 * around for xy in at]
    whiskers = [segment for bars in ax.collections for segment in bars.get_segments()]
    taken += [np.sort(ax.transData.transform(ends), axis=0) + around for ends in whiskers]
    along = ax.get_yaxis_transform()  # x from 0, the left edge, to 1
    for level in (levels or {}).values():
        taken.append(along.transform([(0, level), (1, level)]) + around)
    for name, level in (levels or {}).items():
        along_it = [(x, level, dx, dy) for x, dx in ((0, 3), (1, -3), (0.3, 3), (0.6, 3)) for dy in (2, -9)]
        _write_beside(ax, name, along_it, taken, xycoords=along, color="#555555")
    for name, xy in named:
        _write_beside(ax, name, [(*xy, dx, dy) for dx, dy in BESIDE], taken)
    return figure


def _write_beside(ax, name: str, places: Sequence[tuple], taken: list[np.ndarray], **how: object) -> None:
    """A name where it covers the least of what is `taken`: boxes ((x0, y0), (x1, y1)) in pixels.

    Args:
        places: to choose from, the better ones first: x, y, and how far from there the name begins or ends, in points.
        how: passed on to ``Axes.annotate``.
    """
    options = []
    for x, y, dx, dy in places:
        side = "left" if dx > 0 else "right"
        text = ax.annotate(name, (x, y), xytext=(dx, dy), textcoords="offset points", fontsize=8, ha=side, **how)
        box = text.get_window_extent().get_points()
        overlap = sum(np.prod(np.clip(np.minimum(box[1], b[1]) - np.maximum(box[0], b[0]), 0, None)) for b in taken)
        options.append((overlap, len(options), text, box))
    _, best, _, box = min(options, key=lambda option: option[:2])
    for _, number, text, _ in options:
        if number != best:
            text.remove()
    taken.append(box)


def results(found: Mapping) -> Figure:
    """The test accuracies of ``results.json``: a row a network, a dot a seed, a bar at the mean."""
    colors = {"teacher": TEACHER, "student": ALONE, "distilled": DISTILLED}
    names = {"teacher": "teacher", "student": "student alone", "distilled": "distilled student"}
    runs = found["runs"]
    figure, axes = _figure(size=(7, 0.9 + 0.5 * len(runs)))
    ax = axes[0, 0]
    for row, run in enumerate(runs):
        accuracy = 100 * np.asarray(run["accuracy"])
        ax.scatter(accuracy, np.full(len(accuracy), row), color=colors[run["role"]], alpha=0.6, linewidth=0)
        ax.plot([accuracy.mean()] * 2, [row - 0.28, row + 0.28], color=colors[run["role"]], linewidth=2.5)
    ax.set_yticks(
        range(len(runs)), [f"{names[r['role']]}\n{r['network']}, {r['parameters']:,} parameters" for r in runs]
    )
    ax.set(xlabel="test accuracy, %", ylim=(len(runs) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return figure


def dots(
    groups: Mapping[str, Mapping[str, Sequence[float]]], xlabel: str, *, colors: Sequence[str] = PALETTE,
    size: tuple[float, float] | None = None,
) -> Figure:  # fmt: skip
    """Named measurements: a row a name, a dot a seed, a bar at the mean, a colour a group; the first name on top."""
    rows = [(number, name, values) for number, group in enumerate(groups.values()) for name, values in group.items()]
    figure, axes = _figure(size=size or (7, 0.9 + 0.28 * len(rows)))
    ax, named = axes[0, 0], set()
    for place, (number, _, values) in enumerate(rows):
        values, group = np.asarray(values, float), list(groups)[number]
        ax.scatter(values, np.full(len(values), place), color=colors[number], alpha=0.5, linewidth=0, s=22)
        label = None if group in named else group
        ax.plot([values.mean()] * 2, [place - 0.3, place + 0.3], color=colors[number], linewidth=2.5, label=label)
        named.add(group)
    ax.set_yticks(range(len(rows)), [name for _, name, _ in rows])
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    if len(groups) > 1:
        ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return figure
