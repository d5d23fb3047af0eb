"""Identity: never shared by what computes differently, the same everywhere for the same thing, or refused.

An objective or network of one's own is written to a file, imported and identified, as a reader's is.
"""

import dataclasses
import functools
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
import textwrap
import types
from enum import Enum
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from IPython.core.interactiveshell import InteractiveShell
from torch import nn
from torch.nn.utils import parametrizations

from kdlib import build, distillation_loss
from kdlib.models import NETWORKS
from kdlib.records.identity import IdentityError, digest, identify, network, weights

HEAD = """\
import functools
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
"""


@pytest.fixture
def load(tmp_path, monkeypatch):
    """A function that writes a module of the reader's own, imports it, and gives its namespace."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(str(tmp_path))
    modules, numbers = set(sys.modules), itertools.count()

    def load(source: str, name: str = "mine") -> types.SimpleNamespace:
        path = tmp_path / str(next(numbers)) / f"{name}.py"
        path.parent.mkdir()
        path.write_text(HEAD + textwrap.dedent(source))
        spec = importlib.util.spec_from_file_location(name, path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return module

    yield load
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


# --- values ----------------------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = 1
    BLUE = 2


@dataclasses.dataclass(frozen=True)
class Config:
    width: int
    scale: float = 1.0


ONES = torch.ones(2, 3)
DISTINCT = {
    "none": None,
    "true": True,
    "integer": 7,
    "float": 7.5,
    "infinity": math.inf,
    "minus infinity": -math.inf,
    "nan": math.nan,
    "string": "7",
    "bytes": b"7",
    "complex": 7j,
    "range": range(7),
    "slice": slice(7),
    "ellipsis": ...,
    "list": [1, 2],
    "list in another order": [2, 1],
    "tuple": (1, 2),  # indexes a tensor in another way than a list
    "set": {1, 2},
    "nested": [[1], 2],
    "dict": {"a": 1, "b": 2},
    "dict in another order": {"b": 2, "a": 1},
    "dict of numbers": {1: "a"},
    "dict of strings": {"1": "a"},
    "dtype": torch.float32,
    "other dtype": torch.float64,
    "memory format": torch.channels_last,
    "enum": Colour.RED,
    "other enum": Colour.BLUE,
    "dataclass": Config(1),
    "other dataclass": Config(2),
    "tensor": ONES,
    "another number in it": ONES * 2,
    "another type": ONES.double(),
    "another shape": ONES.view(3, 2),
    "a dimension more": ONES[None],
    "a scalar": torch.tensor(1.0),
    "one element": torch.tensor([1.0]),
    "negative zero": torch.tensor([-0.0]),
    "zero": torch.tensor([0.0]),
    "array": np.full((2, 3), 5.0),
    "array of integers": np.full((2, 3), 5),
    "array without dimensions": np.array(5.0),
    "array of one element": np.array([5.0]),
    "empty": torch.zeros(0, 3),
    "otherwise empty": torch.zeros(3, 0),
    "module": math,
    "function": F.cross_entropy,
    "builtin": torch.relu,
    "method of tensors": torch.Tensor.relu,
    "another builtin": torch.tanh,
    "numpy's function": np.exp,
    "class": nn.ReLU,
    "another class": nn.Tanh,
    "partial": partial(F.cross_entropy, label_smoothing=0.1),
    "partial with another value": partial(F.cross_entropy, label_smoothing=0.2),
    "partial with another keyword": partial(F.cross_entropy, weight=0.1),
    "partial of another function": partial(F.nll_loss, label_smoothing=0.1),
    "partial with a position": partial(F.cross_entropy, 0.1),
    "partial with a keyword called function": partial(F.cross_entropy, function=1),
    "partial of another with a keyword called function": partial(F.nll_loss, function=1),
    "partial with a keyword called keywords": partial(F.cross_entropy, keywords={"function": 1}),
    "network": nn.Linear(2, 2),
    "network with other weights": nn.Linear(2, 2),
    "library loss": nn.CrossEntropyLoss(),
    "library loss with a setting": nn.CrossEntropyLoss(label_smoothing=0.1),
}


def test_different_things_have_different_identities_that_go_through_json():
    identities = {name: json.dumps(identify(thing)) for name, thing in DISTINCT.items()}
    for (a, first), (b, second) in itertools.combinations(identities.items(), 2):
        assert first != second, f"{a} and {b}"
    assert len({digest(identify(thing)) for thing in DISTINCT.values()}) == len(DISTINCT)


EQUAL = [
    (0.5, np.float64(0.5)),
    (0.5, np.float32(0.5)),
    (3, np.int64(3)),
    (True, np.True_),
    ({1, 2, 3}, {3, 2, 1}),
    (ONES, ONES.clone()),
    (ONES, torch.ones(3, 2).T),
    (ONES, nn.Parameter(ONES)),
    (np.arange(6.0), np.arange(12.0)[::2] / 2),
    (torch.tensor([1 - 2j]), torch.tensor([1 + 2j]).conj()),
    (torch.device("cpu"), torch.device("cuda", 1)),  # where it runs is no part of what it is
    (partial(F.cross_entropy, a=1, b=2), partial(partial(F.cross_entropy, b=2), a=1)),
    (F.cross_entropy, torch.nn.functional.cross_entropy),
]


@pytest.mark.parametrize("pair", EQUAL, ids=lambda pair: f"{pair[0]!r:.20}")
def test_the_same_value_has_the_same_identity_however_it_is_stored(pair):
    assert identify(pair[0]) == identify(pair[1])


def test_a_library_function_is_known_by_its_name_and_release():
    release = ".".join(torch.__version__.split(".")[:2])
    assert identify(F.cross_entropy) == f"torch.nn.functional.cross_entropy (torch {release})"
    assert identify(torch.relu) == f"torch.relu (torch {release})"
    assert identify(math.log) == "math.log (math)"
    assert identify(nn.ReLU) == f"torch.nn.modules.activation.ReLU (torch {release})"
    assert identify(F.max_pool2d) == f"torch.nn.functional.max_pool2d (torch {release})"  # made by another function


def test_the_identity_of_an_objective_reads_like_the_objective():
    described = identify(partial(distillation_loss, temperature=4.0, alpha=0.1))
    assert described.keys() == {"function", "temperature", "alpha"}
    assert (described["temperature"], described["alpha"]) == (4.0, 0.1)
    assert described["function"].startswith("distillation_loss ")


# --- what cannot be identified ---------------------------------------------------------------------------------------


class Weighted:
    def __init__(self, weight):
        self.weight = weight

    def __call__(self, student_logits, labels):
        return self.weight * F.cross_entropy(student_logits, labels)

    def loss(self, student_logits, labels):
        return self.weight * F.cross_entropy(student_logits, labels)


def closing_over(weight):
    def loss(student_logits, labels):
        return weight * F.cross_entropy(student_logits, labels)

    return loss


def generated():
    namespace = {"F": F}
    exec("def loss(s, y):\n    return F.cross_entropy(s, y)", namespace)
    return namespace["loss"]


def renamed(function):
    function.__name__ = function.__qualname__ = "loss"
    return function


REFUSED = {
    "a lambda": (lambda: lambda s, y: F.cross_entropy(s, y), r"a lambda cannot be identified .*functools\.partial"),
    "a lambda that was renamed": (lambda: renamed(lambda s, y: F.cross_entropy(s, y)), "a lambda cannot be identified"),
    "a closure": (lambda: closing_over(2.0), r"closing_over.<locals>.loss closes over weight, .*functools\.partial"),
    "an object": (lambda: Weighted(2.0), r"an object of class .*Weighted cannot be identified .*functools\.partial"),
    "a bound method": (lambda: Weighted(2.0).loss, "an object of class builtins.method cannot be identified"),
    "a method of a tensor": (lambda: torch.ones(2).mul, "is no function of a library's, and has no source"),
    "a method of a list": (lambda: [].append, "is no function of a library's, and has no source"),
    "a function without a source": (generated, "the source of .*loss is not there: define it in a module or a cell"),
    "a generator": (lambda: torch.Generator(), "an object of class torch._C.Generator cannot be identified"),
    "an array of objects": (lambda: np.array([object()]), "an array of object cannot be identified by its content"),
    "a sparse tensor": (lambda: torch.eye(2).to_sparse(), "an array of torch.float32 cannot be identified"),
    "a partial of one of them": (lambda: partial(Weighted(2.0), s=1), "an object of class .*Weighted cannot be"),
    "a partial that binds one": (lambda: partial(F.cross_entropy, weight=Weighted(2.0)), "an object of class"),
    "a list with one in it": (lambda: [1, {"a": (Weighted(2.0),)}], "an object of class .*Weighted cannot be"),
    "a network with one in it": (lambda: nn.Sequential(holding(Weighted(2.0))), "an object of class .*Weighted"),
}


class Holding(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(x)


def holding(thing) -> nn.Module:
    module = Holding()
    module.thing = thing
    return module


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_known_by_its_content_is_refused_with_how_to_mend_it(kind):
    make, message = REFUSED[kind]
    with pytest.raises(IdentityError, match=message):
        identify(make())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("WEIGHTS = [1.0]\ndef loss(s, y):\n    return WEIGHTS[0] * F.cross_entropy(s, y)", "reads the global WEIGHTS"),
        ("STATE = {}\ndef loss(s, y):\n    return F.cross_entropy(s, y, **STATE)", "reads the global STATE, which may"),
        ("W = torch.ones(3)\ndef loss(s, y):\n    return F.cross_entropy(s, y, weight=W)", "reads the global W, which"),
        ("W = np.ones(3)\ndef loss(s, y):\n    return (s * W[0]).sum()", "reads the global W, which may change"),
        ("NET = nn.Linear(2, 2)\ndef loss(s, y):\n    return NET(s).sum()", "reads the global NET, which may change"),
        ("CE = nn.CrossEntropyLoss()\ndef loss(s, y):\n    return CE(s, y)", "reads the global CE, which may change"),
        ("class C:\n    T = 4\nc = C()\ndef loss(s, y):\n    return c.T * s.sum()", "mine.loss uses c: an object"),
        ("scale = lambda x: 2 * x\ndef loss(s, y):\n    return scale(s).sum()", "mine.loss uses scale: a lambda"),
        ("def loss(s, y):\n    global N\n    N = 2\n    return s.sum() * N\nN = 1", "assigns the global N"),
        ("T = 4\ndef loss(s, y):\n    return s.sum() * globals()['T']", "reads the global globals, which may change"),
        ("T = 4\ndef loss(s, y):\n    return eval('T') * s.sum()", "reads the global eval"),
        ("def loss(s, y):\n    from mine_too import T\n    return s.sum() * T", "imports mine_too when it is called"),
        ("import mine as me\nT = 4\ndef loss(s, y):\n    m = me\n    return m.T * s.sum()", "mine as a whole may hold"),
        ("def scaled(f):\n    @functools.wraps(f)\n    def g(*a):\n        return 2 * f(*a)\n    return g\n"
         "@scaled\ndef loss(s, y):\n    return F.cross_entropy(s, y)", "closes over f, which may change"),
        ("def plain(s, y):\n    return F.cross_entropy(s, y)\nloss = torch.no_grad()(plain)", "was wrapped in"),
    ],
)  # fmt: skip
def test_a_function_is_refused_if_what_it_reads_may_change_without_being_seen(load, source, message):
    with pytest.raises(IdentityError, match=message):
        identify(load(source).loss)


# --- functions of one's own ------------------------------------------------------------------------------------------

BASE = """
import math
import mine_config as config
from mine_config import helper

