"""The lab: rows that survive an interruption, claims that the rows decide, and students trained over a row store."""

import base64
import hashlib
import importlib
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kdlib
from kdlib import lab
from kdlib.lab import (
    Claim,
    RowStore,
    TrainingSetup,
    difference,
    load,
    train_setups,
    training,
    values,
)
from kdlib.lab import rows as rows_module
from kdlib.published import Logits

checkpoints = importlib.import_module("kdlib.records.checkpoint")


def rows(**cases):
    """A finished experiment: for each case its accuracies, seed by seed."""
    listed = [
        {"case": case, "seed": seed, "seconds": 0.5, "accuracy": value}
        for case, accuracies in cases.items()
        for seed, value in enumerate(accuracies)
    ]
    return {"rows": listed, "claims": []}


def claim(*comparisons):
    return Claim("soft labels help", "somebody", comparisons)


MORE = lab.compare("accuracy", "soft", "hard")


def test_a_row_is_measured_once(tmp_path):
    path, asked = tmp_path / "05_x.json", []

    def run(seed):
        asked.append(seed)
        return {"accuracy": seed / 10}

    first = RowStore(path, profile="quick").measure("a", (0, 1), run, made_from={"lr": 0.1})
    again = RowStore(path, profile="quick").measure("a", (0, 1, 2), run, made_from={"lr": 0.1})
    assert asked == [0, 1, 2]
    assert again[:2] == first
    assert [row["accuracy"] for row in again] == [0, 0.1, 0.2]
    assert {"case", "seed", "seconds", "device", "fingerprint", "sha256"} <= first[0].keys()


def test_an_interrupted_experiment_goes_on_where_it_stopped(tmp_path):
    path, asked = tmp_path / "x.json", []

    def run(seed):
        asked.append(seed)
        if seed == 2 and len(asked) == 3:
            raise KeyboardInterrupt
        return {"accuracy": 0.5}

    with pytest.raises(KeyboardInterrupt):
        RowStore(path).measure("a", range(4), run, made_from={})
    assert [row["seed"] for row in load(path)["rows"]] == [0, 1]
    RowStore(path).measure("a", range(4), run, made_from={})
    assert asked == [0, 1, 2, 2, 3]


def test_jobs_measured_at_once_are_only_those_missing(tmp_path):
    path, asked = tmp_path / "x.json", []

    def run(jobs, _):
        asked.append(jobs)
        return [{"errors": 10 * seed} for _, seed in jobs]

    def measure(seeds):
        return RowStore(path).measure_all({("a", seed): {} for seed in seeds}, run, group=lambda jobs: [jobs])

    measure((0, 1))
    result = measure((0, 1, 2, 3))
    assert asked == [[("a", 0), ("a", 1)], [("a", 2), ("a", 3)]]
    assert [row["errors"] for row in result.values()] == [0, 10, 20, 30]


def test_rows_made_from_something_else_are_measured_anew_and_the_old_file_is_kept(tmp_path, capsys):
    path = tmp_path / "x.json"
    RowStore(path).measure("a", (0,), lambda seed: {"accuracy": 0.1}, made_from={"lr": 0.1})
    result = RowStore(path).measure("a", (0,), lambda seed: {"accuracy": 0.2}, made_from={"lr": 0.2})
    assert result[0]["accuracy"] == 0.2
    assert [row["accuracy"] for row in load(path)["rows"]] == [0.2]
    (backup,) = tmp_path.glob("x.*.json")
    assert load(backup)["rows"][0]["accuracy"] == 0.1
    assert backup.name in capsys.readouterr().out


def test_finish_leaves_the_rows_asked_for_and_the_claims(tmp_path):
    path = tmp_path / "x.json"
    RowStore(path).measure("old", (0,), lambda seed: {"accuracy": 0.1}, made_from={})
    store = RowStore(path, profile="quick")
    for case, value in {"hard": 0.5, "soft": 0.9}.items():
        store.measure(case, (0, 1, 2), lambda seed, v=value: {"accuracy": v + 0.01 * seed}, made_from={})
    result = store.finish([claim(MORE)])
    assert result == load(path)
    assert {row["case"] for row in result["rows"]} == {"hard", "soft"}
    assert result["profile"] == "quick"
    assert result["experiment"] == "x"
    assert [one.verdict for one in lab.verdicts(result)] == [lab.SUPPORTED]
    assert len(list(tmp_path.glob("x.*.json"))) == 1  # the row that was not asked for is not lost


