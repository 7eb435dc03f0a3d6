"""One model in several threads: each call answers as it does alone, whatever the others ask, switch, disable or cache meanwhile."""

import copy
import pickle
import threading

import pytest
import torch
from safetensors.torch import load_file
from support import LORA, VOCABULARY, attached, layer_of, tiny
from support_threads import SECONDS, alone, ask, in_threads, texts, threads_change_often, two_adapters

from fusion_adapters import cache_layer_states, depth_weights, use_adapter

pytestmark = pytest.mark.usefixtures(threads_change_often.__name__)


def during_a_call(model, change, call, block=1):
    """Runs `call` in a thread, and `change` in another while the call is in that block; returns what the call returned or raised."""
    inside, changed = threading.Event(), threading.Event()

    def wait(*_):
        inside.set()
        assert changed.wait(SECONDS)

    def other():
        assert inside.wait(SECONDS)
        handle.remove()
        change()
        changed.set()

    handle = layer_of(model).backbone.blocks[block].register_forward_pre_hook(wait)
    answer, error = in_threads(call, other)
    assert error is None, error
    return answer


@pytest.mark.parametrize("before", ["default", "second", None], ids=str)
@pytest.mark.parametrize("after", ["default", "second", None], ids=str)
def test_a_call_keeps_the_adapter_that_it_began_with(family, before, after):
    model = two_adapters(family)
    ids = texts()[0]
    expected = {name: alone(model, name, lambda: ask(model, ids)) for name in ("default", "second", None)}
    assert len({str(e) for e in expected.values()}) == 3

    def change(name):
        model.base_model.enable_adapter_layers() if name else model.base_model.disable_adapter_layers()
        if name:
            model.set_adapter(name)

    change(before)
    assert torch.equal(during_a_call(model, lambda: change(after), lambda: ask(model, ids)), expected[before])
    assert torch.equal(ask(model, ids), expected[after])
    # a call of the model below peft's, as transformers' own pipelines make it
    change(before)
    base = model.get_base_model()
    assert torch.equal(during_a_call(model, lambda: change(after), lambda: ask(base, ids)), expected[before])


def test_workers_see_the_adapter_that_the_main_thread_set():
    model = two_adapters()
    ids = texts()[0]
    for name in ("second", "default"):
        expected = alone(model, name, lambda: ask(model, ids))
        assert all(torch.equal(e, expected) for e in in_threads(*[lambda: ask(model, ids)] * 2))


def test_a_generation_keeps_its_adapter_to_the_last_token():
    model = two_adapters("llama", "lm")
    ids = texts()[0]

    def generate():
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, output_logits=True,
            return_dict_in_generate=True,
        ).logits  # fmt: skip

    expected = alone(model, "default", generate)
    assert any(not torch.equal(a, b) for a, b in zip(expected, alone(model, "second", generate), strict=True))
    model.set_adapter("default")
    found = during_a_call(model, lambda: model.set_adapter("second"), generate)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_thread_sees_its_own_switch_within_its_own_call():
    model = two_adapters()
    ids = texts()[0]
    expected = {name: alone(model, name, lambda: ask(model, ids)) for name in ("second", None, "default")}
    found = {}

    def switch(*_):
        handle.remove()
        with model.disable_adapter():
            found[None] = ask(model, ids)
        with use_adapter(model, "second"):
            found["second"] = ask(model, ids)
        found["default"] = ask(model, ids)

    handle = layer_of(model).backbone.blocks[1].register_forward_pre_hook(switch)
    assert torch.equal(ask(model, ids), expected["default"])
    for name, answer in found.items():
        assert torch.equal(answer, expected[name]), name


def test_an_adapter_deleted_under_a_call():
    model = two_adapters()
    ids = texts()[0]
    expected = ask(model, ids)
    # its head is gone when the call comes to it: no other head in its place
    with pytest.raises(RuntimeError, match=r"'default' was deleted in another thread"):
        raise during_a_call(model, lambda: model.delete_adapter("default"), lambda: ask(model, ids))
    assert not torch.equal(ask(model, ids), expected)


def test_a_switch_that_crosses_a_call_through_lora_is_refused():
    """LoRA layers look by themselves who is active."""
    model = two_adapters(first=LORA["bert"], second=LORA["bert"])
    ids = texts()[0]
    expected = {name: alone(model, name, lambda: ask(model, ids)) for name in ("second", "default")}
    with pytest.raises(RuntimeError, match=r"mixture of adapters\. Switch and call under one lock"):
        raise during_a_call(model, lambda: model.set_adapter("second"), lambda: ask(model, ids))
    assert torch.equal(ask(model, ids), expected["second"])
    found = during_a_call(model, lambda: model.set_adapter("second"), lambda: ask(model, ids))
    assert torch.equal(found, expected["second"])  # it was active already
    with pytest.raises(ValueError, match=r"use_adapter.*LoRA layers.*one lock"), use_adapter(model, "default"):
        pass


