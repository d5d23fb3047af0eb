"""Experiments: rows that survive an interruption, and claims that the rows decide."""

import base64
import json

import numpy as np
import pytest
import scipy.stats

import kdlib
from kdlib import experiments
from kdlib.experiments import (
    HOLDS,
    NOT_SEEN,
    PARTLY,
    Claim,
    Comparison,
    Experiment,
    Lesson,
    difference,
    judge,
    load,
    values,
)
from kdlib.train import Trained


def rows(**cases):
    """A found experiment: for each case its accuracies, seed by seed."""
    listed = [
        {"case": case, "seed": seed, "made_from": "0", "seconds": 0.5, "accuracy": value}
        for case, found in cases.items()
        for seed, value in enumerate(found)
    ]
    return {"rows": listed, "claims": []}


def claim(*comparisons):
    return Claim("soft labels help", "somebody", comparisons)


MORE = Comparison("accuracy", "soft", "hard")


def test_a_row_is_measured_once(tmp_path):
    path, asked = tmp_path / "05_x.json", []

    def run(seed):
        asked.append(seed)
        return {"accuracy": seed / 10}

    first = Experiment(path, profile="quick").measure("a", (0, 1), run, made_from={"lr": 0.1})
    again = Experiment(path, profile="quick").measure("a", (0, 1, 2), run, made_from={"lr": 0.1})
    assert asked == [0, 1, 2]
    assert again[:2] == first
    assert [row["accuracy"] for row in again] == [0, 0.1, 0.2]
    assert {"case", "seed", "seconds", "device", "made_from"} <= first[0].keys()


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path):
    path, asked = tmp_path / "x.json", []

    def run(seed):
        asked.append(seed)
        if seed == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        Experiment(path).measure("a", range(4), run, made_from={})
    assert [row["seed"] for row in load(path)["rows"]] == [0, 1]
    Experiment(path).measure("a", range(4), run, made_from={})
    assert asked == [0, 1, 2, 2, 3]


def test_seeds_at_once_are_only_those_missing(tmp_path):
    path, asked = tmp_path / "x.json", []

    def run(seeds):
        asked.append(list(seeds))
        return [{"errors": 10 * seed} for seed in seeds]

    Experiment(path).measure("a", (0, 1), run, made_from={}, at_once=True)
    found = Experiment(path).measure("a", (0, 1, 2, 3), run, made_from={}, at_once=True)
    assert asked == [[0, 1], [2, 3]]
    assert [row["errors"] for row in found] == [0, 10, 20, 30]


def test_rows_made_from_something_else_are_measured_anew_and_the_old_file_is_kept(tmp_path, capsys):
    path = tmp_path / "x.json"
    Experiment(path).measure("a", (0,), lambda seed: {"accuracy": 0.1}, made_from={"lr": 0.1})
    found = Experiment(path).measure("a", (0,), lambda seed: {"accuracy": 0.2}, made_from={"lr": 0.2})
    assert found[0]["accuracy"] == 0.2
    assert [row["accuracy"] for row in load(path)["rows"]] == [0.2]
    (aside,) = tmp_path.glob("x.*.json")
    assert load(aside)["rows"][0]["accuracy"] == 0.1
    assert aside.name in capsys.readouterr().out


def test_finish_leaves_the_rows_asked_for_and_the_claims(tmp_path):
    path = tmp_path / "x.json"
    Experiment(path).measure("old", (0,), lambda seed: {"accuracy": 0.1}, made_from={})
    experiment = Experiment(path, profile="quick")
    for case, value in {"hard": 0.5, "soft": 0.9}.items():
        experiment.measure(case, (0, 1, 2), lambda seed, v=value: {"accuracy": v + 0.01 * seed}, made_from={})
    found = experiment.finish([claim(MORE)])
    assert found == load(path)
    assert {row["case"] for row in found["rows"]} == {"hard", "soft"}
    assert found["profile"] == "quick"
    assert found["experiment"] == "x"
    header, table = experiments.verdict_rows(found)
    assert len(header) == len(table[0]) == 4
    assert table[0][3] == "**holds**"
    assert "+40.00" in table[0][2]
    assert len(list(tmp_path.glob("x.*.json"))) == 1  # the row that was not asked for is not lost


