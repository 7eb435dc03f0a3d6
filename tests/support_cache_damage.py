"""Ways to damage, exchange and edit a folder of cached layer states, for states/test_cache_damage.py.

Each takes a folder and a `random.Random`.

Beside the folder stand two caches of the same shape: `other`, of another backbone, and `rows`, of other rows.
"""

import json
import os
import shutil
import struct

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from fusion_adapters.states.formats import DTYPES
from fusion_adapters.states.storage import manifest_text

MANIFEST, INDEX = "manifest.json", "index.safetensors"


def shard_of(folder, draw):
    return draw.choice(sorted(folder.glob("shard-*")))


def two_shards(folder, draw):
    return draw.sample(sorted(folder.glob("shard-*")), 2)


def rewrite(path, change):
    """Changes the tensors of a file and keeps what the file says of itself."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)


def tensors_of(path, change):
    return lambda folder, draw: rewrite(path(folder, draw), lambda tensors: change(tensors, draw))


def flip_bit(path, draw, part):
    data = bytearray(path.read_bytes())
    header = 8 + struct.unpack("<Q", data[:8])[0] if path.suffix == ".safetensors" else 0
    first, last = {"header": (0, header), "tensors": (header, len(data))}[part]
    data[draw.randrange(first, last)] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def cut(path, draw):
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def put(value):
    def change(tensors, draw):
        states = tensors["states"] if value is None or tensors["states"].is_floating_point() else tensors["scales"]
        at = draw.randrange(states.numel())
        states.view(-1)[at] = value if value is not None else states.view(-1)[at] + 1

    return change


def cast(tensors, draw):
    other = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.int32, torch.uint8, torch.float64]
    tensors["states"] = tensors["states"].to(draw.choice([d for d in other if d != tensors["states"].dtype]))


def reinterpret(tensors, draw):
    """The same bytes under another dtype of the same size."""
    other = {torch.float16: torch.bfloat16, torch.int8: torch.uint8, torch.float32: torch.int32}
    tensors["states"] = tensors["states"].view(other[tensors["states"].dtype])


def reshape(tensors, draw):
    states = tensors["states"]
    shapes = [(states.numel(),), (1, *states.shape), (states.shape[0], -1, 1), (states.shape[0], states.shape[2], -1)]
    tensors["states"] = states.reshape(draw.choice(shapes))


def exchange_tokens(tensors, draw):
    first, second = draw.sample(range(len(tensors["states"])), 2)
    tensors["states"][[first, second]] = tensors["states"][[second, first]]


def rename(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensors[f"{name}s"] = tensors.pop(name)


def to_scalar(tensors, draw):
    name = draw.choice(sorted(tensors))
    tensors[name] = tensors[name].view(-1)[0].clone()


def add(tensors, draw):
    tensors[draw.choice(["scales", "more"])] = torch.ones(len(next(iter(tensors.values()))), 4)


def edit_places(tensors, draw):
    places = tensors["places"]
    places[draw.randrange(len(places)), draw.randrange(3)] += draw.choice([-1, 1, 7, 10**6])


def exchange_rows(tensors, draw):
    name = draw.choice(sorted(tensors))
    first, second = draw.sample(range(len(tensors[name])), 2)
    tensors[name][[first, second]] = tensors[name][[second, first]]


def fewer_rows(tensors, draw):
    for name in draw.choice([["signatures"], ["places"], ["signatures", "places"]]):
        tensors[name] = tensors[name][: draw.randrange(len(tensors[name]))]


def exchange_shards(folder, draw):
    first, second = two_shards(folder, draw)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)


def double_shard(folder, draw):
    first, second = two_shards(folder, draw)
    first.write_bytes(second.read_bytes())


def from_other(pattern, *others):
    """Files of a cache of the same shape: of another backbone, or of other rows."""

    def change(folder, draw):
        other = folder.parent / draw.choice(others)
        path = draw.choice(sorted(other.glob(pattern)))
        shutil.copy(path, folder / path.name)

    return change


def edit(change):
    """Changes the manifest's values, and leaves what it says of itself."""

    def edited(folder, draw):
        manifest = json.loads((folder / MANIFEST).read_text())
        found = change(manifest, draw)
        (folder / MANIFEST).write_text(json.dumps(manifest if found is None else found))

    return edited


