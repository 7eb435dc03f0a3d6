"""Output folders are whole or not there; numbers that JSON has not are null."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fusion_adapters.runs.files import check_output, json_text, written_aside
from fusion_adapters.runs.heatmap import draw_depth_map


def test_output_is_written_aside(tmp_path):
    with pytest.raises(RuntimeError), written_aside(tmp_path / "out") as folder:
        (folder / "half.txt").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with written_aside(tmp_path / "out") as folder:
        (folder / "whole.txt").write_text("x")
        assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.rglob("*.txt")] == ["whole.txt"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        check_output(tmp_path / "file")


def test_a_finished_folder_is_not_lost(tmp_path, monkeypatch):
    # two runs with one output: the later one does not replace the earlier, and is kept
    with pytest.raises(FileExistsError, match=r"kept in '.*\.out\.") as told, written_aside(tmp_path / "out") as folder:
        (folder / "second.txt").write_text("x")
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "first.txt").write_text("x")
    assert (tmp_path / "out" / "first.txt").exists() and (folder / "second.txt").exists() and str(folder) in str(told.value)
    # a link to an empty folder is followed
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    with written_aside(check_output(tmp_path / "link")) as folder:
        (folder / "third.txt").write_text("x")
    assert (tmp_path / "disk" / "third.txt").exists() and (tmp_path / "link").is_symlink()
    # what cannot be replaced is refused before the work, not after it
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    mounted = tmp_path / "mounted"
    monkeypatch.setattr("os.path.ismount", lambda path: path == mounted)
    for taken in (".", "..", mounted):
        with pytest.raises(FileExistsError, match=r"current folder, one above it, or a mount point.*give one inside"):
            check_output(taken)


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    code = (
        "import os, sys; from pathlib import Path; from fusion_adapters.runs.files import written_aside\n"
        "with written_aside(Path(sys.argv[1])) as folder:\n    (folder / 'half.txt').write_text('x'); os._exit(9)"
    )
    (tmp_path / ".out.precious").mkdir()
    for name in ("out", "other"):
        assert subprocess.run([sys.executable, "-c", code, str(tmp_path / name)], check=False).returncode == 9
    with written_aside(tmp_path / "out") as beside, written_aside(tmp_path / "out2") as folder:
        (folder / "whole.txt").write_text("x")
        hidden = [p.name for p in tmp_path.iterdir() if p.name.startswith(".out.")]
        assert sorted(hidden) == sorted([".out.precious", beside.name])
        with pytest.raises(RuntimeError), written_aside(tmp_path / "out"):
            assert beside.is_dir()  # that of a living process
            raise RuntimeError
    assert [p.name for p in (tmp_path / "out2").iterdir()] == ["whole.txt"]
    assert [p.name.split(".")[1] for p in tmp_path.iterdir() if p.name.startswith(".")].count("other") == 1


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_files_of_a_run_have_the_usual_permissions(tmp_path):
    before = os.umask(0o027)
    try:
        with written_aside(tmp_path / "out") as folder:
            (folder / "adapter").mkdir(mode=0o700)
            (folder / "adapter" / "weights").touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out", *(tmp_path / "out").rglob("*"))}
    assert modes == {"out": 0o750, "adapter": 0o750, "weights": 0o640}


def test_an_epoch_without_a_loss_is_null_in_the_metrics(tmp_path):
    assert json.loads(json_text({"a": [1.5, float("nan")], "b": {"c": float("inf")}})) == {
        "a": [1.5, None],
        "b": {"c": None},
    }


def test_a_picture_that_could_not_be_finished_is_not_left_behind(tmp_path, monkeypatch):
    def fails(figure, path, **options):
        Path(path).write_bytes(b"\x89PNG")
        raise OSError("No space left on device")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="No space"):
        draw_depth_map(["a"], [1, 2], torch.ones(1, 2) / 2, tmp_path / "depth.png", "title", 2)
    assert not list(tmp_path.iterdir())
