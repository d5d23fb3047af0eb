"""The distillation loss against values worked out by hand, an independent float64 reference, and its limits."""

import math
from functools import partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlib.losses import check_weights, distillation_loss, distillation_terms


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def reference(student, teacher, targets, temperature, alpha, beta) -> tuple[float, float, float, np.ndarray]:
    """Total, hard, soft and the total's gradient by the student's logits, in float64 numpy from the definitions."""
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    soft = (p * np.log(p / q)).sum(1).mean()
    hard = -(targets * np.log(softmax(student))).sum(1).mean()
    gradient = alpha * (softmax(student) - targets) + beta * temperature**2 * (q - p) / temperature
    return alpha * hard + beta * temperature**2 * soft, hard, soft, gradient / len(student)


class Loss(NamedTuple):
    total: torch.Tensor
    hard: torch.Tensor | None
    soft: torch.Tensor


def loss_and_terms(student, teacher, labels, *, temperature, alpha, beta=None) -> Loss:
    """The loss, and its two terms as distillation_terms gives them."""
    total = distillation_loss(student, teacher, labels, temperature=temperature, alpha=alpha, beta=beta)
    return Loss(total, *distillation_terms(student, teacher, labels, temperature=temperature))


def logits(count: int = 16, classes: int = 10, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(count, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, student)[0]


STUDENT, TEACHER = logits(seed=1), logits(seed=2)
LABELS = torch.arange(16) % 10


def test_it_gives_the_values_worked_out_by_hand():
    # Image 1, T = 2:  teacher (2 ln 2, 0) / 2 = (ln 2, 0), probabilities (2/3, 1/3)
    #                  student (0, 2 ln 3) / 2 = (0, ln 3), probabilities (1/4, 3/4)
    #   KL = 2/3 ln((2/3) / (1/4)) + 1/3 ln((1/3) / (3/4)) = 2/3 ln(8/3) + 1/3 ln(4/9)
    #   cross-entropy at T = 1: student (0, ln 9), probabilities (1/10, 9/10), label 1, so -ln(9/10)
    # Image 2:         both (0, 0): KL = 0; label 0 has probability 1/2, so the cross-entropy is ln 2
    # Over the batch:  soft = KL / 2,  hard = (ln 2 - ln 0.9) / 2
    # With alpha = 1/4: total = 1/4 hard + 3/4 * 2**2 * soft = hard / 4 + 3 soft
    teacher = torch.tensor([[2 * math.log(2), 0.0], [0.0, 0.0]])
    student = torch.tensor([[0.0, 2 * math.log(3)], [0.0, 0.0]])
    found = loss_and_terms(student, teacher, torch.tensor([1, 0]), temperature=2, alpha=0.25)
    soft = (2 / 3 * math.log(8 / 3) + 1 / 3 * math.log(4 / 9)) / 2
    hard = (math.log(2) - math.log(0.9)) / 2
    assert found.soft.item() == pytest.approx(soft, rel=1e-6)
    assert found.hard.item() == pytest.approx(hard, rel=1e-6)
    assert found.total.item() == pytest.approx(hard / 4 + 3 * soft, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("temperature", "alpha", "beta"), [(1, 0.5, None), (4, 0.1, None), (2.5, 0.9, 3.0), (20, 0, None), (0.5, 1.5, 0.2)]
)
def test_it_agrees_with_a_reference_in_float64_and_so_does_its_gradient(temperature, alpha, beta, dtype):
    student = STUDENT.to(dtype, copy=True).requires_grad_()
    found = loss_and_terms(student, TEACHER.to(dtype), LABELS, temperature=temperature, alpha=alpha, beta=beta)
    weight = 1 - alpha if beta is None else beta
    wanted = reference(STUDENT.numpy(), TEACHER.numpy(), np.eye(10)[LABELS], temperature, alpha, weight)
    assert [x.item() for x in found] == pytest.approx(wanted[:3], rel=1e-5 if dtype == torch.float32 else 1e-12)
    np.testing.assert_allclose(gradient(found.total, student), wanted[3], rtol=1e-4, atol=1e-6)


def test_class_probabilities_as_labels_agree_with_the_reference():
    targets = softmax(logits(seed=3).numpy())
    student = STUDENT.clone().requires_grad_()
    found = loss_and_terms(student, TEACHER, torch.from_numpy(targets), temperature=4, alpha=0.3)
    wanted = reference(STUDENT.numpy(), TEACHER.numpy(), targets, 4, 0.3, 0.7)
    assert [x.item() for x in found] == pytest.approx(wanted[:3], rel=1e-12)
    np.testing.assert_allclose(gradient(found.total, student), wanted[3], atol=1e-12)


def test_class_indices_are_probabilities_of_one():
    one_hot = F.one_hot(LABELS, 10).double()
    by_index = loss_and_terms(STUDENT, TEACHER, LABELS, temperature=3, alpha=0.4)
    by_probability = loss_and_terms(STUDENT, TEACHER, one_hot, temperature=3, alpha=0.4)
    assert by_index.total.item() == pytest.approx(by_probability.total.item(), rel=1e-12)


def test_the_soft_term_and_its_gradient_are_zero_where_student_and_teacher_agree():
    student = TEACHER.clone().requires_grad_()
    soft = loss_and_terms(student, TEACHER, LABELS, temperature=4, alpha=0.5).soft
    assert soft.item() == pytest.approx(0, abs=1e-15)
    assert gradient(soft, student).abs().max().item() == pytest.approx(0, abs=1e-15)


def test_the_soft_term_is_positive_where_they_differ():
    for temperature in (0.5, 1, 4, 20):
        assert loss_and_terms(STUDENT, TEACHER, LABELS, temperature=temperature, alpha=0.5).soft.item() > 1e-4


def test_alpha_of_one_is_cross_entropy():
    student = STUDENT.clone().requires_grad_()
    found = distillation_loss(student, TEACHER, LABELS, temperature=4, alpha=1)
    plain = F.cross_entropy(student, LABELS)
    assert found.item() == plain.item()
    assert torch.equal(gradient(found, student), gradient(plain, student))


def test_alpha_of_zero_does_not_look_at_the_labels():
    first, second = (
        distillation_loss(STUDENT, TEACHER, labels, temperature=4, alpha=0) for labels in (LABELS, LABELS.flip(0))
    )
    assert first.item() == second.item() > 0


def test_at_temperature_one_the_soft_term_differs_from_a_cross_entropy_by_the_teachers_entropy():
    found = loss_and_terms(STUDENT, TEACHER, LABELS, temperature=1, alpha=0)
    probabilities = TEACHER.softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    assert found.total.item() == pytest.approx((F.cross_entropy(STUDENT, probabilities) - entropy).item(), rel=1e-12)


def test_adding_a_constant_to_an_images_logits_changes_nothing():
    shift = torch.linspace(-50, 50, 16, dtype=torch.float64)[:, None]
    plain = loss_and_terms(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.3)
    for student, teacher in ((STUDENT + shift, TEACHER), (STUDENT, TEACHER + shift)):
        shifted = loss_and_terms(student, teacher, LABELS, temperature=4, alpha=0.3)
        assert [x.item() for x in shifted] == pytest.approx([x.item() for x in plain], rel=1e-10)


def test_duplicating_the_batch_changes_nothing():
    once = loss_and_terms(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.3)
    twice = loss_and_terms(STUDENT.repeat(2, 1), TEACHER.repeat(2, 1), LABELS.repeat(2), temperature=4, alpha=0.3)
    assert [x.item() for x in twice] == pytest.approx([x.item() for x in once], rel=1e-12)


def test_a_class_that_nobody_believes_in_changes_nothing():
    # summed over the classes: a mean over them would shrink as classes are added
    never = torch.full((16, 10), -400.0, dtype=torch.float64)
    wider = loss_and_terms(
        torch.cat([STUDENT, never], 1), torch.cat([TEACHER, never], 1), LABELS, temperature=1, alpha=0
    )
    assert wider.soft.item() == pytest.approx(
        loss_and_terms(STUDENT, TEACHER, LABELS, temperature=1, alpha=0).soft.item(), rel=1e-12
    )


def gradient_norms(temperatures, term: str) -> list[float]:
    norms = []
    for temperature in temperatures:
        student = STUDENT.clone().requires_grad_()
        found = loss_and_terms(student, TEACHER, LABELS, temperature=temperature, alpha=0)
        norms.append(gradient(getattr(found, term), student).norm().item())
    return norms


def test_with_the_factor_of_temperature_squared_the_gradient_keeps_its_size():
    norms = gradient_norms([1, 2, 4, 8, 16, 32], "total")
    assert max(norms) / min(norms) < 3
    assert norms[-1] / norms[-2] == pytest.approx(1, abs=0.05)


def test_without_that_factor_the_gradient_falls_as_one_over_temperature_squared():
    at_16, at_32, at_64 = gradient_norms([16, 32, 64], "soft")
    assert at_16 / at_32 == pytest.approx(4, rel=0.05)
    assert at_32 / at_64 == pytest.approx(4, rel=0.02)


def test_at_high_temperature_the_gradient_is_that_of_logit_matching_for_centred_logits():
    # arXiv 1503.02531, section 2.1: the gradient of T**2 * KL tends to (z - v) / C for logits z, v of mean zero; here
    # averaged over the batch. It is the gradient of the squared distance sum((z - v)**2) / (2 C B).
    student, teacher = (x - x.mean(1, keepdim=True) for x in (STUDENT, TEACHER))
    student.requires_grad_()
    found = gradient(distillation_loss(student, teacher, LABELS, temperature=2000, alpha=0), student)
    matching = gradient((student - teacher).pow(2).sum() / (2 * 10 * 16), student)
    torch.testing.assert_close(found, matching, rtol=0, atol=0.01 * matching.abs().max().item())


def test_no_gradient_reaches_the_teacher():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distillation_loss(student, teacher, LABELS, temperature=4, alpha=0.5).backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (1.0, 1.0), (3.0, 0.0), (0.0, 2.0)])
def test_beta_takes_the_place_of_one_minus_alpha(alpha, beta):
    found = loss_and_terms(STUDENT, TEACHER, LABELS, temperature=4, alpha=alpha, beta=beta)
    assert found.total.item() == pytest.approx((alpha * found.hard + beta * 16 * found.soft).item(), rel=1e-12)


