"""Output folders that are whole or not there: written aside, then renamed."""

from __future__ import annotations

import contextlib
import glob
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

OWNER = ".written_by"  # in a folder that is not complete: which process writes it
KINDS = {
    "run": "a run of fusion-adapters train",
    "bench": "a benchmark",
    "export": "an exported program",
    "shortcuts": "linear shortcuts",
    "shortcut scores": "scores of linear shortcuts",
    "shortcut exits": "early exits of linear shortcuts",
}
EXPORT = "program.json"  # what an exported program has in the place of run.json


def check_output(path: str | Path, overwrite: bool = False, kind: str = "run") -> Path:
    """Checks, before any work is done, that a folder may be written.

    Args:
        path: The folder.
        overwrite: Whether an earlier result of the same kind may be replaced.
        kind: What will be written, one of `KINDS`: as `run.json` names it, or `export`.

    Returns:
        The folder, with links followed.

    Raises:
        FileExistsError: If something other than an empty folder is there and `overwrite` is not set, or it is a file, or a
            folder that no other can take the place of (the current one, a mount point).
    """
    path = Path(path).resolve()
    if path.exists() and not path.is_dir():
        raise FileExistsError(f"The output {str(path)!r} is a file. Give a folder that does not exist yet.")
    if Path.cwd().is_relative_to(path) or os.path.ismount(path):
        raise FileExistsError(
            f"The output {str(path)!r} is the current folder, one above it, or a mount point. The finished folder is moved to its "
            f"place as a whole, so give one inside, for example {str(path / 'run')!r}."
        )
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise FileExistsError(
                f"The output folder {str(path)!r} is not empty ({sum(1 for _ in path.iterdir())} entries). Give another "
                "folder, or add --overwrite to replace it."
            )
        if (found := _kind_of(path)) != kind:
            nothing = f"no earlier export (no {EXPORT})" if kind == "export" else "no earlier run (no run.json)"
            held = nothing if found is None else f"another thing ({KINDS[found]})"
            raise FileExistsError(
                f"The output folder {str(path)!r} holds {held}, so --overwrite does not delete it. Give another folder, or empty "
                "it yourself."
            )
    return path


def _kind_of(path: Path) -> str | None:
    """What a folder holds by its `run.json` or `program.json`; None if there is none. A damaged one is a run's."""
    try:
        content = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return "export" if (path / EXPORT).is_file() else None
    except ValueError:
        return "run"
    kind = content.get("kind") if isinstance(content, dict) else None
    return kind if kind in KINDS else "run"


@contextlib.contextmanager
def written_aside(path: Path, overwrite: bool = False, kind: str = "run") -> Iterator[Path]:
    """Yields a new folder beside `path`, renamed to it when the body ends well, and removed when it does not.

    If the process is killed, the next call for the same path removes what it left.

    Args:
        path: As `check_output` returned it.
        overwrite: As it was given there; what has come into the folder since is not replaced without it.
        kind: As it was given there.

    Raises:
        FileExistsError: If the folder cannot take its place. It is kept where it is, and the message says where.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(path)
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (aside / OWNER).write_text(json.dumps(_this_process()), encoding="utf-8")
        yield aside
        _give_usual_permissions(aside)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    (aside / OWNER).unlink()  # complete: nobody removes it
    try:
        check_output(path, overwrite, kind)
        if path.exists():
            shutil.rmtree(path)
        aside.rename(path)
    except OSError as error:
        raise FileExistsError(
            f"The work is complete and kept in {str(aside)!r}, but it could not be moved to its place: {error} Move it yourself."
        ) from error


def _this_process() -> dict[str, Any]:
    return {"host": platform.node(), "process": os.getpid(), "started": psutil.Process().create_time()}


def _remove_abandoned(path: Path) -> None:
    """Removes the folders beside `path` that processes of this machine began to write and left when they were killed."""
    for owner in path.parent.glob(f".{glob.escape(path.name)}.*/{OWNER}"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError, psutil.Error):
            writer = json.loads(owner.read_text(encoding="utf-8"))
            if writer["host"] != platform.node():
                continue
            number, started = int(writer["process"]), float(writer["started"])
            if not psutil.pid_exists(number) or abs(psutil.Process(number).create_time() - started) > 1:
                shutil.rmtree(owner.parent, ignore_errors=True)


def _give_usual_permissions(folder: Path) -> None:
    """Gives a folder and all in it the permissions of new ones; that of a temporary folder, and safetensors' files, are closed."""
    probe = folder / f"{OWNER}.d"
    probe.mkdir()
    mode = probe.stat().st_mode & 0o777
    probe.rmdir()
    os.chmod(folder, mode)
    for found in folder.rglob("*"):
        os.chmod(found, mode if found.is_dir() else mode & 0o666)


def json_text(value: Any, indent: int = 2) -> str:
    """A value as JSON, with null for what JSON has no number for: the loss of an epoch or a run that diverged."""
    return json.dumps(_without_nan(value), indent=indent, allow_nan=False) + "\n"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
