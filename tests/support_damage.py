"""Damage to a saved adapter, by kind, and what leaves it as it is."""

import json
import shutil
import struct
from collections import Counter

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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


def cut_config(folder, draw):
    data = (folder / CONFIG).read_bytes()
    (folder / CONFIG).write_bytes(data[: draw.randrange(len(data) - 1)])


def no_text(folder, draw):
    data = bytearray((folder / CONFIG).read_bytes())
    data[draw.randrange(len(data))] = 0xFF
    (folder / CONFIG).write_bytes(data)


def no_object(folder, draw):
    (folder / CONFIG).write_text(draw.choice(["", "[1]", "3", "null", '"text"']))


def another_type(folder, draw):
    """A value of a type that its field does not take."""
    wrong = {"fusion": 5, "r": "4", "fusion_heads": "x", "fusion_layers": ["a"], "peft_type": "FUSIOM", "target_modules": 3}
    wrong |= {
        "modules_to_save": 7,
        "fusion_scale": 3,
        "lora_alpha": [],
        "fusion_digest": "x",
        "fusion_labels": 2,
        "bias": {},
    }
    name = draw.choice(sorted(wrong))
    edit_config(folder, lambda values: values.update({name: wrong[name]}))


def without_digest(folder):
    edit_config(folder, lambda values: values.pop("fusion_digest"))


CONFIG_DAMAGE = {
    "a config cut short": cut_config,
    "a config that is no UTF-8": no_text,
    "a config that is no object": no_object,
    "a value of another type": another_type,
}


def add_a_tensor(folder, draw):
    name = draw.choice(["bert.layer_fusion.value.extra", "bert.encoder.layer.0.attention.self.query.lora_C.weight"])
    rewrite(folder / WEIGHTS, lambda tensors: tensors.update({f"base_model.model.{name}": torch.zeros(3)}))


def another_shape(folder, draw):
    def one(tensors):
        name = draw.choice(sorted(tensors))
        tensors[name] = torch.zeros(*(n + 1 for n in tensors[name].shape))

    rewrite(folder / WEIGHTS, one)


# what is seen without a digest as well
SEEN_WITHOUT = {
    "a tensor left out": drop_a_tensor,
    "a tensor too many": add_a_tensor,
    "another shape": another_shape,
    "NaN": put(float("nan")),
    "infinity": put(float("inf")),
    "whole numbers": to_whole_numbers,
}
