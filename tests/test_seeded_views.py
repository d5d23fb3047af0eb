"""Views by seed: the same parameters and pixels for everybody, spread as by torchvision's random transforms."""

import hashlib
import math
import pickle

import numpy as np
import pytest
import torch
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from kdlib.scale import SeededViews, mixup_pair
from kdlib.scale.views import CLEAN, NAMES, ONE, SIGNED, STRENGTHS, Parameters, between, blend


def noise(height=40, width=40, channels=3, seed=0):
    return torch.from_numpy(np.random.RandomState(seed).randint(0, 256, (height, width, channels)).astype(np.uint8))


# --- the same for everybody ------------------------------------------------------------------------------------------

# Whoever changes one of these changes what all stored soft labels were made for: raise kdlib.scale.views.VERSION
GOLDEN = {
    (1, 0): (42320, 34117, 22203, 25337, True, (("translate_x", -0.13595166163141995), ("solarize", 0.3))),
    (2, 0): (634, 5484, 37742, 48607, False, (("autocontrast", 0.0), ("translate_y", -0.13595166163141995))),
    (1, 1): (32665, 35944, 32802, 29000, True, (("identity", 0.0), ("rotate", 9.0))),
    (7, 123456): (
        *(624, 2052, 49575, 60931, True),
        (("color", 0.26999999999999996), ("brightness", -0.26999999999999996)),
    ),
    (2**31 - 1, 1281166): (1177, 8553, 63269, 47822, False, (("identity", 0.0), ("identity", 0.0))),
}


@pytest.mark.parametrize(("view", "index"), GOLDEN)
def test_the_parameters_are_those_of_every_other_machine(view, index):
    views = SeededViews(24, rand_augment=(2, 9))
    assert views.parameters(view, index) == GOLDEN[view, index]
    crop_alone = SeededViews(24).parameters(view, index)
    assert crop_alone == (*GOLDEN[view, index][:5], ())  # RandAugment does not move the crop


def test_the_generator_is_philox_as_its_authors_define_it():
    # the known answers of Random123 for philox4x64-10: counter and key all zeros. NumPy counts before it computes, so
    # a counter of all ones becomes one of zeros
    generator = np.random.Philox(key=0, counter=[2**64 - 1] * 4)
    assert [f"{word:016x}" for word in generator.random_raw(4).tolist()] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


def test_mixup_pairs_are_those_of_every_other_machine():
    assert [mixup_pair(view, index, 100) for view, index in ((1, 0), (2, 0), (7, 99), (0, 5))] == [
        (85, 0.6058273315429688),
        (87, 0.9343643188476562),
        (51, 0.22974395751953125),
        (5, 1.0),
    ]


def test_the_pixels_of_crops_are_those_of_every_other_machine():
    views, image = SeededViews(24), noise()
    made = b"".join(views.apply(image, views.parameters(k, 3)).contiguous().numpy().tobytes() for k in range(50))
    assert hashlib.sha256(made).hexdigest()[:16] == "66494b3fa7b24ea6"


def test_a_view_follows_from_its_two_numbers_and_nothing_else():
    views = SeededViews(24, rand_augment=(2, 9))
    first = [views.parameters(v, i) for v in range(5) for i in range(50)]
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002
    again = [pickle.loads(pickle.dumps(views)).parameters(v, i) for v in range(5) for i in reversed(range(50))]
    assert sorted(map(repr, first)) == sorted(map(repr, again))
    assert len({*first}) == 1 + 4 * 50  # one clean view, and no two others alike
    assert views.parameters(3, 4) != views.parameters(4, 3)


# --- spread as they should be ----------------------------------------------------------------------------------------


