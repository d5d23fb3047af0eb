"""The rendered site in a headless Chromium: what `make audit` looks at, shorter, and what readers do with a page."""

import re

import pytest

pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")


def test_every_page_is_sound(audit, site, base, browser):
    seen, wrong = {}, {}
    for address in audit.pages(site):
        with audit.opened(browser, base) as (page, problems):
            audit.look(page, problems, base + address, code=False)
            seen[address] = page.evaluate(audit.LINKS)
        if problems:
            wrong[address] = problems
    assert wrong == {}
    assert audit.broken_links(seen) == []


def test_the_audit_sees_what_is_wrong(audit, tmp_path, browser):
    (tmp_path / "page.html").write_text(
        '<!DOCTYPE html><html lang="en"><title>A page</title><script src="https://elsewhere.example/x.js"></script>'
        '<main><article><h1>A page</h1><p style="color: #ccc; background: #fff">pale</p>'
        '<p style="width: 2000px">wide</p>'
        '<pre style="overflow: auto" tabindex="-1">' + "long " * 99 + "</pre></article></main></html>",
        encoding="utf-8",
    )
    with audit.served(tmp_path) as base, audit.opened(browser, base) as (page, problems):
        audit.look(page, problems, f"{base}page.html")
    for said in ("asks for https://elsewhere.example", "axe, serious", "sticks out: <p", "wrong for the Tab key: <pre"):
        assert any(problem.startswith(said) for problem in problems), f"{said}: {problems}"
    assert audit.broken_links({"a.html": {"ids": ["x"], "links": ["#x", "a.html#y"]}}) == ["a.html: a.html#y"]


@pytest.mark.parametrize(("name", "dark"), [("intro", False), ("06_evaluate", True), ("what_we_found", False)])
def test_a_page_is_sound_on_a_narrow_screen(audit, base, browser, name, dark):
    with audit.opened(browser, base, width=390, dark=dark) as (page, problems):
        audit.look(page, problems, f"{base}book/{name}.html")
    assert problems == []


def test_nothing_is_heavier_than_it_may_be(audit, site, base, browser):
    assert audit.weight(site) < audit.MOST_MB
    assert audit.first_page_weight(browser, base, site) < audit.MOST_FIRST_PAGE_MB
    assert not list(site.rglob("*.map"))


def test_the_first_page_says_what_the_site_is(audit, site, base, browser):
    with audit.opened(browser, base) as (page, problems):
        page.goto(base)  # leads there
        page.wait_for_url("**/book/intro.html")
        for name in ("description", "twitter:card"):
            assert page.locator(f'meta[name="{name}"]').get_attribute("content")
        card = page.locator('meta[property="og:image"]').get_attribute("content")
        assert (site / "book" / card).resolve().is_file()
        for text, end in (("Read", "00_distil_in_ten_minutes.html"), ("Run", "#run-it"), ("Touch", "#touch-it")):
            button = page.locator(".ways a", has_text=text)
            assert button.get_attribute("href").endswith(end)
            assert button.bounding_box()["y"] < 900
        picture = page.locator("article img").first.bounding_box()
        assert picture["y"] + picture["height"] < 900
        icon = page.locator(".theme-switch-button .fa-solid").first
        assert "Awesome" in icon.evaluate("e => getComputedStyle(e, '::before').fontFamily")
        assert page.evaluate(
            "() => document.fonts.ready.then(() => document.fonts.check('900 16px \"Font Awesome 7 Free\"'))"
        )
    assert problems == []
    leading = (site / "index.html").read_text(encoding="utf-8")
    for name in re.findall(r'"([^"]*/_static/[^"]*|_static/[^"]*)"', leading):  # an icon and a card
        assert (site / name).resolve().is_relative_to(site.resolve())
        assert (site / name).is_file()
    assert 'rel="icon"' in leading
    assert "MIT licence" in (site / "book" / "intro.html").read_text(encoding="utf-8")
    assert (site / ".nojekyll").exists()
    assert (site / "404.html").exists()


@pytest.mark.parametrize(
    ("words", "first"),
    [("temperature", "09_temperature"), ("dark knowledge", "08_dark"), ("soft label", "03_soft"), ("Zebrafish", "")],
)
def test_the_search_finds_sections(audit, base, browser, words, first):
    with audit.opened(browser, base) as (page, problems):
        page.goto(f"{base}book/intro.html")
        page.keyboard.press("Control+k")
        page.keyboard.type(words)
        page.keyboard.press("Enter")
        page.wait_for_url("**/search.html?q=*")
        page.wait_for_function("document.querySelector('.search-summary')?.textContent")
        found = page.locator("#search-results li")
        if not first:
            assert found.count() == 0
            return
        assert f"book/{first}" in found.first.locator("a").get_attribute("href")
        assert all("#" in link.get_attribute("href") for link in found.locator("a").all())
        quoted = " ".join(found.locator("p").all_text_contents())
        assert words.split()[0].lower() in quoted.lower()
        assert "import " not in quoted
        assert not re.search(r"\\[a-z(]", quoted)  # no TeX
        found.first.locator("a").click()
        page.wait_for_url(f"**/book/{first}*")
    assert problems == []


