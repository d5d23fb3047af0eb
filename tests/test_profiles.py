"""Profiles, how parameters override them, and where their artefacts go."""

import dataclasses
import functools
import math
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from kdlib import build, count_parameters, notebook_settings, resolve
from kdlib.datasets import DATA_SETS
from kdlib.models import NETWORKS
from kdlib.profiles import PARAMETERS, PROFILES, outputs_folder
from kdlib.records import fetch

pytestmark = pytest.mark.usefixtures("isolated")


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_what_there_is_and_its_student_is_the_smaller(name):
    profile = resolve(name)
    assert profile.name == name
    assert "-" not in profile.folder.name  # what follows a hyphen there tells a run with overrides
    assert profile.dataset in DATA_SETS
    assert {profile.teacher, *profile.students} <= NETWORKS.keys()
    channels = 3 if profile.dataset == "cifar10" else 1
    for student in profile.students:
        assert count_parameters(build(student, 10, channels)) < count_parameters(build(profile.teacher, 10, channels))


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("views", [None, 2])
def test_the_soft_labels_hold_every_view_that_the_student_sees(name, views):
    profile = resolve(name, views=views)
    assert profile.views is None or (profile.student_recipe.views or math.inf) <= profile.views


def test_the_profiles_are_those_of_the_design():
    quick, full = resolve("quick"), resolve("full")
    assert (quick.dataset, full.dataset) == ("digits", "cifar10")
    assert (full.teacher, full.students[0]) == ("resnet50", "cnn")
    assert len(quick.seeds) >= 5


