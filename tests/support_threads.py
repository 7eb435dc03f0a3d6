"""Models with two adapters and calls in threads, for tuner/test_threads.py and tuner/test_threads_at_once.py."""

import sys
import threading

import pytest
import torch
from support import VOCABULARY, attached, disturb

from fusion_adapters import FusionConfig

SECONDS = 60  # that any wait for another thread may take


@pytest.fixture
def threads_change_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def two_adapters(family="bert", head="token", first=None, second=None):
    """A model with two adapters of different methods and weights, the first active."""
    model = disturb(attached(family, head, **(first or {"fusion": "dwatt", "fusion_heads": 2})), 0.2)
    model.add_adapter(
        "second", FusionConfig(task_type=model.peft_config["default"].task_type, **(second or {"fusion": "concat"}))
    )
    model.set_adapter("second")
    disturb(model, 0.4)
    model.set_adapter("default")
    return model.eval()


def texts(count=4):
    return [torch.randint(1, VOCABULARY, (2, 5 + i), generator=torch.Generator().manual_seed(i)) for i in range(count)]


def ask(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


def in_threads(*works):
    """Runs functions at once; returns what they returned, or raised."""
    results = [None] * len(works)

    def run(i):
        try:
            results[i] = works[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SECONDS)
        assert not thread.is_alive()
    return results


def alone(model, name, call):
    """What a call returns with that adapter, None for none."""
    if name is None:
        with model.disable_adapter():
            return call()
    model.set_adapter(name)
    return call()