def test_the_theme_can_be_switched(audit, base, browser):
    with audit.opened(browser, base) as (page, problems):
        audit.go(page, f"{base}book/intro.html")
        seen = set()
        for _ in range(3):
            page.locator(".theme-switch-button").click()
            seen.add(page.evaluate("document.documentElement.dataset.mode"))
        assert seen == {"light", "dark", "auto"}
    assert problems == []


# What a page lacks on paper. Formulas for screen readers are as wide as they like; nobody sees them.
LOST_ON_PAPER = """() => {
  const lost = [], style = e => getComputedStyle(e), all = selector => [...document.querySelectorAll(selector)];
  const say = (what, e) => lost.push(`${what}: ${e.outerHTML.slice(0, 150)}`);
  const right = document.querySelector('article').getBoundingClientRect().right;
  for (const e of all('article *:not(mjx-assistive-mml, mjx-assistive-mml *)')) {
    const box = e.getBoundingClientRect();
    if (e.scrollWidth > e.clientWidth + 1 && style(e).overflowX !== 'visible') say('scrolls', e);
    if (box.width && box.right > right + 1 && !e.closest('mjx-container')) say('sticks out', e);
  }
  for (const e of all('article details > *, article details pre, .math mjx-container'))
    if (style(e).opacity < 1 || !e.checkVisibility() || !e.getBoundingClientRect().height) say('is not seen', e);
  for (const pre of all('article pre')) { // a box that a page's end may cut is empty if what it holds may not be cut
    const box = pre.closest('details, .cell_input');
    if (!box || style(box).breakInside !== 'auto') continue;
    for (let e = pre; e !== box; e = e.parentElement)
      if (style(e).breakInside !== 'auto' || style(e).overflowY !== 'visible') say('may be pushed out of its box', e);
  }
  for (const e of all('article .verdict, article .live-table td'))
    if (style(e).printColorAdjust !== 'exact') say('loses its colour', e);
  for (const e of all('article button, article input[type=range]'))
    if (e.getClientRects().length) say('is there to be touched', e);
  return [...new Set(lost)]; }"""


@pytest.mark.parametrize("name", ["06_evaluate", "07_paper_mnist"])
def test_nothing_is_lost_on_paper(audit, base, browser, name):
    with audit.opened(browser, base, dark=True) as (page, problems):
        audit.go(page, f"{base}book/{name}.html")
        page.wait_for_function("[...document.querySelectorAll('div.live')].every(e => e.matches('.live-ready'))")
        closed, theme = page.locator("article details:not([open])"), "document.documentElement.dataset.theme"
        before = closed.count()
        assert before > 10
        page.set_viewport_size({"width": 680, "height": 1000})  # A4 without its margins
        page.emulate_media(media="print", color_scheme="dark")
        page.wait_for_function("!document.querySelector('article details:not([open])')")
        assert page.evaluate(LOST_ON_PAPER) == []
        assert page.locator(".math mjx-container").count() > 5
        assert page.evaluate(theme) == "light"
        page.emulate_media(media="screen", color_scheme="dark")
        page.wait_for_function(f"document.querySelectorAll('article details:not([open])').length == {before}")
        assert page.evaluate(theme) == "dark"
    assert problems == []


def test_a_figure_can_be_enlarged_with_the_keyboard(audit, base, browser):
    with audit.opened(browser, base, width=390) as (page, problems):
        audit.go(page, f"{base}book/05_distill_student.html")
        figure = page.locator("article figure a.image-reference").last
        figure.focus()
        page.keyboard.press("Enter")
        shown = page.locator("dialog.enlarged img")
        assert shown.bounding_box()["width"] > 1.5 * figure.bounding_box()["width"]
        page.keyboard.press("Escape")
        assert page.locator("dialog.enlarged").count() == 0
        assert figure.evaluate("e => e === document.activeElement")
    assert problems == []


def test_a_finger_opens_the_contents_and_a_figure(audit, base, browser):
    with audit.opened(browser, base, width=390) as (page, problems):
        audit.go(page, f"{base}book/03_soft_labels.html")
        figure = page.locator("article figure a.image-reference").first
        figure.tap()
        page.locator("dialog.enlarged button").tap()
        assert page.locator("dialog.enlarged").count() == 0
        page.locator("button.primary-toggle").tap()
        page.locator("dialog a", has_text="04 · The distillation loss").tap()
        page.wait_for_url("**/04_distillation_loss.html")
    assert problems == []


def test_the_skip_link_leads_to_the_page_and_code_can_be_copied(audit, base, browser):
    with audit.opened(browser, base) as (page, problems):
        audit.go(page, f"{base}book/03_soft_labels.html")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.keyboard.press("Tab")
        assert page.evaluate("!!document.activeElement.closest('article')")
        button = page.locator("article .cell:not(.tag_hide-input) button.copybtn").first
        button.scroll_into_view_if_needed()
        button.click(force=True)
        page.wait_for_function("document.querySelector('button.copybtn.success')")
    assert problems == []
