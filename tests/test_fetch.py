"""Published files: those of the clone, or fetched by https, and never one that differs from its record."""

import email.message
import hashlib
import importlib.metadata
import json
import re
from pathlib import Path

import pytest

from kdlib.records import fetch
from kdlib.records.fetch import published_file, repository_address

ADDRESS = "https://example.org/book"
CONTENT = b"the teacher's logits"


def remote(content: bytes = CONTENT, of: bytes = CONTENT) -> dict[str, bytes]:
    """What the repository's address serves: a file, and the record of the file `of`."""
    url = f"{ADDRESS}/raw/HEAD/book/published/quick/logits.npy"
    return {url: content, f"{url}.json": json.dumps({"sha256": hashlib.sha256(of).hexdigest()}).encode()}


@pytest.fixture
def installed(monkeypatch, tmp_path):
    """kdlib as installed without a clone; a function that sets what its repository serves, and lists the requests.

    How it is downloaded is in test_download.py.
    """
    monkeypatch.setattr(fetch, "__file__", str(tmp_path / "site-packages" / "kdlib" / "records" / "fetch.py"))
    monkeypatch.setattr(fetch, "repository_address", lambda: ADDRESS)
    record = hashlib.sha256(remote()[next(url for url in remote() if url.endswith("json"))]).hexdigest()
    monkeypatch.setattr(fetch, "pins", lambda: {"quick/logits.npy.json": record})

    def serve(files: dict[str, bytes]) -> list[str]:
        requests = []

        def download(url: str, path: Path, sha256: str, *, most: int, seconds: float) -> None:
            assert 0 < seconds <= 600
            assert most <= 10**8
            requests.append(url)
            if url not in files:
                raise OSError("HTTP Error 404: Not Found")
            found = hashlib.sha256(files[url]).hexdigest()
            if found != sha256:
                raise ValueError(f"{url} is not what was expected: its SHA-256 is {found}, expected {sha256}")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[url])

        monkeypatch.setattr(fetch, "download", download)
        return requests

    return serve


def test_a_published_file_of_the_clone_is_checked_and_used_where_it_is(monkeypatch, tmp_path):
    monkeypatch.setattr(fetch, "__file__", str(tmp_path / "kdlib" / "records" / "fetch.py"))
    folder = tmp_path / "book" / "published" / "quick"
    folder.mkdir(parents=True)
    (tmp_path / "book" / "intro.md").write_text("# The book")
    with pytest.raises(FileNotFoundError, match=r"logits\.npy is not there: profile quick .*start_from=scratch"):
        published_file("quick", "logits.npy", tmp_path / "quick")
    for url, content in remote().items():
        (folder / url.rpartition("/")[2]).write_bytes(content)
    assert published_file("quick", "logits.npy", tmp_path / "quick") == folder / "logits.npy"
    assert not (tmp_path / "quick").exists()

    (folder / "logits.npy").write_bytes(CONTENT + b"!")
    expected, found = (hashlib.sha256(content).hexdigest() for content in (CONTENT, CONTENT + b"!"))
    message = rf"logits\.npy is not what was published: its SHA-256 is {found}, expected {expected}; .*git checkout -- "
    with pytest.raises(ValueError, match=message):
        published_file("quick", "logits.npy", tmp_path / "quick")
    (folder / "logits.npy.json").unlink()
    with pytest.raises(ValueError, match="expected one in its record, which has none"):
        published_file("quick", "logits.npy", tmp_path / "quick")


def test_without_a_clone_it_is_fetched_once_its_record_first(installed, tmp_path, contents):
    requests = installed(remote())
    path = published_file("quick", "logits.npy", tmp_path / "quick-1a2b")
    assert path == tmp_path / "quick-1a2b" / "published" / "logits.npy"
    assert path.read_bytes() == CONTENT
    assert requests == list(remote())[::-1]
    assert contents(path.parent).keys() == {"logits.npy", "logits.npy.json"}
    assert published_file("quick", "logits.npy", tmp_path / "quick-1a2b") == path
    assert len(requests) == 2


def test_a_fetched_file_or_record_that_differs_is_refused_with_what_to_do(installed, tmp_path):
    for served in (remote(content=b"something else"), remote(b"something else", of=b"something else")):
        installed(served)
        for _ in range(2):
            with pytest.raises(
                ValueError, match=r"SHA-256 is \w+, expected \w+; .*upgrade kdlib, .*start_from=scratch"
            ):
                published_file("quick", "logits.npy", tmp_path)
        assert not (tmp_path / "published" / "logits.npy").exists()


@pytest.mark.parametrize("name", ["logits.npy", "logits.npy.json"])
def test_a_fetched_file_or_record_that_was_changed_since_is_refused(installed, tmp_path, name):
    installed(remote())
    path = published_file("quick", "logits.npy", tmp_path)
    path.with_name(name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"{name} is not what .*: .*delete .*published, so that it is fetched again"):
        published_file("quick", "logits.npy", tmp_path)


@pytest.mark.parametrize("name", ["soft_labels.npy", "../../logits.npy", ""])
def test_what_kdlib_does_not_know_to_be_published_is_not_asked_for(installed, tmp_path, name):
    requests = installed(remote())
    with pytest.raises(FileNotFoundError, match="is not published as far as this kdlib knows: clone the repository"):
        published_file("quick", name, tmp_path)
    assert requests == []


def test_what_kdlib_knows_of_the_published_files_is_so():
    published = Path(__file__).parents[1] / "book" / "published"
    records = (path for path in published.glob("*/*.json") if path.with_suffix("").is_file())
    found = {f"{path.parent.name}/{path.name}": hashlib.sha256(path.read_bytes()).hexdigest() for path in records}
    assert fetch.pins() == found, "run `python tools/records.py`, which publishing does"


@pytest.mark.parametrize("kept", [0, 1])
def test_what_cannot_be_fetched_names_its_address_and_leaves_no_part_of_a_file(installed, tmp_path, kept):
    missing = list(remote())[::-1][kept]
    installed({url: content for url, content in remote().items() if url != missing})
    with pytest.raises(
        FileNotFoundError, match=re.escape(missing) + r" cannot be fetched \(HTTP Error 404: Not Found\): cl"
    ):
        published_file("quick", "logits.npy", tmp_path)
    assert not (tmp_path / "published" / "logits.npy").exists()


@pytest.mark.parametrize("address", ["http://example.org/book", "file:///book"])
def test_files_are_fetched_by_https_only(installed, tmp_path, monkeypatch, address):
    requests = installed({})
    monkeypatch.setattr(fetch, "repository_address", lambda: address)
    with pytest.raises(FileNotFoundError, match=r"expected an address that begins with https://"):
        published_file("quick", "logits.npy", tmp_path)
    assert requests == []


def test_the_repositorys_address_is_that_of_the_installed_package(monkeypatch):
    def metadata(*urls):
        message = email.message.Message()
        for url in urls:
            message["Project-URL"] = url
        monkeypatch.setattr(importlib.metadata, "metadata", lambda name: message)

    metadata("homepage, https://example.org", f"repository, {ADDRESS}/")
    assert repository_address() == ADDRESS
    metadata()
    with pytest.raises(FileNotFoundError, match="names no repository to fetch from: clone the repository"):
        repository_address()

    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    with pytest.raises(FileNotFoundError, match="names no repository"):
        repository_address()
