"""Measuring: against scikit-learn, cases made by hand, and samples whose truth is known."""

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, log_loss
from torch import nn

from kdlib import build
from kdlib.evaluate import (
    agreement,
    calibration,
    calibration_error,
    file_megabytes,
    fit_temperature,
    latency,
    load_results,
    paired_interval,
    percent,
    predict_logits,
    results_rows,
    save_results,
    scores,
)
from kdlib.evaluate import evaluate as evaluate_network

pytestmark = pytest.mark.usefixtures("isolated")


def logits(count: int = 500, classes: int = 5, *, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed))


def sampled(given: torch.Tensor, seed: int = 1) -> torch.Tensor:
    """Labels drawn from the probabilities of the logits: a network with these logits is calibrated."""
    return torch.multinomial(given.softmax(1), 1, generator=torch.Generator().manual_seed(seed)).flatten()


def sure(confidences: list[float], right: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of two classes that predict class 0 with those confidences, and labels that make them correct or not."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return torch.stack([p, 1 - p], 1).log(), 1 - torch.tensor(right, dtype=torch.int64)


# --- logits -----------------------------------------------------------------------------------------------------------


def test_logits_come_in_order_and_do_not_depend_on_the_batch_size(image_set, toy_teacher):
    data = image_set(21)
    model = toy_teacher(data).train()
    whole = predict_logits(model, data)
    assert whole.shape == (21, 4)
    assert whole.dtype == torch.float32
    assert not whole.requires_grad
    assert whole.std(0).min() > 0.01  # the images are told apart
    for size in (1, 2, 20):
        torch.testing.assert_close(predict_logits(model, data, batch_size=size), whole, rtol=1e-4, atol=1e-5)
    one = model.eval()(data.batch(torch.tensor([13]), torch.tensor([0])))
    torch.testing.assert_close(one[0], whole[13], rtol=1e-4, atol=1e-5)


def test_the_logits_of_a_view_are_those_of_its_images(image_set, toy_teacher):
    data = image_set(10, flip=True)
    model = toy_teacher(data)
    for view in (1, 17):
        images = data.batch(torch.arange(10), torch.full((10,), view))
        torch.testing.assert_close(predict_logits(model, data, view=view), model(images).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", [True, False])
def test_predicting_leaves_the_network_as_it_was(image_set, toy_teacher, mode):
    data = image_set(20)
    model = toy_teacher(data).train(mode)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    predict_logits(model, data)
    assert model.training is mode
    assert all(m.training is mode for m in model.modules())
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_the_mode_is_restored_when_the_network_fails(image_set):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4)).train()  # of another input size
    with pytest.raises(RuntimeError):
        predict_logits(model, image_set(4))
    assert model.training


def test_a_network_in_float64_predicts_in_float64(image_set, toy_teacher):
    data = image_set(10)
    data = replace(data, mean=(0.5,), std=(0.25,))
    model = toy_teacher(data).double()
    model.register_forward_pre_hook(lambda module, images: images[0].double())
    assert predict_logits(model, data).dtype == torch.float64


class Flattening(nn.Module):
    """A network that calls view on its feature maps, as many in tutorials do."""

    def __init__(self, classes: int, channels: int = 1, how: str = "view"):
        super().__init__()
        self.how = how
        self.convolution = nn.Conv2d(channels, 6, 3, padding=1)
        self.odd = nn.Conv2d(6, 6, 1)  # its weights are laid out in both ways at once
        self.classifier = nn.Linear(6 * 64, classes)

    def forward(self, images):
        x = torch.relu(self.odd(self.convolution(images)))
        x = x.view(x.size(0), -1) if self.how == "view" else x.reshape(x.size(0), -1)
        return self.classifier(x)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("how", ["view", "reshape"])
def test_a_network_that_calls_view_or_reshape_on_its_feature_maps_runs_and_its_weights_stay_in_place(
    image_set, how, channels
):
    data = image_set(20, channels=channels)
    model = Flattening(4, channels, how)
    images = data.batch(torch.arange(20), torch.zeros(20, dtype=torch.int64))
    wanted = model(images.clone(memory_format=torch.contiguous_format)).detach()
    torch.testing.assert_close(predict_logits(model, data, batch_size=8), wanted, rtol=1e-4, atol=1e-5)
    places = [p.data_ptr() for p in model.parameters()]  # of a recorded training step, which goes on with them
    torch.testing.assert_close(predict_logits(model, data, batch_size=8), wanted, rtol=1e-4, atol=1e-5)
    assert 0 < latency(model, (channels, 8, 8), 2, "cpu") < math.inf
    assert [p.data_ptr() for p in model.parameters()] == places
    assert (wanted.std(0) > 0).all()


def test_a_network_that_fails_for_another_reason_says_it_itself(image_set):
    class Failing(Flattening):
        def forward(self, images):
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        predict_logits(Failing(4), image_set(4))


