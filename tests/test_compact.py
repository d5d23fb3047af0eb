"""Compact soft labels: what k logits say, what they cost, and that no shard is lost, mixed up or believed blindly."""

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from kdlib import build, distillation_loss
from kdlib.data import Batch, ImageSet
from kdlib.records import artefacts
from kdlib.scale import (
    bytes_per_view,
    compact_errors,
    compress,
    generate_compact,
    load_compact,
    made_up_logits,
)
from kdlib.scale.compact import layout
from kdlib.soft_labels import SoftLabels, generate, in_half
from kdlib.train import Recipe, load_or_train, train

pytestmark = pytest.mark.usefixtures("isolated")

RECIPE = Recipe(epochs=2, batch_size=16, learning_rate=0.1)
DISTILLATION = functools.partial(distillation_loss, temperature=4.0, alpha=0.1)
quiet = functools.partial(generate_compact, progress=False)


def dense_of(teacher, data, views: int) -> SoftLabels:
    return SoftLabels(torch.from_numpy(generate(teacher, data, views, progress=False)), data.identity)


def batch_of(indices, views) -> Batch:
    return Batch(None, None, torch.tensor(indices), torch.tensor(views))


def everything(data, views: int) -> Batch:
    """Every image in every view, view by view."""
    indices, seen = torch.arange(len(data)).repeat(views), torch.arange(views).repeat_interleave(len(data))
    return Batch(None, None, indices, seen)


def random_labels(classes: int, views: int = 2, images: int = 5) -> SoftLabels:
    logits = 4 * torch.randn(views, images, classes, generator=torch.Generator().manual_seed(0))
    return SoftLabels(logits.half(), "some images")


@pytest.fixture
def asked(monkeypatch):
    """How many images were loaded at each time, which is how often a teacher was asked; stops after ``asked.most``."""

    class Asked(list):
        most = math.inf

    found, load = Asked(), ImageSet.load

    def counted(self, indices, views):
        for batch in load(self, indices, views):
            found.append(len(batch.images))
            if sum(found) > found.most:
                raise KeyboardInterrupt
            yield batch

    monkeypatch.setattr(ImageSet, "load", counted)
    return found


class Overflowing(nn.Module):
    """A teacher whose logits are infinite for images with a mean above a limit."""

    def __init__(self, limit: float):
        super().__init__()
        self.limit = limit

    def forward(self, images):
        logits = images.flatten(1)[:, :4]
        return logits.masked_fill((images.mean((1, 2, 3)) > self.limit)[:, None], math.inf)


# --- what they say ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [3, 256, 257, 40_000])
def test_all_logits_are_exact_and_fewer_keep_the_largest_and_the_probability_of_the_rest(classes):
    dense, batch = random_labels(classes), batch_of([4, 0, 2], [1, 0, 1])
    logits = dense(batch)
    assert torch.equal(compress(dense, classes)(batch), logits)
    for k in (1, 2):
        found, top = compress(dense, k)(batch), logits.topk(k, dim=1).indices
        assert found.shape == logits.shape
        assert found.dtype == torch.float32
        assert torch.equal(found.gather(1, top), logits.gather(1, top))
        others = found.scatter(1, top, math.nan)
        assert (others.isnan().sum(1) == k).all()
        spread = torch.nan_to_num(others, nan=math.inf).amin(1), torch.nan_to_num(others, nan=-math.inf).amax(1)
        assert torch.equal(*spread)  # one value for all of them
        torch.testing.assert_close(found.softmax(1).gather(1, top), logits.softmax(1).gather(1, top), rtol=5e-3, atol=0)


