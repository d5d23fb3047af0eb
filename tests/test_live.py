"""What a reader can touch, in a headless Chromium: it shows what Python computes, and no request leaves the site."""

import base64
import contextlib
import io
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from workshop import ROOT, tool

from kdlib.deploy.export import FromPixels
from kdlib.records import artefacts

with contextlib.suppress(ModuleNotFoundError):  # the tests that need it are skipped: see the fixture `audit`
    from playwright.sync_api import expect

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
TAUGHT = "book/intro.html", "book/03_soft_labels.html", "book/15_deployment.html"
PAD = "book/07_paper_mnist.html"


@pytest.fixture(scope="module")
def live():
    """tools/live.py."""
    return tool(ROOT, "live")


@pytest.fixture(scope="module")
def recorded(live):
    return live.read("cifar10")


@pytest.fixture(scope="module")
def digits(live):
    return live.read("digits")


@pytest.fixture
def visit(audit, browser, base):
    """A function that opens a page and waits for its widget; afterwards, nothing has left the site or gone wrong."""
    seen = []

    def open_page(path, *, base=base, ready=".live-ready", width=1280):
        page, problems = pages.enter_context(audit.opened(browser, base, width=width))
        seen.append(problems)
        audit.go(page, base + path)
        place = page.locator(ready).first
        place.wait_for(timeout=20_000)
        return SimpleNamespace(page=page, place=place)

    with contextlib.ExitStack() as pages:
        yield open_page
    assert [problem for problems in seen for problem in problems] == []


def shown(place, column=0):
    """The probabilities in a column of the table."""
    texts = place.locator(f"tbody td:nth-child({column + 2})").all_inner_texts()
    return np.array([0 if text.startswith("<") else float(text.removesuffix(" %")) / 100 for text in texts])


def softmax(logits, temperature=1.0):
    return torch.softmax(torch.tensor(logits, dtype=torch.float64) / temperature, -1).numpy()


def close(left, right):
    return np.abs(np.asarray(left) - np.asarray(right)).max() < 1e-3


# --- the data ------------------------------------------------------------------------------------------------------


def pixels_of(recorded):
    """The images (N, 32, 32, 3) in the data file."""
    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(recorded["pictures"].partition(",")[2]))))
    height, width, channels = recorded["shape"]
    grid = sheet.reshape(-1, height, recorded["columns"], width, channels).swapaxes(1, 2)
    return grid.reshape(-1, height, width, channels)


def student(live, recorded, pixels):
    """Logits of the published student for pixels (N, 32, 32, 3) uint8, by PyTorch."""
    model = FromPixels(live.student_model(10), recorded["mean"], recorded["std"])
    with torch.no_grad():
        return model(torch.from_numpy(np.array(pixels))).numpy()


def perceptron(digits, pixels, bias=0.0):
    """Probabilities of the digit pad's network for 28x28 pixels, by NumPy."""
    values = (np.asarray(pixels, float).ravel() / 255 - digits["mean"]) / digits["std"]
    for depth, layer in enumerate(digits["layers"]):
        whole = np.frombuffer(base64.b64decode(layer["weights"]), np.int8).reshape(len(layer["bias"]), -1)
        values = whole * np.array(layer["scale"])[:, None] @ values + layer["bias"]
        values = np.maximum(values, 0) if depth + 1 < len(digits["layers"]) else values
    values[digits["digit"]] += bias
    return softmax(values)


def samples_of(digits):
    return np.frombuffer(base64.b64decode(digits["samples"]), np.uint8).reshape(-1, 28, 28)


def test_the_data_are_those_of_the_published_networks(live, recorded):
    published = artefacts.load_array(ROOT / "book" / "published" / "full" / "teacher_logits.npy")[-10_000:]
    assert np.abs(published[recorded["rows"]].astype(float) - recorded["teacher"]).max() < 1e-3
    ours = student(live, recorded, pixels_of(recorded))
    assert np.abs(ours - recorded["student"]).max() < 2e-3
    labels, columns = np.array(recorded["labels"]), recorded["columns"]
    assert labels.tolist() == [*range(columns)] * 3  # a column per class
    correct = np.argmax(recorded["student"], 1) == labels
    assert correct.tolist() == [True] * 2 * columns + [False] * columns
    assert len(set(recorded["rows"])) == len(labels)


def test_the_network_of_the_pad_misses_a_digit_until_its_bias_is_raised(digits):
    before, after = digits["test"]
    assert before["digit"] < 0.8 < 0.9 < after["digit"]
    assert after["all"] > before["all"] > 0.9
    found = [perceptron(digits, image, digits["bias"]).argmax() for image in samples_of(digits)]
    assert np.mean(np.array(found) == digits["labels"]) > 0.8


