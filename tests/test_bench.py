"""The bench: every case runs, its figures fit each other, and its page shows what was recorded."""

import dataclasses
import json

import pytest
import torch
from workshop import ROOT, tool

from kdlib import build, count_parameters, predict_logits


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
    assert "pair" not in found  # which takes a GPU
    assert page.PAGE.read_text() == f"a\n<!-- bench: begin -->\n{page.shown(found)}<!-- bench: end -->\nb\n"


def test_the_page_shows_what_was_recorded(page):
    shown = page.shown(page.recorded())
    assert f"<!-- bench: begin -->\n{shown}<!-- bench: end -->" in page.PAGE.read_text(encoding="utf-8")


@pytest.fixture
def pair(page):
    import bench_pair

    assert bench_pair.bench_page is page
    return bench_pair


def test_the_pair_is_measured_in_little(pair):
    found = pair.measure(pair.MINIATURE, CPU)
    assert (found["images"], found["batch_size"], found["peak_memory_gb"]) == (16, 8, None)
    assert found["seconds_an_epoch"] > 0
    assert found["theirs"]["seconds_an_epoch"] == 12.4
    assert found["device"].startswith("CPU")


def test_the_pair_is_that_of_the_papers(pair):
    sizes = [count_parameters(build(name, pair.PAIR.classes)) for name in (pair.PAIR.teacher, *pair.PAIR.students)]
    assert sizes == [2_255_156, 703_284]  # with 100 classes
    assert (pair.PAIR.images, pair.PAIR.size, pair.PAIR.batch_size) == (50_000, 32, 64)


def test_the_page_shows_the_pair_if_it_was_measured(pair, page):
    found = page.recorded()
    found.pop("pair", None)
    without = page.shown(found)
    own = {"seconds_an_epoch": 1.55, "images": 50_000, "batch_size": 64, "theirs": pair.THEIRS}
    own |= {"device": "a GPU", "torch": "2.11.0", "date": "2026-12-24"}
    shown = page.shown(found | {"pair": own})
    assert shown.startswith(without)
    assert "**1.55 s per epoch** of 50,000 images (a GPU, torch 2.11.0, 2026-12-24)" in shown
    assert "took 12.4 s on an H100" in shown
    assert "8.0 times as long" in shown


def test_the_command_for_the_pair(isolated, pair, page, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(page, "PUBLISHED", tmp_path / "published")
    monkeypatch.setattr(page, "PAGE", tmp_path / "speed.md")
    for options, message in (([], "there is none"), (["--miniature", "--publish"], "measures nothing to publish")):
        assert pair.main(options) == 2
        assert message in capsys.readouterr().err
    assert pair.main(["--miniature"]) == 0
    assert "A pair that many papers share" in capsys.readouterr().out
    assert json.loads((tmp_path / "outputs" / "bench-pair-cpu.json").read_text())["images"] == 16
    assert not page.PUBLISHED.exists()


def test_the_pair_joins_the_published_bench_and_changes_nothing_else_in_it(pair, page, monkeypatch, tmp_path, capsys):
    published, found = tmp_path / "published" / "bench-cuda.json", page.recorded()
    monkeypatch.setenv("KDLIB_OUTPUTS", str(tmp_path))
    monkeypatch.setattr(page, "PUBLISHED", published.parent)
    monkeypatch.setattr(page, "PAGE", tmp_path / "speed.md")
    monkeypatch.setattr(pair.gpu, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(pair, "measure", lambda s, device: measured)
    measured = {"seconds_an_epoch": 1.55, "images": 50_000, "batch_size": 64, "theirs": pair.THEIRS}
    measured |= {"device": "a GPU", "torch": "2.11.0", "date": "2026-12-24"}
    assert pair.main(["--publish"]) == 2
    assert "bench-cuda.json is not there" in capsys.readouterr().err
    published.parent.mkdir()
    published.write_text(json.dumps(found))
    page.PAGE.write_text("<!-- bench: begin -->\n<!-- bench: end -->\n")
    assert pair.main(["--publish"]) == 0
    assert json.loads(published.read_text()) == found | {"pair": measured}
    assert pair.bench_page.shown_pair(measured) in page.PAGE.read_text()


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
