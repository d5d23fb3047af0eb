"""The files of :mod:`tests.hostile`: by name, what writes one that attacks whoever reads it.

Each is a function of a path. What is large is written piece by piece, so that writing it takes no memory itself.
"""

import copy
import gzip
import io
import json
import os
import pickle
import random
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

Write = Callable[[Path], object]
GIGABYTE = 2**30
ABSURD = (None, [], {}, [[]], "x", True, -1, 1e999, 10**20, {"a": {"b": []}}, "\ud800")  # in place of a JSON value


class Executed:
    """What makes a folder when it is unpickled."""

    folder = "executed"

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def compressed(size: int, block: bytes = bytes(2**20)) -> bytes:
    """Deflated zeros of that size, as zip archives have them."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    parts = [deflate.compress(block) for _ in range(size // len(block))]
    return b"".join(parts) + deflate.flush()


def zeros(megabytes: int) -> bytes:
    """Zeros as zlib has them."""
    deflate = zlib.compressobj(9)
    return b"".join(deflate.compress(bytes(2**20)) for _ in range(megabytes)) + deflate.flush()


def write(path: Path, content: bytes | Callable[[], bytes]) -> None:
    path.write_bytes(content() if callable(content) else content)


# --- for whatever is read -------------------------------------------------------------------------------------------


def anywhere(valid: bytes) -> dict[str, Write]:
    """What no reader expects in place of the file that it should read."""
    page, garbage = b"<!DOCTYPE html><title>Log in to the network</title>" * 20, random.Random(0)

    def made(function, *args):
        return lambda path: function(path, *args)

    def unix_socket(path):
        with socket.socket(socket.AF_UNIX) as one:
            os.chdir(path.parent)  # its address has at most 108 bytes
            one.bind(path.name)

    found = {
        "nothing": made(Path.write_bytes, b""),
        "a byte": made(Path.write_bytes, b"\x80"),
        "a page of a hotel's network": made(Path.write_bytes, page),
        "the same in gzip": made(Path.write_bytes, gzip.compress(page)),
        "the file in gzip": made(Path.write_bytes, gzip.compress(valid)),
        "a pointer of Git LFS": made(Path.write_bytes, b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "zeros": made(Path.write_bytes, bytes(10_000)),
        "a script": made(Path.write_bytes, b"#!/bin/sh\nmkdir executed\n"),
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "a socket": unix_socket,
        "a link to nothing": made(Path.symlink_to, "nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to its folder": made(Path.symlink_to, "."),
        "a link to a device": made(Path.symlink_to, "/dev/zero"),
        "a link to a pipe": lambda path: (os.mkfifo(path.with_name("pipe")), path.symlink_to("pipe")),
        "a tar file": lambda path: tarfile.open(path, "w").close(),
    }
    for k in range(6):
        found[f"garbage {k}"] = made(Path.write_bytes, garbage.randbytes(10 ** (k % 4 + 1)))
    for k in range(1, 8):
        found[f"{k} eighths of it"] = made(Path.write_bytes, valid[: k * len(valid) // 8])
    for protocol in range(6):
        content = pickle.dumps({"weight": Executed()}, protocol)
        found[f"a pickle of protocol {protocol}"] = made(Path.write_bytes, content)
    return found


# --- arrays ---------------------------------------------------------------------------------------------------------


def header(text: str, version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    length = len(text) if length is None else length
    packed = struct.pack("<H" if version == (1, 0) else "<I", length)
    return b"\x93NUMPY" + bytes(version) + packed + text.encode()


def promised(shape: str, dtype: str = "'<f4'") -> bytes:
    return header(f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n") + bytes(64)


def bad_arrays() -> dict[str, bytes]:
    """What numpy.load might make too much of."""
    objects = io.BytesIO()
    np.save(objects, np.array([Executed()], object), allow_pickle=True)
    text = "{'descr': '<f4', 'fortran_order': False, 'shape': (4,), }\n"
    shapes = ("(1000000000,)", "(10**12,)", "(999999999999,)", "(4611686018427387904, 4)", "(2147483648, 2147483648)")
    shapes += ("(-1,)", "(-4, -4)", "(99999999999999999999999,)", "(1.5,)", "'x'", "(4,) * 99", "(None,)", "((4,),)")
    found = {f"of shape {shape}": promised(shape) for shape in shapes}
    types = ("'|S2000000000'", "'<U999999999'", "'|V2147483647'", "'<f4,' * 9", "[('a', '<f4', (9999, 9999, 99))]")
    types += ("'|O'", "'x'", "None", "('<f4', (99999, 99999))", "[('a', '|O')]")
    found |= {f"of type {dtype}": promised("(4,)", dtype) for dtype in types}
    found |= {f"{n} of nothing": promised(f"({n},)", "'<U0'") for n in (10**9, 10**15)}
    return found | {
        "an object": objects.getvalue(),
        "a header of 4 GB": header(text, (2, 0), 2**32 - 1),
        "a header of zeros": header("", (2, 0), 2**30) + bytes(2**20),
        "of version 3": header(text, (3, 0)) + bytes(16),
        "of version 9": header(text, (9, 9)) + bytes(16),
        "a header of brackets": header("(" * 60_000),
        "a long header": header(text.strip() + " " * 60_000 + "\n") + bytes(16),
        "a header that is code": header("__import__('os').mkdir('executed')\n"),
        "a header of another kind": header("[1, 2]\n"),
    }


def bad_zips(entry: str) -> dict[str, Write]:
    """Archives whose entry of that name is a trap; the content does not matter."""

    def bomb(path, megabytes, copies=1):
        content, size = compressed(megabytes * 2**20), megabytes * 2**20
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for k in range(copies):
                archive.writestr(entry if not k else f"{k}{entry}", content)
        data = bytearray(path.read_bytes())  # stored, but said to be deflated
        for magic, method, sizes in ((b"PK\x03\x04", 8, 18), (b"PK\x01\x02", 10, 20)):
            at = data.find(magic)
            while at >= 0:
                if struct.unpack_from("<I", data, at + sizes)[0] == len(content):
                    struct.pack_into("<H", data, at + method, 8)
                    struct.pack_into("<I", data, at + sizes + 4, size)
                at = data.find(magic, at + 4)
        path.write_bytes(data)

    def other(path, method, megabytes=200):
        with zipfile.ZipFile(path, "w", method) as archive, archive.open(entry, "w") as file:
            for _ in range(megabytes):
                file.write(bytes(2**20))

    def said(path, size):
        """A small entry that is said to be that large."""
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(entry, bytes(1000))
        data = bytearray(path.read_bytes())
        struct.pack_into("<I", data, data.find(b"PK\x03\x04") + 22, size)
        struct.pack_into("<I", data, data.find(b"PK\x01\x02") + 24, size)
        path.write_bytes(data)

    def many(path):
        with zipfile.ZipFile(path, "w") as archive:
            for k in range(20_000):
                archive.writestr(f"{k}", b"")

    def named(path, name, content=b"x"):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)

    def encrypted(path):
        named(path, entry)
        data = bytearray(path.read_bytes())
        data[data.find(b"PK\x03\x04") + 6] |= 1
        data[data.find(b"PK\x01\x02") + 8] |= 1
        path.write_bytes(data)

    def overlapping(path):
        """Two hundred entries that are the same bytes."""
        named(path, entry, bytes(2**20))
        data = path.read_bytes()
        start = data.find(b"PK\x01\x02")
        one, end = data[start : data.find(b"PK\x05\x06")], data[data.find(b"PK\x05\x06") :]
        count, size = struct.pack("<HH", 200, 200), struct.pack("<I", 200 * len(one))
        path.write_bytes(data[:start] + one * 200 + end[:8] + count + size + end[16:])

    found = {f"a bomb of {m} MB": partial(bomb, megabytes=m) for m in (300, 1500, 4000)}
    found |= {"ten bombs of 200 MB": partial(bomb, megabytes=200, copies=10)}
    found |= {"lzma": partial(other, method=zipfile.ZIP_LZMA), "bzip2": partial(other, method=zipfile.ZIP_BZIP2)}
    found |= {f"said to have {size:,} bytes": partial(said, size=size) for size in (0, 10, 2**28 - 1, 2**32 - 2)}
    found |= {f"an entry {name!r}": partial(named, name=name) for name in ("../../executed", "/executed", "a" * 9000)}
    found |= {"twenty thousand entries": many, "an encrypted entry": encrypted, "entries that overlap": overlapping}
    return found


def bad_archives(valid: dict[str, np.ndarray]) -> dict[str, Write]:
    """``.npz`` files: traps, and arrays that fit nothing."""

    def member(path, content, name):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for other, array in valid.items():
                archive.writestr(f"{other}.npy", content if other == name else array_file(array))

    def changed(path, name, array):
        np.savez(path, **{k: v for k, v in {**valid, name: array}.items() if v is not None})

    found = dict(bad_zips("train_images.npy"))
    for attack, content in bad_arrays().items():
        for name in ("train_images", "class_names"):
            found[f"{name} {attack}"] = partial(member, content=content, name=name)
    n = len(valid["train_images"])
    odd = {
        "missing": None,
        "empty": np.zeros((0, 4, 4, 1), np.uint8),
        "a number": np.array(3),
        "complex": np.full((n, 4, 4, 1), 1j),
        "not numbers": np.full((n, 4, 4, 1), np.nan),
        "infinite": np.full((n, 4, 4, 1), np.inf),
        "of dates": np.zeros((n, 4, 4, 1), "datetime64[s]"),
        "of texts": np.full((n, 4, 4, 1), "x"),
        "of nine axes": np.zeros((1,) * 9, np.uint8),
        "of fewer": valid["train_images"][: n - 1],
        "of another size": np.zeros((n, 5, 5, 1), np.uint8),
        "structured": np.zeros(n, [("a", "<f4"), ("b", "<i8")]),
    }
    found |= {f"images {what}": partial(changed, name="train_images", array=array) for what, array in odd.items()}
    labels = {
        "missing": None,
        "huge": np.full(n, 2**62),
        "negative": np.full(n, -7),
        "not numbers": np.full(n, np.nan),
        "complex": np.full(n, 1j),
        "fractions": np.full(n, 0.5),
        "empty": np.zeros(0, np.int64),
        "a table": np.zeros((n, 3)),
        "unsigned and huge": np.full(n, 2**64 - 1, np.uint64),
    }
    found |= {f"labels {what}": partial(changed, name="train_labels", array=array) for what, array in labels.items()}
    names = {
        "numbers": np.arange(3),
        "twice": np.array(["a", "a", "b"]),
        "bytes": np.array([b"\xff", b"\xfe", b"a"]),
        "none": np.array([], "<U1"),
        "a table": np.array([["a", "b"]]),
    }
    return found | {f"names {what}": partial(changed, name="class_names", array=array) for what, array in names.items()}


def array_file(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


# --- weights --------------------------------------------------------------------------------------------------------


def calls(name: str, argument: int, depth: int = 1) -> bytes:
    """A pickle of {"a": name(argument)}, which no pickler writes."""
    return b"\x80\x02}X\x01\x00\x00\x00ac" + name.encode() + b"\nJ" + struct.pack("<i", argument) + b"\x85Rs."


def doubling(times: int) -> bytes:
    """A pickle that has a text in hexadecimal digits in hexadecimal digits, and so on."""
    latin, codec = (b"X" + struct.pack("<I", len(name)) + name for name in (b"latin1", b"hex"))
    nested = b"c_codecs\nencode\nX\x04\x00\x00\x00aaaa" + latin + b"\x86R"
    for _ in range(times):
        nested = b"c_codecs\nencode\n" + nested + codec + b"\x86R"
    return b"\x80\x02}X\x01\x00\x00\x00a" + nested + b"s."


def with_pickle(path: Path, content: bytes, method: int = zipfile.ZIP_STORED) -> None:
    """What torch.save writes of a tensor, but another pickle beside it."""
    whole = io.BytesIO()
    torch.save({"a": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(path, "w", method) as archive:
        for name in source.namelist():
            archive.writestr(name, content if name.endswith("data.pkl") else source.read(name))


def said_of_tensor(place: int, number: int) -> bytes:
    """The pickle of a tensor of four numbers, one of whose two fours is changed."""
    whole = io.BytesIO()
    torch.save({"a": torch.ones(4)}, whole)
    with zipfile.ZipFile(whole) as archive:
        content = archive.read("archive/data.pkl")
    at = content.index(b"K\x04") if not place else content.rindex(b"K\x04")
    return content[:at] + b"J" + struct.pack("<i", number) + content[at + 2 :]


def bad_weights(valid: dict[str, torch.Tensor]) -> dict[str, Write]:
    """Files of torch.save: traps, and states that fit no network."""
    first = next(iter(valid))
    itself: dict = {"state_dict": {}}
    itself["state_dict"]["state_dict"] = itself
    maze = {"k": valid[first][:1]}
    for _ in range(3):
        maze = {f"k{k}": maze for k in range(2000)}
    deep: dict = {}
    for _ in range(300):
        deep = {"model": deep}
    changed = {
        "not numbers": torch.full_like(valid[first], float("nan")),
        "infinite": torch.full_like(valid[first], float("inf")),
        "complex": torch.full(valid[first].shape, 1j),
        "of texts": "x",
        "sparse": valid[first].to_sparse(),
        "on no device": torch.empty(valid[first].shape, device="meta"),
        "of another shape": torch.ones(7, 7),
        "shown a billion times": torch.ones(1).expand(10**9),
        "boolean": torch.ones(3, dtype=torch.bool),
    }
    states = {f"{first} {what}": {**valid, first: value} for what, value in changed.items()}
    states |= {
        "an empty state": {},
        "a list": [1, 2],
        "a number": 3,
        "a tensor": torch.ones(3),
        "a text": "x" * 1000,
        "bytes": {"a": b"x"},
        "keys of numbers": {k: valid[first] for k in range(3)},
        "a long name": {"a" * 100_000: valid[first]},
        "an object": {"a": Executed()},
        "an object among the weights": {**valid, "optimizer": Executed()},
        "a mapping that holds itself": itself,
        "eight billion ways to one tensor": maze,
        "three hundred mappings": deep,
        "ten thousand names before": {f"{k}.{first}": valid[first] for k in range(10_000)},
        "a network": torch.nn.Linear(2, 2),
    }
    found = {what: partial(save, state=state) for what, state in states.items()}
    found |= {f"{what}, as of old": partial(save, state=s, old=True) for what, s in states.items() if s is not maze}
    pickles = {
        "bytes from nothing": calls("builtins\nbytearray", 2**31 - 1),
        "bytes from nothing, as of Python 2": calls("__builtin__\nbytearray", 2**31 - 1),
        "a text that doubles": doubling(31),
        "a tensor from nothing": calls("torch\nFloatTensor", 2**31 - 1),
        "a storage from nothing": calls("torch\nFloatStorage", 2**31 - 1),
        "a call of the system": b"\x80\x02cos\nmkdir\nX\x08\x00\x00\x00executed\x85R.",
        "a call by another name": b"\x80\x02cbuiltins\neval\nX\x05\x00\x00\x001 + 1\x85R.",
        "a hundred thousand marks": b"\x80\x02" + b"(" * 100_000 + b".",
        "a pickle that does not end": b"\x80\x02]" + b"]" * 1000,
        "a memo that is not there": b"\x80\x02h\x07.",
        "a stack that is empty": b"\x80\x02R.",
        "more numbers than there are": said_of_tensor(0, 10**9),
        "a larger shape than its numbers": said_of_tensor(1, 10**9),
        "a negative shape": said_of_tensor(1, -4),
    }
    found |= {what: partial(with_pickle, content=content) for what, content in pickles.items()}
    found |= {f"{what}, alone": partial(Path.write_bytes, data=content) for what, content in pickles.items()}
    found |= {f"pickle: {what}": write for what, write in bad_zips("archive/data.pkl").items()}
    found["a program"] = lambda path: torch.jit.save(torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)), path)
    return found


def save(path: Path, state: object, old: bool = False) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=not old)


# --- JSON -----------------------------------------------------------------------------------------------------------


def bad_json() -> dict[str, bytes]:
    """What is no JSON object, or a trap for who reads one."""
    return {
        "hardly deep (may be read)": b'{"a":' * 900 + b"1" + b"}" * 900,
        "a list": b"[]",
        "a number": b"3",
        "null": b"null",
        "a text": b'"x"',
        "true": b"true",
        "not a number": b"NaN",
        "deep lists": b"[" * 100_000,
        "deep lists that end": b"[" * 50_000 + b"]" * 50_000,
        "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
        "a number of a million digits": b'{"a": ' + b"9" * 10**6 + b"}",
        "two objects": b"{} {}",
        "a comment": b"{} // x",
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a byte order mark": b"\xef\xbb\xbf{}",
        "no UTF-8": b'{"a": "\xff"}',
        "a zero": b'{"a": "\x00"}',
        "forty megabytes of brackets": b'{"a": [' + b"[]," * 13_000_000 + b"[]]}",
        "thirty megabytes of brackets (may be read)": b'{"a": [' + b"{}," * 10_000_000 + b"{}]}",
        "forty megabytes of text": b'{"a": "' + b"x" * 40_000_000 + b'"}',
    }


def places(value: object, path: tuple = ()) -> list[tuple]:
    """The way to every value in a JSON value; of a list's items to the first."""
    inside = value.items() if isinstance(value, dict) else list(enumerate(value))[:1] if isinstance(value, list) else ()
    return [found for key, item in inside for found in [(*path, key), *places(item, (*path, key))]]


