"""Download of the known data sets: several sources, the fastest first (layer 2).

A file has a size and an MD5 sum, which torchvision checks too, so that any server may offer it.
All sources of a file are asked at once for its first bytes, and the fastest is used. A source that
falls below 1 MB/s, fails repeatedly or offers another file is replaced by the next one, which
continues at the same byte. If all are slow, the fastest of them finishes, unless it delivers less
than 10 kB/s.
"""

import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from cifar_resnet_fast.errors import first_line

_SLOWEST = 1e6  # bytes per second; a slower source is left while there are others
_TRICKLE = 1e4  # bytes per second, at which CIFAR would take 5 hours
_OVER_SECONDS = 5.0  # over which the speed is measured
_SILENT_SECONDS = 10.0  # a connection that gives nothing for so long is broken
_PROBE_SECONDS = 6.0  # finding out that no source can be reached takes at most this long
# what the fastest source must have given to be known as such; or all of a smaller file
_PROBE_BYTES = 2**21
_SAY_EVERY_SECONDS = 30.0  # where there is no terminal to move a bar on
_PART = 2**18


class DataUnavailableError(OSError):
    """A known data set is not on the disk and cannot be downloaded; the message says why."""


@dataclass(frozen=True)
class RemoteFile:
    """A file that never changes.

    name: on the disk
    size: bytes
    md5: as torchvision has it
    urls: that are known to offer these very bytes
    unpacked: bytes that it takes on the disk when it is unpacked, besides its own
    """

    name: str
    size: int
    md5: str
    urls: tuple[str, ...]
    unpacked: int = 0


class _SourceFailed(Exception):
    """A source does not deliver the file; the message says why."""


class _BrokenOff(_SourceFailed):
    """The connection ended or fell silent; another one may go on."""


class _TooSlow(_SourceFailed):
    """The source may be taken if no other one is faster.

    speed: bytes a second
    """

    def __init__(self, speed: float):
        super().__init__(f"{speed / 1e6:.2f} MB/s")
        self.speed = speed


def fetch(
    file: RemoteFile, folder: Path, url: str | None = None, patience: float | None = None
) -> Path:
    """Ensure that a file is in ``folder``, complete and with its MD5 sum.

    An interrupted download stays beside it as NAME.part and is continued.

    Args:
        url: the only source to use, instead of the known ones
        patience: seconds; if all sources are slow, one that would take longer is not taken.
            None: wait for it

    Returns:
        its path

    Raises:
        ValueError: ``url`` is none
        DataUnavailableError: no source delivers it; names each one and the reason
        OSError: ``folder`` cannot be written
    """
    if url is not None and not url.startswith(("http://", "https://", "file://")):
        raise ValueError(f"data_url must begin with http://, https:// or file://, got {url!r}")
    path = folder / file.name
    if md5_of(path) == file.md5:
        return path
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{file.name}.part"
    with open(part, "ab") as out:
        if not _lock(out, file.name):
            return fetch(file, folder, url, patience)  # another process has had it meanwhile
        if md5_of(path) == file.md5:  # another process has had it before the part was opened
            part.unlink()
            return path
        if out.tell() > file.size:
            _empty(out)
        needed = file.size - out.tell() + file.unpacked
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise DataUnavailableError(
                f"{file.name} needs {needed / 1e6:.0f} MB in {folder}, "
                f"{free / 1e6:.0f} MB are free"
            )
        try:
            _fetch_from_any(file, out, url, patience)
        except DataUnavailableError:
            if out.tell() == 0:
                part.unlink()
            raise
        os.replace(part, path)
    return path


def md5_of(path: Path) -> str | None:
    """The MD5 sum of a file; None if there is none."""
    if not path.is_file():
        return None
    total = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            total.update(part)
    return total.hexdigest()


