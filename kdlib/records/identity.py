"""What a run is made from, told by its content: never by a name alone, and never by a memory address.

A library's function is known by its name and release. Code of kdlib's and of your own is known by its syntax tree
(comments and docstrings do not count), its defaults, and the functions and constants that it uses. Tensors and modules
are known by their content. What cannot be known so (a lambda, a closure over a value, an object of another class)
raises :class:`IdentityError`: such a thing can train, but what comes of it cannot be saved under a name.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import hashlib
import json
import logging
import math
import re
import types

import numpy as np
import torch
from torch import Tensor, nn

from kdlib.records.source import (
    BIND,
    IdentityError,
    as_text,
    global_names,
    is_own,
    library_name,
    made_in,
    paths,
    release_of,
    syntax_tree,
)

_WRITTEN_OUT = (bytes, complex, range, slice, type(...), enum.Enum, logging.Logger)  # whose repr() says all
_WRITTEN_OUT += (torch.dtype, torch.memory_format, torch.layout)
_CONTAINERS = (list, tuple, dict, set, frozenset, str, int, float)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, types.MethodDescriptorType, np.ufunc, type)
# what these read shows in no name
_BY_STRING = {"eval", "exec", "globals", "locals", "vars", "__import__", "open", "input"}
# of libraries, what gives another value at another time
_STATE = ("random", "numpy.random", "os.environ", "os.getenv", "sys", "time", "datetime")
_MODULE_STATE = {*vars(nn.Module()), "training", "_compiled_call_impl", "_is_torch_compile"}
# of a class, what is not its code
_CLASS_EXTRAS = {"__module__", "__qualname__", "__doc__", "__dict__", "__weakref__", "__annotations__", "__slots__"}
_CLASS_EXTRAS |= {"__firstlineno__", "__static_attributes__", "__orig_bases__", "__parameters__", "__annotate__"}
_CLASS_EXTRAS |= {"__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl"}
_CLASS_EXTRAS |= {"__dataclass_fields__", "__dataclass_params__"}


def digest(value: object) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def identify(thing: object) -> object:
    """What `thing` is, as a JSON-able value: equal for two things only if they compute the same.

    Args:
        thing: a constant, a list, tuple or dict of things, a tensor or array, a module, a class, a function, or a
            ``functools.partial`` of one.

    Raises:
        IdentityError: it cannot be known by its content.
    """
    return _identify(thing, {})


def _identify(thing: object, seen: dict) -> object:
    """`seen` numbers the functions and classes that were met on the way, since they may use each other."""
    thing = thing.item() if isinstance(thing, np.generic) else thing
    if thing is None or type(thing) in (bool, int, str):
        return thing
    if type(thing) is float:
        return thing if math.isfinite(thing) else repr(thing)  # JSON has no infinity
    if isinstance(thing, torch.device):
        return "device"  # where something is computed is no part of what is computed
    if isinstance(thing, _WRITTEN_OUT):
        return repr(thing)
    if isinstance(thing, _CONTAINERS):
        return _container(thing, seen)
    if isinstance(thing, (Tensor, np.ndarray)):
        return {"tensor": content(thing)}
    if isinstance(thing, functools.partial):
        positional = {"arguments": [_identify(item, seen) for item in thing.args]} if thing.args else {}
        bound = {name: _identify(value, seen) for name, value in sorted(thing.keywords.items())}
        bound = {"keywords": bound} if {"function", "arguments"} & bound.keys() else bound
        return {"function": _identify(thing.func, seen), **positional, **bound}
    if isinstance(thing, nn.Module):
        return {"network": network(thing), "weights": weights(thing)}
    if isinstance(thing, types.ModuleType):
        if release := release_of(thing.__name__):
            return f"{thing.__name__} ({release})"
        raise IdentityError(f"module {thing.__name__} as a whole may hold anything: name what is used of it")
    if dataclasses.is_dataclass(thing) and not isinstance(thing, type):
        values = {field.name: getattr(thing, field.name) for field in dataclasses.fields(thing)}
        values |= getattr(thing, "__dict__", {})  # what __post_init__ and others have added
        values = {name: _identify(value, seen) for name, value in values.items()}
        return {"class": _identify(type(thing), seen), "values": values}
    if isinstance(thing, functools._lru_cache_wrapper):
        return _identify(thing.__wrapped__, seen)
    if isinstance(thing, _FUNCTIONS):
        return _code(thing, seen)
    kind = f"{type(thing).__module__}.{type(thing).__qualname__}"
    raise IdentityError(f"an object of class {kind} cannot be identified by its content: {BIND}")


def _container(thing: object, seen: dict) -> object:
    kind = next(kind for kind in _CONTAINERS if isinstance(thing, kind))
    if type(thing) is not kind and not release_of(type(thing).__module__):  # its methods may do anything
        return {"class": _identify(type(thing), seen), "value": _identify(kind(thing), seen)}
    if kind is list:
        return [_identify(item, seen) for item in thing]
    if kind is dict:
        return {"dict": [[_identify(item, seen) for item in pair] for pair in thing.items()]}
    if kind in (set, frozenset):
        return {"set": sorted((identify(item) for item in thing), key=repr)}
    return {"tuple": [_identify(item, seen) for item in thing]} if kind is tuple else kind(thing)


def content(values: Tensor | np.ndarray) -> str:
    """The SHA-256 of an array's type, shape and numbers, as sixteen hexadecimal digits."""
    try:
        if isinstance(values, np.ndarray):
            values = torch.from_numpy(np.array(values, order="C"))
        values = values.detach().cpu().resolve_conj().resolve_neg()
        sha256 = hashlib.sha256(f"{values.dtype} {tuple(values.shape)}".encode())
        sha256.update(values.contiguous().flatten().view(torch.uint8).numpy())
    except (RuntimeError, TypeError, ValueError) as error:
        raise IdentityError(f"an array of {values.dtype} cannot be identified by its content: {error}") from None
    return sha256.hexdigest()[:16]


