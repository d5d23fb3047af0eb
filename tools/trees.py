"""What of code is neither a comment nor formatting: hashes of syntax trees, and the modules of kdlib that code uses."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from pathlib import Path

from kdlib.records import artefacts

PACKAGE = Path(__file__).resolve().parent.parent / "kdlib"
EXEMPT = re.compile(r"kdlib\.(plots|gpu(\..+)?)")  # modules whose changes make no page stale; see stale.py
FOR_IPYTHON = re.compile(r"(?m)^\s*([%!?].*)$")  # lines of a cell that are not Python


@functools.cache
def tree_digest(code: str, *, is_cell: bool = False) -> str:
    """Hash of a syntax tree without comments and docstrings, the same in every Python; of the text if it has no tree.

    A cell has no docstring: a string at its beginning may be its output.
    """
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return artefacts.digest(code)
    documented = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, *(() if is_cell else (ast.Module,)))

    def plain(node: object) -> object:
        if isinstance(node, list):
            return [plain(item) for item in node]
        if not isinstance(node, ast.AST):
            return repr(node)
        parts = dict(ast.iter_fields(node))
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            parts["body"] = node.body[1:]
        if isinstance(node, ast.JoinedStr):  # Python 3.12 puts empty strings into some f-strings
            parts["values"] = [part for part in node.values if getattr(part, "value", None) != ""]
        # versions of Python differ in which empty fields a node has; `kind` only tells u"" from ""
        named = [[name, plain(part)] for name, part in parts.items() if part not in (None, []) and name != "kind"]
        return [type(node).__name__, *named]

    return artefacts.digest(plain(tree))


def cells_digest(cells: list[str]) -> str:
    """Hash of what code cells do. A last semicolon is not formatting: it keeps a value from being shown."""
    trees = [tree_digest(FOR_IPYTHON.sub("", cell), is_cell=True) for cell in cells]
    return artefacts.digest([trees, [[FOR_IPYTHON.findall(cell), cell.rstrip().endswith(";")] for cell in cells]])


def gpu_digest() -> str:
    """Hash of the syntax trees in kdlib/gpu."""
    paths = sorted((PACKAGE / "gpu").rglob("*.py"))
    return artefacts.digest([[path.name, tree_digest(path.read_text(encoding="utf-8"))] for path in paths])


def module_digest(module: str) -> str | None:
    """Hash of the syntax tree of a module of kdlib; None if it is gone."""
    path = _file(module)
    return tree_digest(path.read_text(encoding="utf-8")) if path.exists() else None


def used_modules(cells: list[str]) -> dict[str, str | None]:
    """The modules of kdlib that define what these cells use, and those that they use in turn, with their hashes.

    What the exempt modules use is among them; they themselves are not.
    """
    waiting = _references("\n".join(code for code in (FOR_IPYTHON.sub("", cell) for cell in cells) if _parses(code)))
    modules: set[str] = set()
    while waiting:
        module = _defining_module(waiting.pop())
        if module and module not in modules:
            modules.add(module)
            waiting |= _references(_file(module).read_text(encoding="utf-8"), module)
    return {module: module_digest(module) for module in sorted(modules) if not EXEMPT.fullmatch(module)}


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:
        return False
    return True


def _references(code: str, module: str = "") -> set[str]:
    """The full names of what code uses of kdlib, such as ``kdlib.train.Recipe``; `module` is where the code stands."""
    names = {"kdlib": "kdlib", **_imports(code, module)}  # the set-up cell has imported kdlib
    full_names = set(names.values())
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and re.fullmatch(r"[\w.]+", text := ast.unparse(node)):
            name, _, rest = text.partition(".")
            full_names |= {f"{names[name]}.{rest}"} if name in names else set()
    return full_names


def _imports(code: str, module: str) -> dict[str, str]:
    """What code imports of kdlib: the name it has there, and the full name."""
    package = module if _is_package(module) else module.rpartition(".")[0]
    names = {}
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom):
            source = importlib.util.resolve_name("." * node.level + (node.module or ""), package or None)
            names |= {alias.asname or alias.name: f"{source}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.asname or alias.name: alias.name for alias in node.names}
    return {name: full for name, full in names.items() if full.partition(".")[0] == "kdlib"}


def _defining_module(name: str) -> str | None:
    """The module that defines something of kdlib, whatever imports it on the way; None for a package as a whole."""
    module = name
    while not _file(module).exists():
        module = module.rpartition(".")[0]
    first, _, rest = name[len(module) + 1 :].partition(".")
    if not _is_package(module):
        return module
    if not first:
        return None
    imports = _imports(_file(module).read_text(encoding="utf-8"), module)
    return _defining_module(f"{imports[first]}.{rest}".rstrip(".")) if first in imports else module


def _file(module: str) -> Path:
    """Where a module of kdlib is, or would be."""
    path = PACKAGE.parent.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _is_package(module: str) -> bool:
    return bool(module) and _file(module).name == "__init__.py"