def test_finish_refuses_a_claim_about_what_was_not_measured(tmp_path):
    experiment = Experiment(tmp_path / "x.json")
    experiment.measure("hard", (0, 1), lambda seed: {"accuracy": 0.5}, made_from={})
    with pytest.raises(ValueError, match="case 'soft' was not measured: expected one of hard"):
        experiment.finish([claim(MORE)])


def test_a_measure_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="measure 'nll' of case 'a' is nan"):
        Experiment(tmp_path / "x.json").measure("a", (0,), lambda seed: {"nll": float("nan")}, made_from={})


def test_the_interval_is_students_over_paired_seeds():
    found = rows(hard=[0.1, 0.2, 0.4], soft=[0.2, 0.5, 0.6])
    mean, half, n = difference(found, "accuracy", "soft", "hard")
    apart = np.array([0.1, 0.3, 0.2])
    low, high = scipy.stats.t.interval(0.95, 2, apart.mean(), scipy.stats.sem(apart))
    assert (mean, mean - half, mean + half, n) == pytest.approx((0.2, low, high, 3))


def test_only_shared_seeds_are_compared():
    found = rows(hard=[0.1, 0.2], soft=[0.3, 0.4, 0.9])
    assert difference(found, "accuracy", "soft", "hard")[::2] == (pytest.approx(0.2), 2)
    found["rows"] = [row for row in found["rows"] if (row["case"], row["seed"]) != ("hard", 1)]
    _mean, half, n = difference(found, "accuracy", "soft", "hard")
    assert n == 1
    assert half == np.inf
    assert judge(claim(MORE), found).verdict == NOT_SEEN


@pytest.mark.parametrize(
    ("comparison", "soft", "verdict"),
    [
        (MORE, [0.60, 0.62, 0.61], HOLDS),
        (MORE, [0.40, 0.42, 0.41], NOT_SEEN),
        (MORE, [0.60, 0.40, 0.80], NOT_SEEN),  # more on average, and well within the noise
        (Comparison("accuracy", "soft", "hard", margin=0.2), [0.60, 0.62, 0.61], NOT_SEEN),
        (Comparison("accuracy", "soft", "hard", sign=-1), [0.40, 0.42, 0.41], HOLDS),
        (Comparison("accuracy", "soft", "hard", sign=-1), [0.60, 0.62, 0.61], NOT_SEEN),
        (Comparison("accuracy", "soft", "hard", margin=0.05, sign=0), [0.50, 0.505, 0.495], HOLDS),
        (Comparison("accuracy", "soft", "hard", margin=0.05, sign=0), [0.60, 0.62, 0.61], NOT_SEEN),
        (Comparison("accuracy", "soft", "hard", margin=0.05, sign=0), [0.30, 0.70, 0.50], NOT_SEEN),  # who knows
        (Comparison("accuracy", "soft", 0.55), [0.60, 0.62, 0.61], HOLDS),
        (Comparison("accuracy", "soft", 0.65), [0.60, 0.62, 0.61], NOT_SEEN),
    ],
)
def test_the_rows_decide_the_verdict(comparison, soft, verdict):
    assert judge(claim(comparison), rows(hard=[0.5, 0.5, 0.5], soft=soft)).verdict == verdict


def test_a_claim_of_which_a_part_is_borne_out_holds_partly():
    found = rows(hard=[0.5, 0.5, 0.5], soft=[0.6, 0.62, 0.61], softer=[0.4, 0.41, 0.42])
    both = claim(MORE, Comparison("accuracy", "softer", "hard"))
    judged = judge(both, found)
    assert judged.verdict == PARTLY
    assert judged.figure.count("n = 3") == 2


