"""The tables of ``tools/bench.py``, and the page of the book that shows them."""

from __future__ import annotations

import json

import render
from notebooks import BOOK

from kdlib import plots
from kdlib.records import artefacts

PAGE = BOOK / "speed.md"
PUBLISHED = BOOK / "published"


def rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of times."""
    header = ["case", "network", "images/s", "s per epoch", "tutorial loop, s", "times as fast"]
    lines = []
    for r in found["cases"]:
        workers = f"{r['tutorial_workers']} worker{'' if r['tutorial_workers'] == 1 else 's'}"
        lines.append(
            [
                r["case"],
                r["network"],
                f"{r['images_a_second']:,.0f}",
                f"{r['seconds_an_epoch']:.3g}",
                f"{r['tutorial_seconds_an_epoch']:.3g} ({workers})",
                f"{r['times_as_fast']:.1f}",
            ]
        )
    return header, lines


def limit_rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of how close that is to the limits of the device."""
    header = ["case", "network", "first epoch, s", "TFLOP/s", "share of a matrix product", "peak memory, GB"]
    lines = []
    for r in found["cases"]:
        memory = "–" if r["peak_memory_gb"] is None else f"{r['peak_memory_gb']:.1f}"
        share = f"{r['share_of_matrix_product']:.0%}"
        lines.append([r["case"], r["network"], f"{r['seconds_before']:.3g}", f"{r['tflops']:.3g}", share, memory])
    return header, lines


def growth_rows(found: dict) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table of how an epoch's time grows with the number of images."""
    header = ["seconds per epoch", "network", *(f"{int(n):,} images" for n in found["cases"][0]["seconds_by_images"])]
    times = ([f"{seconds:.3g}" for seconds in r["seconds_by_images"].values()] for r in found["cases"])
    return header, [[r["case"], r["network"], *own] for r, own in zip(found["cases"], times, strict=True)]


def shown_pair(pair: dict) -> str:
    """What ``tools/bench_pair.py`` measured, in Markdown."""
    theirs = pair["theirs"]
    return (
        f"**A pair that many papers share.** A WRN-16-2 that is distilled from a live WRN-40-2 (100 classes, 32×32 "
        f"pixels, batches of {pair['batch_size']}) takes **{pair['seconds_an_epoch']:.3g} s per epoch** of "
        f"{pair['images']:,} images ({pair['device']}, torch {pair['torch']}, {pair['date']}). The loop of "
        f"[RepDistiller]({theirs['source']}) took {theirs['seconds_an_epoch']:g} s on {theirs['device']}, with its "
        f"defaults (float32, 8 loader workers): {theirs['seconds_an_epoch'] / pair['seconds_an_epoch']:.1f} times as "
        "long."
    )


def shown(found: dict) -> str:
    """The tables in Markdown, with what they were measured on, and the pair if it was measured."""
    batch = found["cases"][0]["batch_size"]
    times, limits, growth = (plots.table(*table(found)).data for table in (rows, limit_rows, growth_rows))
    where = (
        f"{found['device']}, torch {found['torch']}, {found['date']}; batches of {batch}; a large matrix product "
        f"reaches {found['matrix_tflops']:.3g} TFLOP/s there."
    )
    pair = f"{shown_pair(found['pair'])}\n\n" if "pair" in found else ""
    return f"\n{times}\n\n{limits}\n\n{where}\n\n{growth}\n\n{pair}"


def publish(found: dict) -> None:
    """Keep a bench in book/published, and show it on its page: a GPU's if there is one."""
    artefacts.save_json(PUBLISHED / f"bench-{found['kind']}.json", found)
    render.replace_marked(PAGE, "bench", shown(recorded()))


def recorded() -> dict:
    """The published bench: a GPU's if there is one, otherwise a CPU's."""
    path = next(path for kind in ("cuda", "cpu") if (path := PUBLISHED / f"bench-{kind}.json").exists())
    return json.loads(path.read_text(encoding="utf-8"))
