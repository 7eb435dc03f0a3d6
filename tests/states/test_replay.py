"""Calls with cached layer states: what they refuse, and that they leave nothing behind."""

import re
import threading

import pytest
import torch
from accelerate.utils import send_to_device
from peft import get_peft_model
from peft.tuners.lora import LoraLayer
from support import attached, batch, disturb, layer_of, tiny
from support_cache import assert_equal_training, cached, from_cache, pad, some_rows

from fusion_adapters import FusionConfig
from fusion_adapters.states import LayerStateCache, StaleCacheError


def test_a_batch_whose_positions_are_not_those_of_the_cache_is_refused(tmp_path):
    equal = [{name: [value[0]] * 8 for name, value in row.items()} for row in some_rows(4)]
    different = some_rows(2)  # of 3 and 10 tokens
    model = disturb(attached())
    cache = cached(model, [*equal, *different], tmp_path / "states")

    def collated(rows, change):
        dataset = cache.dataset(rows)
        return cache.collator(lambda chosen: change(pad(chosen)))([dataset[i] for i in range(len(rows))])

    def unmasked(batch):
        return {name: value for name, value in batch.items() if name != "attention_mask"}

    def cut(batch):
        return {name: value[:, :5] for name, value in batch.items()}

    assert_equal_training(model, unmasked(pad(equal)), collated(equal, unmasked))  # no padding, no mask needed
    with pytest.raises(
        ValueError, match=r"20 positions, none of them masked, and its rows have 13 cached states \(3 to 10 a"
    ):
        collated(different, unmasked)
    with pytest.raises(
        ValueError, match=r"20 positions with a mask of 1 and its rows have 32 cached states \(8 to 8 a row\)"
    ):
        collated(equal, cut)
    with pytest.raises(
        ValueError, match=r"20 positions, none of them masked, and its rows have 32 .* makes an attention_mask"
    ):
        collated(equal, lambda batch: unmasked(cut(batch)))


def test_the_model_is_the_same_after_a_call_with_states_and_after_one_that_failed(tmp_path):
    model = disturb(attached())
    rows = some_rows(4)
    before = model(**pad(rows)).logits
    states = from_cache(cached(model, rows, tmp_path / "states"), rows)
    model(**states)
    torch.testing.assert_close(model(**pad(rows)).logits, before)
    broken = {**states, "layer_states": {**states["layer_states"], "states": torch.zeros(2, 3, 4)}}
    with pytest.raises(ValueError, match=r"layer_states has the shape \(2, 3, 4\), but the fusion wants \(4, tokens, 32\)"):
        model(**broken)
    torch.testing.assert_close(model(**pad(rows)).logits, before)
    assert all("forward" not in block.__dict__ for block in model.base_model.model.bert.encoder.layer)


def test_states_of_other_layers_or_too_few_positions_are_refused(tmp_path):
    rows = some_rows(4)
    model = attached(fusion="concat", fusion_layers=[1, 4])
    cache = cached(model, rows, tmp_path / "states", layers=[0, 1, 2, 3, 4])
    for layers in ([2, 4], [4, 1]):  # as many layers as the fusion reads
        with pytest.raises(ValueError, match=re.escape(f"holds the layers {layers}, but the active fusion wants [1, 4]")):
            model(**from_cache(cache, rows, layers=layers))
    states = from_cache(cache, rows)
    model(**send_to_device(states, "cpu"))
    unnamed = {name: states["layer_states"][name] for name in ("states", "positions")}
    with pytest.raises(ValueError, match="holds the layers that it does not name"):
        model(**{**states, "layer_states": unnamed})
    for positions in ("labelled", "packed"):
        model(**from_cache(cache, rows, positions=positions))
        mixing = attached(fusion="deeper", fusion_layers=[1, 4])
        with pytest.raises(
            ValueError, match=rf"positions '{positions}' alone, but the model has a fusion \(Deeper\) that mixes"
        ):
            mixing(**from_cache(LayerStateCache(tmp_path / "states", mixing), rows, positions=positions))
        writer = attached("llama", "lm")
        with pytest.raises(ValueError, match=rf"positions '{positions}' alone, but the model is a causal language model"):
            writer(**from_cache(cached(writer, rows, tmp_path / "lm"), rows, positions=positions))