def test_a_figure_is_in_its_unit():
    found = rows(hard=[5, 5, 5], soft=[9, 10, 8])
    errors = judge(claim(Comparison("accuracy", "soft", "hard", unit="errors")), found)
    assert errors.figure.startswith("+4.00 ± 2.48 errors")
    assert judge(claim(MORE), rows(hard=[0.5] * 3, soft=[0.51] * 3)).figure.startswith("+1.00 ± 0.00 points")


def test_values_are_by_seed_and_name_what_is_missing():
    found = rows(hard=[0.1, 0.2])
    found["rows"].reverse()
    assert list(values(found, "hard", "accuracy").items()) == [(0, 0.1), (1, 0.2)]
    with pytest.raises(ValueError, match="measure 'nll' of case 'hard' is not there for seeds"):
        values(found, "hard", "nll")


def test_cost_is_the_sum_of_the_rows():
    assert experiments.cost(rows(hard=[0.1, 0.2], soft=[0.1])) == pytest.approx(1.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"case": "a"}]}', '{"rows": 3}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not an experiment's file"):
        Experiment(path)
    assert path.read_text() == text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the chapter"):
        load(tmp_path / "x.json")


def test_the_file_is_json_that_others_can_read(tmp_path):
    experiment = Experiment(tmp_path / "x.json")
    experiment.measure("a", (0,), lambda seed: {"accuracy": np.float32(0.5)}, made_from={"path": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["accuracy"] == 0.5


def test_the_opposite_of_a_claim_is_called_so():
    less = judge(claim(MORE), rows(hard=[0.5] * 3, soft=[0.40, 0.42, 0.41]))
    assert (less.verdict, less.figure.endswith("(n = 3), the other way round")) == (NOT_SEEN, True)
    for soft in ([0.60, 0.62, 0.61], [0.60, 0.40, 0.48]):
        assert "other way" not in judge(claim(MORE), rows(hard=[0.5] * 3, soft=soft)).figure


def test_contradicted_is_what_lies_beyond_the_margin_on_the_wrong_side():
    about = Comparison("accuracy", "soft", "hard", margin=0.01, sign=0)
    apart = judge(claim(about), rows(hard=[0.5] * 3, soft=[0.40, 0.42, 0.41]))
    assert apart.figure.endswith("(n = 3; asked for: within 1), the other way round")
    assert "other way" not in judge(claim(about), rows(hard=[0.5] * 3, soft=[0.49, 0.52, 0.51])).figure
    nearly = Comparison("accuracy", "soft", "hard", margin=-0.02)  # within two points below
    short = judge(claim(nearly), rows(hard=[0.5] * 3, soft=[0.490, 0.491, 0.489]))
    assert short.verdict == HOLDS
    assert short.figure.endswith("(n = 3; asked for: more than -2)")
    assert "other way" in judge(claim(nearly), rows(hard=[0.5] * 3, soft=[0.470, 0.471, 0.469])).figure


def test_what_a_row_is_made_from_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        Experiment(tmp_path / "x.json").measure("a", (0,), lambda seed: {"accuracy": 0.5}, made_from={"loss": object()})


# --- images as well as seeds ----------------------------------------------------------------------------------------


def by_image(tmp_path, seeds=(0, 1, 2), images=400, **shares):
    """An experiment whose rows know their images: of each case a share of them is right, the same for all seeds."""
    experiment = Experiment(tmp_path / "x.json")
    for case, share in shares.items():
        right = np.arange(images) < share * images
        experiment.measure(case, seeds, lambda seed, right=right: {"accuracy": right}, made_from={"share": share})
    return experiment.finish()


def test_a_row_of_truth_values_keeps_them_and_measures_their_share(tmp_path):
    found = by_image(tmp_path, images=11, soft=7 / 11)
    assert values(found, "soft", "accuracy") == dict.fromkeys(range(3), 7 / 11)
    assert found == load(tmp_path / "x.json")
    (kept,) = {json.dumps(row["by image"]["accuracy"]) for row in found["rows"]}
    bits = np.unpackbits(np.frombuffer(base64.b64decode(json.loads(kept)["bits"]), np.uint8), count=11)
    assert bits.tolist() == [1] * 7 + [0] * 4


def test_the_interval_allows_for_the_choice_of_the_images(tmp_path):
    found = by_image(tmp_path, hard=0.50, soft=0.54)
    mean, half, n = difference(found, "accuracy", "soft", "hard")
    apart = (np.arange(400) >= 200) & (np.arange(400) < 216)  # the 16 images that only one gets right
    assert (mean, n) == (pytest.approx(0.04), 3)
    assert half == pytest.approx(1.959964 * apart.std(ddof=1) / 20)  # the seeds do not differ at all
    assert judge(claim(MORE), found).verdict == HOLDS
    few = by_image(tmp_path / "few", images=50, hard=0.50, soft=0.54)  # the same shares: two images of 50
    assert judge(claim(MORE), few).verdict == NOT_SEEN
    against_a_number, half, _ = difference(found, "accuracy", "soft", 0.5)
    assert against_a_number == pytest.approx(0.04)
    assert half == pytest.approx(1.959964 * np.sqrt(0.54 * 0.46 / 399), rel=1e-6)


def test_the_luck_of_seeds_and_of_images_adds_up_as_squares(tmp_path):
    rng, experiment = np.random.default_rng(0), Experiment(tmp_path / "x.json")
    right = {case: rng.random((3, 300)) < share for case, share in {"hard": 0.5, "soft": 0.6}.items()}
    for case, of_case in right.items():
        experiment.measure(case, range(3), lambda seed, of_case=of_case: {"accuracy": of_case[seed]}, made_from={})
    found = experiment.finish()
    half = difference(found, "accuracy", "soft", "hard")[1]
    for row in found["rows"]:
        del row["by image"]
    seeds_only = difference(found, "accuracy", "soft", "hard")[1]
    by_image = right["soft"].mean(0) - right["hard"].mean(0)
    assert half == pytest.approx(np.hypot(seeds_only, 1.959964 * by_image.std(ddof=1) / np.sqrt(300)))
    assert seeds_only < half < np.hypot(seeds_only, 0.1)


# --- lessons --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return kdlib.load_data("digits")


def lesson(data, rate=0.1, network="perceptron", epochs=2, objective=None):
    recipe = kdlib.Recipe(epochs=epochs, batch_size=50, learning_rate=rate, weight_decay=0.0)
    return Lesson(network, data.train, objective or (lambda seed: kdlib.CrossEntropy()), recipe)


def test_lessons_are_the_same_side_by_side_and_in_turn(tmp_path, digits):
    lessons = {
        "hard": lesson(digits),
        "smooth": lesson(digits, rate=0.05, objective=lambda seed: kdlib.CrossEntropy(label_smoothing=0.1)),
    }
    splits = {"validation": digits.validation, "test": digits.test}
    teacher = Trained(kdlib.build("perceptron", 10, 1, seed=9), None, {"network": "untrained"}, None)
    alone, beside = (
        Experiment(tmp_path / f"{way}.json").train(lessons, (3, 4), splits, teacher=teacher, side_by_side=way)
        for way in (False, True)
    )
    for case in lessons:
        for one, other in zip(alone[case], beside[case], strict=True):
            assert one["seed"] == other["seed"]
            assert one["made_from"] == other["made_from"]
            for measure in ("accuracy", "nll", "ece", "validation accuracy", "validation nll"):
                assert one[measure] == pytest.approx(other[measure], abs=2e-3), measure
            assert one["agreement"] == pytest.approx(other["agreement"], abs=2e-3)
            assert 0 < one["agreement"] < 0.5  # that teacher knows nothing
            assert one["diverged"] == 0
    assert alone["hard"][0]["accuracy"] > 0.3
    assert alone["hard"][0]["accuracy"] != alone["hard"][1]["accuracy"]


def test_a_lesson_is_learned_once_from_the_objective_of_its_seed(tmp_path, digits, monkeypatch):
    learned = []
    train = experiments._train
    monkeypatch.setattr(experiments, "_train", lambda lessons, seeds: learned.extend(seeds) or train(lessons, seeds))

    def learn(seeds, smoothing):
        by_seed = Lesson(
            "perceptron", digits.train, lambda seed: kdlib.CrossEntropy(smoothing[seed]), lesson(digits).recipe
        )
        return Experiment(tmp_path / "x.json").train({"a": by_seed}, seeds, {"test": digits.test})["a"]

    first = learn((0, 1), [0.1, 0.2, 0.3])
    assert learned == [0, 1]
    assert learn((0, 1, 2), [0.1, 0.2, 0.3])[:2] == first
    assert learned == [0, 1, 2]
    changed = learn((0, 1, 2), [0.1, 0.25, 0.3])  # only the second seed's loss is another
    assert learned == [0, 1, 2, 1]
    assert changed[0] == first[0]
    assert changed[1] != first[1]


def test_a_student_that_diverges_says_the_same_of_all_classes(tmp_path, digits, capsys):
    lessons = {"fine": lesson(digits), "lost": lesson(digits, rate=1e30)}
    found = Experiment(tmp_path / "x.json").train(lessons, (0,), {"test": digits.test}, side_by_side=True)
    (lost,), (fine,) = found["lost"], found["fine"]
    assert (lost["diverged"], fine["diverged"]) == (1, 0)
    assert lost["nll"] == pytest.approx(np.log(10))
    assert fine["accuracy"] > 0.25 > lost["accuracy"]
    assert "perceptron, seed 0:" in capsys.readouterr().out


def test_a_search_goes_on_beyond_the_end_where_its_best_rate_is(tmp_path, digits, monkeypatch):
    best_at = {"low": 0.03, "inside": 0.2, "high": 100.0}

    def measured(lessons, seeds):
        return [(x.network, x.recipe.learning_rate) for x in lessons]

    monkeypatch.setattr(experiments, "_train", measured)
    monkeypatch.setattr(
        experiments,
        "_measured",
        lambda model, *_: {"validation accuracy": 1 / (1 + abs(np.log(model[1] / best_at[model[0]])))},
    )
    lessons = {name: lesson(digits, network=name) for name in best_at}
    found = Experiment(tmp_path / "x.json").search_rate(lessons, (0.1, 0.2, 0.4), (1000, 1001), digits.validation)
    assert list(found["inside"]) == [0.1, 0.2, 0.4]
    assert list(found["low"]) == pytest.approx([0.025, 0.05, 0.1, 0.2, 0.4])
    assert list(found["high"]) == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])  # twice beyond, and no further
    assert max(found["low"], key=found["low"].get) == pytest.approx(0.025)


def test_claims_stay_where_a_row_is_measured_after_them(tmp_path):
    path = tmp_path / "x.json"
    experiment = Experiment(path)
    for case, value in {"hard": 0.5, "soft": 0.9}.items():
        experiment.measure(case, (0, 1), lambda seed, v=value: {"accuracy": v + 0.01 * seed}, made_from={})
    experiment.finish([claim(MORE)])
    experiment.measure("more", (0,), lambda seed: {"accuracy": 0.7}, made_from={})
    assert [c["text"] for c in load(path)["claims"]] == ["soft labels help"]


def test_a_file_is_set_aside_once(tmp_path):
    path = tmp_path / "x.json"
    for rate in (0.1, 0.2):
        experiment = Experiment(path)
        for case in "abc":
            experiment.measure(case, (0, 1), lambda seed: {"accuracy": 0.1}, made_from={"lr": rate})
    (aside,) = tmp_path.glob("x.*.json")
    assert len(load(aside)["rows"]) == 6
