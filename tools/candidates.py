"""The networks that ``tools/students.py`` trains beside the book's own, and how."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch.nn.functional as F

import kdlib
from kdlib import evaluate
from kdlib.data import Data, Targets
from kdlib.profiles import Profile
from kdlib.published import Logits, Network
from kdlib.records import artefacts
from kdlib.train import Recipe

ROLES = {"students": ("student", "distilled"), "record": ("distilled",)}


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A network to train.

    Of kind "students" it is trained alone and from the soft labels, exactly as the profile's own. Of kind "record" it
    is distilled from the live teacher alone, over mixed images, three times as long (Beyer et al., arXiv 2106.05237).
    """

    kind: str
    network: str  # as kdlib.build takes it
    n_seeds: int
    rate: float = 1.0  # the learning rate, as a multiple of the profile's


CANDIDATES = {
    "resnet18": Candidate("students", "resnet18", 2),
    "mobilenet_v2": Candidate("students", "mobilenet_v2", 2),
    "wide_resnet14": Candidate("record", "wide_resnet14", 3),
    # where a search starts: its paper trains it with AdamW, and nothing tells a rate for SGD
    "convmixer": Candidate("record", "kdlib.scale.networks:convmixer", 3, rate=0.5),
    "densenet_bc": Candidate("record", "kdlib.scale.networks:densenet_bc", 3),
}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training of a candidate."""

    name: str  # the candidate's
    role: str  # student or distilled
    seed: int
    settings: Profile

    @property
    def candidate(self) -> Candidate:
        return CANDIDATES[self.name]

    @property
    def recipe(self) -> Recipe:
        own = self.settings.student_recipe
        if self.candidate.kind == "record":
            rate = self.candidate.rate * own.learning_rate
            own = dataclasses.replace(own, epochs=3 * own.epochs, mixup=1.0, learning_rate=rate)
        return dataclasses.replace(own, seed=self.seed)

    @property
    def weights(self) -> dict[str, float | None]:
        """Of a distilled student: temperature and weights of the two terms, as the loss takes them."""
        if self.candidate.kind == "record":
            return {"temperature": 2.0, "alpha": 0.0, "beta": None}
        return {name: getattr(self.settings, name) for name in ("temperature", "alpha", "beta")}

    @property
    def path(self) -> Path:
        """Where its weights go; those of a student where the book's own go, so that chapters find it."""
        file = self.settings.file(self.role, self.candidate.network, self.seed)
        if self.candidate.kind == "record":
            file = f"record_{self.name}_seed{self.seed}.pth"
        return self.settings.folder / file

    def objective(self, teacher: Network | None) -> tuple[Callable, Targets | None]:
        """What it minimises, and the teacher's logits for it."""
        if self.role == "student":
            return F.cross_entropy, None
        loss_fn = partial(kdlib.distillation_loss, **self.weights)
        return loss_fn, kdlib.LiveTeacher(teacher.model) if self.candidate.kind == "record" else teacher.soft_labels

    def load_or_train(self, data: Data, teacher: Network | None) -> Network:
        """The trained network; a training that was cut off goes on at its checkpoint."""
        loss_fn, targets = self.objective(teacher)
        made = {"targets": targets, "validation": data.validation}
        file, network = self.path.name, self.candidate.network
        trained = kdlib.load_or_train(self.path.parent, file, network, data.train, loss_fn, self.recipe, **made)
        about, size = artefacts.record(self.path)["provenance"], evaluate.file_megabytes(self.path)
        return Network(trained.model, trained.history, Logits(trained.model, data, {}), about, size, self.path)

    def state(self) -> str:
        """Whether it is done, by what lies in the folder and without reading the networks."""
        if self.path.exists() and (known := artefacts.record(self.path)):
            same = known["fingerprint"].get("recipe") == dataclasses.asdict(self.recipe)
            return "trained" if same else "trained with another recipe"
        return "unfinished" if list(self.path.parent.glob(f"{self.path.stem}.*.partial")) else "not begun"


def trainings(name: str, settings: Profile) -> list[Training]:
    """All trainings of a candidate: every role and seed."""
    candidate = CANDIDATES[name]
    seeds = range(settings.seed, settings.seed + candidate.n_seeds)
    return [Training(name, role, seed, settings) for role in ROLES[candidate.kind] for seed in seeds]