def test_finish_refuses_a_claim_about_what_was_not_measured(tmp_path):
    store = RowStore(tmp_path / "x.json")
    store.measure("hard", (0, 1), lambda seed: {"accuracy": 0.5}, made_from={})
    with pytest.raises(ValueError, match="case 'soft' was not measured: expected one of hard"):
        store.finish([claim(MORE)])


def test_a_measure_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="measure 'nll' of case 'a' is nan"):
        RowStore(tmp_path / "x.json").measure("a", (0,), lambda seed: {"nll": float("nan")}, made_from={})


def test_values_are_by_seed_and_name_what_is_missing():
    result = rows(hard=[0.1, 0.2])
    result["rows"].reverse()
    assert list(values(result, "hard", "accuracy").items()) == [(0, 0.1), (1, 0.2)]
    with pytest.raises(ValueError, match="measure 'nll' of case 'hard' is not there for seeds"):
        values(result, "hard", "nll")


def test_cost_is_the_sum_of_the_rows():
    assert lab.cost(rows(hard=[0.1, 0.2], soft=[0.1])) == pytest.approx(1.5)


@pytest.mark.parametrize("text", ["{", "[]", '{"rows": [{"case": "a"}]}', '{"rows": 3}'])
def test_a_damaged_file_is_named(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"x\.json is not an experiment's file"):
        RowStore(path)
    assert path.read_text() == text


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the chapter"):
        load(tmp_path / "x.json")


