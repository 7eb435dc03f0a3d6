"""The page beside an exported program: what it wants, where that comes from, and how it is called, with torch alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pprint import pformat
from typing import Any

ROWS, POSITIONS = 2, 7  # of the example


def program_card(note: dict[str, Any]) -> str:
    """Markdown for the README.md beside a program.

    Args:
        note: The content of `program.json`, see `export_model`.
    """
    backbone, adapter, compared = note["backbone"], note["adapter"], note["compared"]
    far = compared["largest_difference"]
    sizes = ", ".join(" x ".join(map(str, size)) for size in compared["sizes"])
    lines = [
        f"# {adapter['method']} and head as a program",
        "",
        f"`program.pt2` takes layer states of the backbone `{backbone['name']}` and returns the scores that the trained model gives "
        f"({note.get('title') or note['task'] or 'its own head'}). It needs torch, and neither the backbone nor the package that made it.",
        "",
        "## Call it",
        "",
        "```python",
        *_example(note),
        "```",
        "",
        'Batch and length are free. On a GPU: `torch.export.passes.move_to_device_pass(torch.export.load(...), "cuda").module()`.',
        "",
        *_wanted(note),
        "",
        *_scores(note),
        "",
        "## Where the states come from",
        "",
        *_transformers(note),
        "",
        *_vllm(note),
        "",
        "They must be those of this checkpoint, unquantised or quantised as in training, with nothing folded into it: the program cannot "
        "tell others.",
        "",
        "## What it was made of",
        "",
        "| what | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in _facts(note).items() if value),
        "",
        f"Before it was written, it was compared with the model on random texts ({sizes} positions): the answers "
        f"{f'differ by at most {far:.1g} of the largest' if far else 'are equal'}. The same for programs: `program.json`.",
    ]
    return "\n".join(lines) + "\n"


def _example(note: dict[str, Any]) -> list[str]:
    scores, inputs, layers = note["scores"], note["inputs"], note["layers"]
    count, *_, width = inputs["states"]["shape"]
    rows, shape = (ROWS, POSITIONS), f"{ROWS}, {POSITIONS}"
    found = ", ".join(str({"batch": rows[0], "positions": rows[1]}.get(part, part)) for part in scores["shape"])
    lines = [
        "import torch",
        "",
        'program = torch.export.load("program.pt2").module()',
        f"states = torch.randn({count}, {shape}, {width})  # in their place z_{layers[0]} .. z_{layers[-1]} of {ROWS} texts, padded to "
        f"{POSITIONS} tokens",
    ]
    if "attention_mask" in inputs:
        lines.append(f"attention_mask = torch.ones({shape}, dtype=torch.long)  # 0 at padding")
    if "input_ids" in inputs:
        padding = inputs["input_ids"].get("padding")
        ids = 1 if padding == 0 else 0
        told = "" if padding is None else f"; {padding} at padding"
        lines.append(f"input_ids = torch.full(({shape}), {ids})  # in their place the ids of the tokens{told}")
    given = "".join(f", {name}={name}" for name in inputs if name != "states")
    lines += ["with torch.no_grad():", f"    scores = program(states=states{given})  # ({found})"]
    if scores["labels"]:
        lines += [f"labels = {pformat(scores['labels'], width=120, compact=True)}"]
        many = len(scores["shape"]) == 3
        best = "scores.argmax(-1).tolist()"
        lines.append(
            f"print([[labels[i] for i in row] for row in {best}])" if many else f"print([labels[i] for i in {best}])"
        )
    else:
        lines.append(
            "print(scores.argmax(-1).tolist())" if scores["of_word_pieces"] else "print(scores.squeeze(-1).tolist())"
        )
    return lines


def _wanted(note: dict[str, Any]) -> list[str]:
    inputs, layers = note["inputs"], note["layers"]
    states = inputs["states"]
    lines = [
        "## What it wants",
        "",
        "| input | shape | dtype | what |",
        "| --- | --- | --- | --- |",
        f"| `states` | {_shape(states['shape'])} | any float; computed with as {states['dtype']} | the layers {_listed(layers)}, in this "
        "order |",
    ]
    for name, told in inputs.items():
        if name != "states":
            padding = f"; padding is {told['padding']}" if told.get("padding") is not None else ""
            lines.append(f"| `{name}` | {_shape(told['shape'])} | {told['dtype']} | {told['why']}{padding} |")
    last = note["backbone"]["blocks"]
    return [
        *lines,
        "",
        "`z_0` is what the first block is given (the output of the embeddings), `z_i` what block `i` answers, counted from 1. "
        + (f"`z_{last}` is taken **before** any final norm. " if last in layers else "")
        + (f"Blocks above {layers[-1]} of {last} need not run. " if layers[-1] < last else "")
        + ("No mask is asked for: each position is computed on its own. " if len(inputs) == 1 else "")
        + "At padding the states may be any finite numbers"
        + (", and scores there mean nothing." if "positions" in note["scores"]["shape"] else "."),
    ]


def _scores(note: dict[str, Any]) -> list[str]:
    scores = note["scores"]
    lines = ["## What it returns", "", f"Scores {_shape(scores['shape'])}, {scores['dtype']}: "]
    if scores["labels"]:
        lines[-1] += (
            f"logits of {len(scores['labels'])} labels in the order above; their softmax over the last axis are probabilities."
        )
    elif scores["of_word_pieces"]:
        lines[-1] += "logits of the vocabulary's word pieces."
    else:
        lines[-1] += "what the head answers, of a regression the number itself."
    if "tag_of_a_word_at" in note:
        lines[-1] += f" A word has its tag at its {note['tag_of_a_word_at']} piece."
    if "texts" in note:
        texts = note["texts"]
        lines[-1] += (
            f" In training texts were cut to {texts['max_length']} pieces and padded on the {texts['padding_side']}."
        )
    return lines


def _transformers(note: dict[str, Any]) -> list[str]:
    places, backbone, layers = note["hidden_states"], note["backbone"], note["layers"]
    if places is None:
        return ["transformers lists no `hidden_states` of this model; read what its blocks answer by forward hooks."]
    lacking = [layer for layer in layers if places[str(layer)] is None]
    told = "transformers: with `output_hidden_states=True`, `z_i` is `hidden_states[i]`"
    code = [
        "import torch",
        "from transformers import AutoModel",
        "",
        f"backbone = AutoModel.from_pretrained({_where(backbone)}).eval()",
    ]
    gather = "hidden_states[i]"
    if lacking:
        named = ", ".join(f"`z_{layer}`" for layer in lacking)
        told += f", **but not {named}**: there `hidden_states` holds what comes of it, as the final norm's output, and a hook reads it"
        gather = "found[i] if i in found else hidden_states[i]"
        code += [
            f'found, blocks = {{}}, backbone.get_submodule("{backbone["blocks_name"]}")',
            f"for i in {[layer for layer in lacking if layer]}:",
            "    def keep(block, args, output, i=i):",
            "        found[i] = output[0] if isinstance(output, tuple) else output",
            "    blocks[i - 1].register_forward_hook(keep)",
        ]
        if 0 in lacking:
            code.append("blocks[0].register_forward_pre_hook(lambda block, args: found.update({0: args[0]}))")
    return [
        f"{told}. That was compared, on this model.",
        "",
        "```python",
        *code,
        'with torch.no_grad():  # batch: what the tokenizer returns, return_tensors="pt"',
        "    hidden_states = backbone(**batch, output_hidden_states=True).hidden_states",
        f"states = torch.stack([{gather} for i in {layers}])",
        "```",
    ]


def _where(backbone: dict[str, Any]) -> str:
    """The arguments with which transformers loads a backbone."""
    more = {"revision": backbone["revision"], "gguf_file": backbone["gguf"] and backbone["gguf"].partition(" (")[0]}
    return ", ".join([json.dumps(backbone["name"]), *(f"{k}={json.dumps(v)}" for k, v in more.items() if v)])


def _vllm(note: dict[str, Any]) -> list[str]:
    if not note["backbone"]["causal"]:
        return [
            "A server that serves encoders must give the states of all these layers at every token, not one pooled vector."
        ]
    layers = json.dumps(note["layers"])
    return [
        f'vLLM (0.18 and later, `"method": "extract_hidden_states"`): `"eagle_aux_hidden_state_layer_ids": {layers}`, the same numbers. A '
        "request's file holds `token_ids` and `hidden_states` (tokens, layers, hidden size), the last layer without the final norm: "
        "`states = hidden_states.transpose(0, 1).unsqueeze(1)`.",
    ]


def _facts(note: dict[str, Any]) -> dict[str, Any]:
    backbone, adapter = note["backbone"], note["adapter"]
    options = ", ".join(f"{name} {value}" for name, value in adapter["options"].items() if value is not None)
    shape = f"{backbone['blocks']} blocks of hidden size {backbone['hidden_size']}"
    return {
        "backbone": f"{backbone['name']}, a {backbone['type']}, {shape}"
        + (f", from {backbone['gguf']}" if backbone["gguf"] else ""),
        "its fingerprint": backbone["fingerprint"] and f"`{backbone['fingerprint']}`, as in the run's card",
        "method": f"{adapter['method']} ({options})",
        "digest of the adapter": adapter["digest"]
        and f"`{adapter['digest']}`, `float32` in `fusion_digest` of its adapter_config.json",
        "made with": ", ".join(f"{name} {number}" for name, number in note["versions"].items()),
        "size": f"{note['bytes']:,} bytes",
    }


def _listed(layers: Sequence[int]) -> str:
    steady = len(layers) > 2 and list(layers) == list(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} .. {layers[-1]}" if steady else ", ".join(map(str, layers))


def _shape(parts: Sequence[Any]) -> str:
    return f"({', '.join(map(str, parts))})"