def test_use_adapter_holds_for_its_thread_alone():
    model = two_adapters()
    ids = texts()[0]
    expected = {name: alone(model, name, lambda: ask(model, ids)) for name in ("second", None, "default")}

    def use(name):
        with use_adapter(model, name):
            meet.wait(SECONDS)
            return ask(model, ids)

    def plain():
        meet.wait(SECONDS)
        return ask(model, ids)

    meet = threading.Barrier(3)
    found = in_threads(lambda: use("second"), lambda: use(None), plain)
    assert all(torch.equal(a, b) for a, b in zip(found, expected.values(), strict=True))
    with use_adapter(model, "second"):
        with use_adapter(model, None):
            assert torch.equal(ask(model, ids), expected[None])
        assert torch.equal(ask(model, ids), expected["second"])
        with pytest.raises(ValueError, match=r"do not work within 'with use_adapter"):
            model.set_adapter("default")
    with pytest.raises(KeyError, match="mine"), use_adapter(model, None):
        raise KeyError("mine")
    assert torch.equal(ask(model, ids), expected["default"])
    for wrong in (model, tiny()):
        with pytest.raises(ValueError, match=r"no adapter 'third'"), use_adapter(wrong, "third"):
            pass


def test_compiled_models_follow_use_adapter_and_depth_weights():
    model = two_adapters()
    ids = texts()[0]
    expected = {name: alone(model, name, lambda: ask(model, ids)) for name in ("second", None, "default")}
    weights = depth_weights(model, input_ids=ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    try:
        for _ in range(2):
            torch.testing.assert_close(ask(compiled, ids), expected["default"])
            torch.testing.assert_close(depth_weights(compiled, input_ids=ids), weights)
            for name in ("second", None):
                with use_adapter(model, name):
                    torch.testing.assert_close(ask(compiled, ids), expected[name])
    finally:
        torch.compiler.reset()


def test_depth_weights_are_those_of_the_calling_thread():
    model = two_adapters()
    ids = texts()
    expected = [depth_weights(model, input_ids=i) for i in ids]
    plain = ask(model, ids[2])

    def fail():
        with pytest.raises(IndexError):
            depth_weights(model, input_ids=torch.full((1, 3), VOCABULARY))
        return ask(model, ids[2])

    for _ in range(5):
        answers = in_threads(*(lambda i=i: depth_weights(model, input_ids=i) for i in ids), lambda: ask(model, ids[2]), fail)
        for found, right in zip(answers, [*expected, plain, plain], strict=True):
            assert torch.equal(found, right)
    assert layer_of(model).calls.here.recording is None and not layer_of(model).calls.here.depth


def test_copies_have_calls_of_their_own():
    model = two_adapters()
    ids = texts()[0]
    expected = alone(model, "second", lambda: ask(model, ids))
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        calls = layer_of(again).calls
        assert calls is not layer_of(model).calls and again.base_model.calls is calls
        assert {id(module) for module in calls.followers} <= {id(module) for module in again.modules()}
        with use_adapter(again, "default"):
            assert torch.equal(ask(model, ids), expected) and not torch.equal(ask(again, ids), expected)
        assert torch.equal(ask(again, ids), expected)


def test_attaching_in_threads_at_once():
    """Counting parameters for a budget changes torch's Module class for a moment, for all threads."""
    before, bases = torch.nn.Module.register_parameter, [tiny() for _ in range(12)]

    def attach():
        own = [attached(model=bases.pop(), **LORA["bert"], fusion_budget=20_000) for _ in range(3)]
        return not any(p.is_meta for model in own for p in model.parameters())

    assert in_threads(*[attach] * 4) == [True] * 4
    assert torch.nn.Module.register_parameter is before


def test_unloading_leaves_no_wrapper_behind():
    model = two_adapters()
    base = model.unload()
    assert not any("forward" in module.__dict__ for module in base.modules())
    assert not any(type(module).__module__.startswith("fusion_adapters") for module in base.modules())


def test_states_extracted_beside_calls(tmp_path):
    """The fusion is off for the extraction's thread alone, and it records no state of another's call."""
    model = two_adapters()
    ids = texts()
    expected = [ask(model, i) for i in ids]
    drawn = torch.randint(1, VOCABULARY, (64, 7), generator=torch.Generator().manual_seed(9)).tolist()
    rows = [{"input_ids": row, "attention_mask": [1] * 7, "labels": [0] * 7} for row in drawn]
    cache_layer_states(model, rows, tmp_path / "alone", batch_size=2)
    done = threading.Event()

    def extract():
        try:
            cache_layer_states(model, rows, tmp_path / "beside", batch_size=2)
        finally:
            done.set()

    def call(i):
        wrong, calls = 0, 0
        while not done.is_set() or not calls:
            wrong, calls = wrong + (not torch.equal(ask(model, ids[i]), expected[i])), calls + 1
        return wrong

    assert in_threads(extract, *(lambda i=i: call(i) for i in range(3))) == [None, 0, 0, 0]
    first, second = (load_file(next((tmp_path / name).glob("**/*.safetensors"))) for name in ("alone", "beside"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