def test_crops_are_spread_as_those_of_torchvision():
    views, torchvisions = SeededViews(24), v2.RandomResizedCrop(24)
    image = torch.zeros(3, 1000, 1000, dtype=torch.uint8)
    torch.manual_seed(0)
    made = [torchvisions.make_params([image]) for _ in range(4000)]
    theirs = np.array([[p[key] / 1000 for key in ("top", "left", "height", "width")] for p in made])
    ours = np.array([views.parameters(1, i)[:4] for i in range(4000)]) / ONE
    for figure in (
        lambda crop: crop[:, 2] * crop[:, 3],  # area
        lambda crop: np.log(crop[:, 3] / crop[:, 2]),  # shape
        lambda crop: crop[:, 0] / (1 - crop[:, 2] + 1e-9),  # place
        lambda crop: crop[:, 1] / (1 - crop[:, 3] + 1e-9),
    ):
        # the quartiles of two samples of one distribution of 4,000 differ by less than 4 % of its range
        a, b = (np.quantile(figure(crop), [0.05, 0.25, 0.5, 0.75, 0.95]) for crop in (ours, theirs))
        assert np.abs(a - b).max() < 0.04 * (b[-1] - b[0])
    assert (ours[:, 0] + ours[:, 2]).max() <= 1
    assert (ours[:, 1] + ours[:, 3]).max() <= 1


def test_half_of_the_views_are_mirrored_and_every_operation_occurs():
    made = [SeededViews(24, rand_augment=(1, 9)).parameters(1, i) for i in range(4000)]
    assert abs(np.mean([p.mirrored for p in made]) - 0.5) < 4 * 0.5 / math.sqrt(4000)
    names = [p.operations[0][0] for p in made]
    share = 1 / len(NAMES)
    for name in NAMES:
        assert abs(names.count(name) / 4000 - share) < 4 * math.sqrt(share / 4000), name
        signs = {math.copysign(1, p.operations[0][1]) for p in made if p.operations[0][0] == name}
        assert signs == ({1.0, -1.0} if name in SIGNED else {1.0})
    assert not any(SeededViews(24, flip=False).parameters(1, i).mirrored for i in range(100))


def test_mixup_pairs_every_image_with_any_other():
    pairs = [mixup_pair(1, i % 10, 10) for i in range(10)] + [mixup_pair(v, 3, 10) for v in range(1, 4001)]
    partners = [partner for partner, _ in pairs[10:]]
    assert set(partners) == set(range(10)) - {3}
    shares = np.array([share for _, share in pairs])
    assert 0 < shares.min() < 0.01
    assert 0.99 < shares.max() < 1
    assert abs(shares.mean() - 0.5) < 4 * math.sqrt(1 / 12 / 4000)
    assert mixup_pair(5, 0, 1) == (0, 1.0)  # one image alone


def test_a_range_is_halved_by_its_geometric_mean():
    values = [between(0.75, 4 / 3, bits) for bits in (0, 2**15, 2**16 - 1)]
    assert values == pytest.approx([0.75, 1.0, 4 / 3], rel=1e-4)


# --- pixels ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_operations_are_those_of_torchvisions_randaugment(name):
    image, views = noise(24, 24), SeededViews(24)
    theirs = v2.RandAugment()
    camel = {"autocontrast": "AutoContrast"}.get(name, "".join(part.title() for part in name.split("_")))
    for sign in (1, -1) if name in SIGNED else (1,):
        strength = sign * STRENGTHS[name] * 9 / 30
        told = {"translate_x": 24 * strength, "translate_y": 24 * strength, "solarize": 1 - strength}
        told["posterize"] = 8 - round(strength)
        expected = theirs._apply_image_or_video_transform(
            image.permute(2, 0, 1), camel, told.get(name, strength), "nearest", {torch.Tensor: None}
        )
        made = views.apply(image, Parameters(0, 0, ONE, ONE, False, ((name, strength),)))
        assert made.permute(2, 0, 1).equal(expected)


