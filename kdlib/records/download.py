"""Downloading a file whose checksum is known: within limits, resumed where it stopped, and from nowhere else."""

from __future__ import annotations

import hashlib
import http.client
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path

from kdlib.records import files

SILENCE = 30  # seconds without a byte after which a server is given up on
CHUNK = 2**16  # bytes
# where an address may lead but to its own host: what is named here belongs to the same
SAME_HOUSE = {"github.com": ("raw.githubusercontent.com",)}
_PORTS = {"http": 80, "https": 443}


def download(url: str, path: Path, checksum: str, *, kind: str = "sha256", most: int, seconds: float) -> None:
    """Write the file at an address to `path`, if it is the expected one.

    What arrives is kept in ``<path>.part`` until it is all there, so that the next call goes on where this one stopped
    if the server can do so.

    Args:
        url: http or https.
        checksum: the expected digest of the file, in hexadecimal digits.
        kind: of the digest, as hashlib names it.
        most: bytes that the file may have.
        seconds: that this may take in all.

    Raises:
        OSError: the address cannot be reached, leads elsewhere, sends too much or too slowly, or stops.
        ValueError: it is another file than expected; nothing is kept of it.
    """
    part = path.with_name(f"{path.name}.part")
    files.check_writable(path.parent)
    with files.lock(path):
        resumed = part.exists() and part.stat().st_size > 0
        found = _in_time(url, part, kind, most, seconds)
        if found != checksum and resumed:  # what was there before may have been of another file
            part.unlink(missing_ok=True)
            found = _in_time(url, part, kind, most, seconds)
        if found != checksum:
            part.unlink(missing_ok=True)
            raise ValueError(f"{url} is not what was expected: its {kind} is {found}, expected {checksum}")
        files.sync(part)
        files.replace(part, path)


def _in_time(url: str, part: Path, kind: str, most: int, seconds: float) -> str:
    """Fetch what is missing of the file, and return its digest. The thread is left behind if it does not end."""
    end, outcome = time.monotonic() + seconds, []

    def fetch() -> None:
        try:
            _fetch(url, part, most, end)
        except Exception as error:
            outcome.append(error)
        else:
            outcome.append(None)

    thread = threading.Thread(target=fetch, daemon=True)
    thread.start()
    thread.join(seconds)
    if not outcome:
        raise OSError(f"it took more than {seconds:g} seconds; what arrived is kept, and the next try goes on from it")
    if (error := outcome[0]) is not None:
        raise error if isinstance(error, OSError) else OSError(f"{type(error).__name__}: {error}") from error
    with open(part, "rb") as file:
        return hashlib.file_digest(file, kind).hexdigest()


def _fetch(url: str, part: Path, most: int, end: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    try:
        response = _open(url, have)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code != 416 or not have:  # the range asked for is not there: it is another file now, or all is here
            raise OSError(str(error)) from None
        if error.headers.get("Content-Range", "") == f"bytes */{have}":
            return
        part.unlink()
        have, response = 0, _open(url, 0)
    with response:
        goes_on = response.status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-")
        if response.status not in (200, 206) or (response.status == 206 and not goes_on):
            raise OSError(f"it responds with status {response.status} to a request for a file")
        have = have if goes_on else 0
        length = response.length  # bytes that are to come, if the server tells
        if have + (length or 0) > most:
            raise OSError(f"it has {have + length:,} bytes, expected at most {most:,}")
        with open(part, "ab" if goes_on else "wb") as file:
            arrived = 0
            while content := response.read1(CHUNK):
                arrived += len(content)
                if have + arrived > most:
                    raise OSError(f"it has more than {most:,} bytes, expected at most so many")
                if time.monotonic() > end:
                    raise OSError("it took too long")
                file.write(content)
        if length is not None and arrived < length:
            raise OSError(
                f"it ended after {have + arrived:,} of {have + length:,} bytes; the next try goes on from there"
            )


class _StayThere(urllib.request.HTTPRedirectHandler):
    """Follow an address only to the same scheme, host and port, or to the same house."""

    def redirect_request(self, request, file, code, message, headers, new_url):
        old, new = (urllib.parse.urlsplit(url) for url in (request.full_url, new_url))
        hosts = (_host(old), *((name, _PORTS["https"]) for name in SAME_HOUSE.get(old.hostname, ())))
        if new.scheme != old.scheme or _host(new) not in hosts:
            file.close()
            raise OSError(f"it leads to {new_url[:200]}, expected {old.scheme}://{old.netloc}")
        return super().redirect_request(request, file, code, message, headers, new_url)


def _host(url: urllib.parse.SplitResult) -> tuple[str | None, int | None]:
    return url.hostname, url.port or _PORTS.get(url.scheme)


def _open(url: str, start: int) -> http.client.HTTPResponse:
    if urllib.parse.urlsplit(url).scheme not in _PORTS:
        raise OSError("expected an address that begins with https://")
    headers = {"User-Agent": "kdlib"} | ({"Range": f"bytes={start}-"} if start else {})
    return urllib.request.build_opener(_StayThere).open(urllib.request.Request(url, headers=headers), timeout=SILENCE)
