"""The ladder: in order, in time, once for each card, commit and build; each rung on its own."""

import re
import sys
import time
from pathlib import Path

import pytest

from bench import ladder, report
from bench.ladder import Rung
from bench.suite import RESULTS

ROOT = Path(ladder.__file__).parents[1]


def python(name, code, least=0.0, limit=60.0):
    return Rung(name, (sys.executable, "-c", code), least, limit)


@pytest.fixture
def climb(tmp_path, monkeypatch, capsys):
    """A function that runs the ladder with given rungs: status, rows so far, output."""

    def run(rungs, *arguments):
        monkeypatch.setattr(ladder, "rungs", lambda *_: rungs)
        status = ladder.main(["--device", "cpu", "--out", str(tmp_path), *arguments])
        rows = list(ladder.rows_of([tmp_path]))
        return status, [(row["rung"], row["state"]) for row in rows], capsys.readouterr().out

    return run


GOOD = python("good", "print('one'); print('two')")


def test_a_rung_that_fails_leaves_the_others_their_time(climb, tmp_path):
    bad = python("bad", "import sys; print('so it is'); sys.exit(3)")
    status, rows, out = climb([bad, GOOD])
    assert (status, rows) == (1, [("bad", "failed"), ("good", "done")])
    assert "so it is" in out
    row = next(ladder.rows_of([tmp_path]))
    assert (row["status"], row["said"]) == (3, "so it is")
    assert row.keys() >= {"card", "commit", "build", "date", "seconds"}
    assert (tmp_path / "ladder/good.log").read_text() == "one\ntwo\n"


def test_what_is_done_is_not_done_again(climb, tmp_path, monkeypatch):
    slow = python("slow", "import time; time.sleep(1)")
    assert climb([slow, GOOD])[1] == [("slow", "done"), ("good", "done")]
    began = time.monotonic()
    status, rows, out = climb([slow, GOOD])
    assert (status, len(rows)) == (0, 2)
    assert time.monotonic() - began < 1
    assert "left: nothing" in out
    for name in ("card", "commit", "build"):  # but on another one
        real = ladder.Suite

        def other(*arguments, name=name, real=real):
            suite = real(*arguments)
            suite.header[name] = "another"
            return suite

        with monkeypatch.context() as patch:
            patch.setattr(ladder, "Suite", other)
            count = len(list(ladder.rows_of([tmp_path])))
            assert len(climb([GOOD])[1]) == count + 1


def test_what_hangs_is_ended_with_all_it_started(climb, tmp_path):
    pid = tmp_path / "pid"
    code = (
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)'])\n"
        f"open({str(pid)!r}, 'w').write(str(child.pid))\n"
        "time.sleep(100)"
    )
    status, rows, _ = climb([python("hangs", code, limit=3.0), GOOD])
    assert (status, rows) == (1, [("hangs", "hung"), ("good", "done")])
    state = Path(f"/proc/{pid.read_text()}/stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"
    assert climb([python("hangs", code, limit=3.0)])[1] == rows  # not again


def test_what_does_not_fit_is_left_and_a_smaller_one_is_not(climb):
    large = python("large", "print(1)", least=3600)
    status, rows, out = climb([large, GOOD])
    assert (status, rows) == (0, [("good", "done")])
    assert "left: large" in out


def test_it_stops_in_time_and_goes_on_at_the_next_call(climb, monkeypatch):
    monkeypatch.setattr(ladder, "_RESERVE", 0.0)
    rung = python("long", "import time; time.sleep(4)")
    began = time.monotonic()
    status, rows, out = climb([rung], "--minutes", "0.03")
    assert time.monotonic() - began < 4
    assert (status, rows) == (0, [("long", "stopped")])
    assert "left: long" in out
    assert climb([rung])[1] == [("long", "stopped"), ("long", "done")]


def test_list_runs_nothing(climb):
    climb([GOOD])
    status, rows, out = climb([GOOD, python("next", "print(1)")], "--list")
    assert (status, rows) == (0, [("good", "done")])
    assert re.search(r"done +good", out)
    assert "left: next" in out


def test_the_rungs_are_in_order_and_have_programs(tmp_path):
    parser_of = ladder.flags("ladder", "")
    for name, default in (("--dataset", "cifar10"), ("--data-root", "data")):
        parser_of.add_argument(name, default=default)
    options = parser_of.parse_args(["--out", str(tmp_path)])
    found = ladder.rungs(options, tmp_path / "selfcheck.json")
    names = [rung.name for rung in found]
    assert len(names) == len(set(names))
    order = ["selfcheck", "gpu tests, kernels", "trunk, quick", "step 56, quick", "step 20, quick"]
    order += ["kernels, quick", "loader, quick", "time to 93.1 %", "sanitizer, memcheck"]
    assert [name for name in names if name in order] == order
    for rung in found:
        assert rung.least < rung.limit
        for part in rung.command:
            if part.startswith("tests/"):
                assert (ROOT / part).exists(), part
    own_rung = {"selfcheck"}  # its test is the command
    itself = {Path(__file__).stem.removeprefix("test_")}
    marked = {
        path.stem.removeprefix("test_")
        for path in (ROOT / "tests").glob("test_*.py")
        if "mark.gpu" in path.read_text()
    }
    tested = {name for names in ladder.TESTED.values() for name in names}
    assert marked - own_rung - itself <= tested
    for group, files in ladder.TESTED.items():
        marked = [
            name for name in files if "mark.gpu" in (ROOT / f"tests/test_{name}.py").read_text()
        ]
        assert marked, group  # or pytest would fail for want of tests


def test_rows_are_in_the_report(climb, tmp_path):
    climb([GOOD])
    assert report.main(["--out", str(tmp_path)]) == 0
    assert "* good: done in 0 s; `two`" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize("minutes", ["0", "-1", "nan"])
def test_minutes_must_be_more_than_0(minutes, capsys):
    with pytest.raises(SystemExit) as stopped:
        ladder.main(["--minutes", minutes])
    assert stopped.value.code == 2
    assert "--minutes must be more than 0" in capsys.readouterr().err


def test_the_rows_in_the_repository_can_be_read():
    assert all(row["suite"] == "ladder" for row in ladder.rows_of([RESULTS]))