@pytest.mark.parametrize("images", [1, 2])
def test_one_of_three_worked_out_by_hand_at_temperature_two(images):
    # logits (2 log 6, 2 log 2, 2 log 1): at T = 2 probabilities 6/9, 2/9, 1/9
    by_hand = torch.tensor([[[2 * math.log(1), 2 * math.log(6), 2 * math.log(2)]] * images])
    soft_labels = compress(SoftLabels(by_hand, "some images"), 1)
    found = soft_labels(batch_of([0] * images, [0] * images))
    # the others' exponentials at T = 1 are 4 and 1: together 5, so each gets log 2.5, and at T = 2 sqrt(2.5)
    probabilities = torch.tensor([[2.5**0.5, 6, 2.5**0.5]] * images) / (6 + 2 * 2.5**0.5)
    torch.testing.assert_close((found / 2).softmax(1), probabilities, rtol=1e-3, atol=0)
    # KL(all || compact) at T = 2, by hand, is the loss of a student that has learned the compact targets
    p, q = (6 / 9, 2 / 9, 1 / 9), (6 / (6 + 2 * 2.5**0.5), 2.5**0.5 / (6 + 2 * 2.5**0.5))
    divergence = p[0] * math.log(p[0] / q[0]) + p[1] * math.log(p[1] / q[1]) + p[2] * math.log(p[2] / q[1])
    (one,) = compact_errors(by_hand[0], [1], [2.0])
    assert one.divergence == pytest.approx(divergence, abs=5e-4)
    error = math.dist(p, (q[0], q[1], q[1])) / math.dist(p, (1 / 3,) * 3)
    assert one.gradient == pytest.approx(error, abs=5e-4)


def test_a_masked_class_stays_masked_and_a_logit_beyond_half_precision_stays_finite():
    masked = torch.tensor([[[1.0, 2.0, -math.inf, -math.inf]]])
    found = compress(SoftLabels(masked, "some images"), 2)(batch_of([0], [0]))
    assert found.softmax(1)[0].tolist() == pytest.approx(masked[0, 0].softmax(0).tolist())
    large = torch.tensor([[[1e6, 1e5, -1e6, 0.0]]])
    for k in (1, 2, 4):
        assert compress(SoftLabels(large, "some images"), k)(batch_of([0], [0])).isfinite().all()


