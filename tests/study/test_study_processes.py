"""The processes of a comparison end with it, and one that is killed is told."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from support_study import METHODS, write_study

from fusion_adapters.cli import main
from fusion_adapters.study import load_study, runner
from fusion_adapters.study.runner import Cell

# a shell may have started these tests in the background, where Ctrl-C is ignored, and so it would be in what they start
MAIN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from fusion_adapters.cli import main; main()"
)


@contextlib.contextmanager
def started(tmp_path, path):
    """A comparison with two workers in a process group of its own, once its first run is done."""
    command = ["compare", path, "--output", tmp_path / "out", "--workers", 2]
    with (tmp_path / "said").open("wb") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", MAIN, *map(str, command)], stdout=said, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        end = time.monotonic() + 300
        while not any((tmp_path / "out").rglob("*-seed1-*.json")):
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "said").read_text()[-3000:]
            time.sleep(0.1)
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def others_end(group):
    """Whether the processes of a group are gone, or go soon."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if not any(_lives_in(group, process) for process in psutil.process_iter()):
            return True
        time.sleep(0.1)
    return False


def _lives_in(group, process):
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):  # it ended meanwhile
        return False


def runs_done(tmp_path):
    return len(list((tmp_path / "out" / "runs").rglob("*.json")))


def test_a_killed_comparison_takes_its_processes_along(tmp_path):
    path = write_study(tmp_path, sizes=["all"], seeds=list(range(1, 21)), epochs=50, rates=[1e-3])
    with started(tmp_path, path) as process:
        process.kill()
        process.wait()
        assert others_end(process.pid)
    assert 0 < runs_done(tmp_path) < 20 * len(METHODS), "it had ended before it was killed"


def test_ctrl_c_ends_all_processes(tmp_path):
    path = write_study(tmp_path, sizes=["all"], seeds=list(range(1, 21)), epochs=50, rates=[1e-3])
    with started(tmp_path, path) as process:
        before = runs_done(tmp_path)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers too
        assert process.wait(timeout=120) == 130, (tmp_path / "said").read_text()[-3000:]
        assert others_end(process.pid)
    assert runs_done(tmp_path) < before + 20, "a worker went on with the next method"


def test_an_error_in_one_process_ends_the_others(tmp_path, capsys):
    wrong = {"adapter": {"fusion": "mlp", "fusion_bottleneck": 4}, "training": {"lr_scheduler_type": "none such"}}
    methods = {"wrong": wrong, **METHODS}  # the first to be run, beside methods of many runs
    path = write_study(tmp_path, methods=methods, sizes=["all"], seeds=list(range(1, 41)), epochs=50, rates=[1e-3])
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "2"])
    assert stop.value.code == 2
    assert "none such" in capsys.readouterr().err
    assert runs_done(tmp_path) < 40, "a worker went on with the next method"
    assert not multiprocessing.active_children()


def test_a_killed_process_of_a_comparison_is_told(tmp_path, capsys):
    path = write_study(tmp_path, sizes=["all"], rates=[1e-3], epochs=1000)

    def kill():
        end = time.monotonic() + 300
        while not (workers := multiprocessing.active_children()) and time.monotonic() < end:
            time.sleep(0.1)
        if workers:
            workers[0].kill()

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    tells_of_a_killed_process(path, tmp_path, capsys)
    killer.join()


def test_a_process_killed_before_it_has_work_is_told(tmp_path, capsys, monkeypatch):
    class Unlucky(runner.ProcessPoolExecutor):
        def submit(self, *arguments, **options):
            future = super().submit(*arguments, **options)
            for worker in multiprocessing.active_children():
                worker.kill()
            assert future.exception() is not None  # from now on the pool takes no more
            return future

    monkeypatch.setattr(runner, "ProcessPoolExecutor", Unlucky)
    tells_of_a_killed_process(write_study(tmp_path, sizes=["all"], rates=[1e-3]), tmp_path, capsys)


def tells_of_a_killed_process(path, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", str(path), "--output", str(tmp_path / "out"), "--workers", "2"])
    assert stop.value.code == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "One of the 2 processes of the comparison ended" in said and "--workers" in said


def test_cells_wait_for_the_runs_that_they_read(tmp_path):
    methods = {
        "lora": METHODS["lora"],
        "both": {"adapter": {"fusion": "dwatt", "r": 2, "target_modules": ["query"]}, "start_from": "lora"},
    }
    path = write_study(tmp_path, methods=methods, sizes=[2, 4, "all"], rate_sizes=[4], baseline="lora", reference=None)
    study = load_study(path)
    cells = {(method, size): Cell("toy", method, size) for method in methods for size in (2, 4, 13)}
    assert runner.training_sizes(study) == {"toy": [2, 4, 13]}
    found = {key: {other for other, c in cells.items() if c in runner.needs(study, cell)} for key, cell in cells.items()}
    assert found == {
        ("lora", 2): {("lora", 4)},
        ("lora", 4): set(),
        ("lora", 13): {("lora", 4)},
        ("both", 2): {("both", 4), ("lora", 2), ("lora", 4)},
        ("both", 4): {("lora", 4)},
        ("both", 13): {("both", 4), ("lora", 13), ("lora", 4)},
    }