def test_large_logits_stay_finite():
    student = (1e4 * STUDENT.float()).requires_grad_()
    found = loss_and_terms(student, 1e4 * TEACHER.float(), LABELS, temperature=1, alpha=0.5)
    assert all(torch.isfinite(x) for x in found)
    assert torch.isfinite(gradient(found.total, student)).all()


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"temperature": 0}, r"temperature is 0: expected a number above 0"),
        ({"temperature": -2.5}, r"temperature is -2\.5: expected a number above 0"),
        ({"temperature": math.nan}, r"temperature is nan: expected a finite number"),
        ({"temperature": math.inf}, r"temperature is inf: expected a finite number"),
        ({"temperature": "hot"}, r"temperature is 'hot': expected a finite number"),
        ({"alpha": 1.5}, r"alpha is 1\.5: expected a number in \[0, 1\].*give beta as well"),
        ({"alpha": -0.1}, r"alpha is -0\.1: expected a number in \[0, 1\].*give beta as well"),
        ({"alpha": math.nan}, r"alpha is nan: expected a finite number"),
        ({"alpha": -1, "beta": 1}, r"alpha is -1: expected a number of at least 0"),
        ({"beta": -0.5}, r"beta is -0\.5: expected a number of at least 0 \(leave it out for 1 - alpha\)"),
        ({"beta": math.inf}, r"beta is inf: expected a finite number"),
    ],
)
def test_a_weight_out_of_range_is_refused_by_name_and_value(weights, message):
    weights = {"temperature": 4, "alpha": 0.5, **weights}
    with pytest.raises(ValueError, match=message):
        distillation_loss(STUDENT, TEACHER, LABELS, **weights)