# --- scores ----------------------------------------------------------------------------------------------------------


def test_accuracy_and_likelihood_agree_with_scikit_learn():
    given, labels = logits(), sampled(logits(scale=1.0))
    found = scores(given, labels)
    assert found.accuracy == pytest.approx(accuracy_score(labels, given.argmax(1)), abs=1e-12)
    assert found.nll == pytest.approx(log_loss(labels, given.double().softmax(1).numpy(), labels=range(5)), rel=1e-9)
    assert found.ece == calibration_error(given, labels)


def test_a_network_is_measured_on_every_image_in_its_clean_view(image_set, toy_teacher):
    data = image_set(30, flip=True)
    model = toy_teacher(data).train()
    clean = data.batch(torch.arange(30), torch.zeros(30, dtype=torch.int64))
    found = evaluate_network(model, data)
    assert model.training
    wanted = scores(model.eval()(clean).detach(), data.labels)
    assert (found.accuracy, found.nll) == pytest.approx((wanted.accuracy, wanted.nll), rel=1e-4)


# --- calibration -----------------------------------------------------------------------------------------------------


def test_the_calibration_error_of_one_confidence_is_its_distance_from_the_accuracy():
    # ten predictions of confidence 0.8, six of them correct: |0.8 - 0.6|
    assert calibration_error(*sure([0.8] * 10, [True] * 6 + [False] * 4)) == pytest.approx(0.2)
    assert calibration_error(*sure([0.8] * 10, [True] * 8 + [False] * 2)) == pytest.approx(0, abs=1e-9)


def test_the_calibration_error_weighs_each_bin_by_its_images_and_gaps_do_not_cancel():
    # 3 of confidence 0.9, all right (gap 0.1); 1 of 0.7, wrong (gap 0.7): (3 * 0.1 + 1 * 0.7) / 4 = 0.25
    # signed, 0.1 too little and 0.7 too much would be (0.7 - 0.3) / 4 = 0.1
    assert calibration_error(*sure([0.9] * 3 + [0.7], [True] * 3 + [False])) == pytest.approx(0.25)


def test_predictions_in_one_bin_are_averaged_before_they_are_compared():
    # with two bins both are in the upper one: mean confidence 0.8, accuracy 1/2, gap 0.3
    given, labels = sure([0.7, 0.9], [True, False])
    assert calibration_error(given, labels, bins=2) == pytest.approx(0.3)
    # with fifteen each is alone: (0.3 + 0.9) / 2
    assert calibration_error(given, labels) == pytest.approx(0.6)


def test_a_bin_includes_its_upper_edge_and_full_confidence_is_in_the_last():
    given, labels = sure([0.5, 0.75, 0.76, 1.0], [True] * 4)
    found = calibration(given, labels, bins=4)
    assert found.count.tolist() == [0, 1, 1, 2]
    np.testing.assert_allclose(found.confidence, [np.nan, 0.5, 0.75, 0.88])
    np.testing.assert_allclose(found.accuracy, [np.nan, 1, 1, 1])


def test_a_network_whose_labels_follow_its_probabilities_is_calibrated_and_a_sharper_one_is_not():
    given = logits(20_000)
    labels = sampled(given)
    assert calibration_error(given, labels) < 0.015
    assert calibration_error(3 * given, labels) > 0.1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_a_known_temperature_is_recovered(temperature):
    given = logits(20_000, scale=1.5)
    labels = sampled(given)
    found = fit_temperature(temperature * given, labels)
    assert found == pytest.approx(temperature, rel=0.04)
    assert scores(temperature * given / found, labels).nll <= scores(given, labels).nll


# --- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_is_the_share_of_equal_predictions_correct_or_not():
    one, other = torch.eye(4)[[0, 1, 2, 3]], torch.eye(4)[[0, 1, 3, 2]]
    assert agreement(one, other) == 0.5
    assert agreement(one, one) == 1
    assert agreement(one, other, torch.tensor([True, True, True, False])) == pytest.approx(2 / 3)
    assert agreement(one, other, torch.tensor([False, False, True, True])) == 0


# --- intervals -------------------------------------------------------------------------------------------------------


