"""The processes of a comparison end with it, and one that is killed is told."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from support_study import METHODS, write_study

from fusion_adapters.cli import main


def test_a_killed_comparison_takes_its_processes_along(tmp_path):
    path = write_study(tmp_path, sizes=["all"], seeds=list(range(1, 21)), epochs=200, rates=[1e-3])
    command = ["compare", path, "--output", tmp_path / "out", "--workers", 2]
    process = subprocess.Popen(
        [sys.executable, "-c", "from fusion_adapters.cli import main; main()", *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while not any((tmp_path / "out").rglob("*-seed1-*.json")):
            assert process.poll() is None, process.stdout.read().decode()[-3000:]
            time.sleep(0.1)
        process.kill()
        process.communicate(timeout=20)  # the output ends with the last process that holds it
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    done = len(list((tmp_path / "out" / "runs").rglob("*.json")))
    assert 0 < done < 20 * len(METHODS), "it had ended before it was killed"


def test_a_killed_process_of_a_comparison_is_told(tmp_path, capsys):
    path = write_study(tmp_path, sizes=["all"], rates=[1e-3], epochs=1000)

    def kill():
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.1)
        workers[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "2"])
    killer.join()
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "One of the 2 processes of the comparison ended" in said and "--workers" in said