def weights(model: nn.Module) -> str:
    """The SHA-256 of a network's parameters and buffers, by name, as sixteen hexadecimal digits."""
    return digest({name: identify(value) for name, value in _uncompiled(model).state_dict().items()})


def network(model: nn.Module) -> str:
    """A network's architecture: sixteen hexadecimal digits of its classes' code, their settings, and all shapes.

    Raises:
        IdentityError: it holds something that cannot be known by its content.
    """
    model, seen, first = _uncompiled(model), {}, {}  # of what is there twice, its first name
    layers, tensors = [], []
    for name, module in model.named_modules(remove_duplicate=False):
        again = first.setdefault(id(module), name) != name
        layers.append([name, first[id(module)] if again else [_identify(type(module), seen), _settings(module)]])
    for find in (model.named_parameters, model.named_buffers):
        for name, t in find(remove_duplicate=False):
            tensors.append([name, first.setdefault(id(t), name), str(t.dtype), list(t.shape), t.requires_grad])
    return digest([layers, tensors])


def _uncompiled(model: nn.Module) -> nn.Module:
    return getattr(model, "_orig_mod", model)  # torch.compile changes no result beyond rounding


def _settings(module: nn.Module) -> dict:
    """What decides a module's outputs and gradients beside its class and its trained tensors."""
    library = release_of(type(module).__module__) is not None
    generated = {"code": module.code} if isinstance(module, (torch.fx.GraphModule, torch.jit.ScriptModule)) else {}
    hooks = [module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks]
    hooks += [p._backward_hooks for p in module._parameters.values() if p is not None and p._backward_hooks]
    fixed = {name: identify(module._buffers[name]) for name in sorted(module._non_persistent_buffers_set)}
    found = {"hooks": [identify(list(kind.values())) for kind in hooks], "fixed": fixed, **generated}
    found |= {"extra": module.extra_repr()} if library else {}
    for name, value in vars(module).items():
        if name in _MODULE_STATE or (library and name.startswith("_")):
            continue
        try:
            found[f".{name}"] = identify(value)
        except IdentityError:
            if not library or isinstance(value, (types.FunctionType, types.MethodType)):
                raise
            found[f".{name}"] = re.sub(r" at 0x\w+", "", repr(value))
    return found