@pytest.mark.parametrize("offset", [3000.0, -50_000.0, 1e6])
def test_what_all_logits_have_in_common_costs_no_precision(offset):
    logits = 4 * torch.randn(6, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    batch = batch_of([*range(6)], [0] * 6)
    far = SoftLabels(in_half(logits + offset)[None], "some images")
    for k in (5, 20):
        rows = layout(20, k)
        near, shifted = (rows.decode(rows.encode(x)).softmax(1) for x in (logits, logits + offset))
        torch.testing.assert_close(shifted, near, rtol=0.1, atol=1e-5)
        torch.testing.assert_close(compress(far, k)(batch).softmax(1), near, rtol=0.1, atol=1e-5)


def test_logits_that_half_precision_keeps_well_are_only_rounded():
    logits = torch.tensor([[256.0, 255.9, -7000.0], [-256.0, -300.0, -1e6], [20.01, 3.3, -5.5]])
    assert torch.equal(in_half(logits), logits.clamp(min=-65504).half())


def test_training_on_all_logits_gives_the_weights_of_training_on_dense_ones(image_set, toy_teacher, tmp_path):
    data = image_set(48)
    teacher = toy_teacher(data)
    dense = dense_of(teacher, data, 9)
    kinds = dense, compress(dense, 4), quiet(tmp_path, teacher, data, 9, 4, shard=20)
    students = [build("perceptron", data.classes, data.channels, seed=0) for _ in kinds]
    for student, targets in zip(students, kinds, strict=True):
        train(student, data, DISTILLATION, RECIPE, targets=targets, progress=False)
    for student in students[1:]:
        for name, weight in student.state_dict().items():
            assert torch.equal(weight, students[0].state_dict()[name]), name
    less = build("perceptron", data.classes, data.channels, seed=0)
    train(less, data, DISTILLATION, RECIPE, targets=compress(dense, 1), progress=False)
    assert not torch.equal(next(less.parameters()), next(students[0].parameters()))


def test_more_logits_are_nearer_to_all_of_them_at_every_temperature():
    errors = compact_errors(made_up_logits(50, 100), [1, 2, 5, 100])
    assert [(e.temperature, e.k) for e in errors[:5]] == [(1, 1), (1, 2), (1, 5), (1, 100), (4, 1)]
    for start in (0, 4, 8):
        of_temperature = errors[start : start + 4]
        for measure in ("divergence", "gradient"):
            values = [getattr(error, measure) for error in of_temperature]
            assert values == sorted(values, reverse=True)
            assert values[-1] < values[-2] / 10  # all of them: rounding to half precision is left
    assert errors[0].bytes == 5
    assert torch.equal(made_up_logits(3, 20), made_up_logits(3, 20))


def test_a_class_that_is_ruled_out_adds_nothing_to_the_errors():
    logits = torch.tensor([[2.0, 1.0, 0.5, -math.inf], [0.0, 3.0, 1.0, -math.inf]])
    ruled_out, low = (compact_errors(x, [1, 2, 4]) for x in (logits, logits.clamp(min=-1000)))
    for one, other in zip(ruled_out, low, strict=True):
        assert tuple(one) == pytest.approx(tuple(other), rel=1e-9)


# --- what they cost --------------------------------------------------------------------------------------------------


def test_what_imagenet_takes():
    imagenet = functools.partial(bytes_per_view, 1_281_167, 1000)
    assert imagenet(10) == 1_281_167 * (10 * 2 + 2 + 10 * 2)  # logits, the others, class numbers: 53.8 MB
    assert imagenet(1000) == 1_281_167 * 1000 * 2  # 2.56 GB
    assert bytes_per_view(100, 256, 10) == 100 * (10 * 2 + 2 + 10)  # class numbers of one byte
    dense = random_labels(10)
    assert compress(dense, 3).bytes_per_view == bytes_per_view(5, 10, 3) == 5 * 11
    assert compress(dense, 10).bytes_per_view == dense.logits[0].nbytes


@pytest.mark.parametrize("k", [0, 4, True, 1.5])
def test_a_k_that_there_is_not_is_refused(k):
    with pytest.raises(ValueError, match=f"k is {k}: expected a whole number from 1 to 3, the number of classes"):
        compress(random_labels(3), k)


# --- in files --------------------------------------------------------------------------------------------------------


def test_files_hold_what_compressing_dense_soft_labels_gives(image_set, toy_teacher, tmp_path):
    data = image_set(21, flip=True)
    teacher = toy_teacher(data)
    dense = dense_of(teacher, data, 5)
    for k in (2, 4):
        saved = quiet(tmp_path / str(k), teacher, data, 5, k, shard=8)
        files = sorted(path.name for path in (tmp_path / str(k)).glob("*.npy"))
        assert files == ["shard_00000.npy", "shard_00001.npy", "shard_00002.npy"]
        batch, wanted = everything(data, 5), compress(dense, k)
        # other images share the batch, so the last bit of half precision may differ
        torch.testing.assert_close(saved(batch), wanted(batch), rtol=2**-9, atol=2e-3)
        assert torch.equal(saved.table.read()[batch.views, batch.indices], saved.table[batch.views, batch.indices])
        assert (saved.views, saved.k, saved.bytes_per_view) == (5, k, wanted.bytes_per_view)
        assert sum(path.stat().st_size for path in saved.path.glob("*.npy")) < 5 * saved.bytes_per_view + 3 * 400
        assert saved.to("cpu").identity == load_compact(saved.path, data).identity


def test_they_are_read_through_memory_maps(image_set, toy_teacher, tmp_path):
    data = image_set(20)
    saved = quiet(tmp_path, toy_teacher(data), data, 2, 1, shard=10)
    assert not saved.table._maps  # nothing is opened, nor checked, before it is asked for
    saved(batch_of([3, 4], [0, 1]))
    assert list(saved.table._maps) == [0]
    assert isinstance(saved.table._maps[0].base, np.memmap)


def test_a_damaged_shard_is_named_when_it_is_read_and_made_again_alone(image_set, toy_teacher, tmp_path, capsys, asked):
    data = image_set(20)
    teacher = toy_teacher(data)
    saved = quiet(tmp_path, teacher, data, 2, 1, shard=5)
    content = {path.name: path.read_bytes() for path in tmp_path.glob("shard*")}
    shard = tmp_path / "shard_00002.npy"
    shard.write_bytes(content[shard.name][:-1] + bytes([content[shard.name][-1] ^ 1]))
    again = load_compact(tmp_path, data)
    again(batch_of([9, 15], [1, 1]))
    with pytest.raises(
        ValueError, match=r"shard_00002.npy, images 10 to 14 .* has changed .*call .*generate_compact ag"
    ):
        again(batch_of([0, 10], [0, 0]))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard*.npy")}
    asked.clear()
    mended = quiet(tmp_path, teacher, data, 2, 1, shard=5)
    assert "shard_00002.npy has changed since it was saved" in capsys.readouterr().out
    assert sum(asked) == 20 + 2 * 5  # its examination, and the shard's two views
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard*.npy")}
    assert [name for name in sorted(after) if after[name] != before[name]] == [shard.name]
    assert mended.identity == saved.identity
    assert shard.read_bytes() == content[shard.name]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard_00002.npy, images 10 to 14 .* is not there: call"):
        load_compact(tmp_path, data)(batch_of([10], [0]))
    assert quiet(tmp_path, teacher, data, 2, 1, shard=5).identity == saved.identity


def test_an_interrupted_run_goes_on_with_the_shard_that_it_was_at(image_set, toy_teacher, tmp_path, asked):
    data = image_set(20)
    teacher = toy_teacher(data)
    whole = quiet(tmp_path / "whole", teacher, data, 2, 1, shard=5)
    folder = tmp_path / "stopped"
    asked.clear()
    asked.most = 20 + 25  # in the third shard
    with pytest.raises(KeyboardInterrupt):
        quiet(folder, teacher, data, 2, 1, shard=5)
    assert sorted(path.name for path in folder.glob("*.npy")) == ["shard_00000.npy", "shard_00001.npy"]
    with pytest.raises(FileNotFoundError, match=r"manifest.json is not there: the soft labels are not complete; call"):
        load_compact(folder, data)
    asked.clear()
    asked.most = math.inf
    resumed = quiet(folder, teacher, data, 2, 1, shard=5)
    assert sum(asked) == 20 + 2 * 10
    assert resumed.identity == whole.identity
    asked.clear()
    assert quiet(folder, teacher, data, 2, 1, shard=5).identity == whole.identity
    assert not asked  # all is there: the teacher is not asked at all


def test_ranks_write_shards_of_their_own_and_the_last_one_the_manifest(image_set, toy_teacher, tmp_path):
    data = image_set(20)
    teacher = toy_teacher(data)
    alone = quiet(tmp_path / "alone", teacher, data, 2, 1, shard=5)
    folder = tmp_path / "two"
    assert quiet(folder, teacher, data, 2, 1, shard=5, rank=0, ranks=2) is None
    assert sorted(path.name for path in folder.glob("*.npy")) == ["shard_00000.npy", "shard_00002.npy"]
    assert not (folder / "manifest.json").exists()
    together = quiet(folder, teacher, data, 2, 1, shard=5, rank=1, ranks=2)
    assert together.identity == alone.identity
    assert load_compact(folder, data).identity == alone.identity
    (folder / "shard_00001.npy").unlink()  # of rank 1: without it, rank 0 does not call them complete
    assert quiet(folder, teacher, data, 2, 1, shard=5, rank=0, ranks=2) is None
    with pytest.raises(ValueError, match="rank is 2 of 2: expected a rank from 0 to 1"):
        quiet(folder, teacher, data, 2, 1, rank=2, ranks=2)


def test_shards_of_another_teacher_are_renamed_never_mixed_in_and_found_again(
    image_set, toy_teacher, tmp_path, capsys, asked
):
    data = image_set(20)
    first, second = toy_teacher(data), toy_teacher(data)
    with torch.no_grad():
        next(second.parameters()).add_(0.5)
    of_first = quiet(tmp_path, first, data, 2, 1, shard=5)
    logits = of_first(everything(data, 2))
    kept = {path.read_bytes() for path in tmp_path.glob("shard*.npy")}
    of_second = quiet(tmp_path, second, data, 2, 1, shard=7)  # three shards, where there were four
    assert "kept as" in capsys.readouterr().out
    assert of_second.identity != of_first.identity
    names = {shard["file"] for shard in json.loads((tmp_path / "manifest.json").read_text())["shards"]}
    assert names == {"shard_00000.npy", "shard_00001.npy", "shard_00002.npy"}
    assert not (tmp_path / "shard_00003.npy").exists()
    assert kept <= {path.read_bytes() for path in tmp_path.glob("shard*.npy")}  # under other names
    assert torch.equal(
        quiet(tmp_path / "fresh", second, data, 2, 1, shard=7)(everything(data, 2)), of_second(everything(data, 2))
    )
    asked.clear()
    again = quiet(tmp_path, first, data, 2, 1, shard=5)
    assert not asked
    assert again.identity == of_first.identity
    assert torch.equal(again(everything(data, 2)), logits)


def test_while_another_teachers_shards_are_made_no_manifest_names_them(image_set, toy_teacher, tmp_path):
    data = image_set(20)
    quiet(tmp_path, toy_teacher(data), data, 2, 1, shard=5)
    assert quiet(tmp_path, toy_teacher(data), data, 2, 2, shard=5, rank=0, ranks=2) is None
    with pytest.raises(FileNotFoundError, match="not complete"):
        load_compact(tmp_path, data)


def test_a_manifest_that_was_changed_is_refused(image_set, toy_teacher, tmp_path):
    data = image_set(20)
    saved = quiet(tmp_path, toy_teacher(data), data, 2, 1)
    path = tmp_path / "manifest.json"
    path.write_text(path.read_text().replace('"views": 2', '"views": 1'))
    with pytest.raises(ValueError, match=r"is not a manifest of soft labels .*it was changed since it was written"):
        load_compact(tmp_path, data)
    assert quiet(tmp_path, toy_teacher(data), data, 2, 1).identity == saved.identity
    path.write_text('{"fingerprint": {}}')
    with pytest.raises(ValueError, match=r"is not a manifest of soft labels \(it.* has no "):
        load_compact(tmp_path, data)


def test_damaged_manifests_are_refused_and_kept_as_backups(image_set, toy_teacher, tmp_path, capsys):
    data = image_set(20)
    teacher = toy_teacher(data)
    saved = quiet(tmp_path, teacher, data, 2, 1)
    path = tmp_path / "manifest.json"
    whole = json.loads(path.read_text())
    unsealed = json.dumps({key: value for key, value in whole.items() if key != "checksum"})
    damaged = [unsealed, "{", '{"fingerprint": {}}', unsealed.replace('"views": 2', '"views": 1')]
    for content in damaged:
        path.write_text(content)
        with pytest.raises(ValueError, match=r"is not a manifest of soft labels .*: call kdlib.scale.generate_compact"):
            load_compact(tmp_path, data)
        assert quiet(tmp_path, teacher, data, 2, 1).identity == saved.identity
        assert "manifest.json is not what this run needs (" in capsys.readouterr().out
        assert json.loads(path.read_text()) == whole
    assert sorted(other.read_text() for other in tmp_path.glob("manifest.*.json")) == sorted(damaged)


@pytest.mark.parametrize("options", [{"shard": True}, {"shard": 2.5}, {"shard": 0}, {"batch_size": 0}])
def test_a_size_that_is_none_is_refused(image_set, toy_teacher, tmp_path, options):
    data, (name,) = image_set(20), options
    with pytest.raises(ValueError, match=rf"{name} is .*: expected a whole number of at least 1 image"):
        quiet(tmp_path, toy_teacher(data), data, 2, 1, **options)


def test_other_images_and_more_views_than_there_are_are_refused(image_set, toy_teacher, tmp_path, monkeypatch):
    data, others = image_set(20), image_set(20, seed=1)
    saved = quiet(tmp_path, toy_teacher(data), data, 2, 1)
    student = build("perceptron", data.classes, data.channels, seed=0)
    two = replace(RECIPE, views=2)
    with pytest.raises(
        ValueError, match=r"the soft labels are of toy/train \w+, the images of toy/train \w+: expected"
    ):
        train(student, others, DISTILLATION, two, targets=saved, progress=False)
    with pytest.raises(ValueError, match=r"the student would see 9 views, the soft labels hold 2: generate more views"):
        train(student, data, DISTILLATION, RECIPE, targets=saved, progress=False)
    with pytest.raises(ValueError, match=r"holds the soft labels of toy/train \w+, the images are toy/train \w+"):
        load_compact(tmp_path, others)
    with pytest.raises(ValueError, match="changed by cutout or mixup"):
        train(student, data, DISTILLATION, replace(two, mixup=1.0), targets=saved, progress=False)
    with pytest.raises(ValueError, match="views is 10: expected at most 9"):
        quiet(tmp_path / "more", toy_teacher(data), data, 10, 1)
    monkeypatch.setattr("kdlib.scale.compact_files.AT_MOST", 30)
    with pytest.raises(ValueError, match="views is 9: expected at most 6 for k=1, in one shard"):
        quiet(tmp_path / "more", toy_teacher(data), data, None, 1)
    with pytest.raises(ValueError, match="shard is 0: expected a whole number of at least 1 image"):
        quiet(tmp_path / "more", toy_teacher(data), data, 2, 1, shard=0)


def test_a_teacher_without_finite_logits_is_refused_with_the_image(image_set, toy_teacher, tmp_path):
    data = image_set(20)

    means = data.batch(torch.arange(20), torch.zeros(20, dtype=torch.int64)).mean((1, 2, 3)).sort()
    limit, largest = means.values[-2:].mean().item(), means.indices[-1].item()
    with pytest.raises(
        ValueError, match=f"not finite for 1 of 20 images of toy/train in view 0, first for image {largest}\\b"
    ):
        quiet(tmp_path, Overflowing(limit), data, 1, 1)
    with pytest.raises(ValueError, match=r"logits for 20 images of toy/train are \(20, 5\), expected"):
        quiet(tmp_path, nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), data, 1, 1)
    assert not list(tmp_path.glob("*.npy"))


def test_a_student_of_compact_soft_labels_is_saved_under_what_they_are(image_set, toy_teacher, tmp_path):
    data = image_set(20)
    recipe = replace(RECIPE, epochs=1, views=2)
    one, two = (quiet(tmp_path / str(k), toy_teacher(data), data, 2, k) for k in (1, 2))
    made = functools.partial(
        load_or_train, tmp_path / "students", "student.pth", "perceptron", data, DISTILLATION, recipe
    )
    first = made(targets=one, progress=False)
    again = made(targets=load_compact(one.path, data), progress=False)
    assert again.history == first.history
    assert made(targets=two, progress=False).fingerprint != first.fingerprint
    assert artefacts.record(first.path)["fingerprint"]["targets"]["k"] == 2