def test_check_weights_gives_beta():
    assert check_weights(4, 0.25) == 0.75
    assert check_weights(4, 0.25, 2) == 2


@pytest.mark.parametrize(
    ("student", "teacher", "labels", "message"),
    [
        ((8, 10), (8, 5), (8,), r"student_logits \(8, 10\) and teacher_logits \(8, 5\): expected both \(B, C\)"),
        ((8, 10), (4, 10), (8,), r"student_logits \(8, 10\) and teacher_logits \(4, 10\): expected both \(B, C\)"),
        ((8,), (8,), (8,), r"student_logits \(8,\) and teacher_logits \(8,\): expected both \(B, C\)"),
        (
            (8, 10),
            (8, 10),
            (7,),
            r"labels \(7,\) do not fit logits \(8, 10\): expected \(8,\) class indices or \(8, 10\)",
        ),
        ((8, 10), (8, 10), (8, 9), r"labels \(8, 9\) do not fit logits \(8, 10\): expected \(8,\) class indices or"),
        ((8, 10), (8, 10), (8, 1), r"labels \(8, 1\) do not fit logits \(8, 10\): expected \(8,\) class indices or"),
    ],
)
def test_tensors_that_do_not_fit_each_other_are_refused_with_their_shapes(student, teacher, labels, message):
    labels = torch.zeros(labels) if len(labels) == 2 else torch.zeros(labels, dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        distillation_loss(torch.zeros(student), torch.zeros(teacher), labels, temperature=4, alpha=0.5)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.int(), r"labels \(16,\) are torch\.int32: expected int64 for \(16,\) class indices.*\.long\(\)"),
        (torch.zeros(16), r"labels \(16,\) are torch\.float32: expected int64 for \(16,\).*\.long\(\)"),
        (F.one_hot(LABELS, 10), r"labels \(16, 10\) are torch\.int64: expected.*floats for \(16, 10\).*\.float\(\)"),
    ],
)
def test_labels_of_the_wrong_kind_are_refused_with_how_to_convert_them(labels, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(STUDENT, TEACHER, labels, temperature=4, alpha=0.5)


# --- half precision --------------------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)
NEAR = logits(64, 100, seed=4)  # a teacher, and a student near it: in half precision the difference would be lost
NEARBY = NEAR + 0.1 * logits(64, 100, seed=5)


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
@pytest.mark.parametrize("temperature", [0.5, 1, 4, 20])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_precision_logits_give_the_loss_and_the_gradient_of_their_values_in_full(dtype, temperature, kind):
    labels = torch.arange(64) if kind == "indices" else logits(64, 100, seed=6).softmax(1)
    for work in (torch.float32, torch.float64):
        results = []
        for kept in (dtype, work):
            student = NEARBY.to(dtype).to(kept).requires_grad_()
            teacher = NEAR.to(dtype).to(kept)
            given = labels if kind == "indices" else labels.to(dtype).to(kept)
            hard, soft = distillation_terms(student, teacher, given, temperature=temperature)
            assert hard.dtype == soft.dtype == (torch.float32 if kept == dtype else work)
            loss = distillation_loss(student, teacher, given, temperature=temperature, alpha=0.25)
            results.append((hard.item(), soft.item(), gradient(loss, student).double()))
        (hard, soft, found), (wanted_hard, wanted_soft, wanted) = results
        assert soft > 0
        assert hard == pytest.approx(wanted_hard, rel=1e-5)
        assert soft == pytest.approx(wanted_soft, rel=1e-3, abs=1e-8)
        # the gradient is rounded to half precision once, at the end: 8 bits of bfloat16, 11 of float16
        assert (found - wanted).norm() / wanted.norm() < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("student", "teacher", "wanted"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.float16, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float16, torch.float64),
        (torch.float16, torch.float64, torch.float64),
    ],
)
def test_the_loss_has_the_precision_of_the_finer_logits_and_at_least_float32(student, teacher, wanted):
    student = STUDENT.to(student, copy=True).requires_grad_()
    loss = distillation_loss(student, TEACHER.to(teacher), LABELS, temperature=4, alpha=0.1)
    assert loss.dtype == wanted
    assert loss.ndim == 0
    assert gradient(loss, student).dtype == student.dtype