def test_auto_is_full_with_cuda_and_quick_without(monkeypatch):
    assert resolve("auto") == resolve() == resolve("quick")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve() == resolve("full")


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("cuda", [True, False])
def test_auto_is_the_environments_profile_if_it_names_one(monkeypatch, name, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setenv("KDLIB_PROFILE", name)
    assert resolve("auto").name == name
    assert resolve("quick").name == "quick"  # what is asked for by name comes first


@pytest.mark.parametrize("value", ["", "auto"])
def test_an_environment_that_leaves_it_open_is_auto(monkeypatch, value):
    monkeypatch.setenv("KDLIB_PROFILE", value)
    assert resolve().name == "quick"


def test_an_unknown_profile_is_refused_with_the_nearest_name(monkeypatch):
    with pytest.raises(
        ValueError,
        match=r"profile 'quik' is unknown: expected auto, quick, laptop, full, laptop-repeat; did you mean 'quick'\?",
    ):
        resolve("quik")
    with pytest.raises(
        ValueError, match=r"profile 'xyz' is unknown: expected auto, quick, laptop, full, laptop-repeat$"
    ):
        resolve("xyz")
    monkeypatch.setenv("KDLIB_PROFILE", "ful")
    with pytest.raises(ValueError, match=r"profile 'ful' is unknown: .* did you mean 'full'\?"):
        resolve()


def test_an_unknown_parameter_is_refused_with_the_nearest_name():
    message = r"parameter 'temprature' is unknown: expected one of dataset, teacher, .*; did you mean 'temperature'\?"
    with pytest.raises(TypeError, match=message):
        resolve("quick", temprature=8)
    with pytest.raises(
        TypeError, match=r"parameter 'xyz' is unknown: expected one of dataset, teacher, .*, start_from$"
    ):
        resolve("quick", xyz=1)
    with pytest.raises(TypeError, match="parameter 'xyz' is unknown"):
        resolve("quick", xyz=None)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ({"temperature": 0}, "temperature is 0.0: expected a number above 0"),
        ({"temperature": "hot"}, "temperature is 'hot': expected a finite number"),
        ({"alpha": 1.2}, r"alpha is 1\.2: expected a number in \[0, 1\]"),
        ({"alpha": math.nan}, "alpha is nan: expected a finite number"),
        ({"limit": 0}, "limit is 0: expected a whole number from 1"),
        ({"limit": 2.5}, r"limit is 2\.5: expected a whole number from 1"),
        ({"n_seeds": 0}, "n_seeds is 0: expected a whole number from 1 to 1,000"),
        ({"seed": -1}, "seed is -1: expected a whole number from 0 to 4,294,965,295"),
        ({"epochs": 0}, "epochs is 0: expected a whole number of at least 1"),
        ({"epochs": True}, "epochs is True: expected a whole number of at least 1"),
        ({"alpha": True}, "alpha is True: expected a finite number"),
        ({"views": 0}, "views is 0: expected a whole number of at least 1, or None"),
        ({"start_from": "publised"}, "start_from is 'publised': expected one of scratch, .*; did you mean 'published'"),
        ({"start_from": 3}, "start_from is 3: expected one of scratch, published$"),
        ({"student": "tiny_cn"}, r"network 'tiny_cn' is unknown: .* did you mean 'tiny_cnn'\?"),
        ({"teacher": "resnet05"}, r"network 'resnet05' is unknown: .* did you mean 'resnet50'\?"),
        ({"teacher": "no_such:net"}, r"network 'no_such:net' cannot be imported \(No module named 'no_such'\)"),
        ({"student": nn.Linear(2, 2)}, r"network is a Linear that exists already: expected a function of"),
        ({"beta": -1}, r"beta is -1\.0: expected a number of at least 0"),
        ({"beta": "much"}, "beta is 'much': expected a finite number"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(override, message):
    with pytest.raises(ValueError, match=message):
        resolve("quick", **override)


def test_each_parameter_changes_what_it_names_and_nothing_else():
    given = {
        "dataset": "mnist",
        "teacher": "resnet18",
        "limit": 50,
        "size": 6,
        "padding": 0,
        "flip": True,
        "epochs": 2,
        "views": 3,
        "temperature": 8,
        "alpha": 0.5,
        "beta": 2,
        "student": "cnn",
        "n_seeds": 2,
        "seed": 6,
        "start_from": "published",
    }
    assert given.keys() == set(PARAMETERS)
    plain, changed = resolve("quick"), resolve("quick", **given)
    assert (changed.limit, changed.temperature, changed.alpha, changed.n_seeds) == (50, 8, 0.5, 2)
    assert (changed.beta, plain.beta) == (2, None)
    assert changed.images == {"limit": 50, "size": 6, "padding": 0, "flip": True}
    assert changed.students == ("cnn",)
    assert (changed.dataset, changed.teacher) == ("mnist", "resnet18")
    assert (changed.views, plain.views) == (3, None)
    assert (changed.start_from, plain.start_from) == ("published", "scratch")
    assert changed.seeds == (6, 7)
    teacher, student = changed.teacher_recipe, changed.student_recipe
    assert (teacher.epochs, teacher.seed, teacher.views) == (2, 6, plain.teacher_recipe.views)
    assert (student.epochs, student.seed, student.views) == (2, 6, 3)
    assert (changed.name, changed.threads) == (plain.name, plain.threads)
    assert teacher.learning_rate == plain.teacher_recipe.learning_rate
    assert student.learning_rate == plain.student_recipe.learning_rate
    for name, value in given.items():  # one at a time
        one = resolve("quick", **{name: value})
        fields = {f.name for f in dataclasses.fields(one) if getattr(one, f.name) != getattr(plain, f.name)}
        assert fields - {"run"} == {
            "student": {"students"},
            "epochs": {"teacher_recipe", "student_recipe"},
            "seed": {"seed", "teacher_recipe", "student_recipe"},
            "views": {"views", "student_recipe"},
        }.get(name, {name})


def test_alpha_above_one_needs_beta():
    with pytest.raises(ValueError, match=r"alpha is 1\.5: expected a number in \[0, 1\].*give beta as well"):
        resolve("quick", alpha=1.5)
    assert resolve("quick", alpha=1.5, beta=0.5).alpha == 1.5
    assert resolve("quick", beta=0).beta == 0  # not the same as leaving it out


def test_parameters_that_are_none_leave_the_profile_as_it_is():
    assert resolve("quick", **dict.fromkeys(PARAMETERS)) == resolve("quick")


def test_from_scratch_overrides_nothing_and_from_the_published_logits_is_a_run_of_its_own(tmp_path):
    assert resolve("quick", start_from="scratch") == resolve("quick")
    assert resolve("quick", start_from="published").folder.name.startswith("quick-")


def test_the_number_of_views_is_that_of_the_soft_labels_and_of_the_students():
    plain = resolve("full")
    fewer = plain.with_views(8)
    assert (fewer.views, fewer.student_recipe.views) == (8, 8)
    assert fewer.teacher_recipe == plain.teacher_recipe
    assert plain == resolve("full")


def test_the_profiles_themselves_are_never_changed():
    before = dict(PROFILES)
    resolve("quick", epochs=1, seed=4, student="cnn")
    assert before == PROFILES


def test_a_profile_has_its_own_folder_and_overrides_another(tmp_path):
    outputs = tmp_path / "outputs"
    assert resolve("quick").folder == outputs / "quick"
    folders = [
        resolve("quick", **overrides).folder
        for overrides in ({"seed": 1}, {"seed": 2}, {"temperature": 8.0}, {"seed": 1, "temperature": 8.0})
    ]
    assert len(set(folders)) == 4
    assert all(folder.parent == outputs and folder.name.startswith("quick-") for folder in folders)
    assert resolve("quick", temperature=8.0, seed=1).folder == folders[3]  # in whatever order they are given
    assert resolve("full", seed=1).folder.name.startswith("full-")


def test_a_run_may_name_its_folder(tmp_path):
    assert resolve("quick", run="mine", seed=1).folder == tmp_path / "outputs" / "quick-mine"
    assert resolve("quick", run="mine").folder == tmp_path / "outputs" / "quick-mine"
    assert resolve("quick", run="").folder == tmp_path / "outputs" / "quick"
    for name in ("x/..", "..", ".", "/tmp", "a b", "a\n", "a\0", "x" * 101, "a/b"):
        with pytest.raises(ValueError, match=r"run is .*: expected a name of letters"):
            resolve("quick", run=name)


def test_the_artefacts_have_the_names_of_the_design():
    full = resolve("full")
    assert full.file("teacher") == "teacher_resnet50.pth"
    assert full.file("distilled", "cnn") == full.file("distilled", "cnn", 0) == "student_cnn.pth"
    assert full.file("distilled", "cnn", 2) == "student_cnn_seed2.pth"
    assert full.file("student", "wide_resnet14", 1) == "student_wide_resnet14_alone_seed1.pth"
    assert resolve("quick", seed=3).file("distilled", "tiny_cnn", 3) == "student_tiny_cnn.pth"


def test_no_two_networks_of_a_profile_share_a_file():
    for profile in map(resolve, PROFILES):
        files = [profile.file("teacher")] + [
            profile.file(role, network, seed)
            for role in ("student", "distilled")
            for network in profile.students
            for seed in profile.seeds
        ]
        assert len(set(files)) == len(files)


def test_artefacts_go_where_the_environment_says_otherwise_to_the_clone_or_the_working_folder(monkeypatch, tmp_path):
    assert outputs_folder() == tmp_path / "outputs"
    monkeypatch.setenv("KDLIB_OUTPUTS", "~/mine")
    assert outputs_folder() == Path.home() / "mine"
    monkeypatch.delenv("KDLIB_OUTPUTS")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(fetch, "__file__", str(tmp_path / "clone" / "kdlib" / "records" / "fetch.py"))
    assert outputs_folder() == tmp_path / "work" / "outputs"
    (tmp_path / "clone" / "book").mkdir(parents=True)
    (tmp_path / "clone" / "book" / "intro.md").write_text("# The book")
    assert outputs_folder() == tmp_path / "clone" / "outputs"


def test_what_a_profile_has_anyway_is_no_override():
    profile = resolve("full")
    same = resolve("full", temperature=int(profile.temperature), alpha=profile.alpha, n_seeds=profile.n_seeds)
    assert same == profile
    assert same.folder == profile.folder
    hotter = resolve("full", temperature=8, alpha=profile.alpha)
    assert hotter.folder == resolve("full", temperature=8.0).folder != profile.folder


# --- networks and data of one's own ----------------------------------------------------------------------------------


def small(classes, channels, width=8):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, width), nn.ReLU(), nn.Linear(width, classes))


