"""The training loops of others in chapter 13: the code that the chapter shows, run with the real libraries."""

import copy
import re
from types import SimpleNamespace

import nbformat
import pytest
import torch
from conftest import make_images
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from workshop import ROOT, code_cells

import kdlib

CHAPTER = nbformat.read(ROOT / "book" / "13_your_own.ipynb", 4)


def small(classes, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, classes))


@pytest.fixture
def names():
    """What the chapter's code may use. The teacher's batch norm would remember a step in train mode."""
    torch.manual_seed(0)
    images = make_images(48)
    teacher = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4)).eval()
    found = {"kdlib": kdlib, "torch": torch, "DataLoader": DataLoader, "TensorDataset": TensorDataset, "small": small}
    found |= {"data": SimpleNamespace(train=images), "N": len(images), "teacher": teacher}
    before = copy.deepcopy(teacher.state_dict())
    yield found
    assert all(torch.equal(weight, before[name]) for name, weight in teacher.state_dict().items())
    assert all(weight.grad is None for weight in teacher.parameters())


def run_cells(names, *words):
    """Run the code cells that hold these words."""
    for word in words:
        (source,) = (cell.source for cell in code_cells(CHAPTER) if word in cell.source)
        exec(source, names)


def run_block(names, word):
    """Run the Python block in a Markdown cell that holds this word."""
    text = "\n".join(cell.source for cell in CHAPTER.cells if cell.cell_type == "markdown")
    (source,) = (code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in code)
    exec(source, names)


def loss_of(student, names):
    """The distillation loss on all images: the lower, the more was learned."""
    assert not names["teacher"].training
    rows = torch.arange(names["N"])
    images, labels = names["data"].train.batch(rows, torch.zeros_like(rows)), names["data"].train.labels
    with torch.no_grad():
        logits = [network.cpu()(images) for network in (student, names["teacher"])]
    return kdlib.distillation_loss(*logits, labels, temperature=4.0, alpha=0.1).item()


def test_a_plain_loop(names):
    names["teacher"].train()
    run_cells(names, "TensorDataset(", "for images, labels in loader:")
    assert loss_of(names["student"], names) < loss_of(kdlib.build(small, 4, 1), names)


@pytest.mark.filterwarnings("ignore")
def test_lightning(names):
    lightning = pytest.importorskip("lightning")
    run_block(names, "LightningModule")
    run_cells(names, "TensorDataset(")
    student = kdlib.build(small, 4, 1)
    before = loss_of(student, names)
    module = names["Distillation"](student, names["teacher"].train())
    silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    lightning.Trainer(max_epochs=5, accelerator="cpu", **silent).fit(module.train(), names["loader"])
    assert loss_of(student, names) < before


class OfPixelValues(nn.Module):
    """A network as Hugging Face's are called."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, pixel_values, labels=None):
        return {"logits": self.network(pixel_values)}


@pytest.mark.filterwarnings("ignore")
def test_hugging_faces_trainer(names, tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_block(names, "transformers.Trainer")
    run_cells(names, "TensorDataset(")
    student = kdlib.build(small, 4, 1)
    before = loss_of(student, names)
    options = {"use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    options |= {"remove_unused_columns": False, "per_device_train_batch_size": 8, "learning_rate": 0.01}
    pairs = zip(names["clean"], names["data"].train.labels, strict=True)
    trainer = names["DistillationTrainer"](
        OfPixelValues(student.train()),
        transformers.TrainingArguments(str(tmp_path), max_steps=20, **options),
        train_dataset=[{"pixel_values": image, "labels": label} for image, label in pairs],
        teacher=names["teacher"].train(),
    )
    trainer.train()
    assert loss_of(student, names) < before
