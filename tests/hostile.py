"""Hostile and absurd files: for every reader of kdlib and the tools, whatever else might lie where its file should be.

    python -m tests.hostile                # well over a thousand files, each read in a process of its own: minutes

:mod:`tests.attacks` lists what is tried. A reader must give one error of the documented kind (ValueError or OSError)
that names the file, or say that it passes the file over; execute nothing; end within seconds; and take less than 2 GB
of memory, with PyTorch and all.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime  # noqa: F401  before a reader imports it in each process
import torch
from torch import nn

from kdlib import evaluate, load_data
from kdlib.data import ImageSet
from kdlib.deploy.export import OnnxModel
from kdlib.deploy.saved import load_saved
from kdlib.lab import rows
from kdlib.records import artefacts, documents, fetch
from kdlib.soft_labels import load_soft_labels
from kdlib.sources.pictures import read_picture
from kdlib.sources.stored import read_stored
from kdlib.sources.weights import weights_for
from kdlib.train import History
from tests import attacks

TOOLS = Path(__file__).resolve().parent.parent / "tools"
SECONDS, MEMORY, MOST = 30, 2 * 10**9, 4 * 2**30  # a file may take; bytes it may; bytes at which its process ends
PROGRAMS = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn")
BAD = ("executed", "hanging", "without a message", "read")


@dataclass
class Reader:
    """Who reads a file, and what it may find there."""

    name: str  # of the file
    read: Callable[[Path], object]
    attacks: dict[str, attacks.Write]
    prepare: Callable[[Path], object] = lambda path: None  # what else must lie there


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))


def passed_over(read: Callable[[], object]) -> object:
    """What is read; if that is nothing, the error is what was printed."""
    with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(said):
        found = read()
    if not found:
        raise ValueError(said.getvalue())
    return found


def written(contents: dict[str, bytes]) -> dict[str, attacks.Write]:
    return {name: partial(attacks.write, content=content) for name, content in contents.items()}


def readers(folder: Path) -> dict[str, Reader]:
    """Every reader, with all that attacks it; `folder` is for the files that they are made from."""
    sys.path.insert(0, str(TOOLS))
    import sweep

    torch.manual_seed(0)
    random_ = np.random.RandomState(0)
    model, made_from = network(), {"network": "mine", "data": "toy"}
    state, history = model.state_dict(), {"loss": [1.5], "accuracy": [0.5], "seconds": [1.0]}
    logits = random_.randn(2, 30, 3).astype(np.float16)
    images = torch.from_numpy(random_.randint(0, 256, (30, 8, 8, 1)).astype(np.uint8))
    statistics = {"mean": (0.3,), "std": (0.2,), "padding": 1, "flip": False}
    data = ImageSet("toy/train", images, torch.arange(30) % 3, ("a", "b", "c"), **statistics)
    arrays = {f"{s}_images": random_.randint(0, 256, (20, 4, 4, 1)).astype(np.uint8) for s in ("train", "test")}
    arrays |= {f"{s}_labels": np.arange(20) % 3 for s in ("train", "test")} | {"class_names": np.array(["a", "b", "c"])}
    run = {"role": "student", "network": "mine", "parameters": 9, "size_mb": 0.5, "seeds": [0], "accuracy": [0.5]}
    results = {"profile": "quick", "dataset": "toy", "runs": [run | {"latency_ms": {"CPU": {"1": 0.1}}}]}
    about = {"profile": "quick", "chapters": ["05"], "parameters": {"seed": 1}, "outcome": "done", "seconds": 1.5}
    about |= {"date": "2026-01-01", "made_from": "ab", "results": {"gain": {"0": 0.5}}}
    artefacts.save_weights(folder / "w.pth", model, fingerprint=made_from, history=history, format=data.format)
    artefacts.save_array(folder / "l.npy", logits, fingerprint={"data": data.identity})
    np.savez(folder / "d.npz", **arrays)
    attacks.Image.fromarray(random_.randint(0, 256, (32, 32, 3)).astype(np.uint8)).save(folder / "p.png")
    onnx.save(tiny_onnx(), folder / "n.onnx")
    store = rows.RowStore(folder / "05_x.json")
    store.measure("a", (0,), lambda seed: {"accuracy": 0.5}, made_from=made_from)
    store.finish()
    valid = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    record = documents.read_document(folder / "w.pth.json")
    objects, bad_json = {"histories": {"w.pth": history}}, written(attacks.bad_json())
    arrays_, archives = written(attacks.bad_arrays()), attacks.bad_archives(arrays)
    weights, pictures = attacks.bad_weights(dict(state)), written(attacks.bad_pictures())

    def beside(name: str) -> Callable[[Path], object]:
        return lambda path: path.with_name(name).write_bytes(valid[name])

    def read_record(path: Path) -> object:
        found = passed_over(lambda: artefacts.find(path.parent, "w.pth", made_from))
        artefacts.load_weights(found, network())
        return History(**(artefacts.record(found).get("history") or {}))

    def read_stored_set(path: Path) -> object:
        return read_stored("mnist", path.parent)

    def read_run(path: Path) -> object:
        sweep.RUNS = path.parent.parent
        if not path.exists():
            raise FileNotFoundError(f"{path}: a link to nothing is no record, and is not listed")
        found = passed_over(lambda: list(sweep.recorded().values()))
        sweep.side_by_side(found * 2)
        return [(sweep.in_words(one), sweep.parameters_of(one)) for one in found]

    def read_published(path: Path) -> object:
        fetch.clone_folder = lambda: path.parents[3]
        return fetch.published_file("quick", "l.npy", path.parent)

    def read_foreign(path: Path) -> object:
        return network().load_state_dict(weights_for(network(), path))

    def read_table(path: Path) -> object:
        return evaluate.results_rows(evaluate.load_results(path))

    def read_saved(path: Path) -> object:
        return load_saved(path.with_name("w.pth"), network=partial(linear))

    def read_histories(path: Path) -> object:
        return documents.read_form(path, {"w.pth": documents.HISTORY}, "restore it")

    def read_figures(path: Path) -> object:
        return documents.load_document(path, "file of figures", "delete it")

    altered = {name: written(attacks.altered(value)) for name, value in (("results", results), ("run", about))}
    altered |= {"record": written(attacks.altered(record)), "histories": written(attacks.altered(objects["histories"]))}
    every = {
        "weights": Reader("w.pth", lambda path: artefacts.load_weights(path, network()), weights),
        "weights without a suffix": Reader("w", lambda path: artefacts.load_weights(path, network()), {}),
        "a teacher's weights": Reader("t.pth", read_foreign, weights),
        "an array": Reader("a.npy", artefacts.load_array, arrays_),
        "soft labels": Reader("l.npy", lambda path: load_soft_labels(path, data), arrays_),
        "the reader's own data set": Reader("own.npz", load_data, archives),
        "a known data set": Reader("mnist.npz", read_stored_set, archives),
        "results": Reader("results.json", read_table, bad_json | altered["results"]),
        "rows": Reader("05_x.json", rows.load, bad_json),
        "measured figures": Reader("measured.json", read_figures, bad_json),
        "histories": Reader("histories.json", read_histories, bad_json | altered["histories"]),
        "the record of a run": Reader("quick/run.json", read_run, bad_json | altered["run"]),
        "a record": Reader("w.pth.json", read_record, bad_json | altered["record"], beside("w.pth")),
        "a record for export": Reader("w.pth.json", read_saved, bad_json | altered["record"], beside("w.pth")),
        "a published file": Reader("book/published/quick/l.npy", read_published, arrays_, beside("l.npy.json")),
        "its record": Reader("book/published/quick/l.npy.json", read_published, bad_json, beside("l.npy")),
        "a picture": Reader("p.png", read_picture, pictures),
        "a folder of pictures": Reader("photos", load_data, attacks.bad_folders(valid["p.png"])),
        "an ONNX file": Reader("n.onnx", OnnxModel, bad_onnx()),
    }
    for name, reader in every.items():
        of = {"results": results, "the record of a run": about, "histories": objects["histories"]}.get(name)
        content = json.dumps(of).encode() if of else valid.get(Path(reader.name).name, valid["w.pth"])
        reader.attacks = reader.attacks | attacks.anywhere(content)
        for other, bytes_ in valid.items():  # files of other kinds
            same = Path(other).suffixes == Path(reader.name).suffixes or name == "weights without a suffix"
            same |= name == "measured figures" and other.endswith(".json")  # any object may be some
            if not same:
                reader.attacks[f"the file {other}"] = partial(Path.write_bytes, data=bytes_)
    return every


def linear(classes: int, channels: int) -> nn.Module:
    return network()


def tiny_onnx(**metadata: str) -> onnx.ModelProto:
    """A network that casts its images, with what kdlib expects to be told of it."""
    make, kinds = onnx.helper, onnx.TensorProto
    node = make.make_node("Cast", ["images"], ["logits"], to=kinds.FLOAT)
    images = make.make_tensor_value_info("images", kinds.UINT8, ["batch", 4, 4, 1])
    graph = make.make_graph([node], "g", [images], [make.make_tensor_value_info("logits", kinds.FLOAT, None)])
    model = make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9)
    make.set_model_props(model, {"class_names": '["a"]', "temperature": "1.0", "fingerprint": "{}"} | metadata)
    return model


def bad_onnx() -> dict[str, attacks.Write]:
    """ONNX files with damaged metadata, and one that reads another file as its numbers."""
    found = {
        f"{name} {content[:20]!r}": partial(Path.write_bytes, data=tiny_onnx(**{name: content}).SerializeToString())
        for name in ("class_names", "temperature", "fingerprint")
        for content in ("", "[" * 100_000, "x", "\x00")
    }
    outside = tiny_onnx()
    tensor = onnx.TensorProto(name="w", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../../../../etc/passwd")
    outside.graph.initializer.append(tensor)
    outside.graph.node[0].output[0] = "numbers"
    outside.graph.node.append(onnx.helper.make_node("Add", ["numbers", "w"], ["logits"]))
    return found | {"numbers of another file": partial(Path.write_bytes, data=outside.SerializeToString())}


# --- one file -------------------------------------------------------------------------------------------------------


def attempt(reader: Reader, write: attacks.Write, folder: Path) -> tuple[str, str, int]:
    """What comes of reading such a file in a process of its own: the outcome, in words, and bytes of memory."""
    path = folder / reader.name
    path.parent.mkdir(parents=True, exist_ok=True)
    reader.prepare(path)
    here = Path.cwd()
    write(path)
    os.chdir(here)
    said, told = os.pipe()
    process = os.fork()
    if not process:
        os.close(said)
        outcome, words = in_the_process(reader, path, folder)
        os.write(told, json.dumps([outcome, words[:1000]]).encode())
        os._exit(0)
    os.close(told)
    with open(said, "rb") as pipe:
        answer = pipe.read()
    _, status, used = os.wait4(process, 0)
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        outcome = "hanging" if number == signal.SIGALRM else "without a message"
        return outcome, f"ended by {signal.Signals(number).name}", used.ru_maxrss * 1024
    outcome, words = json.loads(answer)
    if any(found.name == "executed" for found in [*folder.parent.iterdir(), *folder.rglob("executed")]):
        outcome = "executed"
    return outcome, words, used.ru_maxrss * 1024


def in_the_process(reader: Reader, path: Path, folder: Path) -> tuple[str, str]:
    """The outcome, in words; the process ends if it takes too long."""
    resource.setrlimit(resource.RLIMIT_DATA, (MOST, MOST))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)
    os.chdir(folder)
    programs: list[str] = []
    sys.addaudithook(lambda event, _: programs.append(event) if event in PROGRAMS else None)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            found = "read", repr(reader.read(path))[:100]
    except (ValueError, OSError) as error:
        named = any(part in str(error) for part in (path.name, path.name.removesuffix(".json")))
        documented = named and type(error).__module__ == "builtins" and not isinstance(error, UnicodeError)
        found = "refused" if documented else "without a message", f"{type(error).__name__}: {error}"
    except BaseException as error:
        found = "without a message", f"{type(error).__name__}: {error}"
    signal.alarm(0)
    return ("executed", ", ".join(programs)) if programs else found


# --- all of them ----------------------------------------------------------------------------------------------------


def harmless(attack: str) -> bool:
    """Whether such a file may be read: it is valid, or of JSON one value is another, which the reader makes do with."""
    return "may be read" in attack or attack.startswith("altered")


def cases(every: dict[str, Reader], share: int) -> Iterator[tuple[str, str]]:
    """Every one of `share` files of each reader, always the same ones."""
    for name, reader in every.items():
        chosen = sorted(reader.attacks)
        random.Random(name).shuffle(chosen)
        yield from ((name, attack) for attack in chosen[:: share if len(chosen) > share else len(chosen)])


def campaign(share: int = 1, only: str = "") -> tuple[Counter, int, list[str]]:
    """How often what came of it, the most memory that a file took, and what was bad about which."""
    counts, peak, bad = Counter(), 0, []
    with tempfile.TemporaryDirectory() as name:
        root = Path(os.path.realpath(name))
        (root / "valid").mkdir()
        every = readers(root / "valid")
        for reader, attack in cases(every, share):
            if only not in f"{reader}: {attack}":
                continue
            start, folder = time.perf_counter(), root / "case"
            folder.mkdir()
            outcome, words, memory = attempt(every[reader], every[reader].attacks[attack], folder)
            shutil.rmtree(folder)
            if outcome == "read" and harmless(attack):
                outcome = "harmless"
            counts[outcome] += 1
            peak = max(peak, memory)
            if only:
                print(f"{reader}: {attack}: {outcome}: {words[:300]}")
            if outcome in BAD or memory > MEMORY:
                seconds = time.perf_counter() - start
                bad.append(f"{reader}: {attack}: {outcome} ({memory / 1e9:.2f} GB, {seconds:.1f} s): {words[:300]}")
                print(bad[-1], flush=True)
    return counts, peak, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=int, default=1, help="every one of so many files only")
    parser.add_argument("--only", default="", help="files whose reader and attack have that in their names, in detail")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    counts, peak, bad = campaign(options.share, options.only)
    print(
        f"{counts.total():,} files: {counts['refused']:,} refused, {counts['harmless']} harmless, "
        f"{counts['read']} wrongly read, {counts['executed']} executed, {counts['hanging']} hanging, "
        f"{counts['without a message']} without a message; at most {peak / 1e9:.2f} GB"
    )
    if options.share == 1 and not options.only:
        from tests.campaigns import record

        names = ("refused", "harmless", "read", "executed", "hanging", "without a message")
        figures = {name.replace(" ", "_"): counts[name] for name in names}
        record("hostile", {"files": counts.total(), **figures, "peak_mb": peak / 1e6}, time.perf_counter() - start)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
