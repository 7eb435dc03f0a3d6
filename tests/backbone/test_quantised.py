"""8-bit and 4-bit backbones on the CPU: train, save, reload; a quantised head is refused with the remedy."""

import pytest
import torch
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from safetensors.torch import load_file
from support import DEPTH, HEADS, LORA, attached, batch, disturb, layer_of, logits, tiny, without_dropout
from support_cache import pad, rows_of
from transformers import BitsAndBytesConfig, Trainer, TrainingArguments

from fusion_adapters import FusionConfig, quantization_config
from fusion_adapters.backbone.base_tensors import base_tensors
from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.backbone.fingerprint import fingerprints
from fusion_adapters.backbone.quantization import is_quantised, is_readable, quantised_parameters
from fusion_adapters.states import cache_layer_states
from fusion_adapters.states.key import cache_key
from fusion_adapters.tuner.fresh import find_fresh

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")

WITH_AND_WITHOUT_LORA = pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])


@pytest.fixture
def checkpoint(family, tmp_path):
    tiny(family, width=64).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def load(family, folder, quantization, dtype=torch.float32):
    return HEADS[family, "token"].from_pretrained(
        folder, num_labels=5, quantization_config=quantization, dtype=dtype, device_map={"": "cpu"}
    )


def learns(model):
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    history = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(**batch()).loss
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < history[0]


def quantised(model):
    return {n for n, p in model.named_parameters() if not p.is_floating_point()}


@pytest.mark.parametrize("bits", [8, 4])
@WITH_AND_WITHOUT_LORA
def test_train_save_and_reload(family, checkpoint, tmp_path, bits, lora):
    model = attached(family, model=load(family, checkpoint, quantization_config(bits)), **(LORA[family] if lora else {}))
    assert quantised(model), "nothing was quantised, so the test shows nothing"
    learns(model)
    assert not quantised(model) & {n for n, p in model.named_parameters() if p.requires_grad}
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        load(family, checkpoint, quantization_config(bits)), tmp_path / "adapter", is_trainable=True
    )
    assert torch.equal(logits(again.train()), expected)
    # not to be trained, 4-bit weights are packed for inference on the CPU, with scales rounded to bfloat16
    inference = PeftModel.from_pretrained(load(family, checkpoint, quantization_config(bits)), tmp_path / "adapter")
    assert (logits(inference) - expected).norm() < 0.02 * expected.norm()
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert sum(t.numel() for t in tensors.values()) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize(
    "config",
    [quantization_config(8), quantization_config(4), quantization_config(4, bnb_4bit_use_double_quant=False)],
    ids=["8", "4", "4-single"],
)
def test_evaluation_before_training_costs_no_gradient(family, checkpoint, config, prepared):
    """On the CPU, bitsandbytes packs 4-bit weights in an evaluation, and packed ones raise or drop the gradient.

    Packing rounds the scales of 4-bit weights to bfloat16, the first time.
    """

    def gradients(evaluations):
        model = load(family, checkpoint, config)
        if prepared:
            model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(0)
        model = without_dropout(disturb(attached(family, model=model, **LORA[family])))
        for _ in range(evaluations):
            logits(model)
            model.train()
        model.train()
        model(**batch()).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    never, once, often = gradients(0), gradients(1), gradients(3)
    assert any("lora_" in name for name in never)
    for name, gradient in never.items():
        assert gradient.abs().max() > 0, name
        assert (once[name] - gradient).norm() < 0.05 * gradient.norm(), name
        torch.testing.assert_close(often[name], once[name], rtol=0, atol=0, msg=name)


def test_train_and_eval_kernels_differ_on_the_cpu_within_a_known_bound(family, checkpoint):
    """bitsandbytes multiplies int8 in evaluation and dequantises in training: never compare the two exactly."""
    model = without_dropout(load(family, checkpoint, quantization_config(8)))
    with torch.no_grad():
        evaluated = model.eval()(**batch()).logits
        trained = model.train()(**batch()).logits
    assert (evaluated - trained).abs().max() < 0.05 * evaluated.abs().max()


