"""Folders of pictures as they occur: each kind is built, and says what should come of it.

A kind changes a plain folder and the truth about it: which pixels are in which split, with which label. Or it returns a
pattern: then the folder should be refused with a message that matches.
"""

import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")
HEIGHT, WIDTH = 8, 10


class Folder:
    """``train/`` and ``test/`` with two classes of RGB pictures, and the truth about them."""

    def __init__(self, root: Path):
        self.root, self.random = root, np.random.RandomState(0)
        self.truth: dict[str, list] = {"train": [], "test": []}  # split -> [(pixels, label)]
        self.options: dict = {}  # for load_data
        self.names = CLASSES
        for split, count in (("train", 12), ("test", 3)):
            for name in CLASSES:
                for k in range(count):
                    self.add(split, name, f"{k}.png")

    def pixels(self, *shape) -> np.ndarray:
        return self.random.randint(0, 256, shape or (HEIGHT, WIDTH, 3)).astype(np.uint8)

    def file(self, split: str, name: str, file: str) -> Path:
        path = self.root / split / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, split: str, name: str, file: str, **kwargs) -> np.ndarray:
        """A picture of a class, and its pixels."""
        pixels = self.pixels()
        Image.fromarray(pixels).save(self.file(split, name, file), **kwargs)
        self.expect(pixels, split, name)
        return pixels

    def expect(self, pixels: np.ndarray, split: str = "train", name: str = "cat") -> None:
        self.truth.setdefault(split, []).append((pixels, CLASSES.index(name) if name else -1))

    def picture(self, image: Image.Image, file: str, pixels: np.ndarray, **kwargs) -> None:
        """A training cat of another kind, and the pixels that it should be read as."""
        image.save(self.file("train", "cat", file), **kwargs)
        self.expect(np.broadcast_to(pixels.reshape(HEIGHT, WIDTH, -1), (HEIGHT, WIDTH, 3)))


def grey(values: np.ndarray) -> np.ndarray:
    return np.round(values).astype(np.uint8)


# --- files that are no pictures of the set ------------------------------------------------------------------------


def finder_copy(f):
    f.file("train", "cat", "._0.png").write_bytes(b"\0\5\x16\7Mac OS X")


def ds_store(f):
    f.file("train", "cat", ".DS_Store").write_bytes(b"x")
    (f.root / "train" / ".DS_Store").write_bytes(b"x")
    (f.root / ".DS_Store").write_bytes(b"x")


def checkpoints_in_a_class(f):
    shutil.copytree(f.root / "train/cat", f.root / "train/cat/.ipynb_checkpoints")


def checkpoints_beside_the_classes(f):
    for split in ("train", "test"):
        shutil.copytree(f.root / split / "cat", f.root / split / ".ipynb_checkpoints")


def empty_checkpoints(f):
    (f.root / "train/.ipynb_checkpoints").mkdir()


def macosx_folder(f):
    shutil.copytree(f.root / "train", f.root / "train/__MACOSX")


def thumbs_and_notes(f):
    for name in ("Thumbs.db", "notes.txt", "labels.csv", "0.png.json"):
        f.file("train", "dog", name).write_bytes(b"x")
    (f.root / "train/readme.md").write_text("x")


# --- names and places ---------------------------------------------------------------------------------------------


def capital_endings(f):
    f.add("train", "cat", "100.PNG")


def capital_splits(f):
    (f.root / "train").rename(f.root / "Train")
    (f.root / "test").rename(f.root / "TEST")


def validation_apart(f, name="val"):
    for label in CLASSES:
        for k in range(2):
            pixels = f.pixels()
            Image.fromarray(pixels).save(f.file(name, label, f"{k}.png"))
            f.expect(pixels, "validation", label)


def validation_called_valid(f):
    validation_apart(f, "valid")


def validation_in_full(f):
    validation_apart(f, "Validation")


def two_validation_folders(f):
    validation_apart(f)
    validation_apart(f, "valid")
    return r"has val and valid: expected one of them"


def deep_folders(f):
    f.add("train", "cat", "2024/may/1.png")


def a_folder_called_like_a_picture(f):
    f.add("train", "cat", "album.png/1.png")


def names_in_other_scripts(f):
    f.add("train", "cat", "кот 猫\n🐈.png")


def one_name_in_two_spellings(f):
    """é as one letter in train/, as two in test/: the class is the same."""
    for split, form in (("train", "NFC"), ("test", "NFD")):
        (f.root / split / "cat").rename(f.root / split / unicodedata.normalize(form, "café"))
    f.names = ("café", "dog")


def no_test_folder(f):
    """The test images are held out of the training images."""
    shutil.rmtree(f.root / "test")
    del f.truth["test"]