def _lock(out, name: str) -> bool:
    """Lock the part; False if it has become the whole file in the meantime."""
    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{name}: another process downloads it, waiting", file=sys.stderr, flush=True)
        fcntl.flock(out, fcntl.LOCK_EX)
    try:
        same = os.path.samestat(os.fstat(out.fileno()), os.stat(out.name))
    except FileNotFoundError:
        same = False
    out.seek(0, os.SEEK_END)  # it may have grown while we waited
    return same


def _fetch_from_any(file: RemoteFile, out, url: str | None, patience: float | None) -> None:
    """Fill ``out`` from one source after the other.

    Raises:
        DataUnavailableError: none delivers the file
    """
    whys: dict[str, str] = {}
    order = [url] if url is not None else _by_speed(file, whys)
    slow: dict[str, float] = {}
    for source in order:
        try:
            return _fetch_from(source, file, out, _SLOWEST if url is None else _TRICKLE)
        except _TooSlow as reason:
            slow[source] = reason.speed
            whys[source] = str(reason)
        except _SourceFailed as reason:
            whys[source] = str(reason)
    left = file.size - out.tell()
    least = _TRICKLE if patience is None else max(_TRICKLE, left / patience)
    for source in sorted(slow, key=lambda name: slow[name], reverse=True):
        if slow[source] < least:
            whys[source] += f", it would take {left / slow[source] / 60:.0f} minutes"
            continue
        try:
            return _fetch_from(source, file, out, least)
        except _SourceFailed as reason:
            whys[source] = str(reason)
    raise DataUnavailableError("; ".join(f"{_host(name)}: {why}" for name, why in whys.items()))


def _host(url: str) -> str:
    """What a line on the source calls it, without a name and a password."""
    return url.partition("://")[2].partition("/")[0].rpartition("@")[2] or url


def _by_speed(file: RemoteFile, whys: dict[str, str]) -> list[str]:
    """The sources, fastest first; ``whys`` gets what is wrong with those that give nothing.

    Those that have not answered when the fastest is known come last. None if none answers.
    """
    began = time.monotonic()
    received = dict.fromkeys(file.urls, 0)
    finished: list[str] = []
    failed: dict[str, str] = {}
    over = threading.Event()

    def probe(url: str) -> None:
        try:
            with _open(url, 0) as response:
                _check_offer(response, file, 0)
                while received[url] < min(_PROBE_BYTES, file.size) and not over.is_set():
                    received[url] += len(_read(response))
            finished.append(url)
        except _BrokenOff as reason:
            if not received[url]:  # what has given something can be gone on with
                failed[url] = str(reason)
        except _SourceFailed as reason:
            failed[url] = str(reason)

    # in threads, since looking up a name has no time-out of its own
    threads = [threading.Thread(target=probe, args=(url,), daemon=True) for url in file.urls]
    for thread in threads:
        thread.start()
    while not finished and any(thread.is_alive() for thread in threads):
        elapsed = time.monotonic() - began
        if elapsed > _PROBE_SECONDS or (elapsed > _PROBE_SECONDS / 2 and any(received.values())):
            break
        time.sleep(0.02)
    first, so_far = set(finished), dict(received)
    over.set()
    whys.update(dict(failed))
    order = sorted(
        (url for url in file.urls if url not in whys),
        key=lambda url: (url not in first, -so_far[url]),
    )
    if any(so_far[url] for url in order):
        return order
    whys |= dict.fromkeys(order, f"no answer in {time.monotonic() - began:.0f} s")
    return []