@pytest.mark.parametrize("task", ["TOKEN_CLS", None], ids=["task", "no-task"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("times", [1, 2])
def test_a_call_with_states_that_was_interrupted_leaves_the_next_ones_right(task, error, times, tmp_path):
    model = disturb(get_peft_model(tiny(), FusionConfig(task_type=task, modules_to_save=["classifier"])))
    rows = some_rows(4)
    before = model(**pad(rows)).logits
    states = from_cache(cached(model, rows, tmp_path / "states"), rows)
    with_states = model(**states).logits

    def stop(*_):
        raise error("stop")

    handle = layer_of(model).register_forward_pre_hook(stop)
    for _ in range(times):
        with pytest.raises(error, match="stop"):
            model(**states)
    handle.remove()
    for _ in range(2):
        torch.testing.assert_close(model(**pad(rows)).logits, before)
        assert all("forward" not in block.__dict__ for block in layer_of(model).backbone.blocks)
        torch.testing.assert_close(model(**states).logits, with_states)
    assert layer_of(model).taps.open_calls == 0


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("task", ["TOKEN_CLS", None], ids=["task", "no-task"])
@pytest.mark.parametrize("other_cached", [False, True], ids=["plain", "cached"])
def test_calls_with_states_and_other_calls_in_threads(family, task, other_cached, tmp_path):
    head = "classifier" if family == "bert" else "score"
    model = disturb(get_peft_model(tiny(family), FusionConfig(task_type=task, modules_to_save=[head]))).eval()
    groups = [some_rows(4), some_rows(4, seed=1)]
    batches = [
        from_cache(cached(model, rows, tmp_path / str(i)), rows) if i == 0 or other_cached else pad(rows)
        for i, rows in enumerate(groups)
    ]
    alone, plain = [model(**batch).logits for batch in batches], model(**pad(groups[1])).logits
    barrier, answers = threading.Barrier(2), {}

    def meet(*_):
        barrier.wait(timeout=20)  # both within the backbone

    def call(i):
        answers[i] = model(**batches[i]).logits

    root = layer_of(model).backbone.root
    handles = [root.register_forward_pre_hook(meet), root.register_forward_hook(meet)]
    for _ in range(3):
        threads = [threading.Thread(target=call, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(2):
            torch.testing.assert_close(answers.pop(i), alone[i])
    for handle in handles:
        handle.remove()
    assert all("forward" not in block.__dict__ for block in layer_of(model).backbone.blocks)
    torch.testing.assert_close(model(**pad(groups[1])).logits, plain)


def test_a_plain_call_within_one_with_states_runs_the_blocks(tmp_path):
    model = disturb(attached()).eval()
    rows = some_rows(4)
    states = from_cache(cached(model, rows, tmp_path / "states"), rows)
    expected, found = (model(**states).logits, model(**batch()).logits), []

    def call_again(*_):
        handle.remove()
        found.append(model(**batch()).logits)

    handle = layer_of(model).backbone.blocks[1].register_forward_hook(call_again)
    torch.testing.assert_close(model(**states).logits, expected[0])
    torch.testing.assert_close(found[0], expected[1])


def test_a_fusion_may_train_over_a_lora_that_stays_as_it_is(tmp_path):
    first = disturb(attached(fusion="last", r=4, target_modules=["query", "value"]))
    model = first.merge_and_unload(drop_fusion=True)
    model = disturb(attached(model=model))
    rows = some_rows()
    cache = cached(model, rows, tmp_path / "states")
    assert_equal_training(model, pad(rows), from_cache(cache, rows))
    with pytest.raises(StaleCacheError, match="weights: "):
        LayerStateCache(tmp_path / "states", attached())


def test_only_the_active_lora_belongs_to_a_cache(tmp_path):
    lora = {"r": 4, "target_modules": ["query", "value"], "init_lora_weights": False}
    model, rows = attached(**lora), some_rows()
    model.add_adapter("second", FusionConfig(task_type="TOKEN_CLS", **lora))
    model.add_adapter("plain", FusionConfig(task_type="TOKEN_CLS"))

    def activate(name):  # its fusion trains, its LoRA stays as it is
        model.set_adapter(name)
        for parameter_name, parameter in model.named_parameters():
            if ".lora_" in parameter_name:
                parameter.requires_grad_(False)

    folder = {name: tmp_path / name for name in ("default", "second", "plain", "bare")}
    bare = cached(tiny(), rows, folder["bare"], layers=[1, 2, 3, 4])
    batches = {}
    for name in ("default", "second", "plain"):
        activate(name)
        cache = cached(model, rows, folder[name])
        batches[name] = from_cache(cache, rows)
        assert_equal_training(disturb(model), pad(rows), batches[name])
    assert cache.manifest["key"] == bare.manifest["key"]  # neither LoRA has a part in it
    for active, names in (("default", "second, and default now"), ("second", "plain"), ("plain", "default, and none now")):
        activate(active)
        LayerStateCache(folder[active], model)
        model(**batches[active])
        other = names.split(",")[0]
        with pytest.raises(StaleCacheError, match="adapters: "):
            LayerStateCache(folder[other], model)
        with pytest.raises(ValueError, match=f"other adapters inside the backbone .*: {names.replace('plain', 'none')}"):
            model(**batches[other])
    activate("default")
    model.base_model.merge_adapter()
    with pytest.raises(StaleCacheError, match=r"adapters: none in the cache, default \(merged\) now"):
        LayerStateCache(folder["plain"], model)
    model.base_model.unmerge_adapter()
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", 2.0)
    with pytest.raises(StaleCacheError, match="weights: "):
        LayerStateCache(folder["default"], model)
