"""Every family of backbones with every head: found, identity, trained, reloaded, quantised, checkpointed, compiled.

Each test checks its cell of the table in docs/backbones.md, see published.py.
"""

import pytest
import torch
from families import DEPTH, FAMILIES, GENERATING, GRID, SUFFIX, WIDTH, answer, attach, first_head, inputs
from packaging.version import Version
from peft import PeftModel
from support import disturb, without_dropout

from fusion_adapters import quantization_config
from fusion_adapters.backbone.blocks import find_backbones
from fusion_adapters.tuner import fusion_layers

each_family = pytest.mark.parametrize("family", FAMILIES)
# the first head of a family with LoRA and without, the others in turn
HEADS_IN_TURN = [
    (family, head, lora)
    for number, (family, head) in enumerate(GRID)
    for lora in (False, True)
    if head == first_head(family) or lora == (number % 2 == 1)
]
each_head_in_turn = pytest.mark.parametrize(("family", "head", "lora"), HEADS_IN_TURN)
with_and_without_lora = pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])


def train(model, batch, steps=5, rate=3e-3):
    without_dropout(model).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(steps):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def outputs_of(model, modules, batch):
    """What the modules answered last; without those that were not called (OPT's head calls the decoder itself)."""
    outputs = {}
    handles = [
        m.register_forward_hook(lambda m, args, output, i=i: outputs.update({i: output})) for i, m in enumerate(modules)
    ]
    answer(model, batch)
    for handle in handles:
        handle.remove()
    return [outputs[i] for i in sorted(outputs)]


@each_family
def test_the_blocks_are_found(family, table):
    spec, head = FAMILIES[family], first_head(family)
    model = spec.build(head)
    found = find_backbones(model, stack=spec.stack)
    expected = {"encoder": (DEPTH, False), "decoder": (DEPTH - 1, True)}
    seen, answers, norms = [], set(), set()
    for backbone in found:
        assert (backbone.num_layers, backbone.causal) == expected.get(backbone.stack, (DEPTH, head == "causal"))
        assert backbone.hidden_size == WIDTH
        prefix = next(n for n, m in model.named_modules() if m is backbone.root)
        times = f" (one block, {DEPTH} times)" if len(set(backbone.blocks)) == 1 else ""
        seen.append(f"`{prefix}.{backbone.blocks_name}`{times}")
        outputs = outputs_of(model, [backbone.blocks[-1], backbone.root, backbone.base], inputs(family, head))
        output, result = outputs[0], outputs[-1] if backbone.stack is None else outputs[1]
        answers.add("tuple" if isinstance(output, tuple) else "tensor")
        state = output[0] if isinstance(output, tuple) else output
        norms.add("post" if torch.equal(state, result.last_hidden_state) else "pre")
    table.cell(family, "blocks", ", ".join(seen))
    table.cell(family, "answer", " ".join(sorted(answers)))
    table.cell(family, "norm", " ".join(sorted(norms)))
    heads = (name.removeprefix("For") for name in (SUFFIX.get(h, "AudioClassification") for h in spec.classes))
    table.cell(family, "heads", ", ".join(heads))


@each_family
def test_layer_states_are_what_transformers_reports(family):
    """Below the last, which transformers reports after the final norm."""
    spec, head = FAMILIES[family], first_head(family)
    batch = inputs(family, head)
    with torch.no_grad():
        output = spec.build(head)(**batch, output_hidden_states=True)
    model = attach(family, head, fusion_layers=list(range(DEPTH)))
    seen = {}
    for layer in fusion_layers(model):
        layer.register_forward_pre_hook(lambda m, args: seen.update({m: args[0]}))
    answer(model, batch)
    for layer in fusion_layers(model):
        backbone = layer.backbone
        reported = output.get(f"{backbone.stack}_hidden_states") or output["hidden_states"]
        first = 1 if family == "mamba" else 0  # it reports no embeddings
        for number in range(first, min(DEPTH, backbone.num_layers)):
            torch.testing.assert_close(seen[layer][number], reported[number - first], msg=lambda m, n=number: f"z_{n}: {m}")


@each_head_in_turn
def test_trained_saved_reloaded(family, head, lora, tmp_path, table):
    batch = inputs(family, head)
    before = answer(FAMILIES[family].build(head), batch)
    model = attach(family, head, lora)
    assert (answer(model, batch) - before).abs().max() < 1e-6
    losses = train(model, batch)
    assert losses[-1] < losses[0]
    trained = answer(model, batch)
    assert (trained - before).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(FAMILIES[family].build(head), tmp_path)
    torch.testing.assert_close(answer(again, batch), trained, rtol=0, atol=1e-6)
    table.cell(family, "with LoRA" if lora else "alone", "yes")


