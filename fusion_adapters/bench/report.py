"""What a benchmark leaves: results.csv, summary.json, summary.md and the figures."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

from ..runs.plots import COLOURS, MARKERS, pyplot
from .cases import CASES

ENOUGH = 3  # rounds, for a median that one slow round does not move


def write_bench_report(summary: dict[str, Any], folder: Path) -> None:
    """Writes tables and figures of a benchmark into a folder; ratios first."""
    table = io.StringIO(newline="")
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["part", "case", "quantity", "value"])
    for bar in summary["bars"]:
        writer.writerow(["bar", bar["bar"], bar["asked"], bar["value"]])
    for case, seconds in summary["seconds"].items():
        for turn, value in enumerate(seconds["rounds"], start=1):
            writer.writerow(["seconds", case, f"round {turn}", value])
    for case, kinds in summary["memory_mib"].items():
        for kind, value in kinds.items():
            writer.writerow(["memory above the model, MiB", case, kind, value])
    for case, value in summary["deep_inference_mib"].items():
        writer.writerow(["memory above a deep model, MiB", case, "inference", value])
    for row in summary["scaling"]:
        writer.writerow(["scaling, seconds", row["axis"], row["value"], row["seconds"]])
    for case, values in summary["checkpoints"].items():
        for quantity, value in values.items():
            writer.writerow(["checkpoint", case, quantity, value])
    for row in summary["large"]:
        for quantity in ("parameters", "tokens_per_second", "peak_gib", "largest_batch"):
            writer.writerow(["large", f"{row['method']}, {row['precision']}", quantity, row[quantity]])
    (folder / "results.csv").write_text(table.getvalue(), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps({"kind": "bench"}) + "\n", encoding="utf-8")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    (folder / "summary.md").write_text(bench_text(summary), encoding="utf-8")
    _draw_epochs(summary, folder / "epochs.png")
    _draw_memory(summary, folder / "memory.png")
    _draw_scaling(summary, folder / "scaling.png")


def bench_text(summary: dict[str, Any]) -> str:
    """The tables of a benchmark as Markdown."""
    machine, recipe = summary["machine"], summary["recipe"]
    lora = summary["seconds"]["LoRA"]["median"]
    tokens = summary["tokens_per_epoch"]
    lines = [
        "# Benchmark",
        "",
        f"{machine['cores']} cores, {machine['gpu'] or 'no GPU'}; torch {machine['torch']}, transformers {machine['transformers']}, peft "
        f"{machine['peft']}. {recipe['backbone']['model']}, {summary['examples']} examples ({tokens:,} tokens), batch "
        f"{recipe['batch_size']}, {recipe['repeats']} rounds.",
        "",
        *(
            ["A quick look: so few sentences and rounds say little about the ratios of times.", ""]
            if recipe["repeats"] < ENOUGH
            else []
        ),
        "| ratio | measured | asked | holds |",
        "| --- | --- | --- | --- |",
        *(f"| {b['bar']} | {b['value']:,.3g} | {b['asked']} | {'yes' if b['holds'] else 'no'} |" for b in summary["bars"]),
        "",
        "| case | LoRA's seconds / its seconds | seconds (median) | tokens per second |",
        "| --- | --- | --- | --- |",
        *(
            f"| {case} | {lora / s['median']:.1f} | {s['median']:.3f} | {tokens / s['median']:,.0f} |"
            for case, s in summary["seconds"].items()
        ),
        "",
        "| memory above the loaded model, MiB | training step | inference |",
        "| --- | --- | --- |",
        *(f"| {case} | {m['training']:,.1f} | {m['inference']:,.1f} |" for case, m in summary["memory_mib"].items()),
        "",
        f"| inference at {max(recipe['depths'])} blocks, bottleneck a quarter of the width | MiB above the loaded model |",
        "| --- | --- |",
        *(f"| {case} | {value:,.1f} |" for case, value in summary["deep_inference_mib"].items()),
        "",
        "| adapter | parameters, head included | bytes | beyond 4 a parameter | seconds to load |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| {case} | {c['parameters']:,} | {c['bytes']:,} | {c['bytes'] - 4 * c['parameters']:,} | {c['load_seconds']:.3f} |"
            for case, c in summary["checkpoints"].items()
        ),
        "",
        "| time grows with | exponent |",
        "| --- | --- |",
        *(f"| {axis} | {value:.2f} |" for axis, value in summary["exponents"].items()),
        "",
    ]
    if summary["large"]:
        lines += [
            "| large case | parameters | tokens per second | peak GiB | largest batch |",
            "| --- | --- | --- | --- | --- |",
            *map(_large_line, summary["large"]),
            "",
        ]
    return "\n".join(lines)


def _large_line(row: dict[str, Any]) -> str:
    case = f"| {row['method']}, {row['precision']} |"
    if row["tokens_per_second"] is None:
        return f"{case} does not fit into memory | - | - | - |"
    measured = "- | - |" if row["peak_gib"] is None else f"{row['peak_gib']:.1f} | {row['largest_batch']} |"
    return f"{case} {row['parameters']:,} | {row['tokens_per_second']:,.0f} | {measured}"


def _draw_epochs(summary: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    cases = [c for c in summary["seconds"] if CASES[c].work != "forward"]
    lora = summary["seconds"]["LoRA"]["median"]
    figure, axis = plt.subplots(figsize=(6.4, 0.34 * len(cases) + 1.1), layout="constrained")
    values = [summary["seconds"][c]["median"] / lora for c in cases]
    axis.barh(range(len(cases)), values, color=COLOURS[0])
    for i, value in enumerate(values):
        axis.text(value * 1.06, i, f"1/{1 / value:.1f}" if value < 0.95 else f"{value:.2f}", va="center", fontsize=8)
    axis.set_yticks(range(len(cases)), cases)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(values) / 1.5, max(values) * 2.5)
    axis.set_xlabel("seconds of an epoch, as a share of LoRA's (log scale)")
    figure.savefig(path)
    plt.close(figure)


def _draw_memory(summary: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    memory = summary["memory_mib"]
    figure, axis = plt.subplots(figsize=(6.4, 0.55 * len(memory) + 1.2), layout="constrained")
    for offset, (kind, colour) in enumerate((("training", COLOURS[1]), ("inference", COLOURS[0]))):
        places = [i + 0.38 * (offset - 0.5) for i in range(len(memory))]
        axis.barh(places, [m[kind] for m in memory.values()], height=0.36, color=colour, label=f"{kind}")
    axis.set_yticks(range(len(memory)), list(memory))
    axis.invert_yaxis()
    axis.set_xlabel("peak memory above the loaded model (MiB)")
    axis.legend(frameon=False)
    figure.savefig(path)
    plt.close(figure)


def _draw_scaling(summary: dict[str, Any], path: Path) -> None:
    plt = pyplot()
    axes_names = list(summary["exponents"])
    figure, axes = plt.subplots(
        1, len(axes_names), figsize=(2.7 * len(axes_names), 2.7), layout="constrained", squeeze=False
    )
    for i, (axis, name) in enumerate(zip(axes[0], axes_names, strict=True)):
        points = [(r["value"], 1000 * r["seconds"]) for r in summary["scaling"] if r["axis"] == name]
        axis.plot(*zip(*points, strict=True), color=COLOURS[i], marker=MARKERS[i])
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"{name} (log scale)")
        axis.set_title(f"exponent {summary['exponents'][name]:.2f}", fontsize=9)
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("forward and backward (ms, log scale)")
    figure.savefig(path)
    plt.close(figure)
