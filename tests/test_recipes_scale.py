"""The recipes for TinyImageNet and ImageNet, in little: ``python -m tests.miniature`` plays them at the true layout."""

from dataclasses import replace
from urllib.error import URLError

import miniature
import numpy as np
import pytest
import torch
import torchvision

import kdlib
from kdlib import Recipe, profiles
from kdlib.data import ImageSet
from kdlib.deploy import cli
from kdlib.scale import StreamedImages, load_compact, load_images, recipes
from kdlib.scale.recipes import RECIPES, distil, in_little

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize("name", RECIPES)
def test_every_role_is_played_and_found_again(name, tmp_path, capsys):
    root = miniature.TREES[name](tmp_path / name, classes=4)
    made = miniature.play(name, root, tmp_path / "outputs", ["mobilenet_v2"])
    assert [(one.role, one.path.name) for one in made] == [
        ("teacher", "teacher_resnet50.pth"),
        ("soft_labels", "soft_labels"),
        ("student", "student_mobilenet_v2.pth"),
        ("distilled", "distilled_mobilenet_v2.pth"),
    ]
    assert {one.path.parent for one in made} == {tmp_path / "outputs" / f"{name}_miniature"}
    assert made[1].scores is None
    assert all(np.isfinite(one.scores.nll) for one in (made[0], *made[2:]))
    weights = [torch.load(one.path, weights_only=True) for one in made[2:]]
    assert not weights[0]["classifier.1.weight"].equal(weights[1]["classifier.1.weight"])
    files = [path for ending in ("pth", "npy") for path in sorted(made[0].path.parent.rglob(f"*.{ending}"))]
    written = [path.stat().st_mtime_ns for path in files]
    again = distil(
        name,
        root,
        tmp_path / "outputs",
        role="distilled",
        student="mobilenet_v2",
        cache=tmp_path / "outputs" / "cache",
        workers=0,
        device="cpu",
        progress=False,
        miniature=True,
    )
    assert again == made[3]
    assert [path.stat().st_mtime_ns for path in files] == written
    data = load_images(root, **in_little(RECIPES[name]).images(), cache=tmp_path / "outputs" / "cache", progress=False)
    assert type(data.train) is {"tiny_imagenet": ImageSet, "imagenet": StreamedImages}[name]
    kept = load_compact(made[1].path, data.train)
    assert (kept.views, kept.table.shape[1], kept.k) == (2, len(data.train), 2)


def test_the_live_teacher_teaches_where_nothing_is_stored(tmp_path, monkeypatch):
    small = replace(RECIPES["imagenet"], teacher="digits_cnn", students={"small": ("digits_cnn", Recipe(1, 8, 0.1))})
    monkeypatch.setitem(RECIPES, "imagenet", small)
    root = miniature.imagenet(tmp_path / "imagenet", classes=4)
    options = {"cache": tmp_path / "cache", "workers": 0, "device": "cpu", "progress": False, "miniature": True}
    with pytest.raises(ValueError, match="soft_views is 0: expected how many views to store"):
        distil("imagenet", root, tmp_path / "outputs", role="soft_labels", soft_views=0, **options)
    live = distil("imagenet", root, tmp_path / "outputs", role="distilled", soft_views=0, **options)
    assert live.path.exists()
    assert not (live.path.parent / "soft_labels").exists()


def test_torchvisions_weights_are_imagenets_teacher(tmp_path, image_set, monkeypatch):
    data = image_set(count=20, classes=1000, size=(32, 32), channels=3)
    recipe = RECIPES["imagenet"]
    network = torchvision.models.resnet50()
    torch.save(network.state_dict(), tmp_path / "resnet50.pth")
    splits = kdlib.data.Data(data, data, data)
    teacher, path = recipes._teacher(recipe, splits, tmp_path, tmp_path / "resnet50.pth", {"progress": False})
    assert path is None
    numbers = torch.arange(3), torch.zeros(3, dtype=torch.int64)
    scaled = data.pixels(*numbers).permute(0, 3, 1, 2) / 255
    as_trained = (scaled - torch.tensor(recipes.MEAN)[:, None, None]) / torch.tensor(recipes.STD)[:, None, None]
    with torch.no_grad():
        assert torch.allclose(teacher(data.batch(*numbers)), network.eval()(as_trained), atol=1e-4, rtol=1e-3)

    def unreachable(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", unreachable)
    with pytest.raises(OSError, match=r"fetch https://\S+/resnet50-\S+.pth elsewhere, and give the file as weights"):
        recipes._teacher(recipe, splits, tmp_path, None, {"progress": False})


@pytest.mark.parametrize("name", RECIPES)
def test_the_networks_are_those_that_are_named(name):
    recipe = RECIPES[name]
    classes = 200 if name == "tiny_imagenet" else 1000
    sizes = {n: kdlib.count_parameters(kdlib.build(network, classes)) for n, (network, _) in recipe.students.items()}
    if name == "imagenet":  # as torchvision documents them
        assert sizes == {"resnet18": 11_689_512, "mobilenet_v2": 3_504_872}
        with pytest.raises(ValueError, match="channels is 1: expected 3"):
            kdlib.build(recipe.teacher, 1000, 1)
    for network, how in recipe.students.values():
        assert how.epochs >= 90
        assert kdlib.models.find_network(network)


def test_a_name_that_is_unknown_is_refused(tmp_path):
    for wrong, message in (
        ({"recipe_name": "tinyimagenet"}, "recipe is 'tinyimagenet': expected .*; did you mean 'tiny_imagenet'"),
        ({"role": "pupil"}, "role is 'pupil': expected one of teacher, soft_labels, student, distilled"),
        ({"student": "resnet34"}, "student is 'resnet34': expected one of resnet18, mobilenet_v2"),
    ):
        asked = {"recipe_name": "imagenet", "root": tmp_path, "outputs": tmp_path, "role": "teacher", **wrong}
        with pytest.raises(ValueError, match=message):
            distil(**asked)


def test_in_little_every_recipe_needs_nothing_from_elsewhere():
    for recipe in map(in_little, RECIPES.values()):
        assert recipe.teacher_recipe.epochs == 1
        assert recipe.soft_views == 2


def test_a_recipe_is_played_from_the_shell(tmp_path, capsys):
    root = miniature.tiny_imagenet(tmp_path / "tiny", classes=4)
    command = ["train", "--recipe", "tiny_imagenet", "--data", str(root), "--student", "mobilenet_v2", "--miniature"]
    assert cli.main([*command, "--role", "distilled"]) == 0
    said = capsys.readouterr().out
    assert f"{profiles.outputs_folder() / 'tiny_imagenet_miniature' / 'distilled_mobilenet_v2.pth'}: test acc" in said
    assert cli.main([*command[:1], "--role", "soft_labels"]) == 1
    assert "expected --recipe and --data together" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "tiny_imagenet", "--data", ".", "--set", "epochs=3"], "--set has no meaning with --recipe"),
        (["--recipe", "tiny_imagenet", "--data", ".", "--profile", "quick"], "--profile has no meaning with --recipe"),
        (["--profile", "quick", "--student", "mlp100"], "--student has no meaning without --recipe"),
        (["--soft-views", "0"], "--soft-views has no meaning without --recipe"),
        (["--miniature"], "--miniature has no meaning without --recipe"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(options, said, capsys):
    assert cli.main(["train", "--role", "student", *options]) == 1
    assert said in capsys.readouterr().err