SCALE = 2.0

def inner(x):
    return x.relu() * SCALE

class Settings:
    offset = 1.0

@torch.no_grad()
def probabilities(x):
    return x.softmax(1)

def loss(student_logits, labels, *, factor=3.0, reduce=torch.mean):
    '''Cross-entropy, in a way.'''
    # a comment
    def shifted(x):
        '''Of logits.'''
        return x + Settings.offset
    x = shifted(helper(inner(student_logits)))
    weight = probabilities(x).detach() * config.temperature * config.names.alpha
    return factor * reduce(F.cross_entropy(x, labels) + math.log(2) + weight.mean() + loss.extra)

loss.extra = 0.5
"""
CONFIG = """
import mine_names as names
temperature = 4.0
def helper(x):
    return deeper(x) + 1
def deeper(x):
    return 2 * x
"""
NAMES = "alpha = 0.1\nunused = 1\n"
SOURCES = {"mine_names": NAMES, "mine_config": CONFIG, "mine": BASE}

SAME = {
    "nothing": [],
    "a comment": [("# a comment", "# another comment, longer")],
    "a comment more": [("def inner(x):", "# what it is\n\ndef inner(x):  # of it")],
    "the docstring": [("Cross-entropy, in a way.", "Something else.")],
    "no docstring": [("    '''Cross-entropy, in a way.'''\n", "")],
    "the docstring inside": [("        '''Of logits.'''\n", "")],
    "annotations": [("def loss(student_logits, labels,", "def loss(student_logits: torch.Tensor, labels: 'Any',")],
    "a returned annotation": [("def helper(x):", "def helper(x) -> torch.Tensor:")],
    "spaces and parentheses": [("return x.relu() * SCALE", "return (x.relu()\n            * SCALE)")],
    "blank lines before": [("SCALE = 2.0", "\n\n\nSCALE = 2.0")],
    "another function beside": [("def inner(x):", "def unused(x):\n    return x\n\ndef inner(x):")],
    "a constant that it does not use": [("unused = 1", "unused = 2")],
    "how a constant is written": [("SCALE = 2.0", "SCALE = 1.0 + 1")],
    "quotation marks": [("'''Of logits.'''", '"""Of logits."""')],
}
OTHER = {
    "a constant in it": [("math.log(2)", "math.log(3)")],
    "a default": [("factor=3.0", "factor=4.0")],
    "a function as default": [("reduce=torch.mean", "reduce=torch.sum")],
    "an operation": [("F.cross_entropy(x, labels) +", "F.cross_entropy(x, labels) -")],
    "a name from a library": [("F.cross_entropy", "F.nll_loss")],
    "a global constant": [("SCALE = 2.0", "SCALE = 2.5")],
    "a helper": [("x.relu()", "x.tanh()")],
    "a helper's helper": [("return 2 * x", "return 3 * x")],
    "a helper's constant": [("+ 1\n", "+ 2\n")],
    "a constant of another module": [("temperature = 4.0", "temperature = 8.0")],
    "a constant of a module of a module": [("alpha = 0.1", "alpha = 0.2")],
    "an attribute of a class": [("offset = 1.0", "offset = 2.0")],
    "an attribute of the function": [("loss.extra = 0.5", "loss.extra = 1.5")],
    "a function in it": [("x + Settings.offset", "x - Settings.offset")],
    "a library's decorator of a helper": [("@torch.no_grad()", "@torch.enable_grad()")],
    "no decorator": [("@torch.no_grad()\n", "")],
    "the argument of a decorator": [("@torch.no_grad()", "@torch.autocast('cpu', enabled=False)")],
    "a decorator inside": [("    def shifted(x):", "    @torch.no_grad()\n    def shifted(x):")],
    "which module a name stands for": [("import mine_names as names", "import mine_more as names")],
    "which library a name stands for": [("import math", "import cmath as math")],
    "the order of its arguments": [("student_logits, labels, *", "labels, student_logits, *")],
}


def of_base(load, changes) -> object:
    load("alpha = 0.3\n", "mine_more")
    for name, source in SOURCES.items():
        for old, new in changes:
            source = source.replace(old, new)
        module = load(source, name)
    return identify(module.loss)


def test_every_change_is_a_change_of_the_sources():
    for name, changes in {**SAME, **OTHER}.items():
        assert all(any(old in source for source in SOURCES.values()) for old, _ in changes), name


@pytest.mark.parametrize("change", SAME)
def test_what_computes_the_same_keeps_its_identity(load, change):
    assert of_base(load, SAME[change]) == of_base(load, [])


@pytest.mark.parametrize("change", OTHER)
def test_what_computes_something_else_has_another_identity(load, change):
    assert of_base(load, OTHER[change]) != of_base(load, [])


def test_a_file_may_be_renamed_or_its_code_moved_to_a_notebook(load):
    source = "SCALE = 2.0\n\ndef loss(s, y):\n    return SCALE * F.cross_entropy(s, y)\n"
    wanted = identify(load(source, "mine").loss)
    assert identify(load(source, "renamed").loss) == wanted
    assert in_cells(HEAD, source)["loss"] == wanted


@pytest.mark.parametrize("name", ["statistics", "profile", "queue"])  # files that readers have, and Python as well
def test_a_file_of_ones_own_called_as_one_of_pythons_is_ones_own(load, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    source = "def loss(s, y):\n    return {} * F.cross_entropy(s, y)\n"
    first, second = (identify(load(source.format(factor), name).loss) for factor in (2, 3))
    assert first != second


def test_a_function_in_the_guise_of_a_librarys_is_ones_own(load):
    source = """
    @functools.wraps(F.cross_entropy)
    def loss(s, y):
        return {} * F.nll_loss(s, y)
    """
    first, second = (identify(load(source.format(factor)).loss) for factor in (2, 3))
    assert first != second
    assert identify(F.cross_entropy) not in (first, second)


def test_functions_that_use_each_other_are_identified(load):
    source = """
    def even(n, x):
        return x if n == 0 else odd(n - 1, x)
    def odd(n, x):
        return {} * x if n == 0 else even(n - 1, x)
    class Tree(nn.Module):
        def grow(self):
            return Tree()
    """
    first, second = load(source.format(2)), load(source.format(3))
    assert identify(first.even) != identify(second.even)
    assert identify(first.odd) != identify(second.odd)
    assert identify(first.Tree) == identify(second.Tree)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("return 2 * x", "return 3 * x"),  # the code is the same but for a constant
        ("x.relu()", "x.tanh()"),  # the same but for a name
        ("def twice(x):", "\n\n\ndef twice(x):"),  # another function stands where this one was
        ("def twice(x):", "def thrice(x):"),
        ("    return 2 * x\n", "    return 2 *\n"),
        ("    return 2 * x\n", "    return 2 * x + 0\n"),
    ],
)
def test_a_source_that_was_edited_after_the_import_is_noticed(load, old, new):
    source = """
    def twice(x):
        return 2 * x

    def loss(s, y):
        x = s.relu()
        return x.relu() + twice(s)
    """
    module = load(source)
    wanted = identify(module.loss)
    path = Path(module.__file__)
    before = path.read_text()
    assert old in before
    path.write_text(before.replace(old, new))
    os.utime(path, (1, 1))
    with pytest.raises(IdentityError, match=r"source of mine\.\w+ has changed since it was imported: restart Python"):
        identify(module.loss)
    path.write_text(before)
    assert identify(module.loss) == wanted


def test_a_compiled_or_cached_function_is_the_function(load):
    source = """
    def loss(s, y):
        return F.cross_entropy(s, y)

    @functools.cache
    def table(n):
        return n + 1
    """
    module = load(source)
    assert identify(torch.compile(module.loss)) == identify(module.loss)
    assert identify(module.table) == identify(module.table.__wrapped__)


def test_configurations_in_dataclasses_and_tuples_are_identified(load):
    source = """
    import dataclasses
    from typing import NamedTuple

    @dataclasses.dataclass(frozen=True, slots=True)
    class Config:
        T: float = 4.0
        names: tuple = dataclasses.field(default_factory=tuple)
        def scaled(self):
            return {} * self.T

    class Pair(NamedTuple):
        T: float
        def scaled(self):
            return {} * self.T

    def loss(s, y, config):
        return F.cross_entropy(s / config.scaled(), y)
    """
    first, second = (load(source.format(factor, factor)) for factor in (1, 2))
    for kind in ("Config", "Pair"):
        cases = [(first, 4.0), (first, 8.0), (second, 4.0), (first, 4.0)]
        of = [digest(identify(partial(module.loss, config=getattr(module, kind)(t)))) for module, t in cases]
        assert len(set(of)) == 3
        assert of[0] == of[3]


# --- in a notebook ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def shell(monkeypatch, tmp_path):
    """IPython keeps its history and settings in a folder of the test, and leaves nothing behind."""
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])  # which a shell replaces
    yield
    InteractiveShell.clear_instance()


def in_cells(*cells: str) -> dict[str, object]:
    """Run cells as Jupyter does; the identity, or the error, of each function and class that they define."""
    InteractiveShell.clear_instance()
    ipython = InteractiveShell.instance()
    ipython.history_manager.enabled = False
    for cell in cells:
        ipython.run_cell(textwrap.dedent(cell), store_history=True).raise_error()
    identities = {}
    for name, value in ipython.user_ns.items():
        if getattr(value, "__module__", None) == "__main__" and isinstance(value, (types.FunctionType, type)):
            try:
                identities[name] = identify(value)
            except IdentityError as error:
                identities[name] = str(error)
    return identities


CELLS = [
    "%config InteractiveShell.ast_node_interactivity = 'all'\n" + HEAD,
    "SCALE: float = 2.0  # a parameter",
    "def helper(x):\n    '''Twice.'''\n    return 2 * x\nhelper(1)",
    "import asyncio\nawait asyncio.sleep(0)\n\ndef awaited(x):\n    return x + 1",
    "def loss(s, y):\n    return SCALE * helper(F.cross_entropy(s, y))",
    """
    class Net(nn.Module):
        def __init__(self, classes, channels):
            super().__init__()
            self.layer = nn.Linear(64 * channels, classes)

        def forward(self, images):
            return self.layer(helper(images.flatten(1)).relu())
    """,
]


@pytest.mark.parametrize(
    ("old", "new", "changed"),
    [
        ("'''Twice.'''", "'''Two times.'''  # a comment", set()),
        ("2 * x\nhelper", "3 * x\nhelper", {"helper", "loss", "Net"}),
        ("= 2.0", "= 3.0", {"loss"}),
        (".relu()", ".tanh()", {"Net"}),
        ("channels, classes", "channels, classes, bias=False", {"Net"}),
        ("SCALE * helper", "helper", {"loss"}),
    ],
)
def test_functions_and_networks_of_a_notebooks_cells(old, new, changed):
    first, again = in_cells(*CELLS), in_cells(*CELLS)
    assert first == again
    assert first.keys() == {"helper", "awaited", "loss", "Net"}
    assert all(len(identity.split()) == 2 for identity in first.values()), first
    other = in_cells(*(cell.replace(old, new) for cell in CELLS))
    assert {name for name in first if first[name] != other[name]} == changed


def test_a_cell_that_was_run_again_with_a_change_is_another():
    edited = [*CELLS, CELLS[2].replace("2 * x", "3 * x")]  # the helper's cell; the loss was defined before
    assert in_cells(*edited)["loss"] != in_cells(*CELLS)["loss"]
    assert in_cells(*edited, CELLS[2]) == in_cells(*CELLS)


# --- networks --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, channels: int, activation=F.relu):
        super().__init__()
        self.convolution = nn.Conv2d(channels, 4, 3, padding=1)
        self.activation = activation
        self.scale, self.table = 1.0, [1, 2]
        self.offset = torch.zeros(1)  # no buffer
        self.register_buffer("shift", torch.zeros(1), persistent=False)
        self.register_buffer("mean", torch.zeros(1))

    def forward(self, x):
        return self.activation(self.convolution(x) * self.scale + self.offset + self.shift)

    @property
    def width(self):
        return 4

    @functools.cached_property
    def depth(self):
        return 1

    @staticmethod
    def start(x):
        return x

    @classmethod
    def make(cls):
        return cls(1)


def make_net(activation=F.relu) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        Block(1, activation), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(64, 3)
    )


def hook(module, inputs, output):
    return output * 2


def other_hook(module, inputs, output):
    return output * 3


def pre_hook(module, inputs):
    return inputs


def backward_hook(module, gradients, more):
    return None


def gradient_hook(gradient):
    return gradient * 0


def patched(net: nn.Module, name: str, value: object) -> nn.Module:
    owner, _, name = name.rpartition(".")
    setattr(net.get_submodule(owner), name, value)
    return net


def hooked(net: nn.Module, register: str, *hooks) -> nn.Module:
    for each in hooks:
        getattr(net[0], register)(each)
    return net


def frozen(net: nn.Module) -> nn.Module:
    net[0].requires_grad_(False)
    return net


def with_weight_hook(net: nn.Module) -> nn.Module:
    net[0].convolution.weight.register_hook(gradient_hook)
    return net


def tied(pattern: str) -> nn.Module:
    layers = {name: nn.Linear(3, 3) for name in "AB"}
    return nn.Sequential(*(layers[name] for name in pattern))


def tied_weights(of: int, to: int) -> nn.Module:
    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(3)))
    net[of].weight = net[to].weight
    return net


NETS = {
    "as it is": make_net,
    "another activation": lambda: make_net(F.elu),
    "a builtin activation": lambda: make_net(torch.relu),
    "an attribute": lambda: patched(make_net(), "0.scale", 2.0),
    "a list": lambda: patched(make_net(), "0.table", [1, 3]),
    "a tensor that is no buffer": lambda: patched(make_net(), "0.offset", torch.ones(1)),
    "a buffer that is not saved": lambda: patched(make_net(), "0.shift", torch.ones(1)),
    "a new attribute": lambda: patched(make_net(), "0.more", None),
    "dropout": lambda: patched(make_net(), "2.p", 0.2),
    "padding": lambda: patched(make_net(), "0.convolution", nn.Conv2d(1, 4, 3, padding=1, padding_mode="circular")),
    "dilation": lambda: patched(make_net(), "0.convolution", nn.Conv2d(1, 4, 3, padding=2, dilation=2)),
    "stride": lambda: patched(make_net(), "0.convolution", nn.Conv2d(1, 4, 3, padding=1, stride=2)),
    "pooling": lambda: patched(make_net(), "3", nn.AvgPool2d(2)),
    "ceil": lambda: patched(make_net(), "3", nn.MaxPool2d(2, ceil_mode=True)),
    "momentum of statistics": lambda: patched(make_net(), "1.momentum", 0.5),
    "epsilon": lambda: patched(make_net(), "1.eps", 0.1),
    "no statistics": lambda: patched(make_net(), "1", nn.BatchNorm2d(4, track_running_stats=False)),
    "a width": lambda: patched(make_net(), "5", nn.Linear(64, 4)),
    "no bias": lambda: patched(make_net(), "5", nn.Linear(64, 3, bias=False)),
    "float64": lambda: make_net().double(),
    "frozen": lambda: frozen(make_net()),
    "a forward of its own": lambda: patched(make_net(), "0.forward", F.relu),
    "a hook": lambda: hooked(make_net(), "register_forward_hook", hook),
    "another hook": lambda: hooked(make_net(), "register_forward_hook", other_hook),
    "hooks in an order": lambda: hooked(make_net(), "register_forward_hook", hook, other_hook),
    "hooks in another order": lambda: hooked(make_net(), "register_forward_hook", other_hook, hook),
    "a hook before": lambda: hooked(make_net(), "register_forward_pre_hook", pre_hook),
    "a hook on gradients": lambda: hooked(make_net(), "register_full_backward_hook", backward_hook),
    "a hook on gradients before": lambda: hooked(make_net(), "register_full_backward_pre_hook", pre_hook),
    "a hook on a weight": lambda: with_weight_hook(make_net()),
    "weight normalisation": lambda: patched(make_net(), "5", parametrizations.weight_norm(nn.Linear(64, 3))),
    "spectral normalisation": lambda: patched(make_net(), "5", parametrizations.spectral_norm(nn.Linear(64, 3))),
    "traced": lambda: torch.fx.symbolic_trace(make_net()),
    "traced with another activation": lambda: torch.fx.symbolic_trace(make_net(F.elu)),
    "layers in another order": lambda: nn.Sequential(*list(make_net())[:3], nn.ReLU(), *list(make_net())[3:]),
    "ABA": lambda: tied("ABA"),
    "ABB": lambda: tied("ABB"),
    "AAA": lambda: tied("AAA"),
    "the third tied to the first": lambda: tied_weights(2, 0),
    "the third tied to the second": lambda: tied_weights(2, 1),
    "nothing tied": lambda: tied_weights(0, 0),
    "a list that is no module": lambda: holding([make_net()]),
    "the transformer's activation": lambda: nn.TransformerEncoderLayer(8, 2, activation="relu"),
    "another activation of a transformer": lambda: nn.TransformerEncoderLayer(8, 2, activation="gelu"),
    "ungrouped": lambda: nn.GroupNorm(1, 4),
    "grouped": lambda: nn.GroupNorm(2, 4),
    "one way": lambda: nn.LSTM(3, 4, dropout=0.1, num_layers=2),
    "with less dropout": lambda: nn.LSTM(3, 4, dropout=0.05, num_layers=2),
}  # fmt: skip


def test_networks_that_compute_differently_have_different_identities():
    identities = {}
    for name, make in NETS.items():
        first, again = network(make()), network(make())
        assert first == again, name
        assert first not in identities.values(), f"{name} and {[n for n, i in identities.items() if i == first]}"
        identities[name] = first


def test_weights_and_modes_are_no_part_of_an_architecture_and_its_weights_know_every_buffer():
    net, other = make_net(), make_net()
    net(torch.randn(8, 1, 8, 8))  # moves the running statistics
    assert network(net) == network(other.eval())
    assert weights(net) != weights(other)
    for name, tensor in make_net().state_dict().items():
        changed = make_net()
        changed.state_dict()[name].add_(1)
        assert weights(changed) != weights(make_net()), name
        assert network(changed) == network(make_net()), name
        assert tensor is not None


def test_a_networks_code_is_part_of_it(load):
    source = """
    CONFIGURATIONS = {"small": [4, "M", 8]}  # as in many a VGG

    def cat(x):
        return torch.cat([x, x], 1)

    class Base(nn.Module):
        def finish(self, x):
            return x.mean((2, 3))

    class Net(Base):
        slope = 0.1

        def __init__(self, classes=10, channels=3):
            super().__init__()
            layers = []
            for width in CONFIGURATIONS["small"]:
                if width == "M":
                    layers.append(nn.MaxPool2d(2))
                else:
                    layers.append(nn.Conv2d(channels, width, 3, padding=1))
                    channels = width
            self.features, self.head = nn.Sequential(*layers), nn.Linear(2 * channels, classes)

        @torch.no_grad()
        def reset(self):
            self.head.bias.fill_(0)

        @property
        def width(self):
            return 8

        def forward(self, images):
            return self.head(self.finish(cat(F.leaky_relu(self.features(images), self.slope))))
    """
    changes = {
        "nothing": ("", "", False),
        "a comment": ("# as in many a VGG", "# as in few", False),
        "a forward with the same shapes": ("F.leaky_relu", "F.celu", True),
        "a helper": ("[x, x]", "[x, -x]", True),
        "a base class": ("x.mean((2, 3))", "x.amax((2, 3))", True),
        "an attribute of the class": ("slope = 0.1", "slope = 0.2", True),
        "how it starts": ("padding=1))", "padding=1).requires_grad_(True))", True),
        "a decorated method": ("fill_(0)", "fill_(1)", True),
        "its decorator": ("@torch.no_grad()", "@torch.inference_mode()", True),
        "a property": ("return 8", "return 9", True),
        "what it was built from": ('{"small": [4', '{"tiny": [1], "small": [4', True),
    }
    wanted = network(load(source).Net())
    for name, (old, new, is_other) in changes.items():
        assert not old or old in source
        assert (network(load(source.replace(old, new)).Net()) != wanted) == is_other, name


def test_a_library_network_is_known_by_its_settings_and_what_was_put_into_it():
    def of(name, **settings):
        return network(getattr(torchvision.models, name)(num_classes=4, **settings))

    assert of("squeezenet1_1") == of("squeezenet1_1") != of("squeezenet1_0")
    assert of("squeezenet1_1", dropout=0.2) != of("squeezenet1_1")
    net = torchvision.models.shufflenet_v2_x0_5(num_classes=4)
    assert network(net) == of("shufflenet_v2_x0_5") != of("shufflenet_v2_x1_0")
    net.maxpool = nn.Identity()
    assert network(net) != of("shufflenet_v2_x0_5")


def test_a_library_class_whose_method_was_replaced_is_noticed(monkeypatch):
    before = network(nn.Sequential(nn.Tanh()))
    monkeypatch.setattr(nn.Tanh, "forward", flat)
    assert network(nn.Sequential(nn.Tanh())) != before


def flat(self, x):
    return x * 0


def test_a_compiled_network_is_the_network():
    net = make_net()
    plain = network(net), weights(net)
    compiled = torch.compile(net, backend="eager")
    assert (network(compiled), weights(compiled)) == plain
    assert network(net) == plain[0]
    net.compile(backend="eager")
    assert network(net) == plain[0]


def test_a_traced_network_is_known_by_the_code_that_was_traced():
    for _ in range(2):
        assert network(torch.fx.symbolic_trace(make_net())) == network(torch.fx.symbolic_trace(make_net()))
    plain, other = (torch.fx.symbolic_trace(make_net()) for _ in range(2))
    for node in other.graph.nodes:
        if node.target is F.relu:
            node.target = F.celu
    other.recompile()
    assert network(plain) != network(other)


def test_attributes_of_a_librarys_module_that_cannot_be_identified_are_told_apart_by_what_they_print():
    class Settings:
        def __init__(self, masked):
            self.masked = masked

        def __repr__(self):
            return f"<Settings masked={self.masked} at 0x7f00{id(self):x}>"

    def of(masked):
        module = nn.Identity()
        module.config = Settings(masked)
        return network(module)

    assert of(True) == of(True) != of(False)


def test_networks_made_with_other_keywords_are_told_apart():
    def of(**keywords):
        return network(build(partial(KeywordNet, **keywords), 4, 1))

    assert of(slope=0.1) == of(slope=0.1) != of(slope=0.2)
    assert of(slope=0.1, width=8) != of(slope=0.1, width=9)
    assert of(slope=0.1, activation=F.celu) != of(slope=0.1, activation=F.elu)


class KeywordNet(nn.Module):
    def __init__(self, classes, channels, slope, width=8, activation=F.relu):
        super().__init__()
        self.slope, self.activation = slope, activation
        self.hidden, self.head = nn.Linear(64 * channels, width), nn.Linear(width, classes)

    def forward(self, images):
        return self.head(self.activation(self.hidden(images.flatten(1))) * self.slope)


@pytest.mark.parametrize("name", NETWORKS)
def test_kdlibs_networks_have_identities_that_no_seed_changes(name):
    first, second = (network(build(name, 4, 1, seed=seed)) for seed in (0, 1))
    assert first == second
    assert identify(NETWORKS[name]) == identify(NETWORKS[name])
    others = {network(build(name, classes, channels)) for classes, channels in ((5, 1), (4, 3))}
    assert len({first, *others}) == 3


# --- in other processes ----------------------------------------------------------------------------------------------

ASKED = """
import functools, json, sys
sys.path[:0] = sys.argv[1:]
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
import kdlib, test_identity as t
from kdlib.records.identity import identify, network, weights

