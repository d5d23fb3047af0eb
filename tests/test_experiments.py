"""Experiments: rows that survive an interruption, and claims that the rows decide."""

import json

import numpy as np
import pytest
import scipy.stats

from kdlib import experiments
from kdlib.experiments import HOLDS, NOT_SEEN, PARTLY, Claim, Comparison, Experiment, difference, judge, load, values


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
    about = Comparison("accuracy", "soft", "hard", margin=0.01, sign=0)
    assert "other way" not in judge(claim(about), rows(hard=[0.5] * 3, soft=[0.40, 0.42, 0.41])).figure


def test_what_a_row_is_made_from_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        Experiment(tmp_path / "x.json").measure("a", (0,), lambda seed: {"accuracy": 0.5}, made_from={"loss": object()})
