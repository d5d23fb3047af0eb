"""Downloads from servers of this machine that misbehave in every way: one error each, in time, and no wrong file."""

import hashlib
import http.server
import io
import shutil
import threading
import time

import pytest
import torchvision

from kdlib.records import download as downloads
from kdlib.records.download import download
from kdlib.sources import known

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Responds to the next requests as the functions in `script` do, to later ones as the last; lists the ranges."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.script, self.ranges, self.stop = [whole], [], threading.Event()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, *_):
        pass  # that the client has gone is what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.close_connection = True
        self.server.ranges.append(self.headers.get("Range"))
        script = self.server.script
        (script.pop(0) if len(script) > 1 else script[0])(self)

    def start(self, status=200, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


def whole(h):
    """A server that knows ranges."""
    start = int((h.headers.get("Range") or "bytes=0-")[6:-1])
    more = {"Content_Range": f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}"} if start else {}
    h.start(206 if start else 200, Content_Length=len(CONTENT) - start, **more)
    h.wfile.write(CONTENT[start:])


def without_ranges(h):
    h.start(Content_Length=len(CONTENT))
    h.wfile.write(CONTENT)


def without_length(h):
    h.start()
    h.wfile.write(CONTENT)


def half(h):
    h.start(Content_Length=len(CONTENT))
    h.wfile.write(CONTENT[: len(CONTENT) // 2])


def other(h):
    h.start(Content_Length=len(CONTENT))
    h.wfile.write(CONTENT[::-1])


def silent(h):
    h.start(Content_Length=len(CONTENT))
    h.wfile.write(CONTENT[:1000])
    h.wfile.flush()
    h.server.stop.wait(20)


def never(h):
    h.server.stop.wait(20)


def dripping(h, content=b"x"):
    h.start(Content_Length=len(CONTENT))
    while not h.server.stop.wait(0.05):
        h.wfile.write(content)


def dripping_header(h):
    h.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
    while not h.server.stop.wait(0.05):
        h.wfile.write(b"x")


def endless(h):
    h.start()
    while not h.server.stop.is_set():
        h.wfile.write(bytes(2**16))


def huge(h):
    h.start(Content_Length=10**15)


def wrong_range(h):
    h.start(206, Content_Length=10, Content_Range="bytes 3-12/9999")
    h.wfile.write(bytes(10))


def no_such_range(h):
    if h.headers.get("Range"):
        h.start(416, Content_Length=0, Content_Range=f"bytes */{len(CONTENT)}")
    else:
        without_ranges(h)


def garbage(h):
    h.wfile.write(bytes(range(256)) * 100)


def closed(h):
    pass


def status(number):
    return lambda h: h.start(number, Content_Length=0)


def leading(to, then=whole):
    return lambda h: then(h) if h.path == "/there" else h.start(302, Location=to, Content_Length=0)


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    one = Server()
    thread = threading.Thread(target=one.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield one
    one.stop.set()
    one.shutdown()
    one.server_close()
    thread.join()


def fetch(server, path, **limits):
    download(f"{server.address}/file", path, SHA256, **{"most": 10**6, "seconds": 20, **limits})


@pytest.mark.parametrize(
    "act", [whole, without_ranges, without_length, leading("/there")], ids=lambda act: act.__name__
)
def test_a_file_arrives_whole(server, tmp_path, act):
    server.script = [act]
    fetch(server, tmp_path / "a" / "f")
    assert (tmp_path / "a" / "f").read_bytes() == CONTENT
    assert [path.name for path in (tmp_path / "a").glob("[!.]*")] == ["f"]


@pytest.mark.parametrize("act", [whole, without_ranges])
def test_it_goes_on_where_it_stopped_if_the_server_can(server, tmp_path, act):
    server.script = [half, act]
    with pytest.raises(OSError, match="it ended after 128,000 of 256,000 bytes; the next try goes on from there"):
        fetch(server, tmp_path / "f")
    assert not (tmp_path / "f").exists()
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=128000-"]


@pytest.mark.parametrize(
    ("before", "act", "requests"),
    [
        (CONTENT, no_such_range, 1),  # all of it had arrived
        (b"of another file", whole, 2),
        (CONTENT + b"!", no_such_range, 2),
        (b"of another file", no_such_range, 2),
    ],
)
def test_what_arrived_before_is_used_only_if_it_belongs_to_the_file(server, tmp_path, before, act, requests):
    (tmp_path / "f.part").write_bytes(before)
    server.script = [act]
    fetch(server, tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert len(server.ranges) == requests


def test_another_file_is_refused_and_nothing_is_kept_of_it(server, tmp_path):
    server.script = [other]
    found = hashlib.sha256(CONTENT[::-1]).hexdigest()
    with pytest.raises(ValueError, match=f"/file is not what was expected: its sha256 is {found}, expected {SHA256}"):
        fetch(server, tmp_path / "f")
    assert not list(tmp_path.glob("f*"))


REFUSED = {
    "silence": (silent, "timed out"),
    "no response": (never, "timed out"),
    "drops": (dripping, "it took (more than 1 seconds|too long)"),
    "a header in drops": (dripping_header, "it took more than 1 seconds"),
    "no end": (endless, "it has more than 1,000,000 bytes"),
    "too much": (huge, "it has 1,000,000,000,000,000 bytes, expected at most 1,000,000"),
    "a wrong range": (wrong_range, "it responds with status 206 to a request for a file"),
    "garbage": (garbage, "BadStatusLine|bad status|Invalid|ended|closed"),
    "a closed connection": (closed, "closed connection|reset"),
    "nothing": (status(204), "it responds with status 204"),
    "no such file": (status(404), "HTTP Error 404"),
    "an error of its own": (status(500), "HTTP Error 500"),
    "a circle": (leading("/file"), "infinite loop"),
    "another host": (leading("http://localhost/there"), "it leads to http://localhost/there, expected http://127"),
    "another port": (leading("http://127.0.0.1:1/there"), "it leads to http://127.0.0.1:1/there, expected"),
    "another scheme": (leading("https://127.0.0.1/there"), "it leads to https://127.0.0.1/there, expected"),
    "a file of this machine": (leading("file:///etc/passwd"), "not allowed|it leads to file"),
    "a name and a password": (leading("http://me:secret@127.0.0.1:1/"), "it leads to"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_a_server_that_misbehaves_is_given_up_on_in_time(server, tmp_path, monkeypatch, what):
    act, message = REFUSED[what]
    monkeypatch.setattr(downloads, "SILENCE", 0.3)
    server.script = [act]
    start = time.monotonic()
    with pytest.raises(OSError, match=message):
        fetch(server, tmp_path / "f", seconds=1)
    assert time.monotonic() - start < 10
    assert not (tmp_path / "f").exists()
    assert all(path.stat().st_size <= 10**6 for path in tmp_path.glob("f.part"))


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "data:,x", "/etc/passwd", ""])
def test_nothing_but_the_web_is_read(tmp_path, url):
    with pytest.raises(OSError, match="expected an address that begins with https://"):
        download(url, tmp_path / "f", SHA256, most=100, seconds=5)


def test_github_may_lead_to_its_own_files_and_to_nothing_else():
    handler = downloads._StayThere()
    request = downloads.urllib.request.Request("https://github.com/a/b/raw/HEAD/c")
    for there in ("https://raw.githubusercontent.com/a/b/c", "https://github.com/c"):
        assert handler.redirect_request(request, None, 302, "", {}, there).full_url == there
    for elsewhere in ("http://raw.githubusercontent.com/a", "https://raw.githubusercontent.com.evil.org/a"):
        with pytest.raises(OSError, match="it leads to"):
            handler.redirect_request(request, io.BytesIO(), 302, "", {}, elsewhere)


# --- torchvision's archives ------------------------------------------------------------------------------------------


class OneArchive:
    """As much of a data set of torchvision's as is looked at: one archive, which is a folder when it is unpacked."""

    base_folder, filename, url = "unpacked", "archive.tar.gz", ""
    tgz_md5 = hashlib.md5(CONTENT, usedforsecurity=False).hexdigest()


@pytest.mark.parametrize("before", [CONTENT, CONTENT[:1000], b"a page of a hotel's network", b"", None])
def test_a_broken_unpack_is_removed_and_an_archive_is_mended(server, tmp_path, monkeypatch, before):
    monkeypatch.setattr(OneArchive, "url", f"{server.address}/archive.tar.gz")
    (tmp_path / "unpacked" / "inside").mkdir(parents=True)
    if before is not None:
        (tmp_path / "archive.tar.gz").write_bytes(before)
    known.prepare(OneArchive, tmp_path)
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["archive.tar.gz"]
    assert (tmp_path / "archive.tar.gz").read_bytes() == CONTENT
    assert (server.ranges[:1] == ["bytes=1000-"]) == (before == CONTENT[:1000])
    assert (server.ranges == []) == (before == CONTENT)


def test_of_several_addresses_one_that_works_is_enough(server, tmp_path, monkeypatch):
    class Several:
        resources = (("a.gz", OneArchive.tgz_md5),)
        mirrors = ("http://127.0.0.1:1/", f"{server.address}/")

    raw = tmp_path / "Several" / "raw"
    raw.mkdir(parents=True)
    (raw / "a").write_bytes(b"half unpack")
    known.prepare(Several, tmp_path)
    assert [path.name for path in raw.glob("[!.]*")] == ["a.gz"]
    shutil.rmtree(raw)
    Several.mirrors = Several.mirrors[:1]
    with pytest.raises(OSError, match=r"http://127\.0\.0\.1:1/a\.gz: .*refused"):
        known.prepare(Several, tmp_path)


def test_the_names_that_are_used_of_torchvision_are_there():
    for name in ("CIFAR10", "CIFAR100"):
        kind = getattr(torchvision.datasets, name)
        assert kind.filename.endswith(".tar.gz")
        assert len(kind.tgz_md5) == 32
        assert kind.url.endswith(kind.filename)
        assert kind.base_folder
    for name in ("MNIST", "FashionMNIST"):
        kind = getattr(torchvision.datasets, name)
        assert len(kind.resources) == 4
        assert all(file.endswith(".gz") and len(md5) == 32 for file, md5 in kind.resources)
        assert all(mirror.endswith("/") for mirror in kind.mirrors)
