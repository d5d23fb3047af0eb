"""How the book becomes pages: its settings, what a page says of the run that it shows, and Jupyter Book's command.

``tools/book.py`` calls it; by itself it does nothing.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import live
import nbformat
import yaml
from nbformat import NotebookNode
from nbformat.v4 import new_markdown_cell
from notebooks import BOOK, PENDING, ROOT, STAMP, Failed
from polish import polish

SETTLED = ("current", "tidied")  # states in which a page still holds
NOWHERE = "https://github.example/"  # how an address begins that is none


def render(folder: Path, notebooks: dict[str, NotebookNode], *, strict: bool) -> Path:
    """Render a staged copy of the book with those notebooks, by file name, to HTML in `folder`.

    Args:
        strict: a warning is an error.

    Returns:
        The first page.

    Raises:
        Failed: Jupyter Book failed, or warned where that is an error.
    """
    for name in ("source", "_build"):
        shutil.rmtree(folder / name, ignore_errors=True)
    source = folder / "source"
    shutil.copytree(BOOK, source / "book", ignore=shutil.ignore_patterns(".*", "outputs"))
    shutil.copy(ROOT / "_toc.yml", source)
    (source / "_config.yml").write_text(yaml.safe_dump(site_settings(), allow_unicode=True), encoding="utf-8")
    for name, notebook in notebooks.items():
        nbformat.write(notebook, source / "book" / name)
    print("rendering …", flush=True)
    command = [sys.executable, "-c", "from jupyter_book.cli.main import main; main()", "build", str(source)]
    command += ["--path-output", str(folder), "-q", *(["-W", "-n", "--keep-going"] if strict else [])]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=folder)
    said = re.sub(r"\x1b\[[\d;]*m", "", outcome.stderr or outcome.stdout).strip()  # Sphinx writes colours
    if outcome.returncode:
        raise Failed(f"rendering {source} failed:\n{said}")
    if outcome.stderr:
        print(said)
    polish(folder / "_build" / "html")
    live.install(folder / "_build" / "html")
    return folder / "_build" / "html" / "index.html"


def page(notebook: NotebookNode, number: str, note: str) -> NotebookNode:
    """The notebook with its number in the title, `note` under it, and a note under each cell that lacks its output."""
    title, _, rest = notebook.cells[0].source.partition("\n")
    notebook.cells[0].source = f"# {number} · {title.lstrip('# ')}\n\n{note}\n\n{rest}"
    cells = []
    for cell in notebook.cells:
        cells.append(cell)
        if cell.metadata.get(PENDING):
            text = (
                f"*The output of this cell comes with the next run at profile {notebook.metadata[STAMP]['profile']}.*"
            )
            cells.append(new_markdown_cell(text))
    notebook.cells = cells
    return notebook


def stamp_note(number: str, stamp: dict | None, state=None) -> str:
    """What stands under a page's title: how, where and when its outputs were computed, and whether they still hold.

    Args:
        stamp: the notebook's; None if it was never executed.
        state: of :mod:`stale`; None if the notebook has just been executed.
    """
    if stamp is None:
        return "```{warning}\n:class: stamp\nThis page has not been executed yet: it has no outputs.\n```"
    text, kind = describe(stamp), "note"
    if "tidied" in stamp:
        text += f". Outputs of commit {stamp['tidied']['commit']}; the code has been rewritten since"
        text += f" ({stamp['tidied']['proof']})"
    elif state is not None and state.kind == "tidied":
        text += f". Run at commit {state.commit}; the" if state.commit else ". The"
        text += " code has been tidied since and computes the same"
    if state is not None and state.kind not in SETTLED:
        kind, profile = "warning", stamp["profile"]
        text += f". **It may not hold any more** ({state}): `make publish PROFILE={profile} CHAPTERS={number}` "
        text += "executes it again"
    return f"```{{{kind}}}\n:class: stamp\n{text}.\n```"


def describe(stamp: dict) -> str:
    """A stamp in words."""
    parameters = "".join(f", {name}={value}" for name, value in stamp.get("parameters", {}).items())
    torch, date = stamp["versions"]["torch"].partition("+")[0], stamp["date"]
    text = f"Run at profile {stamp['profile']}{parameters} on {stamp['device']} · torch {torch} · {date}"
    if composed := stamp.get("composed"):  # its seconds are not those of the run
        commit = f"commit {stamp['commit']}" if stamp.get("commit") else "commit not recorded"
        return f"{text} ({commit}) · composed from its records on {composed['device']}, {composed['date']}"
    return f"{text} · {stamp['seconds']:.0f} s"


# --- the repository's address --------------------------------------------------------------------------------------


def site_settings() -> dict:
    """``_config.yml``, with what needs an address if the repository is one on github.com: elsewhere it leads nowhere.

    These are the buttons to the repository and to Colab, and, on the pages' address at GitHub, canonical links, social
    cards and the sitemap.
    """
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    if found := re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(\.git)?/?", config["repository"]["url"]):
        owner, name = found[1].lower(), found[2]
        site, sphinx = f"https://{owner}.github.io/{name}/", config["sphinx"]["config"]
        config["html"] |= {"use_repository_button": True, "use_issues_button": True, "baseurl": site}
        config["launch_buttons"] = {"colab_url": "https://colab.research.google.com"}
        sphinx["extensions"].append("sphinx_sitemap")
        sphinx |= {"sitemap_url_scheme": "{link}", "sitemap_excludes": ["search.html", "404.html"]}
        sphinx |= {"ogp_site_url": site, "notfound_urls_prefix": f"/{name}/"}
    else:
        del config["repository"]
    return config


def project_address() -> str:
    """The repository's address: it is set in pyproject.toml, and copied from there to wherever else it stands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return project["project"]["urls"]["repository"]


