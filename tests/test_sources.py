"""Downloads: from servers that are slow, cut off, lie about lengths or serve another file."""

import hashlib
import http.server
import threading
import time
from urllib.parse import urlsplit

import numpy as np
import pytest

from cifar_resnet_fast.data import sources
from cifar_resnet_fast.data.sources import DataUnavailableError, RemoteFile, fetch

CONTENT = np.random.default_rng(0).bytes(3_000_000)


class Server:
    """A server on this machine that gives CONTENT, or not, in one of many ways.

    Args:
        speed: bytes a second; None for all at once
        most: bytes that one connection gives
        silent: after ``most`` bytes it says nothing more in place of hanging up
        claims: the length in the headers; "" for none
        resumes: whether it knows of ranges
        content, status: of the answers
        shift: added to the byte that the answer to a range begins with
        delay: seconds before an answer
    """

    def __init__(
        self,
        *,
        speed=None,
        most=None,
        silent=False,
        claims=None,
        resumes=True,
        content=CONTENT,
        status=200,
        shift=0,
        delay=0,
    ):
        self.starts = []  # the first byte of each request
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked = self.headers.get("Range")
                start = int(asked.split("=")[1].rstrip("-")) if asked else 0
                server.starts.append(start)
                server.closing.wait(delay)
                if not resumes:
                    start = 0
                partly = start > 0 and status == 200
                self.send_response(206 if partly else status)
                length = len(content) - start if claims is None else claims
                if length != "":
                    self.send_header("Content-Length", str(length))
                if partly:
                    span = f"bytes {start + shift}-{len(content) - 1}/{len(content)}"
                    self.send_header("Content-Range", span)
                self.end_headers()
                self.give(content[start:][:most])

            def give(self, data):
                step = len(data) or 1 if speed is None else max(speed // 20, 1)
                try:
                    for at in range(0, len(data), step):
                        self.wfile.write(data[at : at + step])
                        if speed is not None and server.closing.wait(0.05):
                            return
                    if silent:
                        server.closing.wait(30)
                except OSError:
                    pass  # the client has hung up

            def log_message(self, *_):
                pass

        self.closing = threading.Event()
        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/file.bin"
        self.host = urlsplit(self.url).netloc
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.closing.set()
        self._http.shutdown()
        self._http.server_close()


@pytest.fixture
def serve(monkeypatch):
    """A function that starts a server; the speeds and times are a tenth of a user's or less."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(sources, "_SLOWEST", 1e6)
    monkeypatch.setattr(sources, "_OVER_SECONDS", 0.4)
    monkeypatch.setattr(sources, "_SILENT_SECONDS", 0.5)
    monkeypatch.setattr(sources, "_PROBE_SECONDS", 2.0)
    monkeypatch.setattr(sources, "_PROBE_BYTES", 2**17)
    servers = []

    def start(**how):
        servers.append(Server(**how))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def remote(*servers):
    urls = tuple(server.url for server in servers)
    return RemoteFile("file.bin", len(CONTENT), hashlib.md5(CONTENT).hexdigest(), urls)


def assert_whole(folder):
    assert (folder / "file.bin").read_bytes() == CONTENT
    assert [path.name for path in folder.iterdir()] == ["file.bin"]


def test_the_fastest_of_several_is_taken(tmp_path, serve, capsys):
    trickle, fast = serve(speed=20_000), serve()
    assert fetch(remote(trickle, fast), tmp_path / "new") == tmp_path / "new/file.bin"
    assert_whole(tmp_path / "new")
    assert f"file.bin from {fast.host}: 3 MB" in capsys.readouterr().err
    assert trickle.starts == [0]  # asked, and left


def test_a_file_that_is_there_is_not_asked_for(tmp_path, serve):
    server = serve()
    (tmp_path / "file.bin").write_bytes(CONTENT)
    fetch(remote(server), tmp_path)
    assert server.starts == []


def test_a_damaged_file_is_replaced(tmp_path, serve):
    (tmp_path / "file.bin").write_bytes(CONTENT[:-1] + b"x")
    fetch(remote(serve()), tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ({"status": 404}, "HTTP status 404"),
        ({"status": 503}, "HTTP status 503"),
        ({"claims": 100}, "another file, of 100 bytes in place of 3000000"),
        ({"claims": 10**12}, "another file, of 1000000000000 bytes in place of 3000000"),
        ({"content": b"<html>sign in</html>"}, "another file, of 20 bytes"),
        ({"content": CONTENT[::-1]}, "another file of this size, with MD5 sum"),
        ({"content": CONTENT[::-1], "claims": ""}, "another file of this size, with MD5 sum"),
        ({"content": CONTENT + b"more", "claims": ""}, None),  # its first bytes are the file
        ({"content": b"short", "claims": ""}, "broke off at 0.0 MB: the connection ended"),
        ({"most": 0}, "the connection ended"),
        ({"most": 0, "silent": True}, "timed out"),
        ({"content": CONTENT[::-1], "most": 700_000}, "another file of this size, with MD5 sum"),
        ({"most": 10_000}, "broke off at 0.0 MB: the connection ended"),
        ({"most": 10_000, "silent": True}, "broke off at 0.0 MB: timed out"),
    ],
    ids=[
        "not-found",
        "unavailable",
        "too-short",
        "too-long",
        "sign-in",
        "another-file",
        "another-file-of-no-length",
        "more",
        "less",
        "nothing",
        "silent",
        "another-file-in-pieces",
        "cut-off",
        "falls-silent",
    ],
)
def test_a_source_that_does_not_give_the_file(tmp_path, serve, how, why):
    """Alone it is an error of one line that names it; beside another one it is left."""
    bad = serve(**how)
    if why is None:
        fetch(remote(bad), tmp_path)
    else:
        with pytest.raises(DataUnavailableError) as error:
            fetch(remote(bad), tmp_path)
        assert str(error.value).startswith(f"{bad.host}: {why}")
        assert "\n" not in str(error.value)
        assert not (tmp_path / "file.bin").exists()
        assert all(path.stat().st_size for path in tmp_path.iterdir())
        fetch(remote(bad, serve(speed=4_000_000)), tmp_path)
    assert_whole(tmp_path)


def test_a_source_that_grows_slow_is_left_and_its_bytes_are_kept(tmp_path, serve, monkeypatch):
    """It is the fastest while it is asked, and falls below the limit then."""
    monkeypatch.setattr(sources, "_PROBE_BYTES", 1)
    slow, other = serve(speed=400_000), serve(speed=4_000_000)
    order = [slow.url, other.url]
    monkeypatch.setattr(sources, "_by_speed", lambda file, whys: order)
    fetch(remote(slow, other), tmp_path)
    assert_whole(tmp_path)
    assert slow.starts == [0]
    assert 100_000 < other.starts[0] < 1_000_000


def test_if_all_are_slow_the_fastest_finishes(tmp_path, serve):
    slower, slow = serve(speed=300_000), serve(speed=800_000)
    fetch(remote(slower, slow), tmp_path)
    assert_whole(tmp_path)
    assert len(slow.starts) == 3  # asked, tried, finished
    assert len(slower.starts) == 2


def test_patience(tmp_path, serve):
    slow = serve(speed=100_000)
    began = time.monotonic()
    with pytest.raises(DataUnavailableError, match=r"0.1. MB/s, it would take 0 minutes$"):
        fetch(remote(slow), tmp_path, patience=10)
    assert time.monotonic() - began < 5
    assert 0 < (tmp_path / "file.bin.part").stat().st_size < 1_000_000


def test_patience_ends_where_the_source_grows_slower(tmp_path, serve, monkeypatch):
    """It is fast enough while it is tried, and gives a fifth of that then."""
    slow, slower = serve(speed=800_000), serve(speed=160_000)
    received = sources._receive

    def receive(url, file, out, slowest, bar):
        received(slower.url if slowest < 1e6 else url, file, out, slowest, bar)

    monkeypatch.setattr(sources, "_receive", receive)
    with pytest.raises(DataUnavailableError, match=r"0.1. MB/s$"):
        fetch(remote(slow), tmp_path, patience=5)


def test_cut_off_again_and_again(tmp_path, serve):
    server = serve(most=700_000)
    fetch(remote(server), tmp_path)
    assert_whole(tmp_path)
    assert server.starts == [0, 0, 700_000, 1_400_000, 2_100_000, 2_800_000]


def test_what_an_earlier_start_left_is_gone_on_with(tmp_path, serve):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1_000_000])
    server = serve()
    fetch(remote(server), tmp_path)
    assert_whole(tmp_path)
    assert server.starts == [0, 1_000_000]


@pytest.mark.parametrize(
    "left", [b"x" * 1_000_000, CONTENT[::-1], CONTENT + b"more"], ids=["part", "whole", "more"]
)
def test_what_is_left_of_another_file_is_thrown_away(tmp_path, serve, left):
    (tmp_path / "file.bin.part").write_bytes(left)
    fetch(remote(serve()), tmp_path)
    assert_whole(tmp_path)


def test_a_source_that_answers_late_is_kept_for_the_end(tmp_path, serve):
    """The first to give its bytes is another file; by then the second has given none."""
    bad, late = serve(content=CONTENT[::-1]), serve(delay=0.4)
    fetch(remote(bad, late), tmp_path)
    assert_whole(tmp_path)


def test_a_trickle_is_left_even_if_there_is_nothing_else(tmp_path, serve):
    trickle = serve(speed=2_000)
    why = r": 0.00 MB/s, it would take \d\d minutes$"
    for url in (None, trickle.url):
        with pytest.raises(DataUnavailableError, match=why):
            fetch(remote(trickle), tmp_path, url)


def test_a_server_without_ranges(tmp_path, serve):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1_000_000])
    fetch(remote(serve(resumes=False)), tmp_path)
    assert_whole(tmp_path)


def test_a_server_that_gives_another_range(tmp_path, serve):
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:1_000_000])
    with pytest.raises(DataUnavailableError, match="bytes from 1000000 on were requested, got"):
        fetch(remote(serve(shift=7)), tmp_path)


def test_a_url_of_the_user_is_the_only_one_however_slow(tmp_path, serve):
    known, own = serve(), serve(speed=800_000)
    fetch(remote(known), tmp_path, own.url)
    assert_whole(tmp_path)
    assert known.starts == []
    with pytest.raises(ValueError, match="data_url must begin with http://, https:// or file://"):
        fetch(remote(known), tmp_path / "none", "ftp://host/file")


def test_a_name_and_a_password_are_not_shown(tmp_path, serve, capsys):
    server = serve()
    own = server.url.replace("http://", "http://me:secret@")
    with pytest.raises(DataUnavailableError) as error:
        fetch(remote(), tmp_path, own)
    assert "secret" not in str(error.value) + capsys.readouterr().err


def test_a_file_url(tmp_path):
    (tmp_path / "elsewhere").write_bytes(CONTENT)
    fetch(remote(), tmp_path / "new", (tmp_path / "elsewhere").as_uri())
    assert_whole(tmp_path / "new")
    with pytest.raises(DataUnavailableError, match="No such file"):
        fetch(remote(), tmp_path / "none", (tmp_path / "missing").as_uri())


def test_no_room(tmp_path, serve, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DataUnavailableError, match="needs 3 MB in .*, 1 MB are free"):
        fetch(remote(serve()), tmp_path)


def test_two_at_once_share_one_download(tmp_path, serve):
    server = serve(speed=4_000_000)
    threads = [threading.Thread(target=fetch, args=(remote(server), tmp_path)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert_whole(tmp_path)
    assert server.starts == [0, 0]  # asked and taken, once


def test_a_bar_on_a_terminal(tmp_path, serve, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    server = serve(speed=3_000_000)
    fetch(remote(server), tmp_path)
    shown = capsys.readouterr().err
    assert "\r[####" in shown
    assert " s left  file.bin from 127.0.0.1" in shown
    assert all(len(line) < 80 for line in shown.replace("\x1b[K", "").split("\r"))