def test_under_autocast_it_is_computed_in_float32():
    student, teacher = STUDENT.float(), TEACHER.float()
    wanted = distillation_loss(student, teacher, LABELS, temperature=4, alpha=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = distillation_loss(student, teacher, LABELS, temperature=4, alpha=0.1)
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 4])
def test_the_gradient_is_that_of_finite_differences(temperature, masked):
    student, teacher = logits(5, 4, seed=7).requires_grad_(), logits(5, 4, seed=8)
    if masked:
        teacher[:, 1] = -math.inf
    for labels in (torch.tensor([0, 2, 3, 2, 0]), logits(5, 4, seed=9).softmax(1)):
        loss = partial(distillation_loss, temperature=temperature, alpha=0.3, beta=0.9)
        assert torch.autograd.gradcheck(lambda x, y=labels, f=loss: f(x, teacher, y), student)
        assert torch.autograd.gradgradcheck(lambda x, y=labels, f=loss: f(x, teacher, y), student)


# --- masked classes --------------------------------------------------------------------------------------------------


def without(values: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(masked, -math.inf)


MASKS = {
    "one class in all rows": torch.arange(10) == 2,
    "another class in each row": F.one_hot((LABELS + 1) % 10, 10).bool(),
    "all classes but two": (torch.arange(10) != LABELS[:, None]) & (torch.arange(10) != (LABELS[:, None] + 3) % 10),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("where", ["teacher", "both"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_class_that_the_teacher_excludes_adds_nothing_to_the_divergence(dtype, where, mask):
    masked = MASKS[mask].expand(16, 10)
    kept = LABELS % 10 != 2 if mask == "one class in all rows" else torch.ones(16, dtype=torch.bool)
    teacher, plain = without(TEACHER, masked).to(dtype)[kept], STUDENT.to(dtype)[kept]
    plain = without(plain, masked[kept]) if where == "both" else plain
    student = plain.clone().requires_grad_()
    found = loss_and_terms(student, teacher, LABELS[kept], temperature=3, alpha=0.3)
    p, log_q = (teacher.double() / 3).softmax(1), (plain.double() / 3).log_softmax(1)
    wanted = torch.where(p > 0, p * (p.clamp(min=1e-300).log() - log_q), 0).sum(1).mean().item()
    assert found.soft.item() == pytest.approx(wanted, rel=1e-4)
    assert found.total.isfinite()
    slope = gradient(found.total, student)
    assert slope.isfinite().all()
    if where == "both":
        assert (slope[masked[kept]] == 0).all()


@pytest.mark.parametrize("where", ["teacher", "both"])
def test_probabilities_that_give_a_masked_class_nothing_go_with_it(where):
    masked = MASKS["one class in all rows"].expand(16, 10)
    labels = without(logits(seed=3), masked).softmax(1)
    student = without(STUDENT, masked) if where == "both" else STUDENT.clone()
    student = student.requires_grad_()
    found = loss_and_terms(student, without(TEACHER, masked), labels, temperature=3, alpha=0.3)
    log_q = student.detach().log_softmax(1).masked_fill(masked, 0)
    assert found.hard.item() == pytest.approx(-(labels * log_q).sum(1).mean().item(), rel=1e-9)
    assert gradient(found.total, student).isfinite().all()


def test_a_class_that_only_the_student_excludes_is_infinitely_wrong():
    student = without(STUDENT, MASKS["one class in all rows"].expand(16, 10))
    assert distillation_loss(student, TEACHER, LABELS, temperature=3, alpha=0).item() == math.inf


# --- without labels --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [None, 2.0])
def test_without_labels_it_is_the_soft_term_alone(beta):
    wanted = distillation_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=0, beta=beta)
    found = distillation_loss(STUDENT, TEACHER, None, temperature=4, alpha=0, beta=beta)
    assert torch.equal(found, wanted)
    hard, soft = distillation_terms(STUDENT, TEACHER, None, temperature=4)
    assert hard is None
    assert found.item() == pytest.approx((beta or 1) * 16 * soft.item(), rel=1e-12)


def test_without_labels_alpha_must_be_zero():
    with pytest.raises(ValueError, match=r"labels is None and alpha is 0\.1: expected labels, or alpha=0"):
        distillation_loss(STUDENT, TEACHER, None, temperature=4, alpha=0.1)


# --- values that are no logits, and no labels ------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 10), (16, 0), (0, 0)])
def test_an_empty_batch_is_refused(shape):
    empty = torch.zeros(shape)
    with pytest.raises(ValueError, match=rf"logits \({shape[0]}, {shape[1]}\) are empty: expected at least one image"):
        distillation_loss(empty, empty, torch.zeros(shape[0], dtype=torch.int64), temperature=4, alpha=0.1)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.uint8, torch.bool])
@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
def test_logits_that_are_no_floats_are_refused(which, dtype):
    given = {"student_logits": STUDENT, "teacher_logits": TEACHER}
    given[which] = given[which].to(dtype)
    with pytest.raises(ValueError, match=rf"{which} are {dtype}: expected floats, .*\.float\(\)"):
        distillation_loss(**given, labels=LABELS, temperature=4, alpha=0.1)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS + 1, "labels run from 1 to 10: expected class indices from 0 to 9"),
        (LABELS - 1, "labels run from -1 to 8: expected class indices from 0 to 9"),
        (torch.full((16,), -100), "labels run from -100 to -100: expected class indices"),  # PyTorch's "ignore"
        (
            torch.full((16, 10), 0.2),
            r"floats from 0\.2 to 0\.2 whose rows sum to between 2 and 2: expected probabilities",
        ),
        (torch.zeros(16, 10), "rows sum to between 0 and 0: expected probabilities"),
        (TEACHER, "expected probabilities, none below 0, each row summing to 1"),  # logits in their place
        (torch.eye(10)[LABELS] * 1.2 - 0.02, r"floats from -0\.02 to 1\.18 .*: expected probabilities, none below 0"),
        (torch.full((16, 10), math.nan), "rows sum to between nan and nan: expected probabilities"),
    ],
)
def test_labels_with_values_out_of_range_are_refused(labels, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(STUDENT, TEACHER, labels, temperature=4, alpha=0.5)
    with pytest.raises(ValueError, match=message):
        distillation_terms(STUDENT, TEACHER, labels, temperature=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_probabilities_rounded_to_any_precision_are_probabilities(classes, dtype):
    student, teacher = logits(8, classes, seed=1), logits(8, classes, seed=2)
    labels = logits(8, classes, seed=3).softmax(1)
    found = distillation_loss(student, teacher, labels.to(dtype), temperature=4, alpha=0.5)
    wanted = distillation_loss(student, teacher, labels, temperature=4, alpha=0.5)
    assert found.item() == pytest.approx(wanted.item(), rel=0.01)


@pytest.mark.parametrize("which", ["student_logits", "teacher_logits"])
@pytest.mark.parametrize(("temperature", "dtype"), [(1e-39, torch.float32), (1e-308, torch.float64)])
def test_a_temperature_so_small_that_the_quotients_overflow_is_refused(which, temperature, dtype):
    small = 1e-3 * torch.ones(16, 10, dtype=dtype)
    given = {"student_logits": small, "teacher_logits": small}
    given[which] = 5 * torch.ones(16, 10, dtype=dtype)
    message = rf"temperature is {temperature}: {which} of up to 5, divided by it, overflow {dtype}; choose a higher"
    with pytest.raises(ValueError, match=message):
        distillation_loss(**given, labels=LABELS, temperature=temperature, alpha=0.5)
    given[which] = without(given[which], MASKS["one class in all rows"].expand(16, 10))  # masked classes beside
    with pytest.raises(ValueError, match=message):
        distillation_loss(**given, labels=LABELS, temperature=temperature, alpha=0.5)


def test_logits_that_are_not_finite_give_a_loss_that_is_not_so_that_training_can_name_the_step():
    for bad in (math.nan, math.inf):
        student = STUDENT.clone()
        student[3, 4] = bad
        assert not distillation_loss(student, TEACHER, LABELS, temperature=4, alpha=0.5).isfinite()


# --- in other people's loops -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["indices", "probabilities"])
def test_it_can_be_compiled_whole(kind):
    labels = LABELS if kind == "indices" else logits(seed=3).softmax(1)
    loss = partial(distillation_loss, temperature=4.0, alpha=0.1)
    student = STUDENT.clone().requires_grad_()
    compiled = torch.compile(loss, backend="eager", fullgraph=True)
    assert torch.equal(compiled(student, TEACHER, labels), loss(student, TEACHER, labels))
    slopes = (gradient(f(student, TEACHER, labels), student) for f in (compiled, loss))
    assert torch.equal(*slopes)


def test_it_can_be_differentiated_by_torch_func():
    loss = partial(distillation_loss, temperature=4.0, alpha=0.1)
    student = STUDENT.clone().requires_grad_()
    wanted = gradient(loss(student, TEACHER, LABELS), student)
    torch.testing.assert_close(torch.func.grad(loss)(STUDENT, TEACHER, LABELS), wanted)
    loss_of_rows, pull_back = torch.func.vjp(lambda x: loss(x, TEACHER, LABELS), STUDENT)
    assert torch.equal(loss_of_rows, loss(STUDENT, TEACHER, LABELS))
    torch.testing.assert_close(pull_back(torch.ones_like(loss_of_rows))[0], wanted)


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch has no batching rule for kl_div
def test_it_can_be_vectorised_over_models():
    student, teacher = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    labels = torch.zeros(5, dtype=torch.int64)

    def loss(s, t):
        return distillation_loss(s, t, labels, temperature=4, alpha=0.1)

    each = torch.stack([loss(s, t) for s, t in zip(student, teacher, strict=True)])
    assert torch.allclose(torch.func.vmap(loss)(student, teacher), each)