def another_value(manifest, draw):
    """Another number, count, hash, list or name, at any depth."""
    inside = [manifest, manifest["key"], draw.choice(manifest["shards"])]
    values = draw.choice(inside)
    name = draw.choice(sorted(n for n in values if n != "format"))
    value = values[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        values[name] = value + draw.choice([-1, 1, 1000])
    elif isinstance(value, list):
        values[name] = draw.choice([value[:-1], value[::-1], value + value[-1:]])
    else:
        values[name] = f"{value}x"


def another_type(manifest, draw):
    values = draw.choice([manifest, manifest["key"], draw.choice(manifest["shards"])])
    name = draw.choice(sorted(values))
    values[name] = draw.choice([None, [], {}, "", True, "x", -1, 1e300, [None], {"a": 1}])


def without_a_part(manifest, draw):
    values = draw.choice([manifest, manifest["key"], draw.choice(manifest["shards"])])
    values.pop(draw.choice(sorted(values)))


def other_format(manifest, draw):
    manifest["format"] += draw.choice([1, 2, 100, -1, 0.5])


def written_again(manifest, draw):
    """An edit whose author knew of the manifest's own checksum: what it plans and what is there do not agree."""
    manifest.pop("checksum")
    shard = draw.choice(manifest["shards"])
    change = draw.choice(["layers", "hidden_size", "dtype", "index", "tokens", "rows", "file", "inputs", "shards"])
    if change == "layers":
        manifest["layers"] = [0, *manifest["layers"][1:]]
    elif change == "hidden_size":
        manifest["hidden_size"] //= 2
    elif change == "dtype":
        manifest["dtype"] = draw.choice([d for d in DTYPES if d != manifest["dtype"]])
    elif change == "index":
        manifest["index"] = manifest["index"][::-1]
    elif change == "inputs":
        manifest["inputs"] = manifest["inputs"][:1]
    elif change == "file":
        shard["file"] = manifest["shards"][0 if shard is manifest["shards"][-1] else -1]["file"]
    elif change == "shards":
        manifest["shards"].remove(shard)
    else:
        shard[change] += 1
    return json.loads(manifest_text(manifest))


def as_in_0_1(manifest, draw):
    """Files of 0.1.0: format 2, without the checksum and with shards that do not know their cache."""
    manifest.pop("checksum")
    manifest["format"] = 2


TEXTS = {
    "no JSON": [
        b"{",
        b"layers: [1, 2]",
        b"<html></html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ],
    "another kind of JSON": [b"null", b"[]", b"3", b'"manifest"', b"{}", b"true", b"[" * 100_000, b'{"format": {}}', b"NaN"],
    "no UTF-8": [b"\xff\xfe{\x00}\x00", b"\x89PNG\r\n", b'{"format": "\xe9"}', bytes(range(256))],
}


def text(kind):
    return lambda folder, draw: (folder / MANIFEST).write_bytes(draw.choice(TEXTS[kind]))


def any_file(folder, draw):
    """A file of the cache, each kind equally often."""
    return draw.choice([folder / MANIFEST, folder / INDEX, shard_of(folder, draw)])


def folder_instead(folder, draw):
    path = any_file(folder, draw)
    path.unlink()
    path.mkdir()
    if draw.random() < 0.5:
        (path / "mine.txt").write_text("mine")


def link_to_nothing(folder, draw):
    path = any_file(folder, draw)
    path.unlink()
    path.symlink_to(folder / "nowhere")


def link_to_another(folder, draw):
    first, second = two_shards(folder, draw)
    first.unlink()
    first.symlink_to(second.name)


def pipe_instead(folder, draw):
    path = any_file(folder, draw)
    path.unlink()
    os.mkfifo(path)


def file_instead_of_the_folder(folder, draw):
    shutil.rmtree(folder)
    folder.write_text("states")


def lock_is_a_folder(folder, draw):
    (folder / ".lock").mkdir()


def no_right_to(folder, draw):
    """Read a file, read the folder, or write into it."""
    path, mode = draw.choice([(any_file(folder, draw), 0), (folder, 0), (folder, 0o500)])
    path.chmod(mode)


DAMAGE = {
    "shard: a bit of the tensors": lambda f, d: flip_bit(shard_of(f, d), d, "tensors"),
    "shard: a bit of the header": lambda f, d: flip_bit(shard_of(f, d), d, "header"),
    "shard: cut short": lambda f, d: cut(shard_of(f, d), d),
    "shard: no bytes": lambda f, d: shard_of(f, d).write_bytes(b""),
    "shard: gone": lambda f, d: shard_of(f, d).unlink(),
    "shard: two exchanged": exchange_shards,
    "shard: another's copy": double_shard,
    "shard: of another cache": from_other("shard-*", "other", "rows"),
    "shard: NaN": tensors_of(shard_of, put(float("nan"))),
    "shard: infinity": tensors_of(shard_of, put(float("inf"))),
    "shard: one value": tensors_of(shard_of, put(None)),
    "shard: cast": tensors_of(shard_of, cast),
    "shard: bytes under another dtype": tensors_of(shard_of, reinterpret),
    "shard: another shape": tensors_of(shard_of, reshape),
    "shard: a scalar": tensors_of(shard_of, to_scalar),
    "shard: tokens exchanged": tensors_of(shard_of, exchange_tokens),
    "shard: a tensor renamed": tensors_of(shard_of, rename),
    "shard: a tensor added": tensors_of(shard_of, add),
    "index: a bit of the tensors": lambda f, d: flip_bit(f / INDEX, d, "tensors"),
    "index: a bit of the header": lambda f, d: flip_bit(f / INDEX, d, "header"),
    "index: cut short or empty": lambda f, d: d.choice([cut, lambda path, _: path.write_bytes(b"")])(f / INDEX, d),
    "index: gone": lambda f, d: (f / INDEX).unlink(),
    "index: a place edited": tensors_of(lambda f, d: f / INDEX, edit_places),
    "index: rows exchanged": tensors_of(lambda f, d: f / INDEX, exchange_rows),
    "index: fewer rows": tensors_of(lambda f, d: f / INDEX, fewer_rows),
    "index: renamed, reshaped": tensors_of(lambda f, d: f / INDEX, lambda t, d: d.choice([rename, to_scalar])(t, d)),
    "index: of another cache": from_other(INDEX, "rows"),
    "manifest: a bit": lambda f, d: flip_bit(f / MANIFEST, d, "tensors"),
    "manifest: cut short or empty": lambda f, d: d.choice([cut, lambda path, _: path.write_bytes(b"")])(f / MANIFEST, d),
    "manifest: gone": lambda f, d: (f / MANIFEST).unlink(),
    "manifest: another value": edit(another_value),
    "manifest: another type": edit(another_type),
    "manifest: a part left out": edit(without_a_part),
    "manifest: edited, with its checksum": edit(written_again),
    "manifest: another format": edit(other_format),
    "manifest: of 0.1.0": edit(as_in_0_1),
    "manifest: of another cache": from_other(MANIFEST, "other", "rows"),
    **{f"manifest: {kind}": text(kind) for kind in TEXTS},
    "a folder for a file": folder_instead,
    "a link to nothing": link_to_nothing,
    "a link to another shard": link_to_another,
    "a pipe for a file": pipe_instead,
    "a file for the folder": file_instead_of_the_folder,
    "a folder for the lock": lock_is_a_folder,
    "no right to it": no_right_to,
}


def reformat(folder, draw):
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(dict(sorted(manifest.items())), indent=draw.choice([None, 4])))


def keep_elsewhere(folder, draw):
    """A shard in another place, with a link to it."""
    path, elsewhere = shard_of(folder, draw), folder.parent / "elsewhere"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)


def note_beside(folder, draw):
    (folder / draw.choice([".DS_Store", "notes.txt", "shard-00000 (copy).safetensors", "manifest.json~"])).write_text("mine")


HARMLESS = {
    "the manifest in another layout": reformat,
    "a shard elsewhere, linked": keep_elsewhere,
    "a shard written anew": tensors_of(shard_of, lambda tensors, draw: None),
    "a note beside it": note_beside,
    "a dead run's lock": lambda f, d: (f / ".lock").write_text(""),
    "a dead run's folder": lambda f, d: (f / f".shard-00001.safetensors.{2**22 - 1}").mkdir(),
    "a folder in it": lambda f, d: (f / "more").mkdir(),
}
