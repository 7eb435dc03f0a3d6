"""What a classifier on the first blocks of a Llama costs beside one on all of them: time to load, memory, time to answer.

A random model of the shape of SmolLM-135M (30 blocks, d = 576, vocabulary 49152) is written to a folder, and each line of the table is
a process of its own; seconds are those of the processor, one thread, which other work on the machine changes little.
`python recipes/depth_costs.py` takes some minutes; `--depths 5 15` and `--rounds 3` make it shorter.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time

BLOCKS, SHAPE = 30, {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
TEXTS, LENGTH, LABELS = 8, 128, 3


def write_model(folder: str) -> None:
    """Writes the random model."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=BLOCKS, vocab_size=49152, tie_word_embeddings=True, pad_token_id=0)
    LlamaForCausalLM(config).save_pretrained(folder)


def measure(folder: str, way: str, depth: int, rounds: int) -> dict[str, float]:
    """Loads, attaches and answers once a round. `way` is `bare`, `skipped` (the whole model) or `cut`."""
    import torch
    from peft import get_peft_model
    from transformers import AutoModelForSequenceClassification

    from fusion_adapters import FusionConfig, load_cut
    from fusion_adapters.runs.memory import peak_of_process

    torch.set_num_threads(1)
    before, started = peak_of_process(), time.process_time()
    if way == "cut":
        model = load_cut(AutoModelForSequenceClassification, folder, depth, num_labels=LABELS)
    else:
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=LABELS)
    loaded = time.process_time() - started
    if way != "bare":
        model = get_peft_model(model, FusionConfig(task_type="SEQ_CLS", fusion_depth=depth, fusion_budget="1M"))
    model.eval()
    inputs = {
        "input_ids": torch.randint(1, 49152, (TEXTS, LENGTH)),
        "attention_mask": torch.ones(TEXTS, LENGTH, dtype=torch.long),
    }
    seconds = []
    with torch.inference_mode():
        for _ in range(rounds + 1):
            started = time.process_time()
            model(**inputs)
            seconds.append(time.process_time() - started)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    memory = peak_of_process() - before
    return {"load": loaded, "memory": memory, "weights": weights, "answer": statistics.median(seconds[1:])}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--depths", type=int, nargs="+", default=[5, 10, 15, 20])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        folder, way, depth = given.one
        print(json.dumps(measure(folder, way, int(depth), given.rounds)))
        return
    print("| model | load, s | memory, MiB | weights, MiB | answer, s |\n| --- | ---: | ---: | ---: | ---: |")
    with tempfile.TemporaryDirectory() as folder:
        write_model(folder)
        ways = [("bare", BLOCKS), *((way, depth) for depth in given.depths for way in ("skipped", "cut"))]
        for way, depth in ways:
            command = [sys.executable, __file__, "--one", folder, way, str(depth), "--rounds", str(given.rounds)]
            found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            name = (
                "bare, 30 blocks"
                if way == "bare"
                else f"fusion_depth={depth}, {'whole model' if way == 'skipped' else 'cut'}"
            )
            print(
                f"| {name} | {found['load']:.2f} | {found['memory']:,.0f} | {found['weights']:,.0f} | {found['answer']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