# with LoRA every other one; test_quantised has both in 8 and 4 bits
@pytest.mark.parametrize(("family", "lora"), [(family, i % 2 == 1) for i, family in enumerate(FAMILIES)])
def test_eight_bits(family, lora, tmp_path, table):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    spec, head = FAMILIES[family], first_head(family)
    batch = inputs(family, head)
    spec.build(head).save_pretrained(tmp_path / "base")
    skipping = quantization_config(8, extra_skip=spec.unquantised)

    def load():
        return type(spec.build(head)).from_pretrained(
            tmp_path / "base", quantization_config=skipping, dtype=torch.float32, device_map={"": "cpu"}
        )

    model = attach(family, head, lora, model=load())
    assert any(p.dtype == torch.int8 for p in model.parameters()), "nothing was quantised, so the test shows nothing"
    losses = train(model, batch, steps=8)
    assert losses[-1] < losses[0]
    trained = answer(model, batch)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert torch.equal(answer(again, batch), trained)
    table.cell(family, "8-bit", "yes" + "".join(f", not `{name}`" for name in spec.unquantised))


@each_head_in_turn
@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_gradient_checkpointing(family, head, lora, reentrant, table):
    batch = inputs(family, head)

    def gradients(checkpointing):
        model = without_dropout(disturb(attach(family, head, lora))).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**batch).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}

    plain = gradients(False)
    if not FAMILIES[family].build(head).supports_gradient_checkpointing:
        with pytest.raises(ValueError, match="does not support activation checkpointing"):
            gradients(True)
        table.cell(family, "checkpointing", "not in transformers")
        return
    checkpointed = gradients(True)
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-5, atol=1e-5, msg=name)
    table.cell(family, "checkpointing", "yes")


def compiled(model, fullgraph=True):
    torch._dynamo.reset()
    return torch.compile(model, fullgraph=fullgraph, backend="eager")


@each_family
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["alone", "lora"])
def test_a_compiled_model_is_one_graph(family, lora, table):
    head = first_head(family)
    batch = {k: v for k, v in inputs(family, head).items() if k != "labels" or head == "seq2seq"}
    model = disturb(attach(family, head, lora))
    try:
        found = answer(compiled(model), batch)
    except torch._dynamo.exc.Unsupported:
        with pytest.raises(torch._dynamo.exc.Unsupported):  # without a fusion too
            answer(compiled(FAMILIES[family].build(head)), batch)
        if Version(torch.__version__) < Version("2.13"):
            pytest.skip(f"torch {torch.__version__} breaks the graph of transformers' own {family}")
        table.cell(family, "compile", "breaks without fusion too")
        return
    torch.testing.assert_close(found, answer(model, batch), rtol=1e-4, atol=1e-5)
    table.cell(family, "compile", "yes")


@pytest.mark.parametrize("family", ["bert", "llama", "t5-both"])
@with_and_without_lora
def test_a_compiled_model_trains_alike(family, lora):
    batch = inputs(family, first_head(family))

    def gradients(form):
        model = without_dropout(disturb(attach(family, lora=lora))).train()
        form(model)(**batch).loss.backward()
        return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}

    plain, found = gradients(lambda model: model), gradients(lambda model: compiled(model, fullgraph=False))
    assert all(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def generated(model, batch, **options):
    result = model.generate(
        **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip
    return result.sequences, torch.stack(result.logits)


@pytest.mark.parametrize(("family", "head"), GENERATING)
def test_generation_agrees_with_and_without_cache(family, head, table):
    model = disturb(attach(family, head), scale=0.3).eval()
    batch = {k: v for k, v in inputs(family, head, padding="left").items() if k != "labels"}
    for beams in (1, 3):
        cached, scores = generated(model, batch, num_beams=beams, use_cache=True)
        uncached, same_scores = generated(model, batch, num_beams=beams, use_cache=False)
        assert torch.equal(cached, uncached)
        torch.testing.assert_close(scores, same_scores, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            _, plain = generated(model, batch, num_beams=beams)
        assert (scores[0] - plain[0]).abs().max() > 1e-3, "the fusion has no effect, so the test shows nothing"
    table.cell(family, "cached generation", "yes")


@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {f for f, _ in GENERATING}))
def test_other_families_do_not_generate(family, table):
    assert not FAMILIES[family].build(first_head(family)).can_generate()
    table.cell(family, "cached generation", "-")