def test_networks_can_be_given_in_every_form_that_build_takes():
    profile = resolve("quick", teacher=small, student=functools.partial(small, width=3), run="mine")
    assert profile.teacher is small
    assert build(profile.students[0], 10, 1)[1].out_features == 3
    assert profile.file("teacher") == f"teacher_{__name__}.small.pth"
    assert profile.file("distilled", profile.students[0], 0) == f"student_{__name__}.small.pth"
    path = (
        resolve("quick", teacher="tests.nets:small") if False else resolve("quick", student="kdlib.models:Perceptron")
    )
    assert path.file("student", path.students[0]) == "student_kdlib.models.Perceptron_alone.pth"


def test_the_folder_of_a_run_with_a_network_of_ones_own_rests_on_no_address_in_memory():
    again = types.FunctionType(small.__code__, globals())  # as another process has it: elsewhere in memory
    assert repr(again) != repr(small)
    for name in ("teacher", "student"):
        first, second = (resolve("quick", **{name: network}).folder for network in (small, again))
        assert first == second != resolve("quick").folder


def test_a_data_set_can_be_a_name_or_a_path(tmp_path):
    assert resolve("quick", dataset="mnist").dataset == "mnist"
    assert resolve("quick", dataset=tmp_path / "photos").dataset == str(tmp_path / "photos")
    assert resolve("quick", dataset="digits") == resolve("quick")  # what the profile has anyway
    folders = {resolve("quick", dataset=tmp_path / name).folder for name in ("photos", "drawings")}
    assert len(folders) == 2


# --- from a notebook's parameters ------------------------------------------------------------------------------------


def notebook(source: str = "", **injected) -> dict:
    """The globals of a notebook after its parameters cell, and papermill's cell with other values after it."""
    variables = {"__name__": "__main__", "In": ["", source], "Out": {}, "_i": source, "_": "", "exit": object()}
    exec("import kdlib\nfrom pathlib import Path\n" + (source or DECLARED), variables)
    return variables | injected