def test_the_file_is_json_that_others_can_read(tmp_path):
    store = RowStore(tmp_path / "x.json")
    store.measure("a", (0,), lambda seed: {"accuracy": np.float32(0.5)}, made_from={"path": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text())["rows"][0]["accuracy"] == 0.5


def test_what_a_row_is_made_from_must_be_json(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        RowStore(tmp_path / "x.json").measure("a", (0,), lambda seed: {"accuracy": 0.5}, made_from={"loss": object()})


# --- images as well as seeds ----------------------------------------------------------------------------------------


def by_image(tmp_path, seeds=(0, 1, 2), images=400, **shares):
    """An experiment whose rows hold their images: of each case a share of them is correct, the same for all seeds."""
    store = RowStore(tmp_path / "x.json")
    for case, share in shares.items():
        correct = np.arange(images) < share * images
        store.measure(case, seeds, lambda seed, c=correct: {"accuracy": c}, made_from={"share": share})
    return store.finish()


def test_a_row_of_truth_values_keeps_them_and_measures_their_share(tmp_path):
    result = by_image(tmp_path, images=11, soft=7 / 11)
    assert values(result, "soft", "accuracy") == dict.fromkeys(range(3), 7 / 11)
    assert result == load(tmp_path / "x.json")
    (kept,) = {json.dumps(row["by image"]["accuracy"]) for row in result["rows"]}
    bits = np.unpackbits(np.frombuffer(base64.b64decode(json.loads(kept)["bits"]), np.uint8), count=11)
    assert bits.tolist() == [1] * 7 + [0] * 4


def test_claims_stay_where_a_row_is_measured_after_them(tmp_path):
    path = tmp_path / "x.json"
    store = RowStore(path)
    for case, value in {"hard": 0.5, "soft": 0.9}.items():
        store.measure(case, (0, 1), lambda seed, v=value: {"accuracy": v + 0.01 * seed}, made_from={})
    store.finish([claim(MORE)])
    store.measure("more", (0,), lambda seed: {"accuracy": 0.7}, made_from={})
    assert [c["text"] for c in load(path)["claims"]] == ["soft labels help"]


def test_a_file_is_backed_up_once(tmp_path):
    path = tmp_path / "x.json"
    for rate in (0.1, 0.2):
        store = RowStore(path)
        for case in "abc":
            store.measure(case, (0, 1), lambda seed: {"accuracy": 0.1}, made_from={"lr": rate})
    (backup,) = tmp_path.glob("x.*.json")
    assert len(load(backup)["rows"]) == 6


# --- what rows hold -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [True, np.bool_(True), torch.tensor(True), False])
def test_a_single_truth_value_is_0_or_1(tmp_path, value):
    (row,) = RowStore(tmp_path / "x.json").measure("a", (0,), lambda seed: {"solved": value}, made_from={})
    assert row["solved"] == load(tmp_path / "x.json")["rows"][0]["solved"] == int(bool(value))
    assert "by image" not in row


@pytest.mark.parametrize(
    "value",
    [
        [0.7, 0.2],
        np.array([0, 1, 1]),
        torch.tensor([0.3, 0.9]),
        np.ones((2, 3), bool),
        "0.5",
        None,
    ],
)
def test_only_truth_values_are_kept_image_by_image(tmp_path, value):
    with pytest.raises(ValueError, match=r"measure 'correct' of case 'a' is .*: expected a number, or truth values"):
        RowStore(tmp_path / "x.json").measure("a", (0,), lambda seed: {"correct": value}, made_from={})
    assert not (tmp_path / "x.json").exists()


def test_a_row_has_the_fingerprint_of_what_it_was_made_from_and_the_sha256_of_its_measures(tmp_path):
    made_from = {"recipe": {"epochs": 3}, "data": "toy"}
    correct = np.array([True, False, True])
    store = RowStore(tmp_path / "x.json")
    (row,) = store.measure("a", (4,), lambda seed: {"nll": 0.25, "accuracy": correct}, made_from=made_from)
    assert row["fingerprint"] == kdlib.records.artefacts.digest(made_from)
    assert len(row["fingerprint"]) == 16
    by_image = {"accuracy": {"bits": base64.b64encode(bytes([0b10100000])).decode(), "images": 3}}
    measures = {"accuracy": 2 / 3, "by image": by_image, "nll": 0.25}
    canonical = json.dumps(measures, sort_keys=True, separators=(",", ":")).encode()
    assert row["sha256"] == hashlib.sha256(canonical).hexdigest()
    assert "made_from" not in row


@pytest.mark.parametrize("change", [{"accuracy": 0.6}, {"nll": 1.0}, {"sha256": "0" * 64}, {"by image": {}}])
def test_a_row_that_was_changed_is_refused(tmp_path, change):
    path = tmp_path / "x.json"
    RowStore(path).measure("a", (0, 1), lambda seed: {"accuracy": 0.5}, made_from={})
    experiment = load(path)
    experiment["rows"][1] |= change
    path.write_text(json.dumps(experiment))
    message = r"x\.json is not an experiment's file \(the row of case 'a', seed 1, was changed .*SHA-256.*move it away"
    with pytest.raises(ValueError, match=message):
        load(path)
    with pytest.raises(ValueError, match=message):
        RowStore(path)


def test_a_row_without_sha256_is_refused(tmp_path):
    path = tmp_path / "x.json"
    RowStore(path).measure("a", (0,), lambda seed: {"accuracy": 0.5}, made_from={})
    experiment = load(path)
    del experiment["rows"][0]["sha256"]
    path.write_text(json.dumps(experiment))
    with pytest.raises(ValueError, match="a row lacks sha256"):
        load(path)


def test_rows_published_before_they_had_a_fingerprint_are_read_but_not_measured_with(tmp_path):
    path = tmp_path / "x.json"
    legacy = [
        {"case": case, "seed": seed, "made_from": "0a1b2c3d", "seconds": 1.0, "accuracy": a + seed / 50}
        for case, a in {"hard": 0.5, "soft": 0.8}.items()
        for seed in (0, 1, 2)
    ]
    path.write_text(json.dumps({"experiment": "x", "rows": legacy, "claims": []}))
    result = load(path)
    assert difference(result, "accuracy", "soft", "hard")[0] == pytest.approx(0.3)
    assert lab.cost(result) == 6
    store = RowStore(path)
    (row,) = store.measure("soft", (0,), lambda seed: {"accuracy": 0.1}, made_from={})
    assert row["accuracy"] == 0.1
    assert [r["accuracy"] for r in store.finish()["rows"]] == [0.1]
    (backup,) = tmp_path.glob("x.*.json")
    assert load(backup)["rows"] == legacy


def test_what_is_published_today_is_read():
    for path in sorted((Path(__file__).parents[1] / "book" / "published").glob("*/[01][0-9]_*.json")):
        experiment = load(path)
        assert lab.cost(experiment) > 0


# --- setups ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return kdlib.load_data("digits")


def setup(data, rate=0.1, network="perceptron", epochs=2, loss_fn=F.cross_entropy, targets=None):
    recipe = kdlib.Recipe(epochs=epochs, batch_size=50, learning_rate=rate, weight_decay=0.0)
    return TrainingSetup(network, data.train, loss_fn, recipe, targets)


DISTIL = partial(kdlib.distillation_loss, temperature=4.0, alpha=0.1)


def soft_labels(data, seed):
    """Made up: another teacher for each seed, that knows the label and little else."""
    noise = torch.randn(1, len(data), data.classes, generator=torch.Generator().manual_seed(seed))
    return kdlib.SoftLabels(noise + 4 * F.one_hot(data.labels, data.classes), data.identity)


def untrained(data, seed):
    """A teacher that was never trained."""
    model = kdlib.build("perceptron", 10, 1, seed=seed).eval()
    return kdlib.Network(model, None, Logits(model, data, {}), {}, 0.0)


def test_setups_are_the_same_batched_and_in_turn(tmp_path, digits):
    clean = replace(setup(digits).recipe, views=1)
    setups = {
        "hard": setup(digits),
        "smooth": setup(digits, rate=0.05, loss_fn=partial(F.cross_entropy, label_smoothing=0.1)),
        "soft": replace(setup(digits, loss_fn=DISTIL), recipe=clean, targets=partial(soft_labels, digits.train)),
    }
    splits = {"validation": digits.validation, "test": digits.test}
    teachers = {seed: untrained(digits, 9) for seed in (3, 4)}
    alone, together = (
        train_setups(RowStore(tmp_path / f"{way}.json"), setups, (3, 4), splits, teachers=teachers, batched=way)
        for way in (False, True)
    )
    for case in setups:
        for one, other in zip(alone[case], together[case], strict=True):
            assert one["seed"] == other["seed"]
            assert one["fingerprint"] == other["fingerprint"]
            for measure in ("accuracy", "nll", "ece", "validation accuracy", "validation nll"):
                assert one[measure] == pytest.approx(other[measure], abs=2e-3), measure
            assert one["agreement"] == pytest.approx(other["agreement"], abs=2e-3)
            assert 0 < one["agreement"] < 0.5  # that teacher was never trained
            assert one["diverged"] == 0
        assert set(alone[case][0]["by image"]) == {"accuracy"}  # of the test images only
    assert alone["hard"][0]["accuracy"] > 0.3
    assert alone["hard"][0]["accuracy"] != alone["hard"][1]["accuracy"]


@pytest.fixture
def trained(monkeypatch):
    """The seeds that were trained, in their order."""
    seeds, train = [], training._train
    monkeypatch.setattr(training, "_train", lambda setups, more, at: seeds.extend(more) or train(setups, more, at))
    return seeds


def test_a_setup_is_trained_once_with_the_targets_of_its_seed(tmp_path, digits, trained):
    asked = []

    def rows_of(seeds, teachers):
        def targets(seed):
            asked.append(seed)
            return soft_labels(digits.train, teachers[seed])

        own = replace(setup(digits, loss_fn=DISTIL, targets=targets), recipe=replace(setup(digits).recipe, views=1))
        return train_setups(RowStore(tmp_path / "x.json"), {"a": own}, seeds, {"test": digits.test})["a"]

    first = rows_of((0, 1), [10, 20, 30])
    assert trained == [0, 1]
    assert set(asked) == {0, 1}
    assert rows_of((0, 1, 2), [10, 20, 30])[:2] == first
    assert trained == [0, 1, 2]
    changed = rows_of((0, 1, 2), [10, 25, 30])  # only the second seed's teacher is another
    assert trained == [0, 1, 2, 1]
    assert changed[0] == first[0]
    assert changed[1] != first[1]


def small_network(classes, channels=1, *, hidden=8, activation=nn.ReLU):
    layers = nn.Linear(64 * channels, hidden), activation(), nn.Linear(hidden, classes)
    return nn.Sequential(nn.Flatten(), *layers)


def squared(student_logits, labels):
    return (student_logits.softmax(1) - F.one_hot(labels, 10)).square().sum(1).mean()


def squared_and_halved(student_logits, labels):
    return (student_logits.softmax(1) - F.one_hot(labels, 10)).square().sum(1).mean() / 2


def test_whatever_decides_the_outcome_decides_whether_a_row_is_measured_again(tmp_path, digits, trained):
    start = setup(digits, network=small_network)
    one_view = replace(start.recipe, views=1)
    teachers = [kdlib.build("perceptron", 10, 1, seed=seed) for seed in (1, 2)]
    different = {
        "as it is": start,
        "another size": replace(start, network=partial(small_network, hidden=9)),
        "the same size, another activation": replace(start, network=partial(small_network, activation=nn.Tanh)),
        "fewer images": replace(start, data=kdlib.load_data("digits", limit=60).train),
        "another loss": replace(start, loss_fn=squared),
        "another loss of the same shape": replace(start, loss_fn=squared_and_halved),
        "another setting of a loss": replace(start, loss_fn=partial(F.cross_entropy, label_smoothing=0.1)),
        "another rate": replace(start, recipe=replace(start.recipe, learning_rate=0.2)),
        "soft labels": replace(
            start, loss_fn=DISTIL, recipe=one_view, targets=lambda seed: soft_labels(digits.train, 1)
        ),
        "other soft labels": replace(
            start, loss_fn=DISTIL, recipe=one_view, targets=lambda seed: soft_labels(digits.train, 2)
        ),
        "a live teacher": replace(start, loss_fn=DISTIL, targets=lambda seed: kdlib.LiveTeacher(teachers[0])),
        "another live teacher": replace(start, loss_fn=DISTIL, targets=lambda seed: kdlib.LiveTeacher(teachers[1])),
    }
    path, prints = tmp_path / "x.json", set()
    for _ in range(2):  # each under one name, and then all of them once more
        for number, own in enumerate(different.values()):
            store = RowStore(path.with_name(f"{number}.json"))
            (row,) = train_setups(store, {"a": own}, (0,), {"test": digits.test})["a"]
            prints.add(row["fingerprint"])
    assert len(prints) == len(trained) == len(different)
    elsewhere = train_setups(RowStore(path.with_name("0.json")), {"a": start}, (0,), {"test": digits.validation})
    assert elsewhere["a"][0]["fingerprint"] not in prints
    agreeing = {
        train_setups(RowStore(path), {"a": start}, (0,), {"test": digits.test}, teachers={0: untrained(digits, seed)})[
            "a"
        ][0]["fingerprint"]
        for seed in (1, 2)
    }
    assert len(agreeing - prints) == 2


def test_a_network_registered_again_under_its_name_is_trained_again(tmp_path, digits, trained, monkeypatch):
    rows = []
    for hidden in (8, 9, 8):
        monkeypatch.setitem(kdlib.models.NETWORKS, "mine", partial(small_network, hidden=hidden))
        store = RowStore(tmp_path / f"{len(rows)}.json" if len(rows) == 2 else tmp_path / "x.json")
        rows += train_setups(store, {"a": setup(digits, network="mine")}, (0,), {"test": digits.test})["a"]
    assert trained == [0, 0, 0]
    assert rows[0]["fingerprint"] != rows[1]["fingerprint"]
    assert rows[0]["sha256"] == rows[2]["sha256"] != rows[1]["sha256"]


@pytest.mark.parametrize("part", ["loss_fn", "targets"])
def test_a_setup_that_cannot_be_identified_is_refused(tmp_path, digits, trained, part):
    anonymous = {
        "loss_fn": lambda student_logits, labels: F.cross_entropy(student_logits, labels),
        "targets": lambda seed: lambda batch: torch.zeros(len(batch.labels), 10),
    }
    own = replace(setup(digits), **{part: anonymous[part]})
    with pytest.raises(TypeError, match=r"identif"):
        train_setups(RowStore(tmp_path / "x.json"), {"a": own}, (0,), {"test": digits.test})
    assert not trained
    assert not (tmp_path / "x.json").exists()


def test_a_student_that_diverges_counts_as_one_with_equal_logits(tmp_path, digits, capsys):
    setups = {"fine": setup(digits), "diverging": setup(digits, rate=1e30)}
    rows = train_setups(RowStore(tmp_path / "x.json"), setups, (0,), {"test": digits.test}, batched=True)
    (diverged,), (fine,) = rows["diverging"], rows["fine"]
    assert (diverged["diverged"], fine["diverged"]) == (1, 0)
    assert diverged["nll"] == pytest.approx(np.log(10))
    assert fine["accuracy"] > 0.25 > diverged["accuracy"]
    assert "perceptron, seed 0:" in capsys.readouterr().out


def test_cutout_and_mixup_are_trained_alone(tmp_path, digits, monkeypatch):
    programs, train = [], training._train
    monkeypatch.setattr(training, "_train", lambda setups, own, at: programs.append(len(own)) or train(setups, own, at))
    plain = setup(digits, epochs=1)
    setups = {"plain": plain, "mixed": replace(plain, recipe=replace(plain.recipe, mixup=1.0))}
    train_setups(RowStore(tmp_path / "x.json"), setups, (0, 1), {"test": digits.test}, batched=True)
    assert programs == [2, 1, 1]


class Interrupted(BaseException):
    """The process was killed."""


@pytest.fixture
def killed_after(monkeypatch):
    """Lets so many checkpoints be written, one after each epoch, and then kills; returns how many there were."""
    monkeypatch.setattr(checkpoints, "CHECKPOINT_SECONDS", 0)
    written, write = [], checkpoints.Checkpoint._write

    def counted(self, history):
        if len(written) >= written_at_most[0]:
            raise Interrupted
        write(self, history)
        written.append(self.path)

    written_at_most = [math.inf]
    monkeypatch.setattr(checkpoints.Checkpoint, "_write", counted)

    def limit(number):
        written_at_most[0] = number
        written.clear()
        return written

    return limit


@pytest.mark.parametrize("batched", [True, False])
def test_rows_of_a_program_that_was_killed_are_those_of_one_that_was_not(tmp_path, digits, killed_after, batched):
    setups = {"a": setup(digits, epochs=4), "b": setup(digits, rate=0.05, epochs=4)}

    def rows(path):
        found = train_setups(RowStore(path), setups, (0, 1), {"test": digits.test}, batched=batched)
        return {(row["case"], row["seed"]): row["sha256"] for own in found.values() for row in own}

    wanted = rows(tmp_path / "whole.json")
    written = killed_after(3)
    with pytest.raises(Interrupted):
        rows(tmp_path / "x.json")
    assert list(tmp_path.glob("x.*.partial*"))
    written = killed_after(math.inf)
    assert rows(tmp_path / "x.json") == wanted
    assert len(written) == (1 if batched else 13)  # epochs of the program; of four trainings, the first of which had 3
    assert not list(tmp_path.glob("*.partial*"))


def test_a_diverged_program_leaves_nothing_and_neither_does_a_death_after_the_rows_were_saved(
    tmp_path, digits, killed_after, monkeypatch
):
    killed_after(math.inf)
    setups = {"fine": setup(digits, epochs=2), "diverging": setup(digits, rate=1e30, epochs=2)}
    remove = rows_module.RowStore._remove_partial
    monkeypatch.setattr(rows_module.RowStore, "_remove_partial", lambda self: None)

    def measure():
        return train_setups(RowStore(tmp_path / "x.json"), setups, (0, 1), {"test": digits.test}, batched=True)

    first = measure()
    assert [row["diverged"] for row in first["diverging"]] == [1, 1]
    assert list(tmp_path.glob("x.*.1.partial"))  # of the half that did not diverge
    monkeypatch.setattr(rows_module.RowStore, "_remove_partial", remove)
    assert measure() == first
    assert not list(tmp_path.glob("*.partial*"))


# --- teachers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(digits, tmp_path, monkeypatch):
    """A profile whose teachers are trained in no time, one for each seed."""
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path / "outputs"))
    recipe = kdlib.Recipe(epochs=1, batch_size=50, learning_rate=0.1)
    quick = kdlib.resolve("quick", teacher="perceptron", n_seeds=2)
    return replace(quick, teacher_recipe=recipe, own_teachers=True, views=2)