def test_an_adapter_moves_between_8_bit_and_full_precision(family, checkpoint, tmp_path):
    model = disturb(attached(family, model=load(family, checkpoint, quantization_config(8))))
    model.save_pretrained(tmp_path / "adapter")
    full = PeftModel.from_pretrained(HEADS[family, "token"].from_pretrained(checkpoint, num_labels=5), tmp_path / "adapter")
    rounded, exact = logits(model), logits(full)
    assert 0 < (rounded - exact).norm() < 0.05 * exact.norm()
    full.save_pretrained(tmp_path / "back")
    back = PeftModel.from_pretrained(load(family, checkpoint, quantization_config(8)), tmp_path / "back")
    assert torch.equal(logits(back), rounded)


def test_a_bfloat16_8_bit_backbone_keeps_its_dtype(family, checkpoint):
    bare = load(family, checkpoint, quantization_config(8), torch.bfloat16)
    dtypes = {n: p.dtype for n, p in bare.named_parameters() if "classifier" not in n and "score" not in n}
    assert set(dtypes.values()) == {torch.int8, torch.bfloat16}
    model = attached(family, model=bare, fusion_layers=list(range(DEPTH + 1))).train()
    seen = []
    layer_of(model).register_forward_pre_hook(lambda m, args: seen.extend(args[0]))
    model(**batch()).loss.backward()
    assert {state.dtype for state in seen} == {torch.bfloat16} and len(seen) == DEPTH + 1
    own = dict(model.get_base_model().named_parameters())
    assert {n: own[n].dtype for n in dtypes} == dtypes
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.grad is not None)


def test_a_quantised_head_is_refused_and_the_helper_is_named(family, checkpoint):
    model = load(family, checkpoint, BitsAndBytesConfig(load_in_8bit=True))
    head = "classifier" if family == "bert" else "score"
    with pytest.raises(ValueError, match=rf"{head}.*was quantised.*fusion_adapters\.quantization_config\(bits=8\)"):
        get_peft_model(model, FusionConfig(task_type="TOKEN_CLS"))


def test_a_quantised_last_block_cannot_be_copied(family, checkpoint):
    with pytest.raises(ValueError, match="copy of it could not be trained"):
        attached(family, model=load(family, checkpoint, quantization_config(8)), fusion="deeper", fusion_copy_last=True)


WEIGHTS = {"bert": 6, "llama": 7}  # of a block
STORAGES = pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32], ids=["uint8", "bf16", "f32"])


def stored_as(storage):
    """4 bits in a container of another type, as for QLoRA with FSDP."""
    return quantization_config(4, bnb_4bit_quant_storage=storage)


@STORAGES
def test_4_bits_in_any_container_are_quantised(family, checkpoint, tmp_path, storage):
    model = attached(family, model=load(family, checkpoint, stored_as(storage)))
    backbone = layer_of(model).backbone
    packed = {n for n, _ in quantised_parameters(backbone.root)}
    assert len(packed) == WEIGHTS[family] * DEPTH and {p.dtype for _, p in quantised_parameters(backbone.root)} == {storage}
    assert not packed & {t.name for t in base_tensors(backbone) if t.readable}
    learns(model)
    model.save_pretrained(tmp_path / "adapter")
    full = PeftModel.from_pretrained(HEADS[family, "token"].from_pretrained(checkpoint, num_labels=5), tmp_path / "adapter")
    assert torch.isfinite(logits(full)).all()
    found = find_fresh(model, [backbone], ["classifier", "score"])
    assert not found.modules and not found.bare


@STORAGES
def test_the_fingerprint_and_the_key_of_a_cache_leave_packed_bytes_out(family, checkpoint, tmp_path, storage):
    def key(model):
        signs = fingerprints(find_backbones(model)[0], "v1:")
        return signs, cache_key(model)["weights"], cache_key(model)["dtype"]

    model = load(family, checkpoint, stored_as(storage))
    before = key(model)
    with torch.no_grad():
        for _, parameter in quantised_parameters(model):
            parameter.data.view(torch.uint8)[:4] ^= 1
    assert key(model) == before and before[2] == "float32"
    model = attached(family, model=load(family, checkpoint, stored_as(storage)))
    rows = rows_of(batch())
    cache = cache_layer_states(model, rows, tmp_path / "states", pad, dtype="float32", progress=False)
    logits(model)  # an evaluation, in which bitsandbytes packs the weights of a CPU anew
    states = cache.collator(pad)([cache.dataset(rows)[i] for i in range(2)])
    torch.testing.assert_close(model(**states).loss, model(**batch()).loss, rtol=0, atol=0.02)


