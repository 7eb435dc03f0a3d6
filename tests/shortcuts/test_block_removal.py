"""Blocks removed for good, with a map in their place."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import tiny
from support_linear import DEPTH, WIDTH, decoder, padded, some_rows
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fusion_adapters.backbone.thinned import Thinning
from fusion_adapters.shortcuts import (
    RemovalOptions,
    block_distances,
    chosen_run,
    perplexity,
    removal_curve,
    remove_blocks,
)
from fusion_adapters.shortcuts.stream import Choice

ROWS, OTHERS = some_rows(60), some_rows(10, seed=1)
IDS = torch.tensor([some_rows(1, seed=7)[0]["input_ids"]])
SHAPE = {"hidden_size": WIDTH, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24, "vocab_size": 40}


def blocks_of(model):
    return model.model.layers if hasattr(model, "model") else model.transformer.h


def removed(model, count, **options):
    return remove_blocks(model, count, ROWS, padded, RemovalOptions(**options), progress=False)


def idle(model, *numbers):
    """Makes blocks the identity."""
    for number in numbers:
        block = blocks_of(model)[number - 1]
        for name, parameter in block.named_parameters():
            if any(last in name for last in ("o_proj", "down_proj", "c_proj")):
                parameter.zero_()
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_blocks_that_do_nothing_go_without_any_change(family):
    model = idle(decoder(family, depth=5), 3, 4)
    before, size = model(input_ids=IDS).logits, sum(p.numel() for p in model.parameters())
    result = removed(model, 2)
    assert (result.model, result.first, result.count) == (model, 3, 2) and abs(result.distance) < 1e-6
    assert len(blocks_of(model)) == model.config.num_hidden_layers == 3
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert sum(p.numel() for p in model.parameters()) < size


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("fold", [True, False])
def test_the_saved_checkpoint_is_an_ordinary_one(tmp_path, family, fold):
    model = decoder(family, depth=5)
    removed(model, 2, first=3, fold=fold)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(model) and again.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)
        # each block writes to its own place in the cache
        for each in (model, again):
            written = each.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
            plain = each.generate(IDS, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None, use_cache=False)
            assert torch.equal(written, plain)
            cached = each(input_ids=IDS, use_cache=True).past_key_values
            assert len(cached.layers) == 3 and all(layer.get_seq_length() == IDS.shape[1] for layer in cached.layers)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_map_is_the_least_squares_of_the_paper(family):
    """T of `x' + T m ~ z_out`, with m what the feed-forward adds and x' the rest of the state below the gap."""
    model, name = decoder(family, depth=5), "c_proj" if family == "gpt2" else "down_proj"
    added, states = [], []
    block = blocks_of(model)[1]
    handles = [block.mlp.register_forward_hook(lambda _, args, output: added.append(output[0, 1:]))]
    for each in (block, blocks_of(model)[3]):
        handles.append(
            each.register_forward_hook(
                lambda _, args, output: states.append((output[0] if isinstance(output, tuple) else output)[0, 1:])
            )
        )
    with torch.no_grad():
        for row in ROWS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    m, z, out = (torch.cat(each).double() for each in (added, states[::2], states[1::2]))
    linear = getattr(block.mlp, name)
    before = copy.deepcopy(linear)
    removed(model, 2, first=3)
    if family == "gpt2":  # with a constant
        m = torch.cat([m, torch.ones(len(m), 1, dtype=torch.float64)], dim=1)
    solution = torch.linalg.lstsq(m, out - (z - m[:, :WIDTH])).solution.T  # (d, d) or (d, d + 1)
    matrix = solution[:, :WIDTH]
    if family == "gpt2":
        assert torch.allclose(linear.weight.double(), before.weight.double() @ matrix.T, atol=1e-4)
        assert torch.allclose(linear.bias.double(), matrix @ before.bias.double() + solution[:, WIDTH], atol=1e-4)
    else:
        assert torch.allclose(linear.weight.double(), matrix @ before.weight.double(), atol=1e-4)


def test_what_a_map_can_express_is_not_lost():
    """The removed block moves the state by a linear function of what the feed-forward below it added."""
    model, added = decoder(), []
    matrix = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)) / 2
    below, block = model.model.layers[1:3]
    below.mlp.register_forward_hook(lambda _, args, output: added.append(output))
    idle(model, 3)
    handle = block.register_forward_hook(lambda _, args, output: output + added[-1] @ matrix.T)
    before = model(input_ids=IDS).logits
    dropped = removed(copy.deepcopy(model), 1, first=3, fold=False).model(input_ids=IDS).logits
    folded = removed(model, 1, first=3).model(input_ids=IDS).logits
    handle.remove()
    assert torch.allclose(folded, before, atol=1e-3) and not torch.allclose(dropped, before, atol=1)