def test_a_crop_is_cut_out_resized_and_mirrored():
    image = noise(40, 40)
    made = SeededViews(20).apply(image, Parameters(ONE // 4, 0, ONE // 2, ONE // 2, True, ()))
    assert made.equal(image[10:30, :20].flip(1))  # 20 pixels of 40, without resizing
    views = SeededViews(16)
    crop = views.parameters(1, 0)
    top, left, height, width = (round(x * 40 / ONE) for x in crop[:4])
    expected = functional.resized_crop(image.permute(2, 0, 1), top, left, height, width, [16, 16], antialias=True)
    expected = expected.flip(2) if crop.mirrored else expected
    assert (views.apply(image, crop).permute(2, 0, 1).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize(("height", "width"), [(40, 40), (24, 24), (40, 60), (24, 30), (24, 20), (7, 90)])
def test_view_0_is_clean(height, width):
    image, views = noise(height, width), SeededViews(24, resize=28)
    assert views.parameters(0, 17) == CLEAN
    made = views.apply(image, CLEAN)
    if (height, width) == (24, 24):
        assert made.equal(image)
    else:
        expected = functional.center_crop(functional.resize(image.permute(2, 0, 1), [28], antialias=True), [24, 24])
        assert (made.permute(2, 0, 1).int() - expected.int()).abs().max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_every_operation_takes_grey_and_colour(channels):
    image, views = noise(12, 12, channels), SeededViews(8)
    for name in NAMES:
        assert views.apply(image, Parameters(0, 0, ONE, ONE, False, ((name, STRENGTHS[name]),))).shape == (
            8,
            8,
            channels,
        )


def test_extreme_settings_still_give_a_view():
    image = noise(10, 10)
    thin = SeededViews(8, scale=(0.9, 1.0), ratio=(20.0, 20.0))  # no such crop lies within a square image
    crop = thin.parameters(1, 0)
    assert (crop.height, crop.width) == (ONE // 20 + 1, ONE)
    assert thin.apply(image, crop).shape == (8, 8, 3)
    tiny = SeededViews(8, scale=(1e-9, 1e-9))
    assert tiny.apply(image, tiny.parameters(1, 0)).unique().numel() <= 3  # a single pixel


def test_a_blend_is_rounded_to_the_nearest():
    image, partner = noise(seed=1), noise(seed=2)
    for share in (0.5 / ONE, 0.25 + 0.5 / ONE, 1 - 0.5 / ONE):
        exact = share * image.double() + (1 - share) * partner.double()
        assert (blend(image, partner, share).double() - exact).abs().max() <= 0.5
    assert blend(image, partner, 1.0).equal(image)


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 0}, "size is 0"),
        ({"size": 8.0}, "size is 8.0"),
        ({"size": True}, "size is True"),
        ({"flip": "no"}, "flip is 'no': expected True or False"),
        ({"mixup": 1}, "mixup is 1: expected True or False"),
        ({"resize": 4}, "resize is 4: expected a whole number of pixels, at least 8"),
        ({"scale": (0, 1)}, "scale is"),
        ({"scale": (0.5, 2)}, "scale is"),
        ({"scale": (0.9, 0.5)}, "scale is"),
        ({"ratio": (1,)}, "ratio is"),
        ({"ratio": (1, math.inf)}, "ratio is"),
        ({"ratio": (math.nan, 1)}, "ratio is"),
        ({"rand_augment": (0, 9)}, "rand_augment is"),
        ({"rand_augment": (2, 31)}, "rand_augment is"),
        ({"rand_augment": 2}, "rand_augment is"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SeededViews(**{"size": 8, **settings})


def test_every_setting_is_part_of_the_identity():
    others = [
        SeededViews(8),
        SeededViews(9),
        SeededViews(8, scale=(0.1, 1.0)),
        SeededViews(8, ratio=(1.0, 1.0)),
        SeededViews(8, flip=False),
        SeededViews(8, rand_augment=(2, 9)),
        SeededViews(8, mixup=True),
        SeededViews(8, resize=9),
    ]
    assert len({views.identity for views in others}) == len(others)
    assert SeededViews(8, scale=[0.08, 1]).identity == SeededViews(8).identity  # as a JSON file gives it back
    assert SeededViews(8, resize=8).identity == SeededViews(8).identity  # the same views


def test_a_subclass_is_refused():
    class Halved(SeededViews):
        def apply(self, image, parameters):
            return super().apply(image, parameters) // 2

    with pytest.raises(TypeError, match=r"Halved is a subclass of SeededViews: expected SeededViews itself"):
        Halved(8)