def classes_alone(f):
    no_test_folder(f)
    for name in CLASSES:
        (f.root / "train" / name).rename(f.root / name)
    (f.root / "train").rmdir()
    (f.root / "README.txt").write_text("x")


def classes_alone_and_a_stray_picture(f):
    classes_alone(f)
    Image.fromarray(f.pixels()).save(f.root / "overview.png")
    return r"overview\.png lies outside of any class's folder"


def classes_alone_of_deep_folders(f):
    classes_alone(f)
    (f.root / "cat" / "black").mkdir()
    return r"has no folder train \(it has cat, dog\)"


def splits_by_other_names(f):
    for split in ("train", "test"):
        (f.root / split).rename(f.root / f"{split}ing")
    return r"has no folder train \(it has testing, training\)"


def no_test_folder_and_no_labels(f):
    no_test_folder(f)
    for name in CLASSES:
        for file in (f.root / "train" / name).iterdir():
            file.rename(f.root / "train" / f"{name}{file.name}")
        (f.root / "train" / name).rmdir()
    return r"no class folders in .*train"


def train_is_a_file(f):
    shutil.rmtree(f.root / "train")
    (f.root / "train").write_text("x")
    return r"has no folder train"


def no_class_folders(f):
    for name in CLASSES:
        shutil.rmtree(f.root / "test" / name)
    Image.fromarray(f.pixels()).save(f.root / "test/0.png")
    return r"no class folders in .*test"


def a_class_in_train_only(f):
    shutil.rmtree(f.root / "test/dog")
    return r"class 'dog' is in train only"


def an_empty_class(f):
    for split in ("train", "test"):
        (f.root / split / "emu").mkdir()
    return r"emu holds no image"


def one_picture_of_a_class(f):
    for k in range(1, 12):
        (f.root / f"train/dog/{k}.png").unlink()
    return r"class 'dog' has no train image"


def a_rare_class(f):
    for k in range(2, 12):
        (f.root / f"train/dog/{k}.png").unlink()
    f.truth["train"] = f.truth["train"][:14]


def a_stray_test_picture(f):
    Image.fromarray(f.pixels()).save(f.root / "test/stray.png")
    return r"stray\.png lies outside of any class's folder"


def unlabelled_pictures(f):
    validation_apart(f)
    for k in range(5):
        pixels = f.pixels()
        Image.fromarray(pixels).save(f.root / f"train/{k}.png")
        f.expect(pixels, "train", "")


def nothing_labelled_in_train(f):
    validation_apart(f)
    shutil.rmtree(f.root / "train")
    f.truth["train"] = []
    (f.root / "train").mkdir()
    for k in range(5):
        pixels = f.pixels()
        Image.fromarray(pixels).save(f.root / f"train/{k}.png")
        f.expect(pixels, "train", "")


def nothing_labelled_and_no_validation(f):
    nothing_labelled_in_train(f)
    shutil.rmtree(f.root / "val")
    return r"no training image has a label, so none can be held out .* a folder val/"


# --- links and other files ----------------------------------------------------------------------------------------


def _outside(f) -> Path:
    folder = f.root.parent / "elsewhere"
    folder.mkdir()
    for k in range(2):
        pixels = f.pixels()
        Image.fromarray(pixels).save(folder / f"{k}.png")
        f.expect(pixels)
    return folder


def linked_files(f):
    for file in sorted(_outside(f).iterdir()):
        (f.root / "train/cat" / f"linked {file.name}").symlink_to(file)


def linked_folder(f):
    (f.root / "train/cat/more").symlink_to(_outside(f), target_is_directory=True)


def linked_class(f):
    (f.root / "train/cat").rename(f.root.parent / "cats")
    (f.root / "train/cat").symlink_to(f.root.parent / "cats", target_is_directory=True)


def a_loop(f):
    (f.root / "train/cat/again").symlink_to(f.root / "train/cat", target_is_directory=True)


def a_loop_to_the_root(f):
    (f.root / "train/cat/all").symlink_to(f.root, target_is_directory=True)


def a_relative_loop(f):
    (f.root / "train/cat/up").symlink_to("../..", target_is_directory=True)


def two_loops(f):
    inside = f.root / "train/cat/a"
    inside.mkdir()
    (inside / "b").symlink_to(f.root / "train/cat/c", target_is_directory=True)
    (f.root / "train/cat/c").symlink_to(inside, target_is_directory=True)


def a_link_that_leads_to_itself(f):
    (f.root / "train/cat/me.png").symlink_to(f.root / "train/cat/me.png")
    return r"me\.png is not an image that can be read"


def a_link_to_another_class(f):
    (f.root / "train/cat/friends").symlink_to(f.root / "train/dog", target_is_directory=True)


def one_picture_linked_twice(f):
    (f.root / "train/cat/again.png").symlink_to(f.root / "train/cat/0.png")


