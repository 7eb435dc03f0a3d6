"""A file appears whole or not at all, and a temporary name tells whose it is."""

import os

import pytest

from fusion_adapters.backbone.atomic import temporary_of, write_text_whole, written_whole


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file.json"
    write_text_whole(path, "one\n")
    with written_whole(path) as temporary:
        temporary.write_text("two\n")
        assert path.read_text() == "one\n"
        assert temporary_of(temporary.name) == ("file.json", os.getpid())
    assert path.read_text() == "two\n"
    with pytest.raises(KeyboardInterrupt), written_whole(path) as temporary:
        temporary.write_text("thr")
        raise KeyboardInterrupt
    assert path.read_text() == "two\n" and list(path.parent.iterdir()) == [path]


def test_other_names_are_no_temporary_ones():
    for name in ("file.json", ".file", ".file.json", "file.12", ".file.12.json"):
        assert temporary_of(name) is None
