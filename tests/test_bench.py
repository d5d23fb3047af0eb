"""The bench: every case runs, its figures fit each other, and its page shows what was recorded."""

import dataclasses
import json

import pytest
import torch
from workshop import ROOT, tool

from kdlib import build, predict_logits


@pytest.fixture(scope="module")
def bench():
    return tool(ROOT, "bench")


@pytest.fixture(scope="module")
def page(bench):
    return bench.bench_page


CPU = torch.device("cpu")


def small(bench):
    return dataclasses.replace(bench.setting(CPU), images=160, batch_size=20, epochs=2, workers=(0,))


def test_every_case_is_measured(bench, page):
    s = small(bench)
    for case, network in bench.cases(s):
        found = bench.measure(case, network, s, CPU, peak=1e9)
        assert found["images_a_second"] == pytest.approx(160 / found["seconds_an_epoch"])
        assert found["share_of_matrix_product"] == pytest.approx(found["tflops"] * 1e12 / 1e9)
        assert found["times_as_fast"] == pytest.approx(found["tutorial_seconds_an_epoch"] / found["seconds_an_epoch"])
        assert list(found["seconds_by_images"]) == ["40", "80", "160"]
        assert found["tutorial_workers"] == 0
        assert found["peak_memory_gb"] is None
        for table in (page.rows, page.limit_rows, page.growth_rows):
            header, lines = table({"cases": [found]})
            assert len(header) == len(lines[0])


def test_the_arithmetic_is_counted(bench):
    s = small(bench)  # digits_cnn: a 3x3 convolution of c to w channels at n pixels takes 2 * 9 * c * w * n operations
    expected = 2 * 9 * (1 * 16 + 16 * 16) * 64 + 2 * 9 * (16 * 48 + 48 * 48) * 16 + 2 * 48 * 10
    assert bench.forward_flops("digits_cnn", s) == expected


def test_the_tutorials_pictures_are_the_same_images(bench):
    images = bench.noise(small(bench), 12)
    pictures = bench.Pictures(images, augment=False)
    ours = images.batch(torch.arange(12), torch.zeros(12, dtype=torch.int64))
    assert torch.allclose(torch.stack([pictures[i][0] for i in range(12)]), ours, atol=1e-5)
    assert [pictures[i][1:] for i in range(12)] == [(label, i) for i, label in enumerate(images.labels.tolist())]
    assert predict_logits(torch.nn.Flatten(), images).shape == (12, 64)


def test_the_command(bench, page, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path))
    assert bench.main(["--images", "3"]) == 2
    assert "--images is 3: expected at least" in capsys.readouterr().err
    s = small(bench)
    monkeypatch.setattr(bench, "setting", lambda device: s)
    monkeypatch.setattr(page, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(page, "PAGE", tmp_path / "speed.md")
    page.PAGE.write_text("a\n<!-- bench: begin -->\nold\n<!-- bench: end -->\nb\n")
    assert bench.main(["--publish"]) == 0
    assert "train a student with the live teacher" in capsys.readouterr().out
    found = json.loads((tmp_path / "published" / "bench-cpu.json").read_text())
    assert json.loads((tmp_path / "bench-cpu.json").read_text()) == found
    assert page.PAGE.read_text() == f"a\n<!-- bench: begin -->\n{page.shown(found)}<!-- bench: end -->\nb\n"


def test_the_page_shows_what_was_recorded(page):
    shown = page.shown(page.recorded())
    assert f"<!-- bench: begin -->\n{shown}<!-- bench: end -->" in page.PAGE.read_text(encoding="utf-8")


def test_what_a_checkpoint_costs_is_measured_in_pairs(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path))
    costs = tool(ROOT, "bench_checkpoints")
    monkeypatch.setattr(costs, "NETWORKS", ("digits_cnn",))
    assert costs.main(["--pairs", "2", "--epochs", "1"]) in (0, 1)
    found = json.loads((tmp_path / "bench-checkpoints.json").read_text())
    (checkpoint,) = found["checkpoints"]
    assert (found["pairs"], checkpoint["network"]) == (2, "digits_cnn")
    assert found["seconds"] > 0
    parameters = sum(w.numel() for w in build("digits_cnn", 10, 1).parameters())
    assert checkpoint["mb"] > 2 * 4 * parameters / 1e6  # weights and momentum
    said = capsys.readouterr().out
    assert "2 pairs; at most 1% is wanted" in said
