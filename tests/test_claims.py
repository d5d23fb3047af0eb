"""Claims: comparisons of rows, their intervals and what these cover, verdicts, and the verdicts of two runs."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats

from kdlib import lab
from kdlib.lab import (
    CONTRADICTED,
    INCONCLUSIVE,
    MIXED,
    PARTLY,
    SUPPORTED,
    Claim,
    RowStore,
    claims,
    compare,
    contrast,
    difference,
    estimate,
    interval,
    judge,
    load,
    pooled,
    replication,
)


def rows(first_seed=0, **cases):
    """A finished experiment: for each case its accuracies, seed by seed."""
    listed = [
        {"case": case, "seed": seed, "seconds": 0.5, "accuracy": value}
        for case, accuracies in cases.items()
        for seed, value in enumerate(accuracies, first_seed)
    ]
    return {"experiment": "x", "rows": listed, "claims": []}


def claim(*comparisons):
    return Claim("soft labels help", "somebody", comparisons)


def plain(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


MORE = compare("accuracy", "soft", "hard")

# --- intervals -----------------------------------------------------------------------------------------------------


def test_the_interval_is_students_over_paired_seeds():
    result = rows(hard=[0.1, 0.2, 0.4], soft=[0.2, 0.5, 0.6])
    mean, half, n = difference(result, "accuracy", "soft", "hard")
    apart = np.array([0.1, 0.3, 0.2])
    low, high = scipy.stats.t.interval(0.95, 2, apart.mean(), scipy.stats.sem(apart))
    assert (mean, mean - half, mean + half, n) == pytest.approx((0.2, low, high, 3))


def test_only_shared_seeds_are_compared():
    result = rows(hard=[0.1, 0.2], soft=[0.3, 0.4, 0.9])
    assert difference(result, "accuracy", "soft", "hard")[::2] == (pytest.approx(0.2), 2)
    result["rows"] = [row for row in result["rows"] if (row["case"], row["seed"]) != ("hard", 1)]
    _mean, half, n = difference(result, "accuracy", "soft", "hard")
    assert n == 1
    assert half == np.inf
    judged = judge(claim(MORE), result)
    assert judged.verdict == INCONCLUSIVE
    assert "± ?" in plain(judged.figure)
    result["rows"] = [row for row in result["rows"] if (row["case"], row["seed"]) != ("hard", 0)]
    with pytest.raises(ValueError, match="case 'hard' was not measured"):
        difference(result, "accuracy", "soft", "hard")
    result["rows"] += rows(first_seed=7, hard=[0.1])["rows"]
    with pytest.raises(ValueError, match="cases 'soft' and 'hard' share no seed"):
        difference(result, "accuracy", "soft", "hard")


def test_the_interval_is_that_of_the_analysis_of_variance():
    """Worked out from the sums of squares of a small table."""
    table = np.array([[1.0, 2.0, 6.0, 1.0], [2.0, 4.0, 5.0, 3.0], [6.0, 5.0, 9.0, 5.0]])
    found = interval(table)
    between_seeds = 4 * np.square(table.mean(1) - table.mean()).sum() / 2
    between_images = 3 * np.square(table.mean(0) - table.mean()).sum() / 3
    total = np.square(table - table.mean()).sum()
    residual = (total - 2 * between_seeds - 3 * between_images) / 6
    squares = np.array([between_seeds, between_images, residual]) / 12
    variance = squares @ [1, 1, -1]
    freedom = variance**2 / (squares**2 @ [1 / 2, 1 / 3, 1 / 6])
    assert (found.mean, found.n) == (table.mean(), 3)
    assert found.error == pytest.approx(np.sqrt(variance))
    assert found.freedom == pytest.approx(max(freedom, 2))
    assert found.half == pytest.approx(scipy.stats.t.ppf(0.975, found.freedom) * np.sqrt(variance))


def test_the_extremes_of_the_interval():
    same = np.tile([1.0, 0.0, 1.0, 1.0, 0.0], (4, 1))  # all seeds alike: the images' own interval
    assert interval(same).error == pytest.approx(scipy.stats.sem(same[0]))
    assert interval(same).freedom == pytest.approx(4)
    flat = np.tile([[0.1], [0.3], [0.2]], (1, 50))  # all images alike: the seeds' own
    assert interval(flat).half == pytest.approx(interval(flat[:, :1]).half)
    assert interval(np.zeros((3, 5))).half == 0
    assert interval(np.zeros((1, 5))).half == np.inf


LAYOUTS = {  # what the variance of a cell is made of: of seeds, and of images, as shares of the residual's in the mean
    "neither seeds nor images": (0.0, 0.0),
    "images alone": (0.0, 1.0),
    "mostly images": (0.0, 9.0),
    "seeds alone": (1.0, 0.0),
    "mostly seeds": (9.0, 0.0),
    "a little of both": (0.3, 0.3),
    "both": (1.0, 1.0),
    "more images than seeds": (1.0, 5.0),
}
SIMULATIONS = 20_000


def coverage(seeds: int, images: int, of_seeds: float, of_images: float) -> float:
    """The share of simulated tables, normal and balanced, whose interval holds the true mean.

    Their mean squares are independent chi-squares, so nothing larger needs to be drawn.
    """
    random, cells = np.random.default_rng([seeds, images]), seeds * images
    freedom = np.array([seeds - 1, images - 1, (seeds - 1) * (images - 1)])
    expected = np.array([1 + of_seeds, 1 + of_images, 1.0]) / cells
    squares = expected * random.chisquare(freedom, (SIMULATIONS, 3)) / freedom
    mean = random.normal(0, np.sqrt(expected @ [1, 1, -1]), SIMULATIONS)
    variance, freedom = claims.crossed_variance(*squares.T, seeds, images)
    return np.mean(np.abs(mean) <= scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))


@pytest.mark.parametrize("seeds", [10, 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_interval_covers_what_it_says(seeds, layout):
    assert 0.94 < coverage(seeds, 10_000, *LAYOUTS[layout]) < 0.96


@pytest.mark.parametrize(
    ("seeds", "images", "low", "high"), [(3, 10_000, 0.92, 0.955), (4, 10_000, 0.93, 0.955), (10, 50, 0.948, 0.965)]
)
def test_where_it_does_not_quite_is_known(seeds, images, low, high):
    covered = [coverage(seeds, images, *shares) for shares in LAYOUTS.values()]
    assert low < min(covered)
    assert max(covered) < high


@pytest.mark.parametrize(
    ("of_seeds", "of_images"),
    [(0.0, 0.0), (0.0, 0.3), (0.05, 0.0), (0.05, 0.3)],
    ids=["none", "images", "seeds", "both"],
)
def test_the_interval_covers_differences_of_two_networks_that_are_right_or_wrong(of_seeds, of_images):
    """Two networks of equal accuracy, whose probability of being right varies with image and seed, drawn anew."""
    random, tables, seeds, images, covered = np.random.default_rng(0), 500, 10, 150, []
    for _ in range(SIMULATIONS // tables):
        share = np.full((2, tables, seeds, images), 0.85, np.float32)
        share += of_seeds * random.uniform(-1, 1, (2, tables, seeds, 1)).astype(np.float32)
        share -= of_images * np.sign(random.random((2, tables, 1, images), np.float32) - 0.5) * 0.5
        right = random.random(share.shape, np.float32) < share.clip(0, 1)
        table = right[0].astype(np.float32) - right[1]
        by_seed, by_image, mean = table.mean(2), table.mean(1), table.mean((1, 2))
        residual = table - by_seed[:, :, None] - by_image[:, None, :] + mean[:, None, None]
        cells, freedom = seeds * images, (seeds - 1) * (images - 1)
        squares = by_seed.var(1, ddof=1) / seeds, by_image.var(1, ddof=1) / images
        squares += (np.square(residual).sum((1, 2)) / freedom / cells,)
        variance, freedom = claims.crossed_variance(*squares, seeds, images)
        covered.append(np.abs(mean) <= scipy.stats.t.ppf(0.975, freedom) * np.sqrt(variance))
        one = interval(table[0])
        assert (one.error**2, one.freedom) == pytest.approx((variance[0], freedom[0]), rel=1e-3)
    assert 0.94 < np.mean(covered) < 0.96


# --- verdicts ------------------------------------------------------------------------------------------------------

OVER, UNDER, NOISY = [0.60, 0.62, 0.61], [0.40, 0.42, 0.41], [0.60, 0.40, 0.80]


@pytest.mark.parametrize(
    ("comparison", "soft", "verdict"),
    [
        (MORE, OVER, SUPPORTED),
        (MORE, UNDER, CONTRADICTED),
        (MORE, NOISY, INCONCLUSIVE),  # more on average, and well within the noise
        (compare("accuracy", "soft", "hard", margin=0.2), OVER, CONTRADICTED),  # more, but not by that much
        (compare("accuracy", "soft", "hard", margin=0.11), OVER, INCONCLUSIVE),
        (compare("accuracy", "soft", "hard", margin=-0.02), [0.490, 0.491, 0.489], SUPPORTED),  # at most two below
        (compare("accuracy", "soft", "hard", margin=-0.02), [0.470, 0.471, 0.469], CONTRADICTED),
        (compare("accuracy", "soft", "hard", sign=-1), UNDER, SUPPORTED),
        (compare("accuracy", "soft", "hard", sign=-1), OVER, CONTRADICTED),
        (compare("accuracy", "soft", "hard", sign=-1, margin=0.05), UNDER, SUPPORTED),
        (compare("accuracy", "soft", "hard", sign=-1, margin=0.2), UNDER, CONTRADICTED),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.05), [0.50, 0.505, 0.495], SUPPORTED),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.05), OVER, CONTRADICTED),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.05), UNDER, CONTRADICTED),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.05), [0.30, 0.70, 0.50], INCONCLUSIVE),  # who knows
        (compare("accuracy", "soft", margin=0.55), OVER, SUPPORTED),
        (compare("accuracy", "soft", margin=0.65), OVER, CONTRADICTED),
        (contrast("accuracy", {"soft": 1, "hard": -0.2, "best": -0.8}), [0.9, 0.92, 0.91], SUPPORTED),  # of 0.4: 0.41
        (contrast("accuracy", {"soft": 1, "hard": -0.2, "best": -0.8}), [0.7, 0.71, 0.69], CONTRADICTED),  # 0.2
    ],
)
def test_the_rows_decide_the_verdict(comparison, soft, verdict):
    judged = judge(claim(comparison), rows(hard=[0.5] * 3, soft=soft, best=[0.9] * 3))
    assert judged.verdict == verdict
    assert judged.figure.endswith(", contradicted") == (verdict == CONTRADICTED) == judged.contradicted[0]


def test_several_comparisons_make_one_verdict():
    found = rows(hard=[0.5] * 3, over=OVER, under=UNDER, noisy=NOISY)
    over, under, noisy = (compare("accuracy", case, "hard") for case in ("over", "under", "noisy"))
    for asked, verdict in {
        (0, 0): SUPPORTED,
        (0, 2): PARTLY,
        (0, 1): MIXED,
        (0, 1, 2): MIXED,
        (1, 2): CONTRADICTED,
        (1, 1): CONTRADICTED,
        (2, 2): INCONCLUSIVE,
    }.items():
        judged = judge(claim(*([over, under, noisy][i] for i in asked)), found)
        assert judged.verdict == verdict, asked
        assert len(judged.figures) == len(judged.estimates) == len(asked)
        assert judged.figure.count("contradicted") == asked.count(1)


def test_a_figure_is_in_its_unit_and_says_what_is_asked_for():
    def figure(comparison, **cases) -> str:
        return plain(judge(claim(comparison), rows(**cases)).figure)

    same = {"hard": [0.5] * 3, "soft": [0.51] * 3}
    assert figure(MORE, **same) == "+1.00 ± 0.00 points (n = 3; asks for: more than 0)"
    less = compare("accuracy", "soft", "hard", sign=-1, margin=0.02)
    assert figure(less, **same) == "+1.00 ± 0.00 points (n = 3; asks for: less than -2), contradicted"
    nearly = compare("accuracy", "soft", "hard", margin=-0.02)
    assert figure(nearly, **same) == "+1.00 ± 0.00 points (n = 3; asks for: more than -2)"
    about = compare("accuracy", "soft", "hard", sign=0, margin=0.015)
    assert figure(about, **same) == "+1.00 ± 0.00 points (n = 3; asks for: within 1.5)"
    errors = compare("accuracy", "soft", "hard", unit="errors", margin=2)
    counted = figure(errors, hard=[5, 5, 5], soft=[9, 10, 8])
    assert counted == "+4.00 ± 2.48 errors (n = 3; asks for: more than 2), inconclusive".removesuffix(", inconclusive")


@pytest.mark.parametrize(("weights", "options"), [({}, {}), ({"a": 1}, {"sign": 2}), ({"a": 1}, {"sign": 0})])
def test_a_comparison_that_asks_for_nothing_is_refused(weights, options):
    with pytest.raises(ValueError, match="expected some cases, a sign of 1, -1 or 0"):
        contrast("accuracy", weights, **options)


# --- images as well as seeds ---------------------------------------------------------------------------------------


def by_image(folder, seeds=(0, 1, 2), images=400, asked=(), profile="laptop", **shares):
    """An experiment whose rows hold their images: of each case a share of them is correct, the same for all seeds."""
    store = RowStore(folder / "08_x.json", profile=profile)
    for case, share in shares.items():
        correct = np.arange(images) < share * images
        store.measure(case, seeds, lambda seed, c=correct: {"accuracy": c}, made_from={"share": share})
    return store.finish(asked)


def test_the_interval_allows_for_the_choice_of_the_images(tmp_path):
    result = by_image(tmp_path, hard=0.50, soft=0.54)
    mean, half, n = difference(result, "accuracy", "soft", "hard")
    apart = (np.arange(400) >= 200) & (np.arange(400) < 216)  # the 16 images that only one gets correct
    assert (mean, n) == (pytest.approx(0.04), 3)
    assert half == pytest.approx(scipy.stats.t.ppf(0.975, 399) * apart.std(ddof=1) / 20)  # the seeds do not differ
    assert judge(claim(MORE), result).verdict == SUPPORTED
    few = by_image(tmp_path / "few", images=50, hard=0.50, soft=0.54)  # the same shares: two images of 50
    assert judge(claim(MORE), few).verdict == INCONCLUSIVE
    alone = estimate(result, ("accuracy", {"soft": 1}))
    assert alone.mean == pytest.approx(0.54)
    assert alone.error == pytest.approx(np.sqrt(0.54 * 0.46 / 399), rel=1e-6)


def test_a_weighted_sum_is_taken_image_by_image(tmp_path):
    random, store = np.random.default_rng(0), RowStore(tmp_path / "x.json")
    correct = {case: random.random((3, 60)) < share for case, share in {"a": 0.5, "b": 0.6, "c": 0.7}.items()}
    for case, right in correct.items():
        store.measure(case, (5, 3, 4), lambda seed, r=right: {"accuracy": r[seed - 3]}, made_from={})
    result = store.finish()
    weights = {"a": 1, "b": -0.2, "c": -0.8}
    expected = interval(sum(weight * correct[case] for case, weight in weights.items()))
    assert estimate(result, contrast("accuracy", weights)) == pytest.approx(expected)
    del result["rows"][0]["by image"]  # then the seeds alone
    by_seed = sum(weight * correct[case].mean(1, keepdims=True) for case, weight in weights.items())
    assert estimate(result, ("accuracy", weights)).half == pytest.approx(interval(by_seed).half)


def test_cases_measured_on_other_images_are_not_compared(tmp_path):
    store = RowStore(tmp_path / "x.json")
    for case, images in {"soft": 5, "hard": 6}.items():
        store.measure(case, (0, 1), lambda seed, n=images: {"accuracy": np.arange(n) > 2}, made_from={})
    with pytest.raises(ValueError, match="'accuracy' was measured on 5 and 6 images"):
        store.finish([claim(MORE)])


# --- two runs ------------------------------------------------------------------------------------------------------

SETTINGS = {
    name: SimpleNamespace(name=name, base=name.removesuffix("-repeat"), run=None)
    for name in ("quick", "laptop", "laptop-repeat", "full")
}
ABOUT_SAME = Claim(
    "both | are alike", "[us](https://example.org)", (compare("accuracy", "soft", "hard", sign=0, margin=0.01),)
)
ASKED = (claim(MORE), ABOUT_SAME)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A clone that publishes what is put there."""
    monkeypatch.setattr(replication, "clone_folder", lambda: tmp_path)
    for name in ("laptop", "laptop-repeat"):
        (tmp_path / "book" / "published" / name).mkdir(parents=True)
    return tmp_path / "book" / "published"


