"""What Sphinx and the theme leave undone on the rendered pages: MathJax, weight, accessibility, the search's index.

``render.py`` calls it when the pages are written; by itself it does nothing.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path

from bs4 import BeautifulSoup, Tag

# What no page loads: source maps, icons as a script (they come from the font), fonts for old browsers, translations.
UNUSED = ("*.map", "scripts/fontawesome.js*", "vendor/**/*.ttf", "locales", "*webpack-macros.html")
FOR_SEARCH = re.compile(r"(searchtools|language_data|searchindex)\.js")
NOT_PROSE = ".headerlink, .highlight, .cell, .stamp, .caption-number, .ways, table, script"
SENTENCE = re.compile(r"(?<=[.?!])\s+(?=[A-Z“])")
MOST_DESCRIBED = 300  # characters of a page's description
HOME = "book/intro.html"
# On the address of the site itself there is no page, but the way to the first.
INDEX = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="0; url={home}">
{links}
</head>
<body><main><h1>{title}</h1><p><a href="{home}">Read the book</a></p></main></body>
</html>
"""


def polish(html: Path) -> None:
    """Finish the site in the folder `html`."""
    static = html / "_static"
    for pattern in UNUSED:
        for path in list(static.rglob(pattern) if "/" not in pattern else static.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in [*static.rglob("*.js"), *static.rglob("*.css")]:
        text = path.read_text(encoding="utf-8")
        if "sourceMappingURL" in text:
            path.write_text(re.sub(r"(?m)^/[/*]# sourceMappingURL=.*$", "", text), encoding="utf-8")
    copy_mathjax(static / "mathjax")
    sections = []
    for path in sorted([*html.glob("*.html"), *(html / "book").glob("*.html")]):
        if path.name == "index.html":
            continue
        soup = BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")
        finish_head(soup, is_search=path.name == "search.html")
        finish_body(soup)
        path.write_text(str(soup), encoding="utf-8")
        if path.parent != html:
            sections += search_sections(soup, path.relative_to(html).as_posix())
        if path.relative_to(html).as_posix() == HOME:
            write_index(html / "index.html", soup)
    (static / "sections.js").write_text(f"Search.sections = {json.dumps(sections, ensure_ascii=False)};\n", "utf-8")


def copy_mathjax(folder: Path) -> None:
    """MathJax, as far as pages load it: TeX as input, HTML with its fonts as output, and commands loaded when used."""
    package = Path(importlib.util.find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax"
    for name in ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions"):
        source, target = package / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("all-packages.js"), dirs_exist_ok=True)
        else:
            shutil.copy(source, target)


def write_index(path: Path, home: BeautifulSoup) -> None:
    """The page at the address of the site itself, which leads to the first page and has its description and card."""
    links = [copy.copy(tag) for tag in home.head.find_all(["meta", "link"]) if is_public(tag) or is_icon(tag)]
    for tag in links:  # the icon too: without one, browsers ask for /favicon.ico
        for name in ("href", "content"):
            if name in tag.attrs:
                tag[name] = tag[name].removeprefix("../")
    path.write_text(
        INDEX.format(title=home.title.string, home=HOME, links="\n".join(map(str, links))),
        encoding="utf-8",
    )


def is_public(tag: Tag) -> bool:
    """Whether an element of the head is for those who link to the page."""
    name = tag.get("property") or tag.get("name") or ""
    return name.startswith(("og:", "twitter:", "description")) or tag.get("rel") == ["canonical"]


def is_icon(tag: Tag) -> bool:
    """Whether an element of the head names the site's icon."""
    return "icon" in tag.get("rel", [])


def finish_head(soup: BeautifulSoup, *, is_search: bool) -> None:
    """Each script once and only where it is used, one viewport, and the book's name once in the title."""
    seen = set()
    for script in soup.find_all("script"):
        said = script.get("src") or script.string or ""
        unused = "fontawesome" in said or (FOR_SEARCH.search(said) and not is_search)
        if said in seen or unused:
            script.decompose()
        seen.add(said)
    for tag in soup.find_all("meta", attrs={"name": "viewport"})[1:]:
        tag.decompose()
    for tag in soup.find_all("meta", property=("og:url", "og:image")):  # relative ones, of a site without an address
        if not tag["content"].startswith("https:"):
            if tag["property"] == "og:url":
                tag.decompose()
            else:
                tag["content"] = soup.html["data-content_root"] + tag["content"]
    if text := description(soup):
        for tag in soup.find_all("meta", attrs={"content": True}):
            if "description" in (tag.get("name"), (tag.get("property") or "").removeprefix("og:")):
                tag["content"] = text
    parts = soup.title.get_text().split(" — ")
    soup.title.string = " — ".join(dict.fromkeys(part.strip() for part in parts))
    if is_search:
        for name in ("search.js", "sections.js"):
            soup.head.append(soup.new_tag("script", src=f"_static/{name}", defer=""))


def description(soup: BeautifulSoup) -> str:
    """What a page is about: as many of its first sentences as fit, without figures and what follows a subtitle."""
    text = ""
    for paragraph in soup.select("article section > p"):
        if paragraph.find("strong") and plain(paragraph.find("strong")) == plain(paragraph):
            break
        for sentence in SENTENCE.split(plain(paragraph)):
            if len(text) + len(sentence) > MOST_DESCRIBED:
                return text.strip() or sentence
            text += f"{sentence} "
    return text.strip()


def finish_body(soup: BeautifulSoup) -> None:
    """Names, roles and stops of the Tab key, as assistive technology needs them."""
    # A name that differs from what is written keeps those who speak commands from it.
    for tag in soup.select("summary[aria-label], button.search-button-field[aria-label]"):
        del tag["aria-label"]
    for tag in soup.select(".search-button__kbd-shortcut, .theme-switch"):
        tag["aria-hidden"] = "true"
    for tag in soup.select(".citation-list, .citation"):
        del tag["role"]
    for tag in soup.select("th"):
        if not tag.get_text(strip=True):
            tag.name = "td"
    if sidebar := soup.find(id="pst-primary-sidebar"):
        sidebar["role"], sidebar["aria-label"] = "complementary", "The book"
    if article := soup.article:
        article["id"], article["tabindex"] = "page", "-1"
        if link := soup.select_one("#pst-skip-link a"):
            link["href"] = "#page"
    for number, tag in enumerate(soup.select(".bd-article table"), 1):
        box = tag.parent
        if "pst-scrollable-table-container" not in box.get("class", []):
            box = tag.wrap(soup.new_tag("div", attrs={"class": "pst-scrollable-table-container"}))
        box["role"], box["aria-label"] = "region", f"Table {number}"
    for image in soup.select(".bd-article img"):
        if image.find_parent("a") is None:
            classes = "reference internal image-reference"
            image.wrap(soup.new_tag("a", attrs={"class": classes, "href": image["src"]}))
        image.parent["title"] = "Enlarge"


def search_sections(soup: BeautifulSoup, page: str) -> list[list[str]]:
    """Each section of a page: address, title, the page's title, and its prose without code, outputs and subsections."""
    found, article = [], BeautifulSoup(str(soup.article), "html.parser")
    for tag in article.select("div.math"):
        tag.replace_with("…")
    for tag in article.select(NOT_PROSE):
        tag.decompose()
    for section in reversed(article.find_all("section")):  # a section's own subsections are taken out before it
        heading = section.find(re.compile("h[1-6]"))
        if heading is None:
            continue
        title = plain(heading)
        heading.decompose()
        found.append([f"{page}#{section['id']}", title, plain(section)])
        section.decompose()
    found.reverse()
    return [[address, title, found[0][1], text] for address, title, text in found]


def plain(tag: Tag) -> str:
    """The text of an element, with formulas as far as they read without TeX."""
    text = re.sub(r"(?s)\\\((.*?)\\\)", lambda match: formula(match[1]), tag.get_text(" "))
    return re.sub(r" ([.,;:)!?])", r"\1", " ".join(text.split()))


def formula(tex: str) -> str:
    """A formula between dollars as text: T^2 as T², and … for what is no text."""
    text = tex.replace("^2", "²").replace("\\alpha", "alpha").replace("\\beta", "beta").replace("\\cdot", "·")
    return "…" if re.search(r"[\\{}^_]", text) else text.strip("$")