def test_a_large_ridge_is_dropping():
    model = decoder(depth=5)
    dropped = removed(copy.deepcopy(model), 2, first=2, fold=False).model(input_ids=IDS).logits
    whole = model(input_ids=IDS).logits
    folded = removed(model, 2, first=2, ridge=1e9).model(input_ids=IDS).logits
    assert torch.allclose(folded, dropped, atol=1e-3) and not torch.allclose(dropped, whole, atol=0.5)


def test_distances_are_cosines_and_the_closest_run_is_chosen():
    model = idle(decoder(depth=5), 3)
    found = block_distances(model, OTHERS, padded, progress=False)
    states = [[] for _ in range(6)]
    handles = [model.model.layers[0].register_forward_pre_hook(lambda _, args: states[0].append(args[0][0, 1:]))]
    for i, block in enumerate(model.model.layers):
        handles.append(block.register_forward_hook(lambda _, args, output, i=i: states[i + 1].append(output[0, 1:])))
    with torch.no_grad():
        for row in OTHERS:
            model(input_ids=torch.tensor([row["input_ids"]]))
    for handle in handles:
        handle.remove()
    z = torch.stack([torch.cat(each) for each in states]).double()
    expected = 1 - torch.nn.functional.cosine_similarity(z[:, None], z[None], dim=-1).mean(-1)
    assert torch.allclose(found, expected, atol=1e-6)
    assert chosen_run(found, 1) == 3 and removed(copy.deepcopy(model), 1).first == 3
    table = torch.tensor([[0, 0.1, 0.5, 0.9], [0.1, 0, 0.3, 0.4], [0.5, 0.3, 0, 0.2], [0.9, 0.4, 0.2, 0]])
    assert [chosen_run(table, 1), chosen_run(table, 2)] == [3, 2]
    assert [chosen_run(table, 1, fold=False), chosen_run(table, 3, fold=False)] == [1, 1]
    everywhere = block_distances(model, OTHERS, padded, Choice(), progress=False)
    assert not torch.allclose(everywhere, found, atol=1e-4)  # the first positions count


def trained(depth=5):
    """A model that has learned to continue sequences which count up, so that its blocks work together."""
    model = decoder(depth=depth, initializer_range=0.05).requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        ids = (torch.randint(0, 37, (16, 1), generator=generator) + 3 * torch.arange(12)) % 37 + 1
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.requires_grad_(False).eval()


def counting(count, seed):
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, 37, (count, 1), generator=generator)
    return [{"input_ids": ids, "attention_mask": [1] * 12} for ids in ((starts + 3 * torch.arange(12)) % 37 + 1).tolist()]


def test_the_map_beats_dropping_on_a_trained_model_which_stays_as_it_is():
    model = trained()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    rows, judged = counting(40, 1), counting(20, 2)
    options = RemovalOptions(ridge=1e-4)
    scores = removal_curve(model, [3, 1, 2], rows, judged, padded, options, progress=False)
    assert [s.count for s in scores] == [0, 1, 2, 3]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert model.config.num_hidden_layers == len(model.model.layers) == 5
    with torch.no_grad():
        losses = [
            model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["input_ids"]])).loss for r in judged
        ]
    assert scores[0].perplexity == scores[0].dropped == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert all(whole.perplexity < score.perplexity < score.dropped for whole in scores[:1] for score in scores[1:])
    for score in scores[1:]:
        for fold, expected in ((True, score.perplexity), (False, score.dropped)):
            thin = remove_blocks(
                copy.deepcopy(model),
                score.count,
                rows,
                padded,
                RemovalOptions(ridge=1e-4, fold=fold, first=score.first),
                progress=False,
            ).model
            assert perplexity(thin, judged, padded, progress=False) == pytest.approx(expected, rel=1e-4)
            assert sum(p.numel() for p in thin.parameters()) == score.parameters
    assert scores[1].as_json() == {
        **{"count": 1, "first": scores[1].first, "parameters": scores[1].parameters},
        **{"perplexity": scores[1].perplexity, "dropped": scores[1].dropped},
    }


