"""Looks at the rendered site as readers do, in a headless Chromium: light and dark, on a wide and on a narrow screen.

    python tools/audit.py            # the site that `make site` rendered; screenshots and axe's findings in runs/audit

It serves the site on this machine, and everything else is unreachable. ``tests/test_site.py`` calls the same functions.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gzip
import json
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).resolve().parent.parent
HOME = "book/intro.html"
WIDTHS = {1280: 900, 390: 844}  # of a screen, with its height
MOST_MB, MOST_FIRST_PAGE_MB = 16, 1.0
ON_DEMAND = ("_static/live",)  # what loads only when asked for does not count
WORRYING = ("error", "warning")  # kinds of what a page may write to the console
SHOWN = ("intro", "03_", "05_", "06_", "what_we_found", "search")  # pages of which pictures are taken
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]

AXE = (resources.files("axe_playwright_python") / "axe.min.js").read_text(encoding="utf-8")
RUN_AXE = """exclude => axe.run({include: [['html']], exclude}, {resultTypes: ['violations'], preload: false,
    runOnly: {type: 'tag', values: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'wcag22aa', 'best-practice']}})
  .then(({violations}) => violations.map(v => ({id: v.id, impact: v.impact, help: v.help,
    nodes: v.nodes.map(n => n.html.slice(0, 200))})))"""
# Elements that stick out at the right, unless something around them scrolls.
STICK_OUT = """() => {
  const width = document.documentElement.clientWidth;
  const contained = e => { for (let n = e.parentElement; n && n !== document.body; n = n.parentElement) {
    if (getComputedStyle(n).overflowX !== 'visible') return true; } return false; };
  return [...document.querySelectorAll('article *')].filter(e => { const r = e.getBoundingClientRect();
    return r.width && r.right > width + 1 && !contained(e); }).slice(0, 3).map(e => e.outerHTML.slice(0, 120)); }"""
# What cannot be scrolled with the keyboard although it scrolls, or is reached with it although nobody wants to.
STOPS = """() => {
  const wide = e => e.scrollWidth > e.clientWidth + 1 && e.getClientRects().length;
  const all = selector => [...document.querySelectorAll(selector)];
  const scrolls = e => /auto|scroll/.test(getComputedStyle(e).overflowX);
  return [...all('article *').filter(e => scrolls(e) && wide(e) && e.tabIndex < 0),
    ...all('button.copybtn, mjx-container').filter(e => e.tabIndex >= 0 && !wide(e))].slice(0, 3)
    .map(e => e.outerHTML.slice(0, 120)); }"""
LINKS = """() => ({ids: [...document.querySelectorAll('[id]')].map(e => e.id),
  links: [...document.querySelectorAll('a[href]')].map(e => e.getAttribute('href'))})"""


def chromium() -> str | None:
    """The system's Chromium; None if there is none."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Quiet(SimpleHTTPRequestHandler):
    """A server that writes no line per request."""

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def served(html: Path) -> Iterator[str]:
    """The address under which the site in a folder can be reached, from this machine alone."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        server.server_close()


@contextlib.contextmanager
def started() -> Iterator[Browser]:
    """A headless Chromium that reaches nothing but this machine."""
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium(), args=[*FLAGS, nowhere])
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def opened(browser: Browser, base: str, *, width: int = 1280, dark: bool = False) -> Iterator[tuple[Page, list[str]]]:
    """A page of that width, a narrow one on a touch screen, and a list that grows by what goes wrong in it."""
    mode, screen = "dark" if dark else "light", {"width": width, "height": WIDTHS[width]}
    context = browser.new_context(viewport=screen, has_touch=width < 500, color_scheme=mode)
    context.add_init_script(f"localStorage.mode ||= '{mode}'; localStorage.theme ||= '{mode}'")
    page, problems = context.new_page(), []
    page.on("request", lambda request: leaves(request.url, base) and problems.append(f"asks for {request.url}"))
    page.on("response", lambda r: r.status >= 400 and problems.append(f"{r.url} answers {r.status}"))
    page.on("console", lambda said: said.type in WORRYING and problems.append(f"console: {said.text} {said.location}"))
    page.on("pageerror", lambda error: problems.append(f"error: {error}"))
    try:
        yield page, problems
    finally:
        context.close()


def leaves(url: str, base: str) -> bool:
    """Whether a request is for another host."""
    return not url.startswith((base, "data:", "blob:", "about:"))


def go(page: Page, address: str) -> None:
    """Open an address, and wait until its formulas stand."""
    page.goto(address, wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise?.then(() => 0)")


def pages(html: Path) -> list[str]:
    """The addresses of all pages, without the one that only leads to the first."""
    paths = [*html.glob("*.html"), *(html / "book").glob("*.html")]
    return sorted(path.relative_to(html).as_posix() for path in paths if path.name != "index.html")


def look(page: Page, problems: list[str], address: str, *, code: bool = True) -> list[dict]:
    """Open a page, add what is wrong with it to `problems`, and return all that axe finds.

    Args:
        code: axe looks at coloured code as well, whose thousands of words take most of its time.
    """
    go(page, address)
    page.wait_for_timeout(50)
    page.evaluate(AXE)
    found = page.evaluate(RUN_AXE, [] if code else [[".highlight"]])
    for one in found:
        if one["impact"] in ("serious", "critical"):
            problems.append(f"axe, {one['impact']}: {one['help']}, {len(one['nodes'])}×, such as {one['nodes'][0]}")
    problems += [f"sticks out: {text}" for text in page.evaluate(STICK_OUT)]
    problems += [f"wrong for the Tab key: {text}" for text in page.evaluate(STOPS)]
    if page.locator(".math").count() != page.locator(".math mjx-container").count():
        problems.append("a formula does not stand")
    return found


def broken_links(seen: dict[str, dict]) -> list[str]:
    """Links that lead to no page of the site, or to no place on it; `seen` holds what LINKS returned for each page."""
    broken = []
    for address, known in seen.items():
        for link in known["links"]:
            target, anchor = urldefrag(urljoin(f"site:///{address}".replace("site:", "http:"), link))
            path = unquote(target.removeprefix("http:///"))
            if anchor and path in seen and unquote(anchor) not in seen[path]["ids"]:
                broken.append(f"{address}: {link}")
    return broken


def weight(html: Path) -> float:
    """The site's size in MB, without what loads only when asked for."""
    files = [path for path in html.rglob("*") if path.is_file()]
    counted = [p for p in files if not p.relative_to(html).as_posix().startswith(ON_DEMAND)]
    return sum(path.stat().st_size for path in counted) / 1e6