def set_up_cell(source: str) -> str:
    """A notebook's first cell, which installs kdlib where it is missing, such as in Colab.

    Args:
        source: what pip installs: ``git+https://…`` or a wheel. Of an address that leads nowhere it says what to do.
    """
    if source.removeprefix("git+").startswith(NOWHERE):
        missing = """    raise ImportError(
        "kdlib is not installed, and the book has no public address yet. In its "
        "folder, `pip install .` installs it; or `%pip install` a wheel of it here."
    ) from None"""
        return f"# Does nothing where kdlib is there.\ntry:\n    import kdlib\nexcept ModuleNotFoundError:\n{missing}"
    return f"""# Does nothing where kdlib is installed; in Colab it installs it.
try:
    import kdlib
except ModuleNotFoundError:
    %pip install --quiet {source}
    import kdlib"""


def copy_address() -> None:
    """Copy the repository's address from pyproject.toml to the other files and the notebooks' set-up cells."""
    url, config = project_address(), ROOT / "_config.yml"
    for path in sorted(BOOK.glob("*.ipynb")):
        notebook = nbformat.read(path, 4)
        for cell in notebook.cells:
            if "setup" in cell.metadata.get("tags", []):
                cell.source = set_up_cell(f"git+{url}")
        replace_text(path, nbformat.writes(notebook) + "\n")
    old = yaml.safe_load(config.read_text(encoding="utf-8"))["repository"]["url"]
    for path in (config, ROOT / "README.md", ROOT / "CITATION.cff"):
        if path.exists():
            replace_text(path, path.read_text(encoding="utf-8").replace(old, url))


def replace_text(path: Path, text: str) -> None:
    """Write `text` to a file if it differs from what is there."""
    if path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
        print(f"changed {path.name}")


def replace_marked(path: Path, name: str, text: str) -> None:
    """Replace what stands between ``<!-- name: begin -->`` and ``<!-- name: end -->``; without these, nothing."""
    if path.exists():
        parts = re.split(rf"(<!-- {name}: (?:begin|end) -->\n?)", path.read_text(encoding="utf-8"))
        if len(parts) == 5:
            replace_text(path, "".join([*parts[:2], text, *parts[3:]]))