def test_lists_of_one_value_a_block_lose_the_right_ones(tmp_path):
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = Qwen2Config(
        **SHAPE, num_hidden_layers=5, layer_types=kinds, use_sliding_window=True, sliding_window=4, initializer_range=0.2
    )
    model = Qwen2ForCausalLM(config).eval()
    expected = copy.deepcopy(model)
    removed(model, 1, first=3, fold=False)
    assert model.config.layer_types == [kinds[i] for i in (0, 1, 3, 4)]
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        idle(expected, 3)
        assert torch.equal(again(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_a_map_is_folded_where_attention_and_feed_forward_stand_side_by_side(tmp_path):
    torch.manual_seed(0)
    shape = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "vocab_size": 40,
    }
    model = GPTNeoXForCausalLM(GPTNeoXConfig(**shape, use_parallel_residual=True, initializer_range=0.2)).eval()
    model.gpt_neox.layers[2].attention.dense.weight.data.zero_()
    model.gpt_neox.layers[2].mlp.dense_4h_to_h.weight.data.zero_()
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        removed(model, 1, first=3)
        assert torch.equal(model(input_ids=IDS).logits, before)
        removed(model, 1, first=2)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_classifier_loses_blocks_too(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, num_hidden_layers=4, num_labels=3, pad_token_id=0, initializer_range=0.2)
    model = LlamaForSequenceClassification(config).eval()
    removed(model, 1)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_encoders_lose_blocks_without_a_map():
    model = tiny("bert", "mlm")
    with pytest.raises(ValueError, match="not known"):
        removed(model, 1)
    result = removed(model, 2, fold=False)
    assert model.config.num_hidden_layers == len(model.bert.encoder.layer) == 2 and result.first in (1, 2, 3)
    with pytest.raises(ValueError, match="not causal"):
        perplexity(model, OTHERS, padded, progress=False)


def refused(model, match, count=1, **options):
    """The removal is refused, and the model is as it was."""
    before = model(input_ids=IDS).logits
    with pytest.raises(ValueError, match=match):
        removed(model, count, **options)
    assert torch.equal(model(input_ids=IDS).logits, before)


def test_models_that_cannot_be_thinned_are_refused_untouched():
    refused(decoder("gpt2", scale_attn_by_inverse_layer_idx=True), "scaling.*depends on their number", first=2)
    # the last blocks can go: those below keep their numbers
    removed(decoder("gpt2", scale_attn_by_inverse_layer_idx=True), 1, first=DEPTH)
    gemma = Gemma2Config(**SHAPE, num_hidden_layers=4, head_dim=8, pad_token_id=0)
    refused(Gemma2ForCausalLM(gemma).eval(), "a norm or a factor.*fold=False", first=3, feed_forward="mlp")
    granite = GraniteConfig(**SHAPE, num_hidden_layers=4, residual_multiplier=0.3, pad_token_id=0)
    refused(GraniteForCausalLM(granite).eval(), "a norm or a factor.*fold=False", first=3)
    torch.manual_seed(0)
    mixtral = MixtralConfig(**SHAPE, num_hidden_layers=4, num_local_experts=2, pad_token_id=0)
    refused(MixtralForCausalLM(mixtral).eval(), "experts.*fold=False", first=3)
    refused(decoder(), "no such module in block 2", first=3, feed_forward="ffn")


def test_quantised_weights_and_adapters_are_refused():
    model = decoder()
    linear = model.model.layers[1].mlp.down_proj
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        removed(model, 1)
    adapted = get_peft_model(decoder(), LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="Remove blocks first"):
        removed(adapted, 1)
    with pytest.raises(ValueError, match="Remove blocks first"):
        Thinning(adapted, [1])


def test_counts_and_options_out_of_range():
    model = decoder()
    for count, options in ((0, {}), (DEPTH, {}), (DEPTH, {"fold": False}), (3, {"first": 3}), (2, {"first": DEPTH})):
        refused(model, r"of 4 blocks", count, **options)
    removed(copy.deepcopy(model), DEPTH - 1)
    for wrong in ({"first": 1}, {"first": 0, "fold": False}, {"ridge": -1.0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RemovalOptions(**wrong)
    with pytest.raises(ValueError, match="fold=False"):
        removal_curve(model, [1], ROWS, OTHERS, padded, RemovalOptions(fold=False), progress=False)