def test_runs_are_pooled_if_their_seeds_are_disjoint():
    first, second = rows(hard=[0.5] * 3, soft=OVER), rows(first_seed=100, hard=[0.5] * 3, soft=UNDER)
    assert [judge(claim(MORE), run).verdict for run in (first, second)] == [SUPPORTED, CONTRADICTED]
    both = judge(claim(MORE), pooled(first, second))
    assert both.verdict == INCONCLUSIVE
    assert both.estimates[0].n == 6
    with pytest.raises(ValueError, match=r"runs share the seeds \[2\]"):
        pooled(first, rows(first_seed=2, hard=[0.5], soft=[0.5]))
    with pytest.raises(ValueError, match="no experiment to pool"):
        pooled()


@pytest.mark.parametrize(
    ("asked", "verdict"),
    [
        (MORE, INCONCLUSIVE),  # more in one run, and not in the other
        (compare("accuracy", "soft", "hard", margin=0.2), CONTRADICTED),  # not by so much in any
        (compare("accuracy", "soft", "hard", margin=0.095), INCONCLUSIVE),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.2), SUPPORTED),
        (compare("accuracy", "soft", "hard", sign=0, margin=0.001), INCONCLUSIVE),
    ],
)
def test_a_comparison_on_which_two_runs_disagree_is_not_decided(asked, verdict):
    many = [0.6] * 12
    first = rows(hard=[0.5] * 12, soft=[value + 0.001 * k for k, value in enumerate(many)])
    second = rows(first_seed=100, hard=[0.5] * 3, soft=[0.499, 0.5, 0.4995])
    both = pooled(first, second)
    mean, half, n = difference(both, "accuracy", "soft", "hard")
    assert (mean - half > 0, n) == (True, 15)  # the pooled interval alone would decide it
    assert judge(claim(asked), both).verdict == verdict


