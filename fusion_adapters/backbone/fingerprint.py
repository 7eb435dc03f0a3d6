"""Two signatures of a backbone, by which adapters and caches know the backbone that they were made for.

Both cover every tensor that is not quantised. An adapter outlives casts, quantisation and new tokens: its `fingerprint` holds
the configuration and sums over a sample of each tensor (`sums`), and is compared up to rounding. Cached layer states do not:
their `weights_signature` is a hash of all bytes, and must be equal.
"""

from __future__ import annotations

import base64
import json
import struct
import zlib
from collections.abc import Container, Iterable, Mapping
from typing import Any

import torch
import xxhash
from torch import nn

from .base_tensors import base_tensors
from .blocks import Backbone
from .families import input_embeddings
from .quantization import is_quantised, is_readable
from .sampled import sampled_fingerprint
from .settings import settings, settings_differ
from .sums import CAST, SMALLEST_STEP, Sum, Sums

SAMPLED, WHOLE = "v1", "v2"  # of 0.1.0, see `sampled`; of 0.2.0
NAMED = 3  # tensors that a message names


def fingerprints(backbone: Backbone, saved: str | None = None, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The signatures of a backbone's weights and configuration, by version; empty if no weight is in memory (meta device).

    They are the same for every dtype and quantisation of one checkpoint, and whatever adapters are attached to it. Compare by
    `fingerprints_differ`.

    Args:
        backbone: The backbone.
        saved: What they are to be compared with: for one of 0.1.0, the signature of its kind is among them.
        known: Those found before a training, which may change what they are of (`bias="all"`).
    """
    found = dict(known or {})
    if known is None and (whole := _whole_fingerprint(backbone)) is not None:
        found[WHOLE] = f"{WHOLE}:{whole}"
    if saved is not None and saved.startswith(f"{SAMPLED}:") and SAMPLED not in found:
        old = sampled_fingerprint(backbone)
        found.update({} if old is None else {SAMPLED: f"{SAMPLED}:{old}"})
    return found


def fingerprint(backbone: Backbone) -> str | None:
    """The fingerprint to save, see `fingerprints`; None if no weight is in memory."""
    return fingerprints(backbone).get(WHOLE)


def join_fingerprints(parts: list[dict[str, str]]) -> dict[str, str]:
    """The signatures of several stacks of one model, from theirs: the whole one covers both already."""
    joined = {WHOLE: parts[0][WHOLE]} if WHOLE in parts[0] else {}
    if all(SAMPLED in part for part in parts):
        joined[SAMPLED] = f"{SAMPLED}:{''.join(part[SAMPLED].partition(':')[2] for part in parts)}"
    return joined


def fingerprints_differ(
    saved: str | None, here: Mapping[str, str], replaced: Iterable[str] = (), rows: Iterable[int] = ()
) -> str | None:
    """Compares a saved fingerprint with a backbone's, up to the rounding of 16-bit weights.

    Args:
        saved: That of the adapter.
        here: Those of the backbone, see `fingerprints`.
        replaced: Names of modules that the adapter brings itself (`modules_to_save`).
        rows: Word embeddings that it brings (`trainable_token_indices`).

    Returns:
        None if they agree or one is unknown, else what differs, in words that go after "a backbone of the same shape but with".

    Raises:
        ValueError: If the saved one cannot be read, or is of a later version.
    """
    if saved is None:
        return None
    version, _, data = saved.partition(":")
    if version not in (SAMPLED, WHOLE):
        raise ValueError(
            f'"fusion_fingerprint" in adapter_config.json begins with {saved[:12]!r}; this version of fusion-adapters reads '
            f"{SAMPLED!r} and {WHOLE!r}. If the adapter was saved by a later version, install that one (pip install -U "
            "fusion-adapters); else the file is damaged: copy or download it again."
        )
    try:
        if version == SAMPLED:
            sampled = _floats(data)
        else:
            known, sums, partial = _parsed(data)
    except Exception as error:  # of four decoders; all say that the text is not one of ours
        raise ValueError(
            f'"fusion_fingerprint" in adapter_config.json cannot be read ({len(saved)} characters that begin with '
            f"{saved[:12]!r}: {error}), so nothing tells whether the adapter belongs to this backbone. Copy or download the "
            "file again."
        ) from error
    if version not in here or saved == here[version]:
        return None
    if version == SAMPLED:
        return _sampled_differ(sampled, _floats(here[SAMPLED].partition(":")[2]))
    known_here, sums_here, partial_here = _parsed(here[WHOLE].partition(":")[2])
    changed = settings_differ(known, known_here)
    if changed:
        return "another configuration: " + "; ".join(f"{k} is {a} for the adapter and {b} here" for k, a, b in changed)
    skipped = set(replaced)
    sums = {n: s for n, s in sums.items() if not _is_replaced(n, skipped, rows)}
    sums_here = {n: s for n, s in sums_here.items() if not _is_replaced(n, skipped, rows)}
    common = [name for name in sums if name in sums_here]
    far = [name for name in common if sums[name].differs(sums_here[name])]
    if far:
        named = ", ".join(far[:NAMED]) + (", ..." if len(far) > NAMED else "")
        return f"other weights: {len(far)} of {len(common)} tensors ({named}) differ by more than 16-bit rounding"
    if partial or partial_here:
        return None
    names, names_here = ({_tensor_of(n) for n, s in each.items() if s.before} for each in (sums, sums_here))
    alone = sorted(names ^ names_here)
    if alone:
        return f"other weights: {len(alone)} of {len(names | names_here)} tensors ({alone[0]}, ...) are in one of them alone"
    return None


def weights_signature(backbone: Backbone, idle: Container[int] = (), scalings: Iterable[float] = ()) -> str:
    """A hash of every value of every tensor that runs before or in the blocks.

    Quantised layers are left out, because libraries move, pack and cast them between calls; the tensors around them (norms,
    embeddings) stand for the checkpoint.

    Args:
        backbone: The backbone.
        idle: The `id` of tensors that take no part in the layer states: those of adapters that are not active.
        scalings: The factors with which active adapters enter the blocks.

    Returns:
        Sixteen hexadecimal digits.
    """
    digest = xxhash.xxh3_128()  # against another checkpoint, not against forgers
    for scaling in scalings:
        digest.update(struct.pack("<d", scaling))
    elsewhere = {id(t.tensor): t for t in base_tensors(backbone)}
    for module in (m for part in backbone.upstream for m in part.modules()):
        tensors = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None]
        if any(is_quantised(t, module) and isinstance(t, nn.Parameter) for t in tensors):
            continue  # its bias too, which bitsandbytes casts in the first call
        for tensor in tensors:
            if not is_readable(tensor, module) or id(tensor) in idle:
                continue
            value = elsewhere[id(tensor)].value() if tensor.is_meta and id(tensor) in elsewhere else tensor.detach()
            if value is None or value.is_meta:
                continue
            digest.update(f"{tuple(value.shape)}{value.dtype}".encode())
            digest.update(value.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _whole_fingerprint(backbone: Backbone) -> str | None:
    words: Any = input_embeddings(backbone.root)
    words = {id(t) for t in words.parameters()} if hasattr(words, "parameters") else set()
    sums = Sums()
    partial = False
    for base in base_tensors(backbone):
        if not base.tensor.numel() or base.tensor.dtype in (torch.bool, torch.int64):  # positions, counts of batches
            continue
        value = base.value() if base.readable else None
        if value is None:
            partial = True
            continue
        sums.add(base.name, value, base.before, id(base.tensor) in words)
    texts = {name: total.text() for name, total in sums.all().items()}
    if not texts:
        return None
    content = {"config": settings(backbone), "partial": partial, "sums": texts}
    return base64.b64encode(zlib.compress(json.dumps(content).encode())).decode()


def _parsed(data: str) -> tuple[dict[str, str], dict[str, Sum], bool]:
    content = json.loads(zlib.decompress(base64.b64decode(data, validate=True)))
    sums = {name: Sum.parsed(text) for name, text in content["sums"].items()}
    if not sums:
        raise ValueError("no values")
    return dict(content["config"]), sums, bool(content["partial"])


def _floats(data: str) -> tuple[float, ...]:
    raw = bytes.fromhex(data)
    if not raw:
        raise ValueError("no values")
    return struct.unpack(f"<{len(raw) // 4}f", raw)


def _sampled_differ(values: tuple[float, ...], others: tuple[float, ...]) -> str | None:
    if len(values) != len(others):
        return f"other weights: {len(values)} against {len(others)} sampled ones"
    pairs = zip(values, others, strict=True)
    far = sum(abs(a - b) > max(CAST * max(abs(a), abs(b)), SMALLEST_STEP) for a, b in pairs)
    return f"other weights: {far} of {len(values)} sampled ones differ by more than 16-bit rounding" if far else None


def _tensor_of(name: str) -> str:
    return name.partition("[")[0]


def _is_replaced(name: str, modules: Iterable[str], rows: Iterable[int]) -> bool:
    """Whether an adapter brings these values itself."""
    path, _, span = name.partition("[")
    parts = path.split(".")[:-1]
    if any(".".join(parts[:i]).endswith(module) for module in modules for i in range(1, len(parts) + 1)):
        return True
    first, _, last = span.rstrip("]").partition(":")
    return bool(span) and any(int(first) <= row < int(last) for row in rows)