def first_page_weight(browser: Browser, base: str, html: Path) -> float:
    """What opening the first page costs in MB, compressed as a server compresses it."""
    loaded = set()
    with opened(browser, base) as (page, _):
        page.on("response", lambda response: loaded.add(unquote(response.url.partition("?")[0].removeprefix(base))))
        go(page, base + HOME)
        page.wait_for_timeout(300)
    return sum(len(gzip.compress((html / name).read_bytes())) for name in loaded if (html / name).is_file()) / 1e6


def audit(html: Path, out: Path) -> int:
    """Look at every page in every mode and width; the number of problems."""
    out.mkdir(parents=True, exist_ok=True)
    count, everything, seen = 0, {}, {}
    with served(html) as base, started() as browser:
        for dark in (False, True):
            for width in WIDTHS:
                view = f"{'dark' if dark else 'light'}-{width}"
                for address in pages(html):
                    with opened(browser, base, dark=dark, width=width) as (page, problems):
                        everything[f"{view} {address}"] = look(page, problems, base + address)
                        seen[address] = page.evaluate(LINKS)
                        name = Path(address).stem
                        if name.startswith(SHOWN):
                            page.screenshot(path=out / f"{name}-{view}.png")
                            page.screenshot(path=out / f"{name}-{view}-whole.png", full_page=True)
                    for problem in problems:
                        print(f"{view} {address}: {problem}", flush=True)
                    count += len(problems)
        first = first_page_weight(browser, base, html)
    (out / "axe.json").write_text(json.dumps(everything, indent=1), encoding="utf-8")
    for problem in (broken := broken_links(seen)):
        print(f"link that leads nowhere: {problem}")
    print(f"site: {weight(html):.1f} MB of at most {MOST_MB}; first page, compressed: {first:.2f} MB of at most 1")
    return count + len(broken) + (weight(html) > MOST_MB) + (first > MOST_FIRST_PAGE_MB)


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--html", type=Path, default=ROOT / "runs" / "site" / "_build" / "html")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "audit", help="folder for pictures and findings")
    options = parser.parse_args()
    if chromium() is None:
        print("error: no Chromium found; on Debian: apt-get install chromium", file=sys.stderr)
        return 2
    if not (options.html / "index.html").exists():
        print(f"error: no site in {options.html}: run make site first", file=sys.stderr)
        return 2
    count = audit(options.html, options.out)
    print(f"{count} problems; pictures and all that axe found: {options.out}")
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
