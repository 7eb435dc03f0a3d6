"""Calls of an attached model that cross each other: threads, calls within calls, failures, replicas, dropout, compiled models."""

import copy
import threading
import warnings

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from families import FAMILIES, answer, attach, inputs
from peft import get_peft_model
from support import METHODS, attached, batch, disturb, layer_of, logits, tiny, without_dropout
from torch.utils.checkpoint import checkpoint

from fusion_adapters import FusionConfig, depth_weights
from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.backbone.record import recorded
from fusion_adapters.tuner import fusion_layers

FEW = pytest.mark.parametrize("family", ["bert", "llama", "albert", "t5-both", "mamba"])


def make(family, **fields):
    return disturb(attach(family, **fields)).eval()


def held(model):
    return sum(layer.taps.held for layer in fusion_layers(model))


@FEW
def test_threads_get_what_they_get_alone(family):
    model = make(family)
    head = next(iter(FAMILIES[family].classes))
    batches = [inputs(family, head, seed=seed) for seed in range(4)]
    alone = [answer(model, batch) for batch in batches]
    barrier, answers, wrong = threading.Barrier(4), {}, []

    def meet(block, args):
        try:
            barrier.wait(timeout=20)  # all threads are in the same block at the same time
        except threading.BrokenBarrierError:
            wrong.append("a thread did not come")

    handle = fusion_layers(model)[0].backbone.blocks[1].register_forward_pre_hook(meet)
    threads = [threading.Thread(target=lambda i=i: answers.update({i: answer(model, batches[i])})) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    assert not wrong
    for i in range(4):
        torch.testing.assert_close(answers[i], alone[i], rtol=0, atol=1e-6)


@FEW
def test_a_call_within_a_call_does_not_mix_states(family):
    model = make(family)
    head = next(iter(FAMILIES[family].classes))
    outer, inner = inputs(family, head, seed=0), inputs(family, head, seed=1)
    expected = answer(model, outer), answer(model, inner)
    found = []

    def call_again(block, args, output):
        handle.remove()
        found.append(answer(model, inner))

    handle = fusion_layers(model)[-1].backbone.blocks[1].register_forward_hook(call_again)
    torch.testing.assert_close(answer(model, outer), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], expected[1], rtol=0, atol=1e-6)
    assert held(model) == 0