@STORAGES
def test_packed_heads_and_blocks_are_refused_whatever_their_container(family, checkpoint, storage):
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=storage)
    with pytest.raises(
        ValueError, match=r"'(classifier|score)' \(Linear4bit\) was quantised with the backbone \(weight holds packed"
    ):
        get_peft_model(load(family, checkpoint, config), FusionConfig(task_type="TOKEN_CLS"))
    with pytest.raises(
        ValueError, match=rf"last block is quantised \({WEIGHTS[family]} weights, .* copy of it could not be trained"
    ):
        attached(family, model=load(family, checkpoint, stored_as(storage)), fusion="deeper", fusion_copy_last=True)


def test_what_counts_as_quantised():
    class Packed(torch.Tensor):
        __module__ = "library"

    class Layer(torch.nn.Module):
        quant_state = object()

    layer = Layer()
    layer.weight, layer.bias = torch.nn.Parameter(torch.ones(8, 1)), torch.nn.Parameter(torch.ones(2))
    assert is_quantised(layer.weight, layer) and not is_quantised(layer.bias, layer) and not is_quantised(layer.weight)
    layer = torch.nn.Module()
    layer.W_q = torch.nn.Parameter(torch.ones(8, 1, dtype=torch.bfloat16))  # HQQ, view_as_float
    assert is_quantised(layer.W_q, layer)
    for tensor in (
        torch.ones(2, dtype=torch.int32),
        torch.ones(2).to(torch.float8_e4m3fn),
        torch.ones(2).as_subclass(Packed),
    ):
        assert is_quantised(tensor) and not is_readable(tensor)
    for tensor in (torch.ones(2), torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)), torch.nn.Buffer(torch.ones(2))):
        assert is_readable(tensor)


def test_the_helper_keeps_what_is_given_and_knows_its_bits():
    config = quantization_config(8, extra_skip=("special",), llm_int8_threshold=5.0)
    assert config.llm_int8_threshold == 5.0
    assert {"lm_head", "classifier", "score", "special"} <= set(config.llm_int8_skip_modules)
    with pytest.raises(ValueError, match="bits=3"):
        quantization_config(3)


@WITH_AND_WITHOUT_LORA
def test_torchao_weights_of_8_bits(family, checkpoint, tmp_path, lora):
    pytest.importorskip("torchao", reason="torchao is not installed (make test-min installs it)")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    head = "classifier" if family == "bert" else "score"

    def load_ao():
        return load(family, checkpoint, TorchAoConfig(Int8WeightOnlyConfig(), modules_to_not_convert=[head]))

    model = load_ao()
    assert any("Int8" in type(p).__name__ for p in model.parameters()), "nothing was quantised, so the test shows nothing"
    model = attached(family, model=model, **(LORA[family] if lora else {}))
    learns(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(load_ao(), tmp_path / "adapter")), expected)


@pytest.mark.parametrize("family", ["bert", "llama"])
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
def test_a_fusion_trains_on_a_format_that_can_only_infer(family, checkpoint, tmp_path, lora, monkeypatch):
    """As packed GGUF, fp8 and others: `Trainer` refuses them for LoRA, and takes a fusion alone, live and from the cache."""
    base = load(family, checkpoint, quantization_config(8))
    monkeypatch.setattr(type(base.hf_quantizer), "is_trainable", property(lambda self: False))
    model = attached(family, model=base, **(LORA[family] if lora else {}))
    arguments = TrainingArguments(str(tmp_path / "runs"), max_steps=2, report_to="none", use_cpu=True, learning_rate=1e-2)
    rows = rows_of(batch())
    if lora:
        assert model.is_quantized
        with pytest.raises(ValueError, match="do not support training"):
            Trainer(model, arguments, pad, rows)
        return
    cache = cache_layer_states(model, rows, tmp_path / "states", pad, dtype="float32", progress=False)
    for collator, dataset in ((pad, rows), (cache.collator(pad), cache.dataset(rows))):
        before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        Trainer(model, arguments, collator, dataset).train()
        assert any(not torch.equal(before[n], p) for n, p in model.named_parameters() if n in before)
    assert model.get_base_model().is_quantized  # for everybody else it is
