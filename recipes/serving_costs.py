"""What N adapters on the same texts cost in one pass of the backbone, beside LoRA's ways and beside linear heads.

LoRA answers in N passes with the adapters switched, or in one over a batch with the text copied N times (`adapter_names`). All ways
answer for the same batch, in turn, one thread; each number is the median over rounds of its ratio, within the round, to one pass of the
bare backbone. `python recipes/serving_costs.py` takes a quarter of an hour on two cores for SmolLM2; `--model
sentence-transformers/all-MiniLM-L6-v2` two minutes. `--output DIR` keeps the figures and draws them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fusion_adapters import FusionConfig, ManyAdapters, share_backbone
from fusion_adapters.runs.loading import load_model
from fusion_adapters.runs.plots import COLOURS, MARKERS, pyplot
from fusion_adapters.runs.recipe import BackboneRecipe
from fusion_adapters.tasks.registry import TASKS

LABELS = 9
# name of the way: what each adapter is; texts pool the positions before the fusion
FUSIONS = {
    "DWAtt, tags of tokens": {"fusion": "dwatt", "task_type": "TOKEN_CLS"},
    "Concat, tags of tokens": {"fusion": "concat", "task_type": "TOKEN_CLS"},
    "Concat, classes of texts": {"fusion": "concat", "task_type": "SEQ_CLS", "fusion_pool": "mean"},
}
LORA, COPIED, HEADS = "LoRA, N passes", "LoRA, text copied N times", "linear heads, last layer"
HEAD = {"TOKEN_CLS": AutoModelForTokenClassification, "SEQ_CLS": AutoModelForSequenceClassification}


def serving(base: Any, fields: dict[str, Any], most: int) -> tuple[ManyAdapters, float, int]:
    """As many adapters as are wanted at most, the MiB that each further one took, and its parameters.

    Their heads have different sizes, so that no two share a model.
    """
    with tempfile.TemporaryDirectory() as folder:
        for i in range(most):
            model = share_backbone(base, HEAD[fields["task_type"]], num_labels=LABELS + i)
            model = get_peft_model(model, FusionConfig(**fields), adapter_name=f"adapter{i}")
            model.save_pretrained(folder)
        size = sum(p.numel() for p in model.parameters() if p.requires_grad)
        many = ManyAdapters.from_pretrained(base, {"adapter0": f"{folder}/adapter0"})
        process = psutil.Process()
        first = process.memory_info().rss
        for i in range(1, most):
            many.add(f"adapter{i}", f"{folder}/adapter{i}")
        return many, (process.memory_info().rss - first) / 2**20 / max(1, most - 1), size


def with_lora(base: Any, most: int) -> Any:
    """One model with as many LoRA adapters, rank 8 on queries and values, each with a head of its own."""
    model = share_backbone(base, AutoModelForTokenClassification, num_labels=LABELS)
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = ["q_proj", "v_proj"] if "q_proj" in names else ["query", "value"]
    config = LoraConfig(r=8, target_modules=targets, task_type="TOKEN_CLS")
    model = get_peft_model(model, config, adapter_name="adapter0")
    for i in range(1, most):
        model.add_adapter(f"adapter{i}", config)
    return model.eval()


def ways(
    base: Any, batch: dict[str, Any], counts: list[int]
) -> tuple[dict[str, dict[int, Callable[[], Any]]], dict[str, Any]]:
    """What is timed, by the way and the number of adapters, and what each way keeps in memory."""
    most, found, notes = max(counts), {}, {}
    for way, fields in FUSIONS.items():
        many, each, size = serving(base, fields, most)
        found[way] = {n: lambda many=many, n=n: many(adapters=many.names[:n], **batch) for n in counts}
        notes[way] = {"parameters": size, "MiB for each further adapter": round(each, 2)}
    lora = with_lora(base, most)

    def switched(n: int) -> None:
        for i in range(n):
            lora.set_adapter(f"adapter{i}")
            lora(**batch)

    def copied(n: int) -> None:
        names = [f"adapter{i}" for i in range(n) for _ in range(len(batch["input_ids"]))]
        lora(**{k: v.repeat(n, 1) for k, v in batch.items()}, adapter_names=names)

    heads = [nn.Linear(base.config.hidden_size, LABELS) for _ in range(most)]

    def linear(n: int) -> None:
        last = base(**batch).last_hidden_state
        for head in heads[:n]:
            head(last)

    for way, call in ((LORA, switched), (COPIED, copied), (HEADS, linear)):
        found[way] = {n: lambda call=call, n=n: call(n) for n in counts}
    notes[LORA] = {"parameters": sum(p.numel() for n, p in lora.named_parameters() if ".adapter0." in n)}
    notes[HEADS] = {"parameters": sum(p.numel() for p in heads[0].parameters())}
    return found, notes


def measure(base: Any, batch: dict[str, Any], counts: list[int], rounds: int) -> dict[str, Any]:
    """The ratio of each way's time to that of a bare pass, by the number of adapters."""
    calls, notes = ways(base, batch, counts)
    calls = {"bare": {0: lambda: base(**batch)}, **calls}
    seconds: dict[tuple[str, int], list[float]] = {(way, n): [] for way, by in calls.items() for n in by}
    with torch.no_grad():
        for round_ in range(rounds + 1):
            for (way, n), spent in seconds.items():
                started = time.perf_counter()
                calls[way][n]()
                if round_:  # the first one warms up
                    spent.append(time.perf_counter() - started)
    bare = seconds.pop(("bare", 0))
    ratios: dict[str, dict[int, float]] = {}
    for (way, n), spent in seconds.items():
        pairs = zip(spent, bare, strict=True)
        ratios.setdefault(way, {})[n] = round(statistics.median(own / one for own, one in pairs), 2)
    return {"bare_ms": round(1000 * statistics.median(bare), 1), "ratios": ratios, "ways": notes}


