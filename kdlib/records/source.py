"""Where code comes from: the name that a library has for it, or the syntax tree of its source."""

from __future__ import annotations
import __future__

import ast
import copy
import dis
import functools
import importlib.metadata
import linecache
import re
import sys
import sysconfig
import types
from collections.abc import Iterator
from pathlib import Path

BIND = "write it as a function (def) that gets such values as keywords, and bind them with functools.partial"
_STANDARD = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))


class IdentityError(TypeError):
    """Something cannot be known by its content; the message says what, and how to mend it."""


def release_of(module: str | None) -> str | None:
    """A library's name and release ("torch 2.14"), of whose module that is the name; None for kdlib and one's own."""
    root = (module or "").partition(".")[0]
    if root in ("kdlib", "__main__"):
        return None
    loaded = [sys.modules.get(name) for name in (module, root)]
    return _release_in(root, next((file for m in loaded if (file := getattr(m, "__file__", None))), None))


@functools.cache
def _release_in(root: str, file: str | None) -> str | None:
    path = Path(file).resolve() if file else None
    if path and not {"site-packages", "dist-packages"} & set(path.parts):
        return root if any(path.is_relative_to(folder) for folder in _STANDARD) else None
    if path is None:
        return root if root in sys.stdlib_module_names else None
    try:
        version = importlib.metadata.version(root)
    except importlib.metadata.PackageNotFoundError:
        version = str(getattr(sys.modules[root], "__version__", "of unknown version"))
    return f"{root} {'.'.join(version.split('.')[:2])}"


def library_name(thing: object) -> str | None:
    """``torch.relu (torch 2.14)`` for what a library has under that name; None for anything else."""
    home = getattr(thing, "__objclass__", thing)
    for module in (getattr(home, "__module__", None), type(thing).__module__):
        for name in (getattr(thing, "__qualname__", None), getattr(thing, "__name__", None)):
            if module and name and (release := release_of(module)):
                found = functools.reduce(lambda o, n: getattr(o, n, None), name.split("."), sys.modules.get(module))
                if found is thing:
                    return f"{module}.{name} ({release})"
    return None


def is_own(value: object) -> bool:
    """Whether it is a function of one's own with a source: not one that dataclasses or NamedTuple generate."""
    code = getattr(getattr(value, "__func__", value), "__code__", None)
    if code is None or re.match("<(?!ipython)", code.co_filename):
        return False
    return not release_of(made_in(value))


def made_in(function: object) -> str | None:
    """The module in which it was written, whatever functools.wraps has it say."""
    return getattr(getattr(function, "__func__", function), "__globals__", {}).get("__name__")


def syntax_tree(function: types.FunctionType, name: str, wrappers: int) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The syntax tree of a function without its name, annotations and docstrings; it is not to be changed.

    Args:
        wrappers: how many decorators are known to wrap it; if there are none, the tree has no decorators.
    """
    code = function.__code__
    linecache.checkcache(code.co_filename)
    source = "".join(linecache.getlines(code.co_filename, function.__globals__))
    if not source:
        raise IdentityError(f"the source of {name} is not there: define it in a module or a cell")
    flags, place = code.co_flags & __future__.annotations.compiler_flag, (code.co_name, code.co_firstlineno)
    trees, compiled = _parsed(source, flags)
    if place not in trees or code not in compiled:  # the file says something else than what was imported
        raise IdentityError(f"the source of {name} has changed since it was imported: restart Python")
    return _bare(source, flags, place, name, wrappers)


@functools.lru_cache(maxsize=256)
def _bare(
    source: str, flags: int, place: tuple[str, int], name: str, wrappers: int
) -> ast.FunctionDef | ast.AsyncFunctionDef:
    """The tree of the function at `place`, stripped; once, since the lab asks for the same ones hundreds of times."""
    tree = copy.deepcopy(_parsed(source, flags)[0][place])
    if wrappers > len(tree.decorator_list):
        raise IdentityError(f"{name} was wrapped in something that its source does not show: use it as a decorator")
    tree.decorator_list = tree.decorator_list if wrappers else []
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            documented = ast.get_docstring(node, clean=False) is not None
            node.body = (node.body[1:] if documented else node.body) or [ast.Pass()]
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            node.returns = None
        if isinstance(node, ast.arg):
            node.annotation = None
        if isinstance(node, ast.Global):
            raise IdentityError(f"{name} assigns the global {', '.join(node.names)}: {BIND}")
        imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        imported += ["." * node.level + (node.module or "")] if isinstance(node, ast.ImportFrom) else []
        if hidden := [module for module in imported if not release_of(module)]:
            raise IdentityError(f"{name} imports {', '.join(hidden)} when it is called: import it above the function")
    tree.name = "_"
    return tree


@functools.lru_cache(maxsize=64)
def _parsed(source: str, flags: int) -> tuple[dict[tuple[str, int], ast.AST], list[types.CodeType]]:
    """A file's functions by name and first line, and the code of all that is defined in it."""
    try:
        tree = ast.parse(source)
        code = compile(source, "<source>", "exec", flags | ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
    except SyntaxError:
        return {}, []
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    first = {id(node): min([node.lineno, *(part.lineno for part in node.decorator_list)]) for node in functions}
    return {(node.name, first[id(node)]): node for node in functions}, list(_all_code(code))


def _all_code(code: types.CodeType) -> Iterator[types.CodeType]:
    for part in code.co_consts:
        if isinstance(part, types.CodeType):
            yield part
            yield from _all_code(part)


as_text = functools.lru_cache(maxsize=256)(ast.unparse)  # of what `syntax_tree` returns


@functools.lru_cache(maxsize=256)
def global_names(code: types.CodeType) -> frozenset[str]:
    """The names that a function, and functions in it, read from their module."""
    parts = [code, *_all_code(code)]
    instructions = (i for part in parts for i in dis.get_instructions(part))
    return frozenset(i.argval for i in instructions if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))


@functools.lru_cache(maxsize=256)
def paths(tree: ast.AST, names: frozenset[str]) -> list[tuple[str, list[str]]]:
    """Where those names are used, each with the attributes that follow it: ``F.relu`` is ("F", ["relu"])."""
    found, inside = [], set()
    for node in ast.walk(tree):  # an attribute comes before what it is taken from
        path, base = [], node
        while isinstance(base, ast.Attribute):
            path, base = [base.attr, *path], base.value
        if isinstance(base, ast.Name) and base.id in names and id(base) not in inside:
            inside.add(id(base))
            found.append((base.id, path))
    return found
