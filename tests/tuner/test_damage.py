"""Damaged, exchanged and edited adapters: each is refused in one paragraph, or answers as the adapter that was saved.

Thousands of them in `make test-all`, some hundred in `make test`. docs/reliability.md has the table.
"""

import json
import random
import shutil
from collections import Counter

import pytest
import torch
from peft import PeftModel
from support import LORA, attached, disturb, logits, tiny
from support_damage import CONFIG_DAMAGE, DAMAGE, HARMLESS, SEEN_WITHOUT, without_digest

REFUSED = (ValueError, OSError)  # what a load may raise: one paragraph of ours
BARE = (json.JSONDecodeError, UnicodeDecodeError)  # kinds of them that come from inside
MOVED = 1e-3  # a logit, by what a damaged file may do to it without a word
ROUNDED = 5e-2  # and by a cast to bfloat16, which keeps eight bits of every weight


def saved(folder, seed=0, **fields):
    """A saved adapter of the tiny BERT with a fusion, LoRA and a head."""
    model = attached("bert", **LORA["bert"], **fields)
    torch.manual_seed(seed)
    disturb(model, scale=0.1 + 0.01 * seed)
    model.save_pretrained(folder)
    return logits(model)


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """Two adapters of the same shape and other weights, and a third of another size; their folders and answers."""
    root = tmp_path_factory.mktemp("adapters")
    answers = {
        "a": saved(root / "a", 0, fusion="dwatt", fusion_heads=4),
        "b": saved(root / "b", 7, fusion="dwatt", fusion_heads=2),
        "c": saved(root / "c", 3, fusion="dwatt", fusion_heads=4, fusion_bottleneck=8),
    }
    return root, answers


def outcome(root, change, draw):
    """What a load of a changed copy of the first adapter does: `refused`, `same`, `SILENT` or `BARE ...`."""
    folder = root / "changed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(root / "a", folder)
    change(folder, draw)
    model = tiny("bert")
    plain = logits(model)
    try:
        loaded = PeftModel.from_pretrained(model, folder)
    except BARE as error:
        return f"BARE {type(error).__name__}"
    except REFUSED as error:
        told = str(error)
        if "\n" in told or len(told) < 40:
            return f"BARE {told!r}"
        return "refused" if torch.equal(logits(model), plain) and not hasattr(model, "peft_config") else "CHANGED"
    except Exception as error:
        return f"BARE {type(error).__name__}: {error}"
    return logits(loaded)


def told(root, answers, change, seed, limit=MOVED):
    found = outcome(root, change, random.Random(seed))
    if isinstance(found, str):
        return found
    difference = (found - answers["a"]).abs().max()
    return "same" if bool(difference < limit) else "SILENT"


def trials(number):
    return pytest.mark.parametrize("number", [pytest.param(8), pytest.param(number, marks=pytest.mark.slow)])


@trials(150)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_refused_or_changes_nothing(adapters, kind, number):
    root, answers = adapters
    found = Counter(told(root, answers, DAMAGE[kind], f"{kind} {i}") for i in range(number))
    print(f"| {kind} | {number} | {found['refused']} | {found['same']} |")
    assert set(found) <= {"refused", "same"}, found


@trials(50)
@pytest.mark.parametrize("kind", CONFIG_DAMAGE)
def test_a_damaged_config_is_refused(adapters, kind, number):
    """peft reads the config before any of ours is asked."""
    root, answers = adapters
    found = Counter(told(root, answers, CONFIG_DAMAGE[kind], f"{kind} {i}") for i in range(number))
    print(f"| {kind} | {number} | {found['refused']} | {found['same']} |")
    assert set(found) <= {"refused"}, found


@trials(50)
@pytest.mark.parametrize("kind", SEEN_WITHOUT)
def test_what_is_seen_without_a_digest(adapters, kind, number):
    root, answers = adapters

    def change(folder, draw):
        SEEN_WITHOUT[kind](folder, draw)
        without_digest(folder)

    found = Counter(told(root, answers, change, f"{kind} {i}") for i in range(number))
    print(f"| {kind}, no digest | {number} | {found['refused']} | {found['same']} |")
    assert set(found) <= {"refused"}, found


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_changes_load(adapters, kind):
    root, answers = adapters
    assert told(root, answers, HARMLESS[kind], kind, ROUNDED) == "same"