def test_verdicts_are_of_both_runs_and_of_each(tmp_path):
    first = by_image(tmp_path, images=6000, asked=ASKED, hard=0.50, soft=0.52)
    second = by_image(tmp_path / "2", (7, 8), images=6000, asked=ASKED, hard=0.5, soft=0.5)
    alone = lab.verdicts(first)
    assert [(one.verdict, one.alone) for one in alone] == [(SUPPORTED, ()), (CONTRADICTED, ())]
    both = lab.verdicts(first, second)
    assert [own.verdict for own in both[0].alone] == [SUPPORTED, INCONCLUSIVE]
    assert both[0].judgement.estimates[0].n == 5
    assert both[0].claim["text"] == "soft labels help"


def table_of(settings, experiment) -> tuple[list[list[str]], str]:
    """The cells of a table of verdicts, its heading first, and what stands under it."""
    table, _, note = lab.verdict_table(settings, experiment).data.partition("\n\n")
    lines = table.replace("\\|", "/").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])], note


def test_a_chapter_shows_its_verdicts_and_those_of_the_second_run(tmp_path, clone):
    first = by_image(tmp_path, images=6000, asked=ASKED, hard=0.50, soft=0.52)
    cells, note = table_of(SETTINGS["laptop"], first)
    assert cells[0] == ["claim", "verdict", "difference and 95 % interval"]
    assert cells[1][:2] == ["soft labels help (somebody)", '<span class="verdict supported">supported</span>']
    assert plain(cells[1][2]).startswith("*soft* − *hard*: +2.00 ± 0.35 points (n = 3; asks for: more than 0)")
    assert cells[2][0] == "both / are alike ([us](https://example.org))"
    assert note == "No second run was at hand: these are the verdicts of this run alone."

    repeat = by_image(clone / "laptop-repeat", (10, 11), 6000, ASKED, "laptop-repeat", hard=0.5, soft=0.49)
    cells, note = table_of(SETTINGS["laptop"], first)
    assert cells[0][3:] == ["this run alone", "second run alone"]
    assert cells[1][3:] == [lab.badge(SUPPORTED), lab.badge(CONTRADICTED)]
    assert "n = 5" in plain(cells[1][2])
    assert "the same test images" in note
    other_settings = SimpleNamespace(name="laptop", base="laptop", run="n_seeds-2")
    assert len(table_of(other_settings, first)[0][0]) == 3

    by_image(clone / "laptop", images=6000, asked=ASKED, hard=0.50, soft=0.52)
    cells, _ = table_of(SETTINGS["laptop-repeat"], repeat)
    assert cells[0][3:] == ["this run alone", "first run alone"]
    assert cells[1][3:] == [lab.badge(CONTRADICTED), lab.badge(SUPPORTED)]

    at_full = by_image(tmp_path / "full", images=6000, asked=ASKED, profile="full", hard=0.50, soft=0.52)
    cells, _ = table_of(SETTINGS["full"], at_full)
    assert cells[0][3:] == ["at profile laptop"]
    both = lab.verdicts(load(clone / "laptop" / "08_x.json"), repeat)
    assert [row[3] for row in cells[1:]] == [lab.badge(one.verdict) for one in both]


def test_a_second_run_that_does_not_fit_is_not_shown(tmp_path, clone):
    first = by_image(tmp_path, images=6000, asked=ASKED, hard=0.50, soft=0.52)
    by_image(clone / "laptop-repeat", (2, 3), 6000, ASKED, hard=0.50, soft=0.52)  # shares a seed
    assert len(table_of(SETTINGS["laptop"], first)[0][0]) == 3
    by_image(clone / "laptop-repeat", (4, 5), 6000, hard=0.50, softer=0.52)  # lacks a case
    assert len(table_of(SETTINGS["laptop"], first)[0][0]) == 3


def test_with_few_images_there_is_no_verdict(tmp_path, clone):
    coarse = by_image(tmp_path, images=500, asked=ASKED, profile="quick", hard=0.50, soft=0.40)
    cells, note = table_of(SETTINGS["quick"], coarse)
    assert cells[0] == ["claim", "difference and 95 % interval"]
    assert len(cells) == 3
    text = lab.verdict_table(SETTINGS["quick"], coarse).data
    assert "-10.00" in text
    assert not any(word in text for word in (*lab.VERDICTS, "<span"))
    assert note == "Too coarse for a verdict: 500 images (profile laptop tests on 10,000)."