@FEW
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_failure_within_a_call_leaves_nothing_behind(family, error):
    model = make(family)
    batch = inputs(family, next(iter(FAMILIES[family].classes)))
    expected = answer(model, batch)

    def fail(block, args):
        raise error("out of something")

    handle = fusion_layers(model)[-1].backbone.blocks[-1].register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(error, match="out of something"):
            answer(model, batch)
        assert held(model) == 0 and not any(layer.taps.open_calls for layer in fusion_layers(model))
    handle.remove()
    torch.testing.assert_close(answer(model, batch), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("where", ["embeddings", "block", "fusion", "head"])
@pytest.mark.parametrize("training", [False, True])
def test_a_failure_anywhere_leaves_the_model_as_it_was(family, where, training):
    head = "sequence"
    model = without_dropout(disturb(attached(family, head, fusion="dwatt"))).train(training)
    layer = layer_of(model)
    backbone = layer.backbone
    place = {
        "embeddings": next(backbone.root.children()),
        "block": backbone.blocks[1],
        "fusion": layer.fusions["default"],
        "head": model.base_model.model.classifier if family == "bert" else model.base_model.model.score,
    }[where]

    def state():
        here = layer.calls.here
        return (
            [(name, m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
            [p.requires_grad for p in model.parameters()],
            (here.depth, here.states, here.named, here.unfused, here.recording),
            (layer.taps.held, layer.taps.open_calls, layer.state(), model.config.num_hidden_layers),
        )

    def fail(module, args):
        raise RuntimeError("out of something")

    def weights():
        return depth_weights(model, **batch(head))

    expected, weighed, before = model(**batch(head)).logits, weights(), state()
    for call in (lambda: model(**batch(head)), weights):
        handle = place.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of something"):
            call()
        handle.remove()
        assert state() == before
    torch.testing.assert_close(model(**batch(head)).logits, expected, rtol=0, atol=0)
    torch.testing.assert_close(weights(), weighed, rtol=0, atol=0)


@FEW
def test_an_interrupted_call_within_a_call_leaves_the_outer_one_right(family):
    model = make(family)
    head = next(iter(FAMILIES[family].classes))
    outer, inner = inputs(family, head, seed=0), inputs(family, head, seed=1)
    expected = answer(model, outer), answer(model, inner)
    found = []

    def interrupt(block, args):
        raise KeyboardInterrupt

    def call_again(block, args, output):
        handle.remove()
        handles = [block.register_forward_pre_hook(interrupt)]
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                answer(model, inner)
        handles[0].remove()
        found.append(answer(model, inner))

    handle = fusion_layers(model)[-1].backbone.blocks[1].register_forward_hook(call_again)
    torch.testing.assert_close(answer(model, outer), expected[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(found[0], expected[1], rtol=0, atol=1e-6)
    assert held(model) == 0


@pytest.mark.parametrize("before", [False, True], ids=["after", "before"])
def test_accelerate_may_place_a_model_again(before):
    """It replaces `forward`; the fusion stays, and goes when it is taken off."""
    batch = inputs("bert", "token")
    base, hook = FAMILIES["bert"].build("token"), AlignDevicesHook(io_same_device=True)
    plain = answer(base, batch)
    if before:
        add_hook_to_module(base.bert, hook)
    model = disturb(get_peft_model(base, FusionConfig()), scale=0.3)
    expected = answer(model, batch)
    assert (expected - plain).abs().max() > 1e-3
    for append in (False, False, True):
        add_hook_to_module(base.bert, hook, append=append)
        assert torch.equal(answer(model, batch), expected)
    assert torch.equal(answer(copy.deepcopy(model), batch), expected)
    if not before:
        remove_hook_from_module(base.bert)
        assert torch.equal(answer(model, batch), expected)
    bare = model.unload()
    assert torch.equal(answer(bare, batch), plain)
    remove_hook_from_module(base.bert)
    assert torch.equal(answer(bare, batch), plain)


@pytest.mark.parametrize("strict", [False, True])
def test_a_bare_backbone_is_exported_and_its_forward_compiled(strict):
    """The wrapped `forward` is then the one that torch looks at."""
    batch = {k: v for k, v in inputs("bert", "token").items() if k != "labels"}
    root = disturb(get_peft_model(FAMILIES["bert"].build("token").bert, FusionConfig()), scale=0.3).get_base_model().eval()
    with torch.no_grad():
        expected = root(**batch)[0]
        exported = torch.export.export(root, (), kwargs=batch, strict=strict).module()
        compiled = torch.compile(root.forward, fullgraph=True, backend="eager")
        for form in (exported, compiled, root.forward):
            torch.testing.assert_close(form(**batch)[0], expected)


def test_replicas_of_data_parallel_are_refused():
    model = make("bert")
    batch = inputs("bert", "token")
    root = fusion_layers(model)[0].backbone.root
    root._is_replica = True  # what torch.nn.DataParallel sets on its copies
    with pytest.raises(RuntimeError, match=r"DataParallel.*accelerate launch"):
        answer(model, batch)


def test_blocks_run_by_hand_or_recomputed_without_the_backbone_are_refused():
    model = make("bert")
    block = fusion_layers(model)[0].backbone.blocks[0]
    state = torch.randn(1, 3, 32)
    with pytest.raises(RuntimeError, match=r"gradient_checkpointing_enable\(\).*disable_adapter"):
        block(state)
    with model.disable_adapter():
        block(state)

    block.forward = lambda *args, forward=block.forward, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
    model(**inputs("bert", "token")).loss.backward()  # around forward, not around the call: hooks stay outside


def test_layer_drop_is_refused_where_it_would_drop_states():
    rate = {"layerdrop": 0.3}
    with pytest.raises(ValueError, match=r"probability 0\.3.*layerdrop=0\.0"):
        attach("wav2vec2", model=FAMILIES["wav2vec2"].build("audio", **rate), lora=True)
    frozen = attach("wav2vec2", model=FAMILIES["wav2vec2"].build("audio", **rate)).train()
    for _ in range(4):  # a frozen backbone stays in evaluation mode and drops nothing
        frozen(**inputs("wav2vec2", "audio")).loss.backward()
    root = fusion_layers(frozen)[0].backbone.root
    root.config.layerdrop = 1.0
    for module in root.modules():  # as nobody should: train() would keep it in evaluation mode
        module.training = True
    with pytest.raises(RuntimeError, match=r"only 0 of its 4 blocks ran.*layerdrop"):
        frozen(**inputs("wav2vec2", "audio"))


def test_attaching_after_compiling_warns():
    compiled = torch.compile(FAMILIES["bert"].build("token"), backend="eager")
    with pytest.warns(UserWarning, match=r"compiled.*get_peft_model.*torch\.compile"):
        model = attach("bert", model=compiled)
    in_place = FAMILIES["bert"].build("token")
    in_place.compile(backend="eager")
    with pytest.warns(UserWarning, match=r"compiled.*get_peft_model.*torch\.compile"):
        model = attach("bert", model=in_place)
    disturb(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*compiled.*")
        attach("bert")


@pytest.mark.parametrize(("family", "head"), [("bert", "masked"), ("llama", "causal")])
def test_dropout_of_a_fusion_does_not_ask_whether_there_is_a_graph(family, head):
    model = disturb(attach(family, head, fusion_dropout=0.5)).train()
    batch = {k: v for k, v in inputs(family, head).items() if k != "labels"}

    def run(seed, call=lambda: model(**batch).logits):
        torch.manual_seed(seed)
        return call()

    def gradients(logits):
        model.zero_grad()
        logits.square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    with torch.no_grad():
        first, again, other = run(0), run(0), run(1)
    assert torch.equal(first, again) and not torch.allclose(first, other)
    expected = run(0)
    assert torch.equal(first, expected)
    needs = torch.zeros(1, requires_grad=True)  # without an input that has a gradient, nothing would be computed again
    twice = run(0, lambda: checkpoint(lambda _: model(**batch).logits, needs, use_reentrant=True))
    assert torch.equal(twice, expected)
    found, plain = gradients(twice), gradients(expected)
    assert found.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient)


@pytest.mark.parametrize("after", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_an_attached_model_may_be_cast_as_a_whole(family, method, after):
    before = (torch.float32, torch.bfloat16)[(list(METHODS).index(method) + (family == "llama")) % 2]  # in turn
    model = without_dropout(disturb(attached(family, model=tiny(family, dtype=before), **METHODS[method])))
    expected = logits(model)
    model.to(after)
    assert {p.dtype for p in model.parameters()} == {after}
    found = logits(model)
    assert found.dtype == after
    torch.testing.assert_close(found.float(), expected.float(), rtol=0.1, atol=0.1 * float(expected.float().std()))
    layer_of(model).enable_adapters(False)
    assert method == "last" or not torch.equal(logits(model), found), "the fusion is not called"
    layer_of(model).enable_adapters(True)
    for mode in (True, False):
        model.train(mode)(**batch()).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_a_call_of_another_thread_that_crosses_the_begin_of_a_recording():
    """Torch has a hook before it notes that it takes keyword arguments; a call in between brings none."""
    model, found, failed = tiny("llama", "lm"), [], []
    backbone = find_backbones(model)[0]

    def call():
        try:
            model(input_ids=batch()["input_ids"])
        except Exception as error:
            failed.append(error)

    with recorded(backbone, [0], lambda layer, state: found.append(layer)):
        backbone.blocks[0]._forward_pre_hooks_with_kwargs.clear()
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert not failed and not found