def test_each_seed_has_a_teacher_of_its_own_and_keeps_it(small, digits, capsys):
    teachers = lab.teachers(small, digits)
    assert list(teachers) == [0, 1, 1000, 1001]
    assert len({kdlib.LiveTeacher(t.model).identity["weights"] for t in teachers.values()}) == 4
    soft = lab.soft_labels_of(teachers)
    assert soft(1).logits.shape == (2, len(digits.train), 10)
    assert not torch.equal(soft(0).logits, soft(1).logits)
    view = kdlib.predict_logits(teachers[1].model, digits.train, view=1)
    torch.testing.assert_close(soft(1).logits[1].float(), view, atol=5e-3, rtol=0)
    files = {path.name: path.stat().st_mtime_ns for path in small.folder.iterdir() if path.suffix in (".pth", ".npy")}
    assert sorted(files)[-4:] == [f"teacher_perceptron{own}.pth" for own in ("", "_seed1", "_seed1000", "_seed1001")]
    again = lab.teachers(small, digits)
    assert torch.equal(again[1].soft_labels.logits, soft(1).logits)
    assert files == {path.name: path.stat().st_mtime_ns for path in small.folder.iterdir() if path.name in files}


def test_a_profile_without_own_teachers_has_one_for_all_seeds(small, digits):
    teachers = lab.teachers(replace(small, own_teachers=False), digits)
    assert len({id(teacher) for teacher in teachers.values()}) == 1