def altered(valid: dict) -> dict[str, bytes]:
    """An object without one of its values, or with an absurd one in its place."""
    found = {}
    for path in places(valid):
        for other in (..., *ABSURD):
            whole = copy.deepcopy(valid)
            holder = whole
            for key in path[:-1]:
                holder = holder[key]
            if other is ...:
                del holder[path[-1]]
            else:
                holder[path[-1]] = other
            what = "missing" if other is ... else ascii(other)
            found[f"altered: {'.'.join(map(str, path))} {what}"] = json.dumps(whole).encode()
    return found


# --- pictures -------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, bits: int = 8, colour: int = 2, data: bytes | None = None, more: bytes = b"") -> bytes:
    if data is None:
        samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
        row, deflate = bytes(1 + -(-width * samples * bits // 8)), zlib.compressobj(9)
        data = b"".join(deflate.compress(row) for _ in range(height)) + deflate.flush()
    size = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + more + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def bad_pictures() -> dict[str, bytes | Callable[[], bytes]]:
    """Pictures that are larger than they seem, other programs' files, and damaged ones; what is large when called."""
    tiff, gif = io.BytesIO(), io.BytesIO()
    Image.new("L", (8, 8)).save(tiff, "TIFF")
    Image.new("P", (64, 64)).save(gif, "GIF")
    gif_bytes = gif.getvalue()
    frame = gif_bytes[gif_bytes.index(b",", 13) : -1]
    circle = bytearray(tiff.getvalue())
    first = struct.unpack_from("<I", circle, 4)[0]
    struct.pack_into("<I", circle, first + 2 + 12 * struct.unpack_from("<H", circle, first)[0], first)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(executed) (w) file\n%%EOF\n"
    kinds = {"grey": (8, 0), "deep grey": (16, 0), "colour": (8, 2), "deep colour": (16, 2), "opacity": (8, 6)}
    found = {f"9,000 pixels square of {kind}": partial(png, 9000, 9000, *way) for kind, way in kinds.items()}
    found |= {
        "said to have 4 GB": png(2**31 - 1, 1, data=b""),
        "said to have any size": png(2**31 - 1, 2**31 - 1, data=zlib.compress(b"x")),
        "of no size": png(0, 0, data=b""),
        "a line (may be read)": png(3_000_000, 1),
        "a text of 300 MB (may be read)": lambda: png(8, 8, more=chunk(b"zTXt", b"a\0\0" + zeros(300))),
        "a profile of 300 MB (may be read)": lambda: png(8, 8, more=chunk(b"iCCP", b"a\0\0" + zeros(300))),
        "without data": png(8, 8, data=b""),
        "another program": postscript,
        "the same for Windows": b"\xc5\xd0\xd3\xc6" + struct.pack("<II", 32, len(postscript)) + bytes(20) + postscript,
        "a drawing": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
        "a document": b"%PDF-1.4\n1 0 obj<</OpenAction<</S/Launch/F(mkdir executed)>>>>\n%%EOF",
        "an icon": b"\0\0\1\0\1\0" + bytes(16),
        "a metafile": b"\xd7\xcd\xc6\x9a" + bytes(100),
        "a Photoshop file": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 300_000, 300_000, 8, 3) + bytes(100),
        "FITS": b"SIMPLE  =                    T" + b" " * 3000,
        "said to be a bitmap of 4 GB": b"BM"
        + struct.pack("<IIIIiiHHIIIIII", 99, 0, 54, 40, 40000, 40000, 1, 24, *[0] * 6),
        "said to be a graymap": b"P5 99999 99999 255\n" + bytes(100),
        "said to have endless digits": b"P5 " + b"9" * 100_000 + b" 1 255\n",
    }
    readable = {"a hundred thousand frames": gif_bytes[:-1] + frame * 100_000 + b";"}
    readable |= {"frames in a circle": bytes(circle), "long": png(40_000, 2)}
    return found | {f"{what} (may be read)": content for what, content in readable.items()}


def bad_folders(picture: bytes) -> dict[str, Write]:
    """Folders of pictures; `picture` is one that can be read."""

    def plain(path, count=4):
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                (path / split / name).mkdir(parents=True)
                for k in range(count if split == "train" else 1):
                    shade = Image.new("L", (8, 8), random.Random(f"{split}{name}{k}").randrange(255))
                    shade.save(path / split / name / f"{k}.png")
        return path / "train" / "cat"

    def deeper(path, depth):
        inside = plain(path)
        for _ in range(depth):
            inside = inside / "a"
            inside.mkdir()
        (inside / "x.png").write_bytes(picture)

    def one(path, act):
        act(plain(path) / "x.png")

    def rename(path, name):
        cat = plain(path)
        for split in ("train", "test"):
            os.rename(path / split / "cat", os.path.join(os.fsencode(path / split), name))
        return cat

    found = {f"{depth} folders deep": partial(deeper, depth=depth) for depth in (70, 300)}
    for what, content in bad_pictures().items():
        if "may be read" not in what and ("pixels" in what or "program" in what or "said" in what):
            found[f"with a picture {what}"] = partial(one, act=partial(write, content=content))
    acts = {
        "a pipe": os.mkfifo,
        "a link to nothing": lambda path: path.symlink_to("nowhere"),
        "a link to itself": lambda path: path.symlink_to(path.name),
        "a link to a device": lambda path: path.symlink_to("/dev/zero"),
        "a pickle": lambda path: path.write_bytes(pickle.dumps(Executed())),
    }
    found |= {f"with {what}": partial(one, act=act) for what, act in acts.items()}
    names = {"no UTF-8": b"\xff\xfe", "a line break": b"a\nb", "an escape": b"\x1b[31m", "a bell": b"\x07"}
    found |= {f"a class named with {what}": partial(rename, name=name) for what, name in names.items()}
    readable = {
        "links in circles": lambda path: (plain(path) / "up").symlink_to("../.."),
        "a folder that is named as a picture": lambda path: one(path, Path.mkdir),
        "a pipe that is no picture": lambda path: os.mkfifo(plain(path) / "notes"),
    }
    found |= {"empty": Path.mkdir, "a class without pictures": lambda path: (plain(path).parent / "eel").mkdir()}
    return found | {f"{what} (may be read)": write for what, write in readable.items()}
