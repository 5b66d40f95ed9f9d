"""A run's folder: one process writes to it and removes what killed ones left (layer 2)."""

import contextlib
import fcntl
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

_LOCK = ".lock"


def is_free(folder: Path) -> bool:
    """Whether a new run can use ``folder``: it does not exist, or holds at most the files of a
    process that was killed before it had begun."""
    if not os.path.lexists(folder):
        return True
    return folder.is_dir() and all(_is_left_over(path) for path in folder.iterdir())


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to ``folder``, and remove temporary files.

    The lock belongs to the operating system, so it is released however the process ends; the
    locked file names the process that holds it.

    Args:
        folder: an existing folder

    Raises:
        ValueError: another process holds the folder; names it
        OSError: the folder cannot be written, or the file system has no locks
    """
    path = folder / _LOCK
    file = _locked(path)
    try:
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        for left in folder.iterdir():
            if _is_left_over(left) and left != path:
                left.unlink()
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is locked, so no process waits for it
        os.close(file)


def _locked(path: Path) -> int:
    """The descriptor of the lock file, locked."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # the process that held it may have removed it since it was opened
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), os.stat(path)):
                    return file
        except BlockingIOError:
            holder = os.read(file, 200).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise ValueError(
                f"only one process can train in {path.parent}, and {holder} does"
            ) from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _is_left_over(path: Path) -> bool:
    """A temporary file of ``write_atomically``, or the lock of a process that was killed."""
    name = path.name
    named = name == _LOCK or (name.startswith(".") and name.endswith(".tmp"))
    return named and stat.S_ISREG(path.lstat().st_mode)
