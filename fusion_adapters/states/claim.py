"""One extraction at a time in a folder: a lock file there, held by the process that writes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


class Claim:
    """A folder as it was when this run began to write there.

    Args:
        folder: The folder; it has a lock file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = _inode(folder / LOCK)

    def check(self) -> None:
        """Call it before a file gets its name.

        Raises:
            FileNotFoundError: If the folder was deleted, or deleted and begun again by another run.
        """
        if self._lock is None or _inode(self.folder / LOCK) != self._lock:
            raise FileNotFoundError(
                f"The folder {str(self.folder)!r} was deleted, or begun again by another run, while this one wrote layer states into "
                "it. This run stops and writes nothing more there. Start it again, into a folder of its own."
            )

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """In the body, a file that cannot be read or written is told as what it is where the folder went: see `check`."""
        try:
            yield
        except OSError:
            self.check()
            raise


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Holds a folder for the time of the body; makes it if it is not there, and takes it away again if it stays empty.

    The system frees the lock of a process that dies, whose lock file the next run takes over.

    Raises:
        RuntimeError: If another run holds it.
        OSError: If it cannot be made, or its lock file.
    """
    path = folder / LOCK
    new = not folder.exists()
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_RDWR)
        except FileNotFoundError:  # the folder went meanwhile
            continue
        except OSError as error:
            raise OSError(
                f"No layer states can be written into the folder {str(folder)!r}: {path.name!r} cannot be made there ({error.strerror}). "
                "Give a folder in which you may write, and move away what stands in the place of that file."
            ) from error
        try:
            if fcntl is not None:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(handle)
            raise RuntimeError(
                f"Another run is writing layer states into the folder {str(folder)!r} at this moment. Wait until it has ended and start "
                "again (what it wrote is kept, if it is the same cache), or give another folder."
            ) from error
        except OSError as error:
            warnings.warn(
                f"The file system of {str(folder)!r} has no locks ({error.strerror}): nothing keeps a second run from writing layer states "
                "there at the same time. Start one run at a time.",
                stacklevel=3,
            )
        if _inode(path) == os.fstat(handle).st_ino:
            break
        os.close(handle)  # that run ended, and took its lock file with it
    mine = os.fstat(handle).st_ino
    try:
        yield
    finally:
        if _inode(path) == mine:
            path.unlink(missing_ok=True)
        os.close(handle)
        if new:
            with contextlib.suppress(OSError):  # not empty, or not there
                folder.rmdir()


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None
