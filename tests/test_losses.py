"""The losses against values worked out by hand, an independent float64 reference, and their limits."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from kdlib.data import Batch
from kdlib.losses import CrossEntropy, Distillation, DistillationLoss, check_weights, distillation_loss


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
    found = distillation_loss(student, teacher, torch.tensor([1, 0]), temperature=2, alpha=0.25)
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
    found = distillation_loss(student, TEACHER.to(dtype), LABELS, temperature=temperature, alpha=alpha, beta=beta)
    weight = 1 - alpha if beta is None else beta
    wanted = reference(STUDENT.numpy(), TEACHER.numpy(), np.eye(10)[LABELS], temperature, alpha, weight)
    assert [x.item() for x in found] == pytest.approx(wanted[:3], rel=1e-5 if dtype == torch.float32 else 1e-12)
    np.testing.assert_allclose(gradient(found.total, student), wanted[3], rtol=1e-4, atol=1e-6)


def test_class_probabilities_as_labels_agree_with_the_reference():
    targets = softmax(logits(seed=3).numpy())
    student = STUDENT.clone().requires_grad_()
    found = distillation_loss(student, TEACHER, torch.from_numpy(targets), temperature=4, alpha=0.3)
    wanted = reference(STUDENT.numpy(), TEACHER.numpy(), targets, 4, 0.3, 0.7)
    assert [x.item() for x in found] == pytest.approx(wanted[:3], rel=1e-12)
    np.testing.assert_allclose(gradient(found.total, student), wanted[3], atol=1e-12)


def test_class_indices_are_probabilities_of_one():
    one_hot = F.one_hot(LABELS, 10).double()
    by_index = distillation_loss(STUDENT, TEACHER, LABELS, temperature=3, alpha=0.4)
    by_probability = distillation_loss(STUDENT, TEACHER, one_hot, temperature=3, alpha=0.4)
    assert by_index.total.item() == pytest.approx(by_probability.total.item(), rel=1e-12)


def test_the_soft_term_and_its_gradient_are_zero_where_student_and_teacher_agree():
    student = TEACHER.clone().requires_grad_()
    soft = distillation_loss(student, TEACHER, LABELS, temperature=4, alpha=0.5).soft
    assert soft.item() == pytest.approx(0, abs=1e-15)
    assert gradient(soft, student).abs().max().item() == pytest.approx(0, abs=1e-15)


def test_the_soft_term_is_positive_where_they_differ():
    for temperature in (0.5, 1, 4, 20):
        assert distillation_loss(STUDENT, TEACHER, LABELS, temperature=temperature, alpha=0.5).soft.item() > 1e-4


def test_alpha_of_one_is_cross_entropy():
    student = STUDENT.clone().requires_grad_()
    found = distillation_loss(student, TEACHER, LABELS, temperature=4, alpha=1).total
    plain = F.cross_entropy(student, LABELS)
    assert found.item() == plain.item() == CrossEntropy()(student, Batch(None, LABELS, None, None)).item()
    assert torch.equal(gradient(found, student), gradient(plain, student))


def test_alpha_of_zero_does_not_look_at_the_labels():
    first, second = (
        distillation_loss(STUDENT, TEACHER, labels, temperature=4, alpha=0).total for labels in (LABELS, LABELS.flip(0))
    )
    assert first.item() == second.item() > 0


def test_at_temperature_one_the_soft_term_differs_from_a_cross_entropy_by_the_teachers_entropy():
    found = distillation_loss(STUDENT, TEACHER, LABELS, temperature=1, alpha=0)
    probabilities = TEACHER.softmax(1)
    entropy = -(probabilities * probabilities.log()).sum(1).mean()
    assert found.total.item() == pytest.approx((F.cross_entropy(STUDENT, probabilities) - entropy).item(), rel=1e-12)


def test_adding_a_constant_to_an_images_logits_changes_nothing():
    shift = torch.linspace(-50, 50, 16, dtype=torch.float64)[:, None]
    plain = distillation_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.3)
    for student, teacher in ((STUDENT + shift, TEACHER), (STUDENT, TEACHER + shift)):
        shifted = distillation_loss(student, teacher, LABELS, temperature=4, alpha=0.3)
        assert [x.item() for x in shifted] == pytest.approx([x.item() for x in plain], rel=1e-10)


def test_duplicating_the_batch_changes_nothing():
    once = distillation_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.3)
    twice = distillation_loss(STUDENT.repeat(2, 1), TEACHER.repeat(2, 1), LABELS.repeat(2), temperature=4, alpha=0.3)
    assert [x.item() for x in twice] == pytest.approx([x.item() for x in once], rel=1e-12)


def test_a_class_that_nobody_believes_in_changes_nothing():
    # summed over the classes: a mean over them would shrink as classes are added
    never = torch.full((16, 10), -400.0, dtype=torch.float64)
    wider = distillation_loss(
        torch.cat([STUDENT, never], 1), torch.cat([TEACHER, never], 1), LABELS, temperature=1, alpha=0
    )
    assert wider.soft.item() == pytest.approx(
        distillation_loss(STUDENT, TEACHER, LABELS, temperature=1, alpha=0).soft.item(), rel=1e-12
    )


def gradient_norms(temperatures, term: str) -> list[float]:
    norms = []
    for temperature in temperatures:
        student = STUDENT.clone().requires_grad_()
        found = distillation_loss(student, TEACHER, LABELS, temperature=temperature, alpha=0)
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
    found = gradient(distillation_loss(student, teacher, LABELS, temperature=2000, alpha=0).total, student)
    matching = gradient((student - teacher).pow(2).sum() / (2 * 10 * 16), student)
    torch.testing.assert_close(found, matching, rtol=0, atol=0.01 * matching.abs().max().item())


def test_no_gradient_reaches_the_teacher():
    student, teacher = STUDENT.clone().requires_grad_(), TEACHER.clone().requires_grad_()
    distillation_loss(student, teacher, LABELS, temperature=4, alpha=0.5).total.backward()
    assert teacher.grad is None
    assert student.grad.norm() > 0


@pytest.mark.parametrize(("alpha", "beta"), [(0.1, 0.5), (1.0, 1.0), (3.0, 0.0), (0.0, 2.0)])
def test_beta_takes_the_place_of_one_minus_alpha(alpha, beta):
    found = distillation_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=alpha, beta=beta)
    assert found.total.item() == pytest.approx((alpha * found.hard + beta * 16 * found.soft).item(), rel=1e-12)


def test_large_logits_stay_finite():
    student = (1e4 * STUDENT.float()).requires_grad_()
    found = distillation_loss(student, 1e4 * TEACHER.float(), LABELS, temperature=1, alpha=0.5)
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
    with pytest.raises(ValueError, match=message):
        Distillation(None, **weights)


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


def test_cross_entropy_smooths_the_labels_by_the_share_given():
    # 0.2 of the target spread over ten classes: 0.82 on the label, 0.02 on each of the others
    target = 0.8 * F.one_hot(LABELS, 10).double() + 0.02
    found = CrossEntropy(label_smoothing=0.2)(STUDENT, Batch(None, LABELS, None, None))
    assert found.item() == pytest.approx(-(target * STUDENT.log_softmax(1)).sum(1).mean().item(), rel=1e-12)
    assert CrossEntropy(0.2).describe() != CrossEntropy().describe()


class Targets:
    """A target source that remembers what it was asked."""

    def __call__(self, *asked):
        self.asked = asked
        return TEACHER

    def describe(self):
        return "those of the test"


def test_the_objective_asks_its_targets_about_the_batch_and_gives_the_distillation_loss():
    targets = Targets()
    batch = Batch(torch.zeros(16, 1, 2, 2), LABELS, torch.arange(16), torch.full((16,), 3))
    found = Distillation(targets, temperature=4, alpha=0.3, beta=0.9)(STUDENT, batch)
    assert isinstance(found, DistillationLoss)
    assert found == distillation_loss(STUDENT, TEACHER, LABELS, temperature=4, alpha=0.3, beta=0.9)
    assert all(a is b for a, b in zip(targets.asked, (batch.images, batch.indices, batch.views), strict=True))


def test_what_decides_the_result_is_in_the_objectives_description():
    plain = Distillation(Targets(), temperature=4, alpha=0.3)
    assert plain.describe() == Distillation(Targets(), temperature=4.0, alpha=0.3, beta=0.7).describe()
    others = [
        Distillation(Targets(), temperature=5, alpha=0.3),
        Distillation(Targets(), temperature=4, alpha=0.4),
        Distillation(Targets(), temperature=4, alpha=0.3, beta=0.8),
        Distillation(lambda *_: TEACHER, temperature=4, alpha=0.3),
    ]
    assert all(other.describe() != plain.describe() for other in others)
