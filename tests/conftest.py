"""What the unit tests share: folders of their own, no GPU, and image sets small enough to train on in a blink."""

import os
from pathlib import Path
from types import ModuleType

import matplotlib
import numpy as np
import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels for a GPU run here too; read when torchvision imports Triton

from workshop import ROOT, render_site, tool

from kdlib import build
from kdlib.data import ImageSet
from kdlib.records.files import LOCKS

matplotlib.use("Agg")
torch.set_num_threads(1)  # so small a network is faster on one, and gives the same sums everywhere


@pytest.fixture
def isolated(monkeypatch, tmp_path):
    """kdlib in folders of its own, on the CPU, whatever the machine and its environment."""
    monkeypatch.setenv("KDLIB_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path / "outputs"))
    monkeypatch.delenv("KDLIB_PROFILE", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture(scope="session")
def site(tmp_path_factory) -> Path:
    """The folder of the rendered book: see :func:`workshop.render_site`. It is rendered once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in one that they share
        folder = folder.parent
    with FileLock(folder / "site.lock"):
        address = folder / "site.txt"
        if not address.exists():
            html = render_site(tmp_path_factory.mktemp("site"))
            address.write_text(str(html), encoding="utf-8")
    return Path(address.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def audit() -> ModuleType:
    """tools/audit.py, and with it a browser. Where there is none, the tests that need one are skipped."""
    for name in ("playwright", "axe_playwright_python"):
        pytest.importorskip(name, reason=f"no browser: {name} is not installed")
    module = tool(ROOT, "audit")
    if module.chromium() is None:
        pytest.skip("no browser: no Chromium found; on Debian: apt-get install chromium")
    return module


@pytest.fixture(scope="module")
def browser(audit):
    """A Chromium that reaches nothing but this machine. A module closes it, since its event loop disturbs others."""
    with audit.started() as one:
        yield one


@pytest.fixture(scope="module")
def base(audit, site):
    """The address of the rendered book, on this machine."""
    with audit.served(site) as address:
        yield address


def make_images(
    count: int = 48,
    *,
    classes: int = 4,
    size: tuple[int, int] = (8, 8),
    channels: int = 1,
    padding: int = 1,
    flip: bool = False,
    seed: int = 0,
    name: str = "toy/train",
) -> ImageSet:
    """Noise with a bright quadrant that tells the class, so that a network can learn it in a few steps."""
    random = np.random.RandomState(seed)
    height, width = size
    labels = random.permutation(np.arange(count) % classes)
    images = random.randint(0, 100, (count, height, width, channels))
    for image, label in zip(images, labels, strict=True):
        row, column = divmod(label % 4, 2)
        image[row * height // 2 :, column * width // 2 :][: height // 2, : width // 2] += 150
    return ImageSet(
        name=name,
        images=torch.from_numpy(images.astype(np.uint8)),
        labels=torch.from_numpy(labels.astype(np.int64)),
        class_names=tuple(f"class {c}" for c in range(classes)),
        mean=(0.3, 0.4, 0.5)[:channels],
        std=(0.2, 0.25, 0.3)[:channels],
        padding=padding,
        flip=flip,
    )


@pytest.fixture
def image_set():
    """A function that makes a small :class:`ImageSet`; see :func:`make_images`."""
    return make_images


@pytest.fixture
def toy_teacher():
    """A function that makes a network in eval mode whose batch norm has seen data, so that its mode matters."""

    def make(data: ImageSet, network: str = "digits_cnn", seed: int = 7) -> torch.nn.Module:
        model = build(network, data.classes, data.channels, seed=seed).train()
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(20):
                height, width = data.images.shape[1:3]
                model(2 * torch.randn(8, data.channels, height, width, generator=generator) + 1)
            for parameter in model.parameters():  # answers that differ from image to image
                parameter.mul_(2)
        return model.eval()

    return make


@pytest.fixture
def contents():
    """A function that tells what a folder holds but locks, so that a test can say that nothing in it changed."""

    def read(folder: Path) -> dict[str, bytes]:
        found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.parent.name != LOCKS)
        return {str(p.relative_to(folder)): p.read_bytes() for p in found}

    return read


class SideEffect:
    """An object that, when a file that holds it is read with pickle, makes a folder: it must never appear."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.folder),)


@pytest.fixture
def side_effect(tmp_path):
    """An object that makes the folder `side_effect.folder` when it is unpickled."""
    return SideEffect(tmp_path / "executed")
