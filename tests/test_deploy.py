"""The student outside of the notebook: ONNX files, eight bits, the commands, and what is refused."""

import json
from functools import partial

import numpy as np
import onnx
import pytest
import torch
from conftest import make_images
from PIL import Image
from torch import nn

import kdlib
from kdlib import deploy, evaluate
from kdlib.deploy import cli, tensorrt
from kdlib.deploy.export import FromPixels
from kdlib.models import NETWORKS
from kdlib.records import artefacts

pytestmark = pytest.mark.usefixtures("isolated")
RECIPE = kdlib.Recipe(epochs=2, batch_size=16, learning_rate=0.05)


def images_for(network: str):
    size = 28 if network in ("lenet", "mlp100") else 12
    torch.manual_seed(0)
    pixels = torch.randint(0, 256, (24, size, size, 3), dtype=torch.uint8)
    labels = torch.arange(24) % 4
    return kdlib.data.ImageSet("toy/train", pixels, labels, ("ant", "bee", "cat", "dog"), (0.5, 0.4, 0.3), (0.2,) * 3)


def trained(tmp_path, network="tiny_cnn", images=None):
    """A network in a file with its record, and its images."""
    images = images or make_images(48)
    made = kdlib.load_or_train(
        tmp_path, "student.pth", network, images, nn.functional.cross_entropy, RECIPE, progress=False, device="cpu"
    )
    return made, images


# --- export ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [n for n in NETWORKS if not n.startswith(("resnet", "mobilenet"))])
def test_every_small_network_predicts_the_same_outside_for_any_batch(network, tmp_path):
    images = images_for(network)
    model = kdlib.build(network, 4, 3).eval()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    exported = deploy.export_onnx(model, tmp_path / "a" / "network.onnx", images)
    logits = kdlib.predict_logits(model, images, device="cpu")
    for batch in (1, 7, 24):
        torch.testing.assert_close(exported.predict_logits(images.images, batch), logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert exported.shape == tuple(images.images.shape[1:])
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["network.onnx"]


def test_a_network_in_train_mode_is_exported_in_eval_mode_and_left_as_it_was(tmp_path):
    images = images_for("cnn")
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(400, 4)
    ).train()
    exported = deploy.export_onnx(model, tmp_path / "network.onnx", images)
    assert model.training
    wanted = kdlib.predict_logits(model, images, device="cpu")
    torch.testing.assert_close(exported.predict_logits(images.images), wanted, atol=1e-4, rtol=1e-4)


def test_what_the_numbers_mean_is_in_the_file(tmp_path):
    made, images = trained(tmp_path)
    model = deploy.export_onnx(made.model, tmp_path / "s.onnx", images, temperature=1.7, fingerprint=made.fingerprint)
    told = {one.key: one.value for one in onnx.load(model.path).metadata_props}
    assert json.loads(told["class_names"]) == list(images.class_names) == list(model.class_names)
    assert float(told["temperature"]) == model.temperature == 1.7
    assert json.loads(told["fingerprint"]) == json.loads(json.dumps(made.fingerprint)) == model.fingerprint
    other = deploy.export_onnx(made.model, tmp_path / "t.onnx", images.format)
    assert list(other.fingerprint) == ["weights"]
    assert other.temperature == 1


def test_half_the_size_in_half_precision(tmp_path):
    images = images_for("cnn")
    model = kdlib.build("cnn", 4, 3)
    full, half = (deploy.export_onnx(model, tmp_path / f"{h}.onnx", images, half=h) for h in (False, True))
    assert 0.45 < half.megabytes / full.megabytes < 0.55
    torch.testing.assert_close(
        half.predict_logits(images.images), full.predict_logits(images.images), atol=0.02, rtol=0.02
    )