def hard_links(f):
    os.link(f.root / "train/cat/0.png", f.root / "train/cat/copy.png")


def a_broken_link(f):
    (f.root / "train/cat/gone.png").symlink_to(f.root / "nowhere.png")
    return r"gone\.png is not an image that can be read"


def a_pipe(f):
    os.mkfifo(f.root / "train/cat/pipe.png")
    return r"pipe\.png is not an image that can be read \(no regular file\)"


def an_empty_file(f):
    f.file("train", "cat", "empty.png").touch()
    return r"empty\.png is not an image"


def a_truncated_file(f):
    whole = (f.root / "train/cat/0.png").read_bytes()
    f.file("train", "cat", "cut.png").write_bytes(whole[: len(whole) // 2])
    return r"cut\.png is not an image"


def a_damaged_file(f):
    whole = bytearray((f.root / "train/cat/0.png").read_bytes())
    whole[len(whole) // 2] ^= 0xFF
    f.file("train", "cat", "bad.png").write_bytes(whole)
    return r"bad\.png is not an image"


def a_text_called_png(f):
    f.file("train", "cat", "page.png").write_text("<html>404 not found</html>")
    return r"page\.png is not an image"


def a_bad_header(f):
    f.file("train", "cat", "bad.ppm").write_bytes(b"P6\n8 8\n2x5\n" + bytes(192))
    return r"bad\.ppm is not an image"


def a_huge_picture(f):
    Image.new("1", (20_000, 9_000)).save(f.file("train", "cat", "big.png"))
    return r"big\.png is not an image"


def a_picture_just_too_large(f):
    Image.new("1", (11_000, 9_200)).save(f.file("train", "cat", "big.png"))
    return r"big\.png is not an image.*exceeds limit"


# --- kinds of pictures --------------------------------------------------------------------------------------------


def sixteen_bits(f, file="deep.png"):
    values = f.random.randint(0, 65536, (HEIGHT, WIDTH)).astype(np.uint16)
    values[0, 0] = 65535
    f.picture(Image.fromarray(values), file, grey(values / 257.0))


def sixteen_bits_tiff(f):
    sixteen_bits(f, "deep.tif")


def twelve_bits_of_sixteen(f):
    values = f.random.randint(0, 4096, (HEIGHT, WIDTH)).astype(np.uint16)
    Image.fromarray(values).save(f.file("train", "cat", "deep.png"))
    return r"16-bit pictures have no value above 4,\d\d\d"


def thirty_two_bits(f):
    values = f.random.randint(0, 256, (HEIGHT, WIDTH)).astype(np.int32)
    Image.fromarray(values).save(f.file("train", "cat", "deep.tif"))
    return r"deep\.tif .*mode I: expected"


def _colour_of_sixteen_bits(f, file: str, values: np.ndarray) -> None:
    """A PNG of 16-bit RGB, which PIL does not write."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    f.file("train", "cat", file).write_bytes(b"\x89PNG\r\n\x1a\n" + content)


def sixteen_bits_of_colour(f):
    values = f.random.randint(0, 2**16, (HEIGHT, WIDTH, 3))
    _colour_of_sixteen_bits(f, "deep.png", values)
    f.expect((values >> 8).astype(np.uint8))


def twelve_bits_of_sixteen_in_colour(f):
    _colour_of_sixteen_bits(f, "deep.png", f.random.randint(0, 2**12, (HEIGHT, WIDTH, 3)))
    return r"the 16-bit pictures have no value above 4,095"


def floats(f):
    values = f.random.rand(HEIGHT, WIDTH).astype(np.float32)
    f.picture(Image.fromarray(values), "float.tif", grey(values * 255))


def floats_to_255(f):
    Image.fromarray(f.pixels(HEIGHT, WIDTH).astype(np.float32)).save(f.file("train", "cat", "float.tif"))
    return r"float\.tif .*floats from \d+ to 2\d\d: expected a range from 0 to 1"


def floats_that_are_none(f):
    Image.fromarray(np.full((HEIGHT, WIDTH), np.nan, np.float32)).save(f.file("train", "cat", "nan.tif"))
    return r"nan\.tif .*floats from nan"


def eight_bits_of_grey(f):
    pixels = f.pixels(HEIGHT, WIDTH)
    f.picture(Image.fromarray(pixels), "grey.png", pixels)


def black_and_white(f):
    pixels = 255 * f.random.randint(0, 2, (HEIGHT, WIDTH)).astype(np.uint8)
    f.picture(Image.fromarray(pixels).convert("1", dither=Image.Dither.NONE), "bits.png", pixels)


def _of_sixteen_colours(f) -> tuple[Image.Image, np.ndarray, np.ndarray]:
    """A picture with a palette, its palette, and its pixels' numbers in that."""
    colours, numbers = f.pixels(16, 3), f.random.randint(0, 16, (HEIGHT, WIDTH)).astype(np.uint8)
    image = Image.fromarray(numbers, "L").convert("P")
    image.putdata(numbers.ravel().tolist())
    image.putpalette(colours.ravel().tolist())
    return image, colours, numbers


def a_palette(f):
    image, colours, numbers = _of_sixteen_colours(f)
    f.picture(image, "palette.png", colours[numbers])


def a_palette_with_a_transparent_colour(f):
    image, colours, numbers = _of_sixteen_colours(f)
    colours[3] = 255
    f.picture(image, "palette.png", colours[numbers], transparency=3)


def transparent(f):
    pixels = f.pixels(HEIGHT, WIDTH, 4)
    opacity = pixels[..., 3:] / 255.0
    f.picture(Image.fromarray(pixels), "alpha.png", grey(pixels[..., :3] * opacity + 255 * (1 - opacity)))


def one_colour_that_is_transparent(f):
    pixels = f.pixels()
    pixels[:3] = (7, 7, 7)
    white = pixels.copy()
    white[:3] = 255
    f.picture(Image.fromarray(pixels), "keyed.png", white, transparency=(7, 7, 7))


def transparent_grey(f):
    pixels = f.pixels(HEIGHT, WIDTH, 2)
    opacity = pixels[..., 1] / 255.0
    f.picture(Image.fromarray(pixels, "LA"), "alpha.png", grey(pixels[..., 0] * opacity + 255 * (1 - opacity)))


def cmyk(f):
    ink = f.pixels(HEIGHT, WIDTH, 4)
    ink[..., 3] = 0  # without black, each channel is what its ink leaves
    f.picture(Image.fromarray(ink, "CMYK"), "print.tif", 255 - ink[..., :3])


def lab(f):
    Image.fromarray(f.pixels(), "LAB").save(f.file("train", "cat", "lab.tif"))
    return r"lab\.tif .*mode LAB: expected"


def lossless_kinds(f):
    for ending, options in ((".bmp", {}), (".ppm", {}), (".tiff", {}), (".webp", {"lossless": True})):
        f.add("train", "cat", f"other{ending}", **options)


def animated(f):
    frames = [Image.fromarray(255 * (f.pixels(HEIGHT, WIDTH) > 127).astype(np.uint8)) for _ in range(3)]
    first = np.asarray(frames[0])
    f.picture(frames[0], "moving.gif", first, save_all=True, append_images=frames[1:])


def turned(f):
    """The eight EXIF orientations: how the stored pixels have to be turned to be seen upright."""
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    for orientation, stored in undo.items():
        upright = f.pixels()
        exif = Image.Exif()
        exif[0x0112] = orientation
        image = Image.fromarray(np.ascontiguousarray(stored(upright)))
        f.picture(image, f"turned {orientation}.png", upright, exif=exif)


# --- sizes ----------------------------------------------------------------------------------------


def another_size(f):
    Image.fromarray(f.pixels(9, 4, 3)).save(f.file("test", "dog", "odd.png"))
    return r"odd\.png is 4x9, expected 10x8 like the others: .*size=8"


def sizes_to_resize(f):
    """Every picture is of one colour, and of another size: resized, it is still of that colour."""
    shutil.rmtree(f.root)
    f.truth = {}
    for split, count in (("train", 12), ("test", 3)):
        for name in CLASSES:
            for k in range(count):
                colour = f.pixels(1, 1, 3)
                large = np.broadcast_to(colour, (f.random.randint(3, 40), f.random.randint(3, 40), 3))
                Image.fromarray(np.ascontiguousarray(large)).save(f.file(split, name, f"{k}.png"))
                f.expect(np.broadcast_to(colour, (6, 6, 3)), split, name)
    f.options = {"size": 6}


# --- the same picture twice ---------------------------------------------------------------------------------------


def a_test_picture_among_the_training_ones(f):
    shutil.copy(f.root / "test/cat/0.png", f.root / "train/cat/leak.png")
    f.expect(f.truth["test"][0][0])
    return {"warning": r"1 test image is also in train \(such as test/cat/0\.png and train/cat/leak\.png\)"}


def a_picture_with_two_labels(f):
    shutil.copy(f.root / "train/cat/0.png", f.root / "train/dog/same.png")
    f.expect(f.truth["train"][0][0], "train", "dog")
    return {"warning": r"1 train image occurs twice with different labels|validation image is also in train"}


NO_KINDS = ("grey", "Folder")
KINDS = [
    thing
    for name, thing in list(globals().items())
    if getattr(thing, "__module__", "") == __name__ and name not in NO_KINDS and not name.startswith("_")
]