print(json.dumps(t.asked()))
"""


def asked() -> dict:
    """Identities of many kinds of things."""
    things = {name: thing for name, thing in DISTINCT.items() if not isinstance(thing, nn.Linear)}
    identities = {f"value: {name}": identify(thing) for name, thing in things.items()}
    identities |= {f"net: {name}": network(make()) for name, make in NETS.items()}
    identities |= {f"weights: {name}": weights(build(name, 4, 1, seed=3)) for name in ("tiny_cnn", "digits_cnn")}
    identities |= {f"network: {name}": identify(make) for name, make in NETWORKS.items()}
    identities["words"] = identify({"some", "words", "in", "a", "set", "whose", "order", "varies"})
    identities["functions"] = identify({hook, other_hook, pre_hook, F.relu, F.celu})
    identities["loss"] = identify(partial(distillation_loss, temperature=4.0, alpha=0.1))
    identities["shufflenet"] = network(torchvision.models.shufflenet_v2_x0_5())
    return identities


def test_the_same_things_have_the_same_identities_in_another_process(tmp_path):
    environment = os.environ | {"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "2", "PYTHONDONTWRITEBYTECODE": "1"}
    folder = Path(__file__).parent
    command = [sys.executable, "-c", ASKED, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads(json.dumps(asked()))


@dataclasses.dataclass
class Tempered:
    """An objective with state beside its fields."""

    temperature: dataclasses.InitVar[float]

    def __post_init__(self, temperature):
        self.keywords = {"temperature": temperature}

    def __call__(self, student_logits, labels):
        return F.cross_entropy(student_logits / self.keywords["temperature"], labels)


def test_what_a_dataclass_holds_beside_its_fields_counts():
    assert identify(Tempered(1.0)) == identify(Tempered(1.0)) != identify(Tempered(20.0))


def from_the_environment(student_logits, labels):
    return F.cross_entropy(student_logits / float(os.environ["TEMPERATURE"]), labels)


def from_a_generator(student_logits, labels):
    return F.cross_entropy(student_logits * np.random.uniform(), labels)  # noqa: NPY002


class ReadsTheEnvironment(nn.Module):
    def forward(self, images):
        return images * float(os.getenv("FACTOR", "1"))


def test_state_of_a_library_is_no_code():
    for objective, what in ((from_the_environment, "os.environ"), (from_a_generator, "np.random.uniform")):
        with pytest.raises(IdentityError, match=f"reads the global {what}"):
            identify(objective)
    with pytest.raises(IdentityError, match=r"reads the global os\.getenv"):
        network(ReadsTheEnvironment())