def test_other_teachers_have_files_and_an_objective_of_their_own(small, digits):
    smooth = partial(F.cross_entropy, label_smoothing=0.2)
    few = kdlib.load_data("digits", limit=60).train
    teachers = {
        "plain": lab.teachers(small, digits),
        "smooth": lab.teachers(small, digits, loss_fn=smooth, name="smooth"),
        "longer": lab.teachers(small, digits, recipe=replace(small.teacher_recipe, epochs=2), name="longer"),
        "few": lab.teachers(small, digits, images=few, name="few"),
    }
    weights = {name: kdlib.LiveTeacher(t[1].model).identity["weights"] for name, t in teachers.items()}
    assert len(set(weights.values())) == 4
    assert teachers["smooth"][1].path.name == "teacher_smooth_seed1.pth"
    assert teachers["few"][1].soft_labels.data == digits.train.identity  # of all training images all the same


# --- search ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def peaks(monkeypatch):
    """In place of training: a student is best at the peak of its case; returns what was trained."""
    asked, peaks = [], {"low": (0.03, 1e-3), "inside": (0.2, 1e-3), "high": (100.0, 1e-3)}
    networks = {name: partial(small_network, hidden=k) for k, name in enumerate(peaks, 2)}

    def trained(setups, *_):
        asked.extend(setups)
        return list(setups)

    def measures(model, *_):
        name = next(name for name, network in networks.items() if network == model.network)
        values = model.recipe.learning_rate, model.recipe.weight_decay
        distance = sum(abs(np.log(a / b)) for a, b in zip(values, peaks[name], strict=True))
        distance += abs(getattr(model.loss_fn, "keywords", {}).get("label_smoothing", 0.1) - 0.1)
        return {"validation accuracy": 1 / (1 + distance)}

    monkeypatch.setattr(training, "_train", trained)
    monkeypatch.setattr(training, "_measures", measures)
    return asked, networks


