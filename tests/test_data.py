"""Image sets, their views and identity, the batches of an epoch, cutout and mixup."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from kdlib.data import Batch, batches, cutout, draw_epoch, mixup, steps_per_epoch


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_fingerprint_tells_every_part_of_the_content(image_set):
    data = image_set()
    pixel, label = data.images.clone(), data.labels.clone()
    pixel[3, 2, 1, 0] ^= 1
    label[5] = (label[5] + 1) % 4
    others = [
        replace(data, images=pixel),
        replace(data, labels=label),
        replace(data, images=data.images.flip(0)),
        replace(data, class_names=("a", "b", "c", "d")),
        replace(data, padding=2),
        replace(data, flip=True),
        replace(data, mean=(0.31,)),
        replace(data, std=(0.21,)),
    ]
    assert len({data.fingerprint, *(other.fingerprint for other in others)}) == 9
    assert image_set().fingerprint == data.fingerprint


def test_moving_a_set_to_its_own_device_gives_the_same_set(image_set):
    data = image_set()
    assert data.to("cpu") is data
    moved = data.to("meta")
    assert moved.images.device.type == moved.labels.device.type == "meta"
    assert moved.fingerprint == data.fingerprint


def test_the_identity_is_name_and_fingerprint(image_set):
    data = image_set()
    assert data.identity == f"toy/train {data.fingerprint}"
    assert len(data.fingerprint) == 16
    assert replace(data, name="other/train").identity == f"other/train {data.fingerprint}"


# --- views ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("padding", "flip", "views"), [(4, True, 162), (4, False, 81), (1, False, 9), (0, True, 2), (0, False, 1)]
)
def test_the_view_table_lists_every_crop_and_flip_once_the_clean_image_first(image_set, padding, flip, views):
    table = image_set(padding=padding, flip=flip).view_table.tolist()
    assert table[0] == [0, 0, 0]
    assert len(table) == views
    offsets = range(-padding, padding + 1)
    every = {(dy, dx, mirrored) for dy in offsets for dx in offsets for mirrored in range(1 + flip)}
    assert {tuple(view) for view in table} == every


def test_the_first_views_are_a_sample_of_all_and_the_same_for_every_set(image_set):
    table = image_set(padding=4, flip=True).view_table
    assert torch.equal(table, image_set(20, padding=4, flip=True, seed=1, channels=3).view_table)
    first = table[:32].double()
    assert 0.25 < first[:, 2].mean() < 0.75  # both sides
    assert (first[:, :2].mean(0).abs() < 1.5).all()  # no direction preferred
    assert set(first[:, 0].tolist()) == set(first[:, 1].tolist()) == set(range(-4, 5))
    # published soft labels depend on this order
    assert table[:4].tolist() == [[0, 0, 0], [-1, 0, 1], [-1, 2, 1], [3, -3, 1]]


@pytest.mark.parametrize(("channels", "padding", "flip"), [(1, 1, False), (3, 2, True), (3, 0, True)])
def test_every_view_is_the_crop_of_the_padded_image_mirrored_if_it_says_so(image_set, channels, padding, flip):
    data = image_set(7, size=(6, 9), channels=channels, padding=padding, flip=flip)
    for view, (dy, dx, mirrored) in enumerate(data.view_table.tolist()):
        images = data.batch(torch.tensor([5, 2, 5]), torch.full((3,), view))
        assert images.dtype == torch.float32
        for image, index in zip(images, (5, 2, 5), strict=True):
            edges = ((padding, padding), (padding, padding), (0, 0))
            crop = np.pad(data.images[index].numpy(), edges)[padding + dy :, padding + dx :][:6, :9]
            crop = crop[:, ::-1] if mirrored else crop
            expected = (crop / 255 - np.array(data.mean)) / np.array(data.std)
            np.testing.assert_allclose(image.permute(1, 2, 0), expected, atol=1e-5)


def test_a_batch_may_hold_another_view_of_every_image(image_set):
    data = image_set(9, padding=1, flip=True)
    indices, views = torch.arange(9).flip(0), torch.arange(9) * 2
    whole = data.batch(indices, views)
    for row in range(9):
        one = data.batch(indices[row : row + 1], views[row : row + 1])
        assert torch.equal(whole[row], one[0])


@pytest.mark.parametrize(("views", "resolved"), [(None, 162), (1, 1), (4, 4), (162, 162)])
def test_none_stands_for_all_views(image_set, views, resolved):
    assert image_set(padding=4, flip=True).resolve_views(views) == resolved


@pytest.mark.parametrize(
    ("views", "expected"),
    [(10, "at most 9, which is all"), (0, r"at least 1 \(the clean image\); 9 are all"), (-1, "at")],
)
def test_views_that_there_are_not_are_refused_with_what_there_is(image_set, views, expected):
    data = image_set(padding=1)
    message = rf"views is {views}: expected {expected}.*"
    settings = r"that toy/train has with 1 pixels of padding and flip=False, or None for all$"
    with pytest.raises(ValueError, match=message + settings):
        data.resolve_views(views)
    with pytest.raises(ValueError, match=message):
        next(batches(data, 4, views=views, generator=generator()))


# --- batches and augmentation --------------------------------------------------------------------------------------


def test_an_epoch_sees_every_image_once_with_its_own_label_in_the_view_it_names(image_set):
    data = image_set(48, flip=True)
    epoch = list(batches(data, 16, generator=generator()))
    assert len(epoch) == steps_per_epoch(data, 16) == 3
    indices = torch.cat([b.indices for b in epoch])
    assert sorted(indices.tolist()) == list(range(48))
    assert indices.tolist() != list(range(48))
    for batch in epoch:
        assert torch.equal(batch.labels, data.labels[batch.indices])
        assert torch.equal(batch.images, data.batch(batch.indices, batch.views))


@pytest.mark.parametrize(("count", "size", "steps", "images"), [(10, 4, 2, 4), (10, 5, 2, 5), (10, 64, 1, 10)])
def test_all_batches_are_of_one_size_and_the_remainder_waits(image_set, count, size, steps, images):
    data = image_set(count)
    epoch = list(batches(data, size, generator=generator()))
    assert [len(b.labels) for b in epoch] == [images] * steps
    assert steps_per_epoch(data, size) == steps
    assert len(torch.cat([b.indices for b in epoch]).unique()) == steps * images


def test_batches_repeat_with_the_generator_and_differ_from_epoch_to_epoch(image_set):
    data = image_set(48)

    def draw(seed: int) -> list[list[int]]:
        source = generator(seed)
        epochs = [list(batches(data, 16, generator=source)) for _ in range(2)]
        return [
            torch.stack([torch.cat([b.indices for b in e]), torch.cat([b.views for b in e])]).tolist() for e in epochs
        ]

    assert draw(0) == draw(0)
    assert draw(0)[0] != draw(0)[1]
    assert draw(0) != draw(1)


def test_views_are_drawn_from_the_first_ones(image_set):
    data = image_set(480, padding=4, flip=True)

    def drawn(views: int | None) -> set[int]:
        return set(torch.cat([b.views for b in batches(data, 48, views=views, generator=generator())]).tolist())

    assert drawn(1) == {0}
    assert drawn(4) == {0, 1, 2, 3}
    assert max(drawn(None)) > 150


def test_cutout_sets_one_square_of_each_image_to_the_mean_and_nothing_else():
    images = torch.rand(400, 3, 10, 12, generator=generator()) + 1
    kept = images.clone()
    changed = cutout(images, 4, generator(1))
    assert torch.equal(images, kept)
    cut = changed == 0
    assert torch.equal(changed[~cut], images[~cut])
    assert torch.equal(cut[:, 0], cut[:, 1])  # all channels alike
    sizes = set()
    for mask in cut[:, 0]:
        rows, columns = mask.any(1).nonzero().flatten(), mask.any(0).nonzero().flatten()
        height, width = (int(x[-1] - x[0]) + 1 for x in (rows, columns))
        assert mask.sum() == height * width  # a full rectangle
        sizes.add((height, width))
    assert max(sizes) == (4, 4)
    assert min(sizes) == (2, 2)  # in a corner half of each side may be outside
    assert cut[:, 0].any(0).all()  # anywhere in the image
    assert torch.equal(cutout(images, 4, generator(1)), changed)


def one_hot_batch(count: int = 32, classes: int = 4) -> Batch:
    """Images of one row of pixels that spell their label, so that a mixture of images spells the mixture of labels."""
    labels = torch.arange(count) % classes
    images = torch.nn.functional.one_hot(labels, classes).float()[:, None, None, :]
    return Batch(images, labels, torch.arange(count) + 100, torch.zeros(count, dtype=torch.int64))


@pytest.mark.parametrize("strength", [0.01, 0.2, 1.0])
def test_mixup_blends_images_and_labels_by_the_same_share(strength):
    batch = one_hot_batch()
    for seed in range(20):
        mixed = mixup(batch, strength, 4, generator(seed))
        torch.testing.assert_close(mixed.labels.sum(1), torch.ones(32))
        torch.testing.assert_close(mixed.images[:, 0, 0], mixed.labels)
        assert (mixed.labels >= 0).all()
        assert mixed.views is None  # no view has such images
        assert torch.equal(mixed.indices, batch.indices)


def test_mixup_mixes_and_repeats_with_its_generator():
    batch = one_hot_batch()
    first, again, other = (mixup(batch, 1.0, 4, generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images)
    assert not torch.equal(first.images, other.images)
    assert not torch.equal(first.images, batch.images)


@pytest.mark.parametrize("strength", [0.2, 1.0, 5.0])
def test_the_shares_of_mixup_are_those_of_a_beta_distribution(strength):
    # Beta(a, a) has mean 1/2 and variance 1 / (4 (2 a + 1))
    batch, source = one_hot_batch(2, 2), generator()
    shares = []
    while len(shares) < 2000:
        mixed = mixup(batch, strength, 2, source)
        if mixed.labels[0, 1] or mixed.labels[1, 0]:  # otherwise each was mixed with itself
            shares.append(mixed.labels[0, 0].item())
    assert np.mean(shares) == pytest.approx(0.5, abs=0.03)
    assert np.var(shares) == pytest.approx(1 / (4 * (2 * strength + 1)), rel=0.1)


@pytest.fixture
def double_precision():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def test_images_are_of_the_default_dtype_and_the_same_in_both(image_set, double_precision):
    (double,) = batches(image_set(24), 24, generator=generator())
    torch.set_default_dtype(torch.float32)
    (single,) = batches(image_set(24), 24, generator=generator())
    assert (double.images.dtype, single.images.dtype) == (torch.float64, torch.float32)
    assert torch.equal(double.indices, single.indices)
    assert torch.equal(double.views, single.views)
    torch.testing.assert_close(double.images, single.images.double(), rtol=1e-5, atol=1e-6)


def test_cutout_and_mixup_keep_the_dtype_of_the_images(image_set, double_precision):
    data = image_set(24)
    (batch,) = batches(data, 24, generator=generator())
    mixed = mixup(batch._replace(images=cutout(batch.images, 3, generator())), 1.0, data.classes, generator())
    assert mixed.images.dtype == mixed.labels.dtype == torch.float64
    assert (mixed.labels.sum(1) - 1).abs().max() < 1e-15  # no float32 on the way


def test_of_float32_images_mixup_computes_in_float32_whatever_the_default(double_precision):
    batch = one_hot_batch()
    mixed = mixup(batch, 1.0, 4, generator(3))
    torch.set_default_dtype(torch.float32)
    reference = mixup(batch, 1.0, 4, generator(3))
    assert mixed.images.dtype == mixed.labels.dtype == torch.float32
    assert torch.equal(mixed.images, reference.images)
    assert torch.equal(mixed.labels, reference.labels)


def test_an_epoch_can_be_drawn_without_its_images(image_set):
    data = image_set(10, padding=2)
    indices, views = draw_epoch(data, 4, views=5, generator=generator(2))
    epoch = list(batches(data, 4, views=5, generator=generator(2)))
    assert indices.tolist() == [b.indices.tolist() for b in epoch]
    assert views.tolist() == [b.views.tolist() for b in epoch]


def test_a_change_in_place_is_another_content(image_set):
    data = image_set()
    before = data.fingerprint
    assert data.fingerprint == before
    data.labels[:3] = 0
    noisy = data.fingerprint
    data.images[0] += 1
    assert len({before, noisy, data.fingerprint}) == 3
    assert data.to("cpu").identity == f"{data.name} {data.fingerprint}"


def test_a_view_is_of_the_images_as_they_are_now(image_set):
    data = image_set(padding=1)
    every = torch.arange(len(data))
    data.batch(every, every * 0 + 1)
    data.images.copy_(255 - data.images)
    again = replace(data, images=data.images.clone())
    assert torch.equal(data.batch(every, every * 0 + 1), again.batch(every, every * 0 + 1))
