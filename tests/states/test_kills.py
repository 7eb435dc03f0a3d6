"""Extractions that are killed, and extractions that meet in one folder: one right cache, or a clear refusal.

A few in `make test`, many in `make test-all`; docs/reliability.md has the tables.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the scripts fork")


def run(script, folder, times):
    result = subprocess.run(
        [sys.executable, script, str(folder), str(times)],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    print(result.stdout)
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.parametrize("times", [6, pytest.param(60, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_nothing_that_a_resume_does_not_remove(tmp_path, times):
    said = run("killed_run.py", tmp_path, times).stdout
    resumed, of, kills, left = map(
        int, re.search(r"(\d+) of (\d+) resumed, (\d+) kills, dead runs' files: (\d+)", said).groups()
    )
    assert resumed == of == times and kills > times
    assert left, "no kill met a file half-written, so the test shows little"


@pytest.mark.parametrize("times", [1, pytest.param(10, marks=pytest.mark.slow)])
def test_extractions_that_meet_in_a_folder_end_in_one_cache_or_a_refusal(tmp_path, times):
    result = run("raced_run.py", tmp_path, times)
    assert result.stdout.splitlines()[-1] == "wrong: 0", result.stdout + result.stderr
