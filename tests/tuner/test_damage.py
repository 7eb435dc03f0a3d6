"""Damaged, exchanged and edited adapters: each is refused in one paragraph, or answers as the adapter that was saved.

Thousands of them in `make test-all`, some hundred in `make test`. docs/reliability.md has the table.
"""

import json
import random
import shutil
import struct
from collections import Counter

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import LORA, attached, disturb, logits, tiny

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
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


def metadata_of(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def rewrite(path, change):
    """Changes the tensors of a file and keeps what the file says of itself."""
    tensors, metadata = load_file(path), metadata_of(path)
    change(tensors)
    save_file(tensors, path, metadata)


def edit_config(folder, change):
    values = json.loads((folder / CONFIG).read_text())
    change(values)
    (folder / CONFIG).write_text(json.dumps(values))


def flip_bit(folder, draw, where):
    path = folder / WEIGHTS
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0]
    at = draw.randrange(8, header) if where == "header" else draw.randrange(header, len(data))
    data[at] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def put(value):
    def change(folder, draw):
        def one(tensors):
            tensor = tensors[draw.choice(sorted(tensors))]
            tensor.view(-1)[draw.randrange(tensor.numel())] = value

        rewrite(folder / WEIGHTS, one)

    return change


def exchange(folder, draw):
    """Two tensors of one shape under each other's name."""

    def swap(tensors):
        shapes = Counter(tuple(t.shape) for t in tensors.values())
        shape = draw.choice(sorted(s for s, n in shapes.items() if n > 1))
        first, second = draw.sample(sorted(n for n, t in tensors.items() if tuple(t.shape) == shape), 2)
        tensors[first], tensors[second] = tensors[second].clone(), tensors[first].clone()

    rewrite(folder / WEIGHTS, swap)


def to_whole_numbers(folder, draw):
    def one(tensors):
        name = draw.choice(sorted(tensors))
        tensors[name] = (100 * tensors[name]).to(draw.choice([torch.int8, torch.int32, torch.int64, torch.uint8]))

    rewrite(folder / WEIGHTS, one)


def scale_a_tensor(folder, draw):
    def one(tensors):
        name = draw.choice(sorted(tensors))
        tensors[name] = tensors[name] * draw.choice([-1.0, 0.5, 2.0]) + 0.05

    rewrite(folder / WEIGHTS, one)


def drop_a_tensor(folder, draw):
    rewrite(folder / WEIGHTS, lambda tensors: tensors.pop(draw.choice(sorted(tensors))))


def cut(folder, draw):
    path = folder / WEIGHTS
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def other_weights(folder, draw):
    shutil.copy(folder.parent / "b" / WEIGHTS, folder / WEIGHTS)


def other_config(folder, draw):
    shutil.copy(folder.parent / "b" / CONFIG, folder / CONFIG)


def option(values, draw):
    names = sorted(n for n, v in values.items() if n.startswith("fusion") and v is not None)
    return draw.choice([*names, "r", "lora_alpha", "target_modules", "modules_to_save"])


def take_option_out(folder, draw):
    edit_config(folder, lambda values: values.pop(option(values, draw)))


def null_an_option(folder, draw):
    edit_config(folder, lambda values: values.update({option(values, draw): None}))


def another_value(folder, draw):
    def change(values):
        name = option(values, draw)
        value = values[name]
        other = {bool: lambda: not value, int: lambda: value + 1, float: lambda: 2 * value, str: lambda: f"{value}x"}
        if isinstance(value, dict):
            values[name] = {**value, draw.choice(sorted(value)): "0"}
        else:
            values[name] = other[type(value)]() if type(value) in other else value[:-1]

    edit_config(folder, change)


DAMAGE = {
    "a bit of the weights": lambda folder, draw: flip_bit(folder, draw, "weights"),
    "a bit of the header": lambda folder, draw: flip_bit(folder, draw, "header"),
    "NaN": put(float("nan")),
    "infinity": put(float("inf")),
    "exchanged names": exchange,
    "whole numbers": to_whole_numbers,
    "a tensor scaled": scale_a_tensor,
    "a tensor left out": drop_a_tensor,
    "a file cut short": cut,
    "another adapter's weights": other_weights,
    "another adapter's config": other_config,
    "an option left out": take_option_out,
    "an option null": null_an_option,
    "another value of an option": another_value,
}


def keep_tensors_in(dtype):
    def change(folder, draw):
        def cast(tensors):
            for name in list(tensors):
                tensors[name] = tensors[name].to(dtype)

        rewrite(folder / WEIGHTS, cast)

    return change


HARMLESS = {
    "cast to bfloat16": keep_tensors_in(torch.bfloat16),
    "cast to float16": keep_tensors_in(torch.float16),
    "config written anew": lambda folder, draw: edit_config(folder, lambda values: None),
    "without the card": lambda folder, draw: (folder / "README.md").unlink(),
    "a note beside it": lambda folder, draw: (folder / "note.txt").write_text("mine"),
}


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


def test_a_config_cut_short_is_no_adapter(adapters):
    """peft reads the config before any of ours is asked, and its error is json's."""
    root, _ = adapters
    size = (root / "a" / CONFIG).stat().st_size

    def cut_config(folder, draw):
        (folder / CONFIG).write_bytes((folder / CONFIG).read_bytes()[: draw.randrange(size - 1)])

    assert {outcome(root, cut_config, random.Random(i)) for i in range(8)} == {"BARE JSONDecodeError"}


@pytest.mark.parametrize("kind", HARMLESS)
def test_harmless_changes_load(adapters, kind):
    root, answers = adapters
    assert told(root, answers, HARMLESS[kind], kind, ROUNDED) == "same"
