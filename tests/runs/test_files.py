"""Output folders are whole or not there; numbers that JSON has not are null."""

import json

import pytest

from fusion_adapters.runs.files import check_output, json_text, written_aside


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


def test_an_epoch_without_a_loss_is_null_in_the_metrics(tmp_path):
    assert json.loads(json_text({"a": [1.5, float("nan")], "b": {"c": float("inf")}})) == {
        "a": [1.5, None],
        "b": {"c": None},
    }
