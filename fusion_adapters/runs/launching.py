"""Programs that import peft themselves, run with the method registered, in their Python subprocesses too.

peft has no entry points for methods, and neither has transformers, so something has to be imported. Running a program inside this
process would leave out the processes that it starts (launchers, workers); a file in site-packages would run at every start of
Python, asked or not. An environment variable reaches exactly what is started here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path

STARTUP = Path(__file__).parent / "startup"  # holds a sitecustomize


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """An environment in which every Python registers the method, and programs beside this one's Python are found.

    Args:
        given: The environment as it is.
    """
    changed = dict(given)
    paths = given["PYTHONPATH"].split(os.pathsep) if given.get("PYTHONPATH") else []
    changed["PYTHONPATH"] = os.pathsep.join([str(STARTUP), *(path for path in paths if path != str(STARTUP))])
    programs = given.get("PATH", os.defpath).split(os.pathsep)
    own = sysconfig.get_path("scripts")
    changed["PATH"] = os.pathsep.join(programs if own in programs else [own, *programs])
    return changed


def execute(command: Sequence[str]) -> int:
    """Runs a program in such an environment, in the place of this process where the system can.

    Args:
        command: The program and its arguments.

    Returns:
        Its exit code, on systems where it runs beside this process.

    Raises:
        ValueError: If there is no such program, or it cannot be run.
    """
    changed = environment(os.environ)
    program = shutil.which(command[0], path=changed["PATH"])
    if program is None:
        script = f" For a Python script: python {command[0]}." if command[0].endswith(".py") else ""
        raise ValueError(
            f"There is no program {command[0]!r} on the path, or it may not be executed. Give it as you would without fusion-adapters "
            f"exec, installed in the environment of {sys.executable}.{script}"
        )
    if os.name == "nt":  # there a process that takes another's place returns to the shell at once
        return subprocess.call([program, *command[1:]], env=changed)
    sys.stdout.flush()
    os.execve(program, list(command), changed)