def _code(thing: object, seen: dict) -> object:
    """A function or class: a library's by name and release, another by its name and sixteen digits of its code."""
    thing = getattr(thing, "_torchdynamo_orig_callable", thing)  # as for a compiled network
    if name := library_name(thing):
        replaced = (
            {n: getattr(f, "__func__", f) for n, f in vars(thing).items() if is_own(f)}
            if isinstance(thing, type)
            else {}
        )
        return [name, _identify(replaced, seen)] if replaced else name
    if not isinstance(thing, (types.FunctionType, type)):
        raise IdentityError(f"{thing!r} is no function of a library's, and has no source: {BIND}")
    if thing in seen:  # it uses itself
        return f"number {seen[thing]}"
    seen[thing] = len(seen)
    parts = _class_parts(thing, seen) if isinstance(thing, type) else _function_parts(thing, seen)
    return f"{thing.__name__} {digest(parts)}"


def _class_parts(kind: type, seen: dict) -> dict:
    parts = {"bases": [_identify(base, seen) for base in kind.__bases__]}
    generated = dataclasses.is_dataclass(kind) or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    for name, value in vars(kind).items() if not release_of(kind.__module__) else ():
        if name in _CLASS_EXTRAS or isinstance(value, types.MemberDescriptorType):
            continue
        if generated and (
            name in getattr(kind, "_fields", ()) or (callable(getattr(kind, name)) and not is_own(value))
        ):
            continue
        if isinstance(value, property):
            value = [value.fget, value.fset, value.fdel]
        elif isinstance(value, (staticmethod, classmethod)):
            value = [type(value).__name__, value.__func__]
        elif isinstance(value, functools.cached_property):
            value = value.func
        parts[f".{name}"] = _identify(value, seen)
    return parts


def _function_parts(function: types.FunctionType, seen: dict) -> dict:
    inner, wrappers = function, 0
    while hasattr(inner, "__wrapped__") and release_of(made_in(inner)):  # by a library's decorator: torch.no_grad()
        inner, wrappers = inner.__wrapped__, wrappers + 1
    code, name = inner.__code__, f"{inner.__module__}.{inner.__qualname__}"
    if code.co_name == "<lambda>":
        raise IdentityError(f"a lambda cannot be identified by its content: {BIND}")
    if release_of(made_in(inner)):
        raise IdentityError(f"{name} was made by a function and cannot be identified: {BIND}")
    if set(code.co_freevars) - {"__class__"}:
        raise IdentityError(f"{name} closes over {', '.join(code.co_freevars)}, which may change: {BIND}")
    tree = syntax_tree(inner, name, wrappers)
    names = global_names(code)
    names |= {node.id for part in tree.decorator_list for node in ast.walk(part) if isinstance(node, ast.Name)}
    uses = {}
    for used, path in paths(tree, names):
        value = inner.__globals__.get(used)
        while isinstance(value, types.ModuleType) and not release_of(value.__name__) and path:
            used, value, path = f"{used}.{path[0]}", getattr(value, path[0], None), path[1:]
        if _may_change(value, seen) or (value is None and used in _BY_STRING) or _is_state(value, path):
            raise IdentityError(f"{name} reads the global {'.'.join([used, *path])}, which may change: {BIND}")
        try:
            uses[used] = _identify(value, seen)
        except IdentityError as error:
            raise IdentityError(f"{name} uses {used}: {error}") from None
    own = {key: value for key, value in vars(inner).items() if not key.startswith("__")}
    values = [_identify(value, seen) for value in (inner.__defaults__, inner.__kwdefaults__, own)]
    return {"code": as_text(tree), "values": values, "uses": dict(sorted(uses.items()))}


def _is_state(value: object, path: list[str]) -> bool:
    """Whether a library's module, with the attributes that follow it, names state instead of code."""
    whole = ".".join([value.__name__, *path]) + "." if isinstance(value, types.ModuleType) else ""
    return whole.startswith(tuple(f"{name}." for name in _STATE))


def _may_change(value: object, seen: dict) -> bool:
    """Whether a global's content may change; of a list or dict that a network is built from, today's content counts."""
    of_a_network = any(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in seen)
    containers = () if of_a_network else (list, dict, set)
    return isinstance(value, (Tensor, np.ndarray, nn.Module, *containers))