def test_a_search_goes_on_beyond_the_end_where_its_best_value_is(tmp_path, digits, peaks):
    _, networks = peaks
    setups = {name: replace(setup(digits), network=network) for name, network in networks.items()}
    setups = {name: replace(s, recipe=replace(s.recipe, weight_decay=1e-3)) for name, s in setups.items()}
    found = lab.tune(
        RowStore(tmp_path / "x.json"), setups, {"learning_rate": (0.1, 0.2, 0.4)}, (1000, 1001), digits.validation
    )
    tried = {name: list(result.tried["learning_rate"]) for name, result in found.items()}
    assert tried["inside"] == [0.1, 0.2, 0.4]
    assert tried["low"] == pytest.approx([0.025, 0.05, 0.1, 0.2, 0.4])
    assert tried["high"] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6])  # twice beyond, and no further
    assert found["low"].best == {"learning_rate": pytest.approx(0.025)}
    assert found["low"].setup.recipe.learning_rate == pytest.approx(0.025)
    assert (found["inside"].at_edge, found["high"].at_edge) == ((), ("learning_rate",))
    header, rows = lab.search_rows(found)
    assert header == ["", "learning rate", "validation accuracy"]
    assert rows[2][1] == "1.6 (at an end)"


def test_axes_are_searched_one_after_the_other_at_the_best_so_far(tmp_path, digits, peaks):
    asked, networks = peaks
    start = replace(setup(digits, loss_fn=F.cross_entropy), network=networks["inside"])
    start = replace(start, recipe=replace(start.recipe, weight_decay=1e-4, learning_rate=0.1))
    axes = {"learning_rate": (0.1, 0.2, 0.4), "weight_decay": (1e-4, 1e-3, 1e-2), "label_smoothing": (0.05, 0.1, 0.2)}
    found = lab.tune(
        RowStore(tmp_path / "x.json"), {"inside": start, "plain": start},
        {"inside": axes, "plain": {"learning_rate": (0.1, 0.2, 0.4)}}, (1000,), digits.validation,
    )  # fmt: skip
    assert found["inside"].best == {"learning_rate": 0.2, "weight_decay": 1e-3, "label_smoothing": 0.1}
    best = found["inside"].setup
    assert (best.recipe.learning_rate, best.recipe.weight_decay, best.loss_fn.keywords) == (
        0.2, 1e-3, {"label_smoothing": 0.1},
    )  # fmt: skip
    assert found["plain"].best == {"learning_rate": 0.2}
    assert found["plain"].setup.recipe.weight_decay == 1e-4
    assert list(found["inside"].tried["learning_rate"]) == [0.1, 0.2, 0.4]  # the second time, at the best decay
    assert found["inside"].accuracy == max(found["inside"].tried["learning_rate"].values())
    # where axes cross, one training serves both; smoothing starts from none
    assert len(asked) == 3 + (3 + 2 + 3) + 2


