"""Caches for `fusion_pool="mean"`: a mean a text and layer, which trains and answers as the backbone does."""

import pytest
import torch
from families import attach
from support import METHODS, VOCABULARY, attached, disturb, tiny
from support_cache import assert_equal_training, cached, from_cache, loss_and_gradients, pad
from transformers import DataCollatorWithPadding

from fusion_adapters import FUSIONS
from fusion_adapters.states import LayerStateCache, StaleCacheError, cache_layer_states, plan_cache


def texts(count=8, end=None):
    """Rows of different lengths, the first of one token."""
    generator = torch.Generator().manual_seed(4)
    rows = []
    for i in range(count):
        ids = torch.randint(3, VOCABULARY, (1 + (5 * i) % 12,), generator=generator).tolist()
        ids = ids if end is None else [*ids, end]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": i % 5})
    return rows


def model_of(family="llama", method="dwatt", **fields):
    return disturb(attached(family, "sequence", fusion_pool="mean", **{**METHODS[method], **fields}))


def bytes_in(folder):
    return sum(path.stat().st_size for path in folder.glob("shard-*"))


def same_answers(model, rows, batch):
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**pad(rows)).logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_training_and_answers_from_a_cache_are_those_of_the_backbone(family, method, tmp_path):
    # dropout would draw other numbers for fewer positions
    fields = {"fusion_dropout": 0.0} if METHODS[method].get("fusion_dropout") else {}
    model, rows = model_of(family, method, **fields), texts()
    cache = cached(model, rows, tmp_path / "means")
    assert cache.manifest["means"] is not FUSIONS[METHODS[method]["fusion"]].mixes_positions
    batch = from_cache(cache, rows)
    assert batch["layer_states"]["kept"] == ("means" if cache.manifest["means"] else "all")
    same_answers(model, rows, batch)
    assert_equal_training(model, pad(rows), batch)


def test_normalised_states_are_means_before_they_are_normalised(family, tmp_path):
    model, rows = model_of(family, "concat", fusion_norm="rms", fusion_alpha=4.0), texts()
    batch = from_cache(cached(model, rows, tmp_path / "means"), rows)
    same_answers(model, rows, batch)
    assert_equal_training(model, pad(rows), batch)


@pytest.mark.parametrize("name", FUSIONS)
def test_states_of_all_tokens_are_pooled_when_they_are_read(family, name, tmp_path):
    model, rows = model_of(family, name), texts()
    cached(tiny(family, "sequence"), rows, tmp_path / "states", layers=range(5))  # extracted for any method
    batch = from_cache(LayerStateCache(tmp_path / "states", model), rows)
    assert batch["layer_states"]["kept"] == "all"
    same_answers(model, rows, batch)
    assert_equal_training(model, pad(rows), batch)


def test_a_text_takes_the_bytes_of_one_token(tmp_path):
    rows = texts()
    plans = [plan_cache(model, rows) for model in (attached("llama", "sequence"), model_of())]
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert [plan.bytes for plan in plans] == [tokens * 4 * 32 * 2, len(rows) * 4 * 32 * 2]
    assert "8 means over tokens x 4 layers" in str(plans[1])
    cached(model_of(), rows, tmp_path / "means", dtype="float16")
    assert plans[1].bytes < bytes_in(tmp_path / "means") < plans[0].bytes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8", "int8"])
def test_other_formats_are_near(dtype, tmp_path):
    model, rows = model_of(), texts()
    batch = from_cache(cached(model, rows, tmp_path / "means", dtype=dtype), rows)
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**pad(rows)).logits, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side(side, tmp_path):
    from support_text import tokenizer

    words = tokenizer()
    words.padding_side = side
    collator, model, rows = DataCollatorWithPadding(words), model_of(), texts()
    cache = cache_layer_states(model, rows, tmp_path / "means", collator, dtype="float32", progress=False)
    dataset = cache.dataset(rows)
    batch = cache.collator(collator)([dataset[i] for i in range(len(rows))])
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, model(**pad(rows)).logits, rtol=1e-5, atol=1e-5)


def test_texts_that_end_with_the_token_that_also_pads_keep_all_positions(tmp_path):
    rows, model = texts(end=2), model_of()
    model.config.pad_token_id = 2
    cache = cached(model, rows, tmp_path / "states")
    assert cache.manifest["means"] is False
    same_answers(model, rows, from_cache(cache, rows))  # the head reads the token before the end


def test_another_padding_token_makes_means_stale(tmp_path):
    model = model_of()
    cached(model, texts(end=2), tmp_path / "means")
    model.config.pad_token_id = 2
    with pytest.raises(StaleCacheError, match="pad_token_id: 0 when it was extracted, 2 now"):
        LayerStateCache(tmp_path / "means", model)


def test_models_that_read_positions_do_not_get_means(tmp_path):
    rows = texts()
    cache = cached(model_of(), rows, tmp_path / "means")
    batch = from_cache(cache, rows)
    for other in (attached("llama", "sequence"), model_of(method="deeper")):
        with pytest.raises(StaleCacheError, match="holds a mean over the positions of each text"):
            LayerStateCache(tmp_path / "means", other)
    with pytest.raises(ValueError, match="layer_states holds a mean over the positions of each text"):
        attached("llama", "sequence")(**batch)
    with pytest.raises(ValueError, match="positions='labelled': the cache"):
        cache.dataset(rows, positions="labelled")
    with pytest.raises(StaleCacheError, match="means: True in the cache, False now"):
        cached(attached("llama", "sequence"), rows, tmp_path / "means")
    assert "means" in repr(cache)
    cached(model_of(), rows, tmp_path / "all", means=False)  # for both
    for model in (model_of(), attached("llama", "sequence")):
        same_answers(model, rows, from_cache(LayerStateCache(tmp_path / "all", model), rows))


def test_a_decoder_whose_head_is_not_known_keeps_all_positions(tmp_path):
    llama = tiny("llama", "sequence")
    llama.__class__ = type("OwnForSequenceClassification", (type(llama),), {})  # may read what it likes
    model = attach("llama", "sequence", fusion_pool="mean", model=llama)
    cache = cached(model, texts(), tmp_path / "states")
    assert cache.manifest["means"] is False
    same_answers(model, texts(), from_cache(cache, texts()))


def test_collators_that_cut_are_refused(tmp_path):
    def cut(rows):
        return {name: value[:, :5] if value.dim() == 2 else value for name, value in pad(rows).items()}

    with pytest.raises(ValueError, match="positions, but its rows have"):
        cache_layer_states(model_of(), texts(), tmp_path / "means", cut, progress=False)
    cache = cached(model_of(), texts(), tmp_path / "whole")
    dataset = cache.dataset(texts())
    with pytest.raises(ValueError, match="The collated batch has"):
        cache.collator(cut)([dataset[i] for i in range(8)])


def test_a_batch_of_other_texts_is_refused(tmp_path):
    model, rows = model_of(), texts()
    batch = from_cache(cached(model, rows, tmp_path / "means"), rows)
    batch["input_ids"] = batch["input_ids"][:3]
    batch["attention_mask"] = batch["attention_mask"][:3]
    batch["labels"] = batch["labels"][:3]
    with pytest.raises(ValueError, match="the means of 8 texts, and the batch has 3"):
        model(**batch)
    assert loss_and_gradients(model, pad(rows))[0].isfinite()  # and the model is as it was