def _open(url: str, start: int):
    """A response with the file's bytes from ``start`` on, if the server can."""
    headers = {"User-Agent": "cifar_resnet_fast", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        request = urllib.request.Request(url, headers=headers)
        return urllib.request.urlopen(request, timeout=_SILENT_SECONDS)
    except urllib.error.HTTPError as error:
        error.close()
        raise _SourceFailed(f"HTTP status {error.code}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise _SourceFailed(first_line(getattr(error, "reason", error))) from None


def _read(response) -> bytes:
    """The bytes that have arrived, at least one."""
    try:
        part = response.read1(_PART)
    except (OSError, http.client.HTTPException) as error:
        raise _BrokenOff(first_line(error)) from None
    if not part:
        raise _BrokenOff("the connection ended")
    return part


def _fetch_from(url: str, file: RemoteFile, out, slowest: float) -> None:
    """Continue ``out`` from one source until it is complete and correct.

    Raises:
        _SourceFailed: the source does not deliver the file
    """
    bar = _Bar(file, url)
    alone = out.tell() == 0  # no other source has a part in it
    while True:
        began_with = out.tell()
        try:
            if began_with < file.size:
                _receive(url, file, out, slowest, bar)
        except _BrokenOff as reason:
            if out.tell() - began_with < file.size / 200:  # it would take hundreds of connections
                raise _SourceFailed(f"broke off at {out.tell() / 1e6:.1f} MB: {reason}") from None
            continue
        finally:
            bar.clear()
        out.flush()
        found = md5_of(Path(out.name))
        if found == file.md5:
            bar.finished()
            return
        _empty(out)
        if alone:
            raise _SourceFailed(f"another file of this size, with MD5 sum {found}")
        alone = True


def _empty(out) -> None:
    out.truncate(0)
    out.seek(0)


def _receive(url: str, file: RemoteFile, out, slowest: float, bar: "_Bar") -> None:
    """Append the bytes of one connection to ``out``."""
    with _open(url, out.tell()) as response:
        if _check_offer(response, file, out.tell()) == 0:
            _empty(out)
        window = deque([(time.monotonic(), out.tell())])
        while out.tell() < file.size:
            out.write(_read(response)[: file.size - out.tell()])
            now = time.monotonic()
            while len(window) > 1 and now - window[1][0] > _OVER_SECONDS:
                window.popleft()
            elapsed = now - window[0][0]
            speed = (out.tell() - window[0][1]) / max(elapsed, 1e-3)
            if now - window[-1][0] > _OVER_SECONDS / 100:
                window.append((now, out.tell()))
            bar.show(out.tell(), speed)
            if elapsed > _OVER_SECONDS and speed < slowest:
                raise _TooSlow(speed)


def _check_offer(response, file: RemoteFile, start: int) -> int:
    """The byte that a response begins with, ``start`` or 0.

    Raises:
        _SourceFailed: its headers are not those of the file
    """
    size = response.headers.get("Content-Length")
    if response.status == 206:
        span, _, size = response.headers.get("Content-Range", "").rpartition("/")
        if not span.startswith(f"bytes {start}-"):
            raise _SourceFailed(f"bytes from {start} on were requested, got {span!r}")
    else:
        start = 0
    if size and size.isdigit() and int(size) != file.size:
        raise _SourceFailed(f"another file, of {int(size)} bytes in place of {file.size}")
    return start


class _Bar:
    """The progress: a line that is updated on a terminal, otherwise a line now and then."""

    def __init__(self, file: RemoteFile, url: str):
        self._file, self._host = file, _host(url)
        self._moves = sys.stderr.isatty()
        self._began = self._shown = time.monotonic()
        if not self._moves:
            self._print(f"{file.name} from {self._host}, {file.size / 1e6:.0f} MB")

    def show(self, done: int, speed: float) -> None:
        now, size = time.monotonic(), self._file.size
        if now - self._shown < (0.2 if self._moves else _SAY_EVERY_SECONDS):
            return
        self._shown = now
        filled = 20 * done // size
        line = (
            f"[{'#' * filled}{'.' * (20 - filled)}]  {done / 1e6:.0f} of {size / 1e6:.0f} MB  "
            f"{speed / 1e6:.1f} MB/s  {(size - done) / max(speed, 1):.0f} s left  "
            f"{self._file.name} from {self._host}"
        )
        if self._moves:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r{line[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
        else:
            self._print(line)

    def clear(self) -> None:
        if self._moves:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)

    def finished(self) -> None:
        seconds = time.monotonic() - self._began
        size = self._file.size / 1e6
        self._print(f"{self._file.name} from {self._host}: {size:.0f} MB, {seconds:.1f} s")

    def _print(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)