def test_what_is_committed_is_small(live):
    assert sum(path.stat().st_size for path in live.FOLDER.iterdir()) < 600_000
    assert "null" in (live.FOLDER / "runtime.js").read_text(encoding="utf-8")


def test_a_site_that_npm_cannot_complete_says_so(live, tmp_path, monkeypatch, capsys):
    place = tmp_path / "_static" / "live"
    place.mkdir(parents=True)
    shutil.copy(live.FOLDER / "runtime.js", place)
    monkeypatch.setattr(live, "student_onnx", lambda: place)
    monkeypatch.setattr(live, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(live.shutil, "which", lambda name: None)
    live.install(tmp_path)
    assert "no student that runs in the browser: npm is not there" in capsys.readouterr().out
    assert "null" in (place / "runtime.js").read_text(encoding="utf-8")


# --- the temperature -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", TAUGHT)
def test_the_slider_softens_the_recorded_logits(visit, recorded, path):
    place = visit(path).place
    cats = [k for k, label in enumerate(recorded["labels"]) if recorded["class_names"][label] == "cat"]
    assert close(shown(place), softmax(recorded["teacher"][cats[0]]))
    place.locator(".live-pictures input").nth(cats[2]).check(force=True)
    slider = place.get_by_label("Temperature")
    slider.focus()
    for key, presses in (("ArrowRight", 30), ("ArrowLeft", 3), ("End", 1)):
        for _ in range(presses):
            slider.press(key)
        temperature = float(place.locator("output").inner_text().removeprefix("T = "))
        assert slider.get_attribute("aria-valuetext") == f"T = {temperature:g}"
        for column, network in enumerate(("teacher", "student")):
            assert close(shown(place, column), softmax(recorded[network][cats[2]], temperature))
    assert temperature == 20
    place.get_by_role("button", name="T = 4").click()
    assert close(shown(place), softmax(recorded["teacher"][cats[2]], 4))
    assert place.locator(".live-label").inner_text().startswith("cat label")


def test_the_keyboard_goes_through_the_images_and_the_result_is_said(visit, recorded):
    place = visit(TAUGHT[0]).place
    inputs = place.locator(".live-pictures input")
    assert inputs.count() == 30
    names = [inputs.nth(k).get_attribute("aria-label") for k in range(30)]
    assert len(set(names)) == 30
    inputs.nth(3).focus()
    inputs.nth(3).press("ArrowRight")
    assert inputs.nth(4).is_checked()
    assert close(shown(place), softmax(recorded["teacher"][4]))
    said = place.locator(".live-said[aria-live=polite]")
    expect(said).to_contain_text("the teacher gives deer")
    assert place.locator(".live-large").get_attribute("aria-label") == "picture of a deer"


@pytest.mark.parametrize("path", [*TAUGHT, PAD])
def test_on_a_phone_nothing_sticks_out(visit, path):
    seen = visit(path, width=390)
    box = seen.place.bounding_box()
    inner = seen.place.evaluate(
        "e => Math.max(...[...e.querySelectorAll('*')].map(x => x.getBoundingClientRect().right))"
    )
    assert box["x"] + box["width"] <= 390
    assert inner <= 390
    assert seen.page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("path", [*TAUGHT, PAD])
def test_without_javascript_a_picture_and_a_sentence_stay(browser, base, path):
    page = browser.new_page(java_script_enabled=False)
    page.goto(base + path)
    place = page.locator(".live")
    assert "with JavaScript" in place.inner_text()
    assert len(place.locator("img").get_attribute("alt")) > 80
    page.close()


def test_pages_that_were_opened_as_files_work_but_for_the_student(visit, site, recorded, digits):
    base = site.as_uri() + "/"
    place = visit(TAUGHT[0], base=base).place
    place.get_by_role("button", name="T = 20").click()
    assert close(shown(place), softmax(recorded["teacher"][3], 20))
    place.locator(".live-student summary").click()
    assert re.search("opened as a file|built without it", place.locator(".live-student").inner_text())
    place = visit(PAD, base=base).place
    assert close(shown(place), perceptron(digits, samples_of(digits)[3]))


def test_pages_without_a_widget_load_none_of_this(visit):
    loaded = []
    seen = visit("book/01_data.html", ready="article h1")
    seen.page.on("request", lambda request: loaded.append(request.url))
    seen.page.reload(wait_until="load")
    assert loaded
    assert [url for url in loaded if "/live/" in url] == []


# --- the student in the browser ------------------------------------------------------------------------------------


@pytest.fixture
def started(visit, site):
    """The first page's widget with the student loaded, and what was loaded for it."""
    if "null" in (site / "_static" / "live" / "runtime.js").read_text(encoding="utf-8"):
        pytest.skip("the site was built without ONNX Runtime Web: npm or a network is missing")
    seen = visit(TAUGHT[0])
    loaded = []
    seen.page.on("request", lambda request: loaded.append(request.url))
    seen.place.locator(".live-student summary").click()
    assert [url for url in loaded if "ort" in url or "onnx" in url] == []
    seen.place.get_by_role("button", name="Load the student").click()
    seen.place.locator(".live-drop").wait_for(timeout=60_000)
    expect(seen.place.locator(".live-status[aria-live=polite]")).to_contain_text("Computed here")
    assert any(url.endswith("student_cnn.onnx") for url in loaded)
    return seen


def test_the_student_computes_what_pytorch_computes(started, live, recorded):
    place = started.place
    logits = student(live, recorded, pixels_of(recorded))
    assert "student, live" in place.locator("thead").inner_text()
    for k in (3, 23, 29):
        place.locator(".live-pictures input").nth(k).check(force=True)
        expect(place.locator(".live-status")).to_contain_text("from the recorded one")
        place.get_by_role("button", name="T = 4").click()
        assert close(shown(place, 1), softmax(logits[k], 4))
        place.get_by_role("button", name="T = 1").click()
        assert close(shown(place, 1), softmax(logits[k]))
        assert close(shown(place), softmax(recorded["teacher"][k]))


def test_a_picture_of_ones_own(started, live, recorded, tmp_path):
    place = started.place
    pixels = np.random.RandomState(0).randint(0, 256, (32, 32, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    place.get_by_label("A picture of your own").set_input_files(tmp_path / "noise.png")
    expect(place.locator(".live-status")).to_contain_text("ten classes only")
    (logits,) = student(live, recorded, pixels[None])
    assert close(shown(place, 1), softmax(logits))
    assert place.locator("tbody td:nth-child(2)").all_inner_texts() == ["–"] * 10  # the teacher has no record of it
    place.get_by_role("button", name="T = 4").click()
    assert close(shown(place, 1), softmax(logits, 4))

    # a large one, whose middle is a test image with pixels of 20x20, between red stripes
    middle = np.kron(pixels_of(recorded)[3], np.ones((20, 20, 1), np.uint8))
    stripe = np.full((640, 200, 3), (255, 0, 0), np.uint8)
    Image.fromarray(np.concatenate([stripe, middle, stripe], 1)).save(tmp_path / "large.png")
    place.get_by_role("button", name="T = 1").click()
    place.get_by_label("A picture of your own").set_input_files(tmp_path / "large.png")
    expect(place.locator("tbody tr", has_text="cat").locator("td").nth(1)).to_have_class(re.compile("best"))

    (tmp_path / "text.png").write_text("no picture", encoding="utf-8")
    place.get_by_label("A picture of your own").set_input_files(tmp_path / "text.png")
    expect(place.locator(".live-status")).to_contain_text("text.png is not a picture")


def test_a_site_without_the_runtime_says_so(visit, live):
    seen = visit(TAUGHT[0])
    without = (live.FOLDER / "runtime.js").read_text(encoding="utf-8")
    seen.page.route("**/runtime.js", lambda route: route.fulfill(body=without, content_type="text/javascript"))
    seen.page.reload(wait_until="load")
    seen.place.wait_for()
    seen.place.locator(".live-student summary").click()
    assert "built without it" in seen.place.locator(".live-student").inner_text()


def test_a_page_may_unfold_the_student(visit, site):
    seen = visit(TAUGHT[0])
    assert seen.place.locator(".live-student").get_attribute("open") is None
    html = (site / TAUGHT[0]).read_text(encoding="utf-8")
    unfolded = html.replace('data-live="student"', 'data-live="student" data-open=""')
    seen.page.route("**/intro.html", lambda route: route.fulfill(body=unfolded, content_type="text/html"))
    seen.page.reload(wait_until="load")
    seen.place.wait_for()
    assert seen.place.locator(".live-student p").first.is_visible()


# --- the digit pad -------------------------------------------------------------------------------------------------


def draw(seen, strokes):
    """Draw lines of points, given on a pad of 280x280, with the mouse."""
    pad = seen.place.locator(".live-pad")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    for stroke in strokes:
        points = [(box["x"] + x * box["width"] / 280, box["y"] + y * box["height"] / 280) for x, y in stroke]
        seen.page.mouse.move(*points[0])
        seen.page.mouse.down()
        for point in points[1:]:
            seen.page.mouse.move(*point, steps=4)
        seen.page.mouse.up()


def seen_by_the_network(place):
    values = place.locator(".live-seen").evaluate(
        "c => [...c.getContext('2d').getImageData(0, 0, 28, 28).data].filter((_, i) => i % 4 == 0)"
    )
    return np.array(values).reshape(28, 28)


def test_a_digit_is_chosen_with_the_keyboard(visit, digits):
    place = visit(PAD).place
    inputs = place.locator(".live-pictures input")
    assert inputs.count() == len(digits["labels"])
    inputs.nth(3).focus()
    for k in range(4, len(digits["labels"])):
        inputs.nth(k - 1).press("ArrowRight")
        image = samples_of(digits)[k]
        assert (seen_by_the_network(place) == image).all()
        assert close(shown(place), perceptron(digits, image))
    place.get_by_label("Raise the bias of the 3").check()
    assert close(shown(place), perceptron(digits, image, digits["bias"]))
    assert f"{100 * digits['test'][1]['digit']:.1f} % of the 3s" in place.locator(".live-figures").inner_text()
    assert len({inputs.nth(k).get_attribute("aria-label") for k in range(inputs.count())}) == inputs.count()
    assert "3 never seen" in place.locator(".live-label").inner_text()
    expect(place.locator(".live-said[aria-live=polite]")).to_contain_text("The network says 9")


def test_a_digit_is_drawn(visit, digits):
    seen = visit(PAD)
    place = seen.place
    draw(seen, [[(20, 20), (60, 10), (80, 35), (45, 60), (85, 85), (70, 120), (20, 115)]])  # a small 3, in a corner
    pixels = seen_by_the_network(place)
    assert close(shown(place), perceptron(digits, pixels))
    mass, middle = pixels / pixels.sum(), np.arange(28) + 0.5
    assert abs(mass.sum(1) @ middle - 14) < 0.5
    assert abs(mass.sum(0) @ middle - 14) < 0.5
    rows = np.flatnonzero(pixels.max(1) > 64)
    assert 18 <= rows[-1] - rows[0] + 1 <= 21
    place.get_by_label("Raise the bias of the 3").check()
    assert close(shown(place), perceptron(digits, pixels, digits["bias"]))
    assert shown(place).argmax() == 3
    assert place.locator(".live-pictures input:checked").count() == 0
    place.get_by_role("button", name="Clear").click()
    assert place.locator("tbody td").all_inner_texts() == ["–"] * 10
    draw(seen, [[(140, 30), (140, 250)]])
    assert shown(place).argmax() == 1


@pytest.fixture
def fingers(visit):
    """The digit pad on a phone, and a function that moves one finger or several through lists of places on the page."""
    seen = visit(PAD, width=390)
    pad = seen.place.locator(".live-pad")
    pad.scroll_into_view_if_needed()
    session = seen.page.context.new_cdp_session(seen.page)

    def send(kind, *places):
        points = [{"x": x, "y": y, "id": finger} for finger, (x, y) in enumerate(places)]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    def move(*paths):
        for number, places in enumerate(zip(*paths, strict=True)):
            send("touchMove" if number else "touchStart", *places)
            seen.page.wait_for_timeout(20)  # as between two frames: the browser decides whether this scrolls
        send("touchEnd")
        seen.page.wait_for_timeout(100)

    box = pad.bounding_box()
    side = box["width"]
    seen.at = lambda x, y: (box["x"] + x * side, box["y"] + y * side)
    seen.move = move
    seen.scrolled = lambda: seen.page.evaluate("[scrollX, scrollY]")
    return seen


def line(start, end, steps=12):
    return [tuple(np.array(start) + (np.array(end) - start) * k / steps) for k in range(steps + 1)]


def test_a_finger_draws_and_does_not_scroll(fingers, digits):
    place, at, before = fingers.place, fingers.at, fingers.scrolled()
    place.get_by_role("button", name="Clear").tap()
    fingers.move(line(at(0.5, 0.9), at(0.5, 0.1)))
    assert fingers.scrolled() == before
    assert shown(place).argmax() == 1
    assert close(shown(place), perceptron(digits, seen_by_the_network(place)))
    outside = place.locator(".live-figures").bounding_box()
    x, y = outside["x"] + 20, outside["y"] + 10
    fingers.move(line((x, y), (x, y - 200)))
    assert fingers.scrolled() != before  # so it would have been seen


def test_a_second_finger_draws_nothing(fingers):
    place, at = fingers.place, fingers.at

    def width():  # of what was drawn: the browser may join movements, so pixels differ from time to time
        return int((seen_by_the_network(place) > 64).any(axis=0).sum())

    place.get_by_role("button", name="Clear").tap()
    fingers.move(line(at(0.2, 0.9), at(0.2, 0.1)))
    one = width()
    place.get_by_role("button", name="Clear").tap()
    fingers.move(line(at(0.2, 0.9), at(0.2, 0.1)), line(at(0.8, 0.9), at(0.8, 0.1)))
    assert 1 <= width() <= one + 2
