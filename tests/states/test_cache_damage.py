"""Damaged, exchanged and edited caches of layer states: each gives the states that were cached, or is refused in one paragraph.

Every trial opens a changed copy and reads every row, with and without checksums, and extracts into it again. Hundreds of them
in `make test-all`, some dozen in `make test`. docs/reliability.md has the table.
"""

import json
import os
import random
import shutil
from collections import Counter

import pytest
import torch
from support import attached, tiny
from support_cache import cached, from_cache, some_rows
from support_cache_damage import DAMAGE, HARMLESS, MANIFEST

from fusion_adapters.states import LayerStateCache

REFUSED = (ValueError, OSError)  # what a refusal may be
BARE = (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError)  # kinds of them that come from inside
SMALL = {"batch_size": 4, "shard_bytes": 5_000}
SUBJECTS = {"float16": "bert", "int8": "llama", "float32": "bert"}  # formats, and the backbones whose states are stored so
ROWS = some_rows(24)


class Subject:
    """A cache, the model that it belongs to, and the states that it holds."""

    def __init__(self, root, dtype):
        self.folder, self.dtype, family = root / dtype / "right", dtype, SUBJECTS[dtype]
        self.model = attached(family)
        self.states = self.read(cached(self.model, ROWS, self.folder, dtype=dtype, **SMALL))
        self.files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        # of the same shape: another backbone, and other rows
        cached(attached(model=tiny(family, seed=1)), ROWS, root / dtype / "other", dtype=dtype, **SMALL)
        cached(self.model, some_rows(24, seed=1), root / dtype / "rows", dtype=dtype, **SMALL)
        self.changed = root / dtype / "changed"

    def read(self, cache):
        """The states of all rows, by number and as a batch gets them."""
        states = cache.read(cache.find(ROWS))
        batch = from_cache(cache, ROWS)["layer_states"]["states"]
        return states, batch

    def is_right(self, states):
        return all(torch.equal(found, expected) for found, expected in zip(states, self.states, strict=True))


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    root = tmp_path_factory.mktemp("caches")
    return [Subject(root, dtype) for dtype in SUBJECTS]


def told(subject, attempt):
    """What an attempt at the changed cache does: `same`, `refused`, `SILENT` or `BARE ...`."""
    try:
        cache = attempt()
        return "same" if subject.is_right(subject.read(cache)) else "SILENT"
    except BARE as error:
        return f"BARE {type(error).__name__}: {error}"
    except REFUSED as error:
        told = str(error)  # names the folder, and says what to do: not the system's own words
        ours = "\n" not in told and len(told) > 60 and subject.changed.name in told and not told.startswith("[Errno")
        return "refused" if ours else f"BARE {type(error).__name__}: {told[:200]}"
    except Exception as error:
        return f"BARE {type(error).__name__}: {str(error)[:200]}"


def trial(subject, change, seed):
    """What opening a changed copy does, and extracting again into it."""
    if subject.changed.is_dir():
        subject.changed.chmod(0o700)
    for path in (subject.changed, subject.changed.parent / "elsewhere"):
        path.unlink() if path.is_file() else shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(subject.folder, subject.changed)
    change(subject.changed, random.Random(seed))
    opened = told(subject, lambda: LayerStateCache(subject.changed, subject.model))
    quickly = told(subject, lambda: LayerStateCache(subject.changed, subject.model, verify=False))
    if quickly.startswith("BARE"):
        return quickly, "not tried"
    again = told(subject, lambda: cached(subject.model, ROWS, subject.changed, dtype=subject.dtype, **SMALL))
    if again == "same":
        there = {name: (subject.changed / name).read_bytes() for name in subject.files}
        again = "same" if all(there[name] == subject.files[name] for name in there if name != MANIFEST) else "LEFT"
    return opened, again


def trials(number):
    return pytest.mark.parametrize("number", [pytest.param(3), pytest.param(number, marks=pytest.mark.slow)])


@trials(15)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_or_gives_the_same_states(subjects, kind, number):
    if kind == "no right to it" and not os.geteuid():
        pytest.skip("the system's administrator has every right")
    found = [trial(subjects[i % len(subjects)], DAMAGE[kind], f"{kind} {i}") for i in range(number)]
    opened, again = Counter(each[0] for each in found), Counter(each[1] for each in found)
    print(f"| {kind} | {number} | {opened['refused']} | {opened['same']} | {again['refused']} | {again['same']} |")
    assert {*opened, *again} <= {"refused", "same"}, (opened, again)


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_changes_load(subjects, kind):
    assert {trial(subject, HARMLESS[kind], kind) for subject in subjects} == {("same", "same")}