def test_the_first_axis_is_searched_again_at_the_best_of_the_others(tmp_path, digits, monkeypatch):
    def measures(setup, *_):  # the best rate is that at which rate times decay is 1e-4, and the best decay is 1e-4
        rate, decay = setup.recipe.learning_rate, setup.recipe.weight_decay
        return {"validation accuracy": 1 / (1 + abs(np.log(rate * decay / 1e-4)) + abs(np.log(decay / 1e-4)))}

    monkeypatch.setattr(training, "_train", lambda setups, *_: list(setups))
    monkeypatch.setattr(training, "_measures", measures)
    start = setup(digits)
    start = replace(start, recipe=replace(start.recipe, weight_decay=1e-3))
    axes = {"learning_rate": (0.05, 0.1, 0.2), "weight_decay": (1e-4, 1e-3)}
    found = lab.tune(RowStore(tmp_path / "x.json"), {"a": start}, axes, (1000,), digits.validation)["a"]
    assert found.best == {"learning_rate": pytest.approx(0.8), "weight_decay": 1e-4}
    assert found.at_edge == ("learning_rate",)


def test_a_list_that_starts_at_zero_goes_on_at_its_other_end(tmp_path, digits, peaks):
    _, networks = peaks
    start = replace(setup(digits, loss_fn=F.cross_entropy), network=networks["inside"])
    start = replace(start, recipe=replace(start.recipe, weight_decay=1e-3))
    axes = {"label_smoothing": (0.0, 0.025, 0.05)}
    found = lab.tune(RowStore(tmp_path / "x.json"), {"a": start}, axes, (1000,), digits.validation)["a"]
    assert found.best == {"label_smoothing": 0.1}
    assert list(found.tried["label_smoothing"]) == [0.0, 0.025, 0.05, 0.1, 0.2]


def test_a_closed_axis_ends_where_its_list_ends(tmp_path, digits, peaks):
    _, networks = peaks
    start = replace(setup(digits), network=networks["high"])
    start = replace(start, recipe=replace(start.recipe, weight_decay=1e-3))
    found = lab.tune(
        RowStore(tmp_path / "x.json"), {"a": start}, {"learning_rate": (0.1, 0.2)}, (1000,), digits.validation,
        closed=("learning_rate",),
    )["a"]  # fmt: skip
    assert list(found.tried["learning_rate"]) == [0.1, 0.2]
    assert found.at_edge == ()  # there is no more to be tried


@pytest.mark.parametrize("values", [(), (0.2, 0.1), (0.1, 0.1)])
def test_an_axis_must_ascend(tmp_path, digits, values):
    with pytest.raises(ValueError, match="axis learning_rate"):
        lab.tune(RowStore(tmp_path / "x.json"), {"a": setup(digits)}, {"learning_rate": values}, (0,), digits.test)