def test_the_interval_is_that_of_the_mean_over_the_images():
    differences = np.random.RandomState(0).choice([-1.0, 0.0, 0.0, 0.0, 1.0, 1.0], 1000)
    low, high = paired_interval(differences)
    error = differences.std(ddof=1) / math.sqrt(1000)
    assert low == pytest.approx(differences.mean() - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(differences.mean() + 1.96 * error, abs=0.2 * error)


def test_a_higher_level_gives_a_wider_interval():
    differences = np.random.RandomState(0).randint(-1, 2, 300).astype(float)
    low, high = paired_interval(differences, 0.8)
    wider = paired_interval(differences, 0.99)
    assert wider[0] < low < high < wider[1]


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    random, covered = np.random.RandomState(0), 0
    for _ in range(60):
        low, high = paired_interval(random.choice([-1.0, 0.0, 1.0], 200, p=[0.1, 0.7, 0.2]))
        covered += low <= 0.1 <= high
    assert 52 <= covered <= 60  # 57 expected


def test_the_interval_repeats_whatever_was_drawn_before():
    differences = np.random.RandomState(0).randint(-1, 2, 300).astype(float)
    first = paired_interval(differences)
    np.random.seed(5)  # noqa: NPY002
    assert paired_interval(differences) == first


def test_two_networks_that_are_always_right_together_differ_by_nothing():
    assert paired_interval(np.zeros(50)) == (0, 0)


# --- size and latency ------------------------------------------------------------------------------------------------


def test_latency_is_a_positive_number_of_milliseconds_in_eval_mode():
    model = build("tiny_cnn", 4, 1).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = latency(model, (1, 8, 8), 2, "cpu")
    assert 0 < found < math.inf
    assert not model.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_a_megabyte_is_a_million_bytes(tmp_path):
    (tmp_path / "file").write_bytes(bytes(2_500_000))
    assert file_megabytes(tmp_path / "file") == 2.5


# --- results.json ----------------------------------------------------------------------------------------------------


def run_of(role: str, seeds: list[int]) -> dict:
    """A run over some seeds, as chapter 06 describes it."""
    return {
        "role": role,
        "network": "tiny_cnn",
        "parameters": 1898,
        "size_mb": 0.123,
        "seeds": seeds,
        "accuracy": [0.90 + 0.01 * s for s in seeds],
        "nll": [0.3 + s for s in seeds],
        "ece": [0.02 + s for s in seeds],
        "agreement": [0.95] * len(seeds),
        "seconds": [1.5] * len(seeds),
        "device": "CPU, 2 threads",
        "latency_ms": {"CPU": {"1": 0.25, "256": 12.0}},
    }


def test_results_come_back_as_they_were_written_in_the_schema_of_the_design(tmp_path):
    runs = [run_of("teacher", [0]), run_of("student", [0, 1]), run_of("distilled", [0, 1])]
    written = save_results(tmp_path / "results.json", "quick", "digits", runs)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert len(saved.pop("checksum")) == 64
    assert load_results(tmp_path / "results.json") == saved == written
    assert written.keys() == {"profile", "dataset", "versions", "date", "runs"}
    assert (written["profile"], written["dataset"]) == ("quick", "digits")
    assert written["versions"].keys() == {"python", "torch", "numpy"}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", written["date"])
    assert written["runs"] == runs


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is not a results file \(.+\): run chapter 06 again"),
        ('{"profile": "quick", "runs"', r"is not a results file \(.+\): run chapter 06 again"),
        ("[]", r"is not a results file \(.+\): run chapter 06 again"),
        ('{"profile": "quick"}', r"is not a results file \(it has no dataset, runs\): run chapter 06 again"),
    ],
)
def test_a_file_that_holds_no_results_is_refused_and_kept(tmp_path, content, message):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ValueError, match=r"results\.json " + message):
        load_results(tmp_path / "results.json")
    assert (tmp_path / "results.json").read_text() == content


def test_results_that_are_not_there_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"results .*results\.json are not there: run chapter 06 first"):
        load_results(tmp_path / "results.json")


def test_the_table_says_it_in_words():
    teacher, student, distilled = run_of("teacher", [0]), run_of("student", [0, 1]), run_of("distilled", [1, 2, 3])
    distilled["latency_ms"] = {"CPU": {"1": 0.5, "256": 1.234}}
    header, rows = results_rows({"runs": [teacher, student, distilled]})
    assert header == [
        *["", "network", "test accuracy", "seeds", "parameters", "file, MB"],
        *["ms for 1 on CPU", "ms for 256 on CPU"],
    ]
    assert rows == [
        ["teacher", "tiny_cnn", "90.00 %", "1", "1,898", "0.12", "0.25", "12.00"],
        ["student alone", "tiny_cnn", "90.50 ± 0.71 %", "2", "1,898", "0.12", "0.25", "12.00"],
        ["distilled student", "tiny_cnn", "92.00 ± 1.00 %", "3", "1,898", "0.12", "0.50", "1.23"],
    ]
    short = results_rows({"runs": [teacher, student, distilled]}, latency=False)
    assert short == (header[:6], [row[:6] for row in rows])


def test_a_percentage_has_the_standard_deviation_over_the_seeds():
    # 0.90, 0.92, 0.94: mean 0.92, deviations -0.02, 0, 0.02, so sqrt(0.0008 / 2) = 0.02
    assert percent([0.90, 0.92, 0.94]) == "92.00 ± 2.00 %"
    assert percent([0.968]) == "96.80 %"