def draw(found: dict[str, Any], path: Path) -> None:
    """The ratios over the number of adapters, both axes logarithmic."""
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(5.6, 3.6))
    for i, (way, by) in enumerate(found["ratios"].items()):
        axes.plot(list(by), list(by.values()), marker=MARKERS[i], color=COLOURS[i], label=way, linewidth=1.4, markersize=4)
    counts = [*next(iter(found["ratios"].values()))]
    axes.set(xscale="log", yscale="log", xlabel="adapters on the same texts", ylabel="time / one pass of the bare backbone")
    axes.set_xticks(counts, [str(n) for n in counts])
    axes.minorticks_off()
    ticks = [1, 2, 5, 10, 20, 50, 100]
    axes.set_yticks(ticks, [str(tick) for tick in ticks])
    axes.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 20, 64])
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    base = load_model(BackboneRecipe(model=given.model), TASKS["sequence_classification"], ["0", "1"]).base_model.eval()
    ids = torch.randint(1000, 20000, (given.texts, given.length))
    found = measure(base, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, given.adapters, given.rounds)
    print(
        f"{given.model}: {given.texts} texts of {given.length} tokens, {found['bare_ms']:.0f} ms a pass of the bare backbone\n"
    )
    print("| time / one bare pass | parameters | " + " | ".join(f"N = {n}" for n in given.adapters) + " |")
    print("| --- |" + " ---: |" * (len(given.adapters) + 1))
    for way, by in found["ratios"].items():
        size = found["ways"].get(way, found["ways"][LORA])["parameters"]
        print(f"| {way} | {size:,} | " + " | ".join(f"{ratio:.2f}" for ratio in by.values()) + " |")
    for way, note in found["ways"].items():
        if "MiB for each further adapter" in note:
            weights = note["parameters"] * 4 / 2**20
            print(f"\n{way}: {note['MiB for each further adapter']} MiB for each further adapter, {weights:.2f} of weights")
    if given.output:
        given.output.mkdir(parents=True, exist_ok=True)
        (given.output / "serving.json").write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        draw(found, given.output / "serving.png")


if __name__ == "__main__":
    main()