class Branches(nn.Module):
    """A network whose path depends on its values."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 4)

    def forward(self, x):
        x = self.layer(x.flatten(1))
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        (Branches(), {}, "Branches cannot be exported .*: its forward must be made of tensor operations"),
        (nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), {}, r"gives \(2, 5\) for 2 images, expected \(2, 4\)"),
        (
            nn.Sequential(nn.Flatten(), nn.Linear(64, 4)),
            {"temperature": 0},
            "temperature is 0: expected a number above",
        ),
    ],
    ids=["branches", "classes", "temperature"],
)
def test_what_cannot_be_exported_is_refused_and_leaves_no_file(model, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        deploy.export_onnx(model, tmp_path / "s.onnx", make_images(8), **options)
    assert not any(tmp_path.iterdir())


def test_a_file_that_is_no_exported_network_is_refused_by_name(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.onnx is not there: export a network first"):
        deploy.OnnxModel(tmp_path / "none.onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(ValueError, match=r"text\.onnx is not a network that ONNX Runtime can open"):
        deploy.OnnxModel(tmp_path / "text.onnx")
    x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10),
        tmp_path / "other.onnx",
    )
    with pytest.raises(
        ValueError, match=r"other\.onnx has the inputs \['x'\] and outputs \['y'\], expected \['images'\]"
    ):
        deploy.OnnxModel(tmp_path / "other.onnx")


def test_images_of_another_kind_are_refused(tmp_path):
    made, images = trained(tmp_path)
    model = deploy.export_onnx(made.model, tmp_path / "s.onnx", images)
    for wrong in (images.images.float() / 255, images.images.permute(0, 3, 1, 2), images.images[0]):
        with pytest.raises(ValueError, match=r"expected uint8 \(N, 8, 8, 1\): pixels from 0 to 255"):
            model.predict_logits(wrong)


# --- eight bits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [False, True])
def test_eight_bits_are_smaller_and_predict_nearly_the_same(symmetric, tmp_path):
    images = images_for("wide_resnet14")
    model = deploy.export_onnx(kdlib.build("wide_resnet14", 4, 3), tmp_path / "s.onnx", images, temperature=2.0)
    small = deploy.quantise(model, tmp_path / "s8.onnx", images.images, symmetric=symmetric)
    assert small.megabytes < 0.35 * model.megabytes
    assert (small.class_names, small.temperature, small.fingerprint) == (
        model.class_names,
        model.temperature,
        model.fingerprint,
    )
    a, b = model.predict_logits(images.images), small.predict_logits(images.images)
    assert (a - b).norm() < 0.1 * (a - a.mean(0)).norm() + 0.05 * a.norm()
    scales = [one for one in onnx.load(small.path).graph.initializer if one.name.endswith("weight_scale")]
    assert any(one.dims and one.dims[0] > 1 for one in scales)  # a scale for each channel


def test_weights_are_rounded_by_channel_and_the_gradient_passes():
    weight = torch.tensor([[1.0, -0.62, 0.371], [0.01, -0.004, 0.0031]], requires_grad=True)
    made = deploy.quantise.__globals__["RoundedWeight"]()(weight)
    steps = torch.tensor([[1 / 127], [0.01 / 127]])
    torch.testing.assert_close(made, (weight / steps).round() * steps)
    made.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_training_with_the_rounding_keeps_the_network_and_teaches_it(tmp_path):
    made, images = trained(tmp_path, "digits_cnn", images_for("digits_cnn"))
    logits = kdlib.predict_logits(made.model, images, device="cpu")
    aware = deploy.rounded(made.model, images)
    off = (kdlib.predict_logits(aware, images, device="cpu") - logits).norm() / logits.norm()
    assert 0 < off < 0.1  # rounded, and nearly the same
    as_before = deploy.plain(deploy.rounded(made.model, images))  # with weights that are rounded, and nothing else
    left = (kdlib.predict_logits(as_before, images, device="cpu") - logits).norm() / logits.norm()
    assert 0 < left < off
    loss_fn = partial(kdlib.distillation_loss, temperature=2.0, alpha=0.0)
    targets = kdlib.SoftLabels(5 * torch.eye(4)[images.labels][None].half(), images.identity)
    recipe = kdlib.Recipe(epochs=5, batch_size=12, learning_rate=0.01, views=1)
    history = kdlib.train(aware, images, loss_fn, recipe, targets=targets, progress=False, device="cpu")
    assert np.isfinite(history.loss).all()
    assert history.loss[-1] < history.loss[0]
    simulated = kdlib.predict_logits(aware, images, device="cpu")
    exported = deploy.export_onnx(deploy.plain(aware), tmp_path / "a.onnx", images)
    small = deploy.quantise(exported, tmp_path / "a8.onnx", images.images).predict_logits(images.images)
    assert (small - simulated).norm() < 0.1 * simulated.norm()


# --- files and commands ----------------------------------------------------------------------------------------------


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_from_weights_to_the_classes_of_a_picture(tmp_path, capsys):
    made, images = trained(tmp_path)
    status, said, _ = run(capsys, "export", made.path, tmp_path / "s.onnx", "--temperature", 2)
    assert status == 0
    assert "8x8 pixels with 1 channel as uint8 (batch, 8, 8, 1), gives logits for 4 classes, temperature 2" in said
    files = []
    for k in range(3):
        files.append(tmp_path / f"{k}.png")
        Image.fromarray(images.images[k, ..., 0].numpy()).save(files[-1])
    wanted = (kdlib.predict_logits(made.model, images, device="cpu")[:3] / 2).softmax(1)
    for file, options in ((tmp_path / "s.onnx", ()), (made.path, ("--temperature", 2))):
        status, said, _ = run(capsys, "predict", file, *files, "--top", 4, *options)
        assert status == 0
        for line, own in zip(said.splitlines(), wanted, strict=True):
            shown = dict(pair.rsplit(" ", 1) for pair in line.partition(": ")[2].split(", "))
            for name, p in zip(images.class_names, own.tolist(), strict=True):
                assert float(shown[name].rstrip("%")) == pytest.approx(100 * p, abs=0.06)


def test_a_picture_in_colour_and_of_another_size_is_fitted(tmp_path, capsys):
    made, _ = trained(tmp_path)
    deploy.export_onnx(made.model, tmp_path / "s.onnx", make_images(8))
    Image.new("RGB", (50, 30), (200, 10, 10)).save(tmp_path / "wide.jpg")
    assert run(capsys, "predict", tmp_path / "s.onnx", tmp_path / "wide.jpg")[0] == 0


def test_a_network_of_ones_own_is_named_and_never_taken_from_the_record(tmp_path, capsys, monkeypatch):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\n"
        "def small(classes, channels):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    made, _ = trained(tmp_path, "nets:small")
    status, _, error = run(capsys, "export", made.path, "s.onnx")
    assert status == 1
    assert "its record names 'nets.small', which is not one of kdlib's own; say which network it is" in error
    assert run(capsys, "export", made.path, "s.onnx", "--network", "nets:small")[0] == 0


def test_an_older_record_takes_what_it_lacks_from_the_data_set(tmp_path, capsys):
    data = kdlib.load_data("digits")
    made, _ = trained(tmp_path, "perceptron", data.train)
    record = artefacts.record(made.path)
    del record["format"]
    artefacts.save_json(artefacts.record_path(made.path), record)
    assert run(capsys, "export", made.path, tmp_path / "s.onnx")[0] == 0
    assert deploy.OnnxModel(tmp_path / "s.onnx").class_names == data.train.class_names
    record["fingerprint"]["data"] = "mine/train 0123"
    artefacts.save_json(artefacts.record_path(made.path), record)
    status, _, error = run(capsys, "export", made.path, tmp_path / "s.onnx")
    assert status == 1
    assert "does not tell the size, scale and classes of its images; say what it was trained on" in error
    assert run(capsys, "export", made.path, tmp_path / "s.onnx", "--dataset", "digits")[0] == 0


def test_a_command_that_cannot_be_carried_out_says_why(tmp_path, capsys):
    made, _ = trained(tmp_path)
    for arguments, message in (
        (("export", tmp_path / "none.pth", "s.onnx"), "none.pth is not there"),
        (("predict", tmp_path / "none.onnx", "p.png"), "none.onnx is not there"),
        (("predict", made.path, tmp_path / "none.png"), "none.png is not an image that can be read"),
        (("predict", made.path, made.path, "--top", 0), "--top is 0"),
        (("predict", made.path, made.path, "--temperature", -2), "temperature is -2.0: expected a number above 0"),
    ):
        status, _, error = run(capsys, *arguments)
        assert (status, error.startswith("error: ")) == (1, True)
        assert message in error


def test_the_published_students_can_be_exported(tmp_path):
    settings = kdlib.resolve("quick")
    model = deploy.published_student(settings, "perceptron", 0)
    data = kdlib.load_data("digits")
    scores = evaluate.evaluate(model, data.test, device="cpu")
    reported = deploy.reported_accuracy(settings, "distilled", "perceptron")
    assert scores.accuracy == pytest.approx(reported[0], abs=0.005)


def test_timing_calls_all_in_turn():
    called = []
    times = deploy.interleaved({name: partial(called.append, name) for name in "ab"}, rounds=3, seconds=0)
    assert called == list("abab" * 2)
    assert set(times) == {"a", "b"}
    assert all(ms > 0 for ms in times.values())


def test_without_a_gpu_tensorrt_says_what_is_missing(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    made, images = trained(tmp_path)
    assert tensorrt.missing() == "no CUDA GPU"
    with pytest.raises(RuntimeError, match="TensorRT needs what this machine lacks: no CUDA GPU"):
        tensorrt.TensorRTModel(deploy.export_onnx(made.model, tmp_path / "s.onnx", images))


def test_the_graph_casts_pixels_before_anything_else(tmp_path):
    made, images = trained(tmp_path)
    graph = onnx.load(deploy.export_onnx(made.model, tmp_path / "s.onnx", images).path).graph
    assert graph.node[0].op_type == "Cast"  # TensorRT takes uint8 for nothing else
    assert FromPixels(made.model, images.mean, images.std)(images.images[:2]).shape == (2, 4)
