"""Eight threads on one model, whose answers are those of a thread alone.

Thousands of calls in `make test-all`, some hundred in `make test`. docs/reliability.md has the table.
"""

import re
import time
from collections import Counter

import pytest
import torch
from peft import PeftModel
from support import VOCABULARY, tiny
from support_threads import SECONDS, alone, ask, in_threads, texts, threads_change_often, two_adapters

from fusion_adapters import LayerStateCache, cache_layer_states, depth_weights, use_adapter

REFUSED = "refused in one paragraph"
OURS = re.compile(r"no active fusion|gives no weights over depth|under an active fusion|switched in another thread")
pytestmark = pytest.mark.usefixtures(threads_change_often.__name__)


def replayed(model, folder):
    """A batch with cached states, and the same text without."""
    drawn = torch.randint(1, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(9)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * 7, "labels": [0] * 7} for row in drawn]
    cache_layer_states(model, rows, folder, batch_size=2)
    cache = LayerStateCache(folder, model)

    def from_cache():
        dataset = cache.dataset(rows)  # the states are read anew each time
        batch = cache.collator(lambda rows: {k: torch.tensor([row[k] for row in rows]) for k in rows[0]})(list(dataset))
        with torch.no_grad():
            return model(**batch).logits

    return from_cache


def count(model, works, seconds):
    """Calls each work again and again, all at once; what came of it by the work's name."""
    until, found = time.time() + seconds, {name: Counter() for name in works}

    def run(name):
        call, allowed = works[name]
        while time.time() < until or (not found[name]["right"] and time.time() < until + SECONDS):
            try:
                answer = call()
                kind = "right" if any(torch.equal(answer, right) for right in allowed) else "silent"
            except ValueError as error:
                kind = REFUSED if OURS.search(str(error)) else f"bare {error}"
            except Exception as error:
                kind = f"bare {type(error).__name__}: {error}"
            found[name][kind] += 1

    assert in_threads(*(lambda name=name: run(name) for name in works)) == [None] * len(works)
    return found


def trial(folder, seconds):
    """Eight threads on one model, twice: each with an adapter of its own choice, and with switches that hold for all."""
    model, ids = two_adapters(), texts()
    from_cache = replayed(model, folder / "states")
    names = ("second", None, "default")
    rights = [{name: alone(model, name, lambda i=i: ask(model, i)) for name in names} for i in ids]
    weights = depth_weights(model, input_ids=ids[0])
    states = {name: alone(model, name, from_cache) for name in ("second", "default")}

    def use(name, i):
        with use_adapter(model, name):
            return ask(model, ids[i])

    def set_and_ask():
        model.set_adapter("second")
        model.set_adapter("default")
        return ask(model, ids[1])

    def disable_and_ask():
        time.sleep(0.03)  # the others' turn with an adapter
        with model.disable_adapter():
            return ask(model, ids[2])

    def save():
        model.save_pretrained(folder / "saved", selected_adapters=["default"])
        return ask(model, ids[3])

    def load():
        own = PeftModel.from_pretrained(tiny(), folder / "first").eval()
        return ask(own, ids[0])

    model.save_pretrained(folder / "first", selected_adapters=["default"])
    own = {
        "plain call": (lambda: ask(model, ids[0]), [rights[0]["default"]]),
        "plain call, another text": (lambda: ask(model, ids[1]), [rights[1]["default"]]),
        "`depth_weights`": (lambda: depth_weights(model, input_ids=ids[0]), [weights]),
        "`use_adapter`, another adapter": (lambda: use("second", 1), [rights[1]["second"]]),
        "`use_adapter`, none": (lambda: use(None, 2), [rights[2][None]]),
        "cached states": (from_cache, [states["default"]]),
        "`save_pretrained`, then a call": (save, [rights[3]["default"]]),
        "the adapter loaded into another model": (load, [rights[0]["default"]]),
    }
    shared = {
        "plain call": (lambda: ask(model, ids[0]), [*rights[0].values()]),
        "plain call, another text": (lambda: ask(model, ids[1]), [*rights[1].values()]),
        "`depth_weights`": (lambda: depth_weights(model, input_ids=ids[0]), [weights]),
        "`use_adapter`, another adapter": own["`use_adapter`, another adapter"],
        "`use_adapter`, none": own["`use_adapter`, none"],
        "cached states": (from_cache, [*states.values()]),
        "`set_adapter` to and fro, then a call": (set_and_ask, [*rights[1].values()]),
        "`disable_adapter`, and a call in it": (disable_and_ask, [*rights[2].values()]),
    }
    return count(model, own, seconds), count(model, shared, seconds)


def report(first, second):
    lines = ["| in eight threads at once | calls | right | refused | wrong |", "| --- | --- | --- | --- | --- |"]
    for title, found in (("**each its own adapter**", first), ("**switches that hold for all**", second)):
        lines.append(f"| {title} | | | | |")
        for name, kinds in found.items():
            wrong = sum(kinds.values()) - kinds["right"] - kinds[REFUSED]
            lines.append(f"| {name} | {sum(kinds.values()):,} | {kinds['right']:,} | {kinds[REFUSED]:,} | {wrong} |")
    return "\n".join(lines)


@pytest.mark.parametrize("seconds", [1.5, pytest.param(45, marks=pytest.mark.slow)])
def test_eight_threads(seconds, tmp_path):
    first, second = trial(tmp_path, seconds)
    print(report(first, second))
    for found in (first, second):
        for name, kinds in found.items():
            assert set(kinds) <= {"right", REFUSED} and kinds["right"], (name, kinds)
    assert not any(kinds[REFUSED] for kinds in first.values())
