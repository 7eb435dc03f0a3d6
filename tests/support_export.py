"""States of a bare backbone, and a process that calls exported programs with torch alone."""

import subprocess
import sys

import torch

# Loads each program and compares its answers; says what it has imported.
CALLER = """
import sys, torch
from pathlib import Path
cases = torch.load(sys.argv[1])
for path, calls in cases:
    program = torch.export.load(path).module()
    for inputs, expected in calls:
        found = program(**inputs)
        assert found.dtype == expected.dtype, (path, found.dtype)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"{path}: {text}")
foreign = {name.split(".")[0] for name in sys.modules} & {"fusion_adapters", "transformers", "peft"}
assert not foreign, foreign
print(sum(len(calls) for _, calls in cases))
"""
# other sizes than any with which a program is traced
SIZES = ((1, 1), (3, 4), (2, 11), (1, 23))


def texts(vocabulary, sizes=SIZES, padding="right"):
    """Random batches whose last row is padded by two, on either side, where there is room."""
    generator = torch.Generator().manual_seed(7)
    batches = []
    for rows, length in sizes:
        ids = torch.randint(3, vocabulary, (rows, length), generator=generator)
        mask = torch.ones_like(ids)
        if rows > 1:
            mask[-1, slice(length - 2, None) if padding == "right" else slice(None, 2)] = 0
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def states_of(bare, note, batch):
    """The states that a program wants, of a model without any adapter, as transformers and a forward hook give them."""
    base, found = bare.base_model, {}
    blocks = base.get_submodule(note["backbone"]["blocks_name"])
    lacking = [i for i in note["layers"] if note["hidden_states"][str(i)] is None]
    handles = [
        blocks[i - 1].register_forward_hook(
            lambda block, args, output, i=i: found.update({i: output[0] if isinstance(output, tuple) else output})
        )
        for i in lacking
    ]
    with torch.no_grad():
        listed = base(**batch, output_hidden_states=True).hidden_states
    for handle in handles:
        handle.remove()
    return torch.stack([found[i] if i in found else listed[i] for i in note["layers"]])


def calls_of(model, bare, note, batches):
    """What a program is called with, and what it must answer: the model's own logits."""
    calls = []
    for batch in batches:
        with torch.no_grad():
            expected = model(**batch).logits
        beside = {name: batch[name] for name in note["inputs"] if name != "states"}
        calls.append(({"states": states_of(bare, note, batch), **beside}, expected))
    return calls


def call_elsewhere(cases, folder):
    """Compares programs with what they must answer, in a process that knows neither this package nor transformers."""
    torch.save([(str(path), calls) for path, calls in cases], folder / "cases.pt")
    done = subprocess.run(
        [sys.executable, "-I", "-c", CALLER, str(folder / "cases.pt")],
        capture_output=True,
        text=True,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout) == sum(len(calls) for _, calls in cases)