DECLARED = """
profile: str = "quick"  # quick or full
run: str = None
temperature: float = None  # T
alpha: float = None
student: str = None
seed: int = None
"""


def test_a_notebook_gets_the_profile_that_its_parameters_ask_for():
    assert notebook_settings(notebook()) == resolve("quick")
    settings = notebook_settings(notebook(temperature=8, student="tiny_cnn"))
    assert settings == resolve("quick", temperature=8.0, student="tiny_cnn")
    assert notebook_settings(notebook(profile="full", seed=3)) == resolve("full", seed=3)
    assert notebook_settings(notebook(run="mine")).folder.name == "quick-mine"


def test_without_a_profile_among_its_parameters_it_is_auto(monkeypatch):
    source = "temperature: float = 4.0\nalpha: float = 0.1\n"
    assert notebook_settings(notebook(source)) == resolve("quick")
    monkeypatch.setenv("KDLIB_PROFILE", "full")
    assert notebook_settings(notebook(source)).name == "full"


@pytest.mark.parametrize("value", [8, 8.0, "8", None, True, [8], {"T": 8}])
def test_a_parameter_that_the_notebook_does_not_have_is_an_error_with_the_nearest_name(value):
    message = r"parameter 'temprature' is unknown: expected one of profile, run, temperature, .*mean 'temperature'\?"
    with pytest.raises(TypeError, match=message):
        notebook_settings(notebook(temprature=value))


@pytest.mark.parametrize("name", ["beta", "dataset", "teacher", "views"])  # known, but not to this notebook
def test_a_parameter_of_another_notebook_is_an_error(name):
    with pytest.raises(TypeError, match=rf"parameter '{name}' is unknown: expected one of profile, run, temperature"):
        notebook_settings(notebook(**{name: None}))
    assert notebook_settings(notebook(DECLARED + f"{name}: str = None\n")) == resolve("quick")


def test_a_value_out_of_range_is_an_error_here_too():
    with pytest.raises(ValueError, match=r"temperature is 0\.0: expected a number above 0"):
        notebook_settings(notebook(temperature=0))
    with pytest.raises(ValueError, match="network 'tiny_cn' is unknown"):
        notebook_settings(notebook(student="tiny_cn"))
    with pytest.raises(ValueError, match="profile 'quik' is unknown"):
        notebook_settings(notebook(profile="quik"))


@pytest.mark.parametrize("value", [[4.0], {"T": 4}, object(), torch.zeros(1), (4.0,)])
def test_an_object_in_place_of_a_plain_value_is_an_error(value):
    with pytest.raises(TypeError, match=rf"parameter temperature is a {type(value).__name__}: expected a plain value"):
        notebook_settings(notebook(temperature=value))


def test_run_again_after_the_rest_of_the_notebook_it_gives_the_same():
    variables = notebook(temperature=8)
    variables["settings"] = notebook_settings(variables)
    variables |= {"accuracy": 0.9, "rows": [1, 2], "name": "a variable of the notebook's own"}
    assert notebook_settings(variables) == variables["settings"]
    variables["temperature"] = 4.0  # the parameters cell was edited
    assert notebook_settings(variables).temperature == 4.0
    variables["student"] = build("tiny_cnn", 10, 1)  # the notebook used a parameter's name for an object
    with pytest.raises(ValueError, match="a TinyCNN that exists already"):
        notebook_settings(variables)


def test_variables_that_are_no_plain_values_are_the_notebooks_own_affair():
    variables = notebook()
    variables |= {"data": object(), "loss": small, "net": nn.Linear(1, 1), "_private": 3, "np": math}
    assert notebook_settings(variables) == resolve("quick")


def test_the_second_run_of_laptop_has_other_seeds_and_other_training_images():
    first, second = (resolve(name) for name in ("laptop", "laptop-repeat"))
    assert not set(first.seeds + first.search_seeds) & set(second.seeds + second.search_seeds)
    assert first.limit.images == second.limit.images
    assert first.limit.block != second.limit.block
    assert first.base == second.base == "laptop"
    assert first.folder != second.folder
    same = {"name": "", "seed": 0, "limit": None, "teacher_recipe": None, "student_recipe": None}
    assert dataclasses.replace(first, **same) == dataclasses.replace(second, **same)
    assert second.limit_of(25_000) == second.limit._replace(images=25_000)
    assert resolve("full").limit_of(25_000) is None
    assert resolve("laptop", limit=100).limit_of(25_000) == 100


def test_each_teacher_has_a_file_of_its_own():
    settings = resolve("laptop-repeat")
    assert settings.file("teacher") == settings.file("teacher", seed=100) == "teacher_lenet.pth"
    assert settings.file("teacher", seed=101) == "teacher_lenet_seed101.pth"
