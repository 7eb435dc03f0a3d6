"""A cache knows what the backbone saw: collators that change rows, padding, columns, and layers that are lacking."""

import pytest
import torch
from datasets import Dataset
from families import FAMILIES
from support import attached, disturb
from support_cache import assert_equal_training, cached, from_cache, pad, some_rows
from support_text import tokenizer
from transformers import (
    DataCollatorForLanguageModeling,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    DebertaV2Config,
    DebertaV2ForTokenClassification,
    MPNetConfig,
    MPNetForTokenClassification,
    Trainer,
    TrainingArguments,
)

from fusion_adapters.states import cache_layer_states


def unlabelled(rows):
    return [{n: row[n] for n in ("input_ids", "attention_mask")} for row in rows]


def drawing(seed):
    """A collator that hides other tokens at each call."""
    generator = torch.Generator().manual_seed(seed)

    def collate(rows):
        batch = pad(rows)
        hidden = (torch.rand(batch["input_ids"].shape, generator=generator) < 0.3) & batch["attention_mask"].bool()
        return {**batch, "input_ids": batch["input_ids"].masked_fill(hidden, 4), "labels": batch["input_ids"]}

    return collate


def test_random_masks_are_refused_at_extraction_and_from_a_cache(tmp_path):
    model, rows = attached(head="mlm", modules_to_save=["transform"]), unlabelled(some_rows())
    with_mask = tokenizer()
    with_mask.mask_token = with_mask.unk_token
    masked = DataCollatorForLanguageModeling(with_mask, mlm_probability=0.5)
    for collator in (drawing(0), masked):
        with pytest.raises(ValueError, match=r"changes 'input_ids': \d+ of \d+ values .* Draw masks and augment once"):
            cache_layer_states(model, rows, tmp_path / "drawn", collator, progress=False)
        assert not list((tmp_path / "drawn").glob("shard-*"))
    cache = cached(model, rows, tmp_path / "clean")
    data = cache.dataset(rows)
    for collator in (drawing(0), masked):
        with pytest.raises(ValueError, match="changes 'input_ids'"):
            cache.collator(collator)([data[i] for i in range(12)])


def test_masks_that_were_drawn_before_train_as_live(tmp_path):
    model = disturb(attached(head="mlm", modules_to_save=["transform"]))
    batch = drawing(0)(some_rows(6))
    real = [mask.bool() for mask in batch["attention_mask"]]
    rows = [{n: batch[n][i][real[i]].tolist() for n in ("input_ids", "attention_mask", "labels")} for i in range(6)]
    assert_equal_training(model, pad(rows), from_cache(cached(model, rows, tmp_path / "states"), rows))


def test_augmented_pictures_and_sound_are_refused(tmp_path):
    for family, head, name, shape in (
        ("vit", "image", "pixel_values", (3, 32, 32)),
        ("wav2vec2", "audio", "input_values", (400,)),
    ):
        model = FAMILIES[family].build(head)
        size = getattr(model.config, "image_size", 32)
        rows = [{name: torch.randn(3, size, size) if family == "vit" else torch.randn(shape)} for _ in range(3)]

        def augmented(chosen, name=name):
            return {name: torch.stack([torch.as_tensor(row[name]) for row in chosen]).flip(-1)}

        with pytest.raises(ValueError, match=f"changes '{name}'"):
            cache_layer_states(model, rows, tmp_path / family, augmented, progress=False)
        assert len(cached(model, rows, tmp_path / f"{family}-plain")) == 3


def test_inputs_that_the_collator_adds_are_refused(tmp_path):
    model, rows = attached(), some_rows(4)
    cache = cached(model, rows, tmp_path / "states")
    data = cache.dataset(rows)

    def adding(chosen):
        batch = pad(chosen)
        return {**batch, "position_ids": torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])}

    with pytest.raises(ValueError, match="adds the model input 'position_ids'"):
        cache.collator(adding)([data[i] for i in range(4)])


def left(rows):
    return {n: v.flip(1) for n, v in pad([{n: v[::-1] for n, v in row.items()} for row in rows]).items()}


def test_padding_on_the_left_changes_no_state_or_is_refused(tmp_path):
    rows = some_rows()
    model = disturb(attached("llama"))
    expected = cached(model, rows, tmp_path / "right")
    cache = cache_layer_states(model, rows, tmp_path / "left", left, dtype="float32", progress=False)
    torch.testing.assert_close(cache.read(cache.find(rows)), expected.read(expected.find(rows)))
    for family in ("bert", "gpt2"):
        counted = FAMILIES[family].build("sequence")
        bare = unlabelled(rows)
        with pytest.raises(
            ValueError, match=r"pads on the left, and this backbone .* Pad on the right: tokenizer.padding_side"
        ):
            cache_layer_states(counted, bare, tmp_path / family, left, progress=False)


def test_columns_that_the_trainer_would_drop_are_dropped(tmp_path):
    model = attached()
    rows = [{**row, "id": str(i), "tokens": ["a", "b"], "word_ids": [0] * i} for i, row in enumerate(some_rows(16))]
    collator = DataCollatorForTokenClassification(tokenizer())
    arguments = TrainingArguments(
        str(tmp_path / "run"), max_steps=2, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True
    )
    for given in (Dataset.from_list(rows), rows):
        cache = cache_layer_states(model, given, tmp_path / "states", collator, progress=False)
        Trainer(model, arguments, cache.collator(collator), cache.dataset(given)).train()
    assert set(cache.dataset(rows)[0]) == {"input_ids", "attention_mask", "labels"}
    assert set(cache.dataset(rows, remove_unused_columns=False)[0]) == set(rows[0])


def test_rows_without_number_get_a_clear_answer(tmp_path):
    stream = Dataset.from_list(some_rows()).to_iterable_dataset()
    model = attached()
    cache = cached(model, some_rows(), tmp_path / "states")
    for rows in (stream, iter(some_rows())):
        with pytest.raises(TypeError, match=r"has no length and cannot be read by number; .* list\(rows\)"):
            cached(model, rows, tmp_path / "stream")
        with pytest.raises(TypeError, match="has no length"):
            cache.dataset(rows)
    assert not (tmp_path / "stream").exists()


def test_layers_that_the_fusion_lacks_are_said_before_the_extraction(tmp_path):
    with pytest.raises(
        ValueError, match=r"layers=\[1, 4\]: .* reads the layer states \[1, 2, 3, 4\], and \[2, 3\] are not among"
    ):
        cached(attached(), some_rows(), tmp_path / "states", layers=[1, 4])
    assert not (tmp_path / "states").exists()


SIZES = {"vocab_size": 120, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 32}


@pytest.mark.parametrize(
    ("build", "positions"),
    [
        (
            lambda: DebertaV2ForTokenClassification(
                DebertaV2Config(**SIZES, relative_attention=True, pos_att_type=["p2c"], position_buckets=8)
            ),
            "rel_embeddings",
        ),
        (lambda: MPNetForTokenClassification(MPNetConfig(**SIZES)), "relative_attention_bias"),
    ],
    ids=["deberta", "mpnet"],
)
def test_relative_positions_that_train_are_seen(build, positions, tmp_path):
    torch.manual_seed(0)
    model = attached(model=build(), modules_to_save=["classifier", positions])
    said = rf"1 parameters train inside the backbone \(for example 'encoder\.{positions}\..*weight'\), so its layer states change"
    with pytest.raises(ValueError, match=said):
        cached(model, some_rows(), tmp_path / "states")


def test_a_batch_whose_lengths_are_exchanged_is_refused(tmp_path):
    model, rows = attached(), some_rows(4)
    cache = cached(model, rows, tmp_path / "states")
    data = cache.dataset(rows)
    with pytest.raises(ValueError, match=r"and its rows have \d+ cached states|changes 'input_ids'"):
        cache.collator(lambda chosen: pad(chosen[::-1]))([data[0], data[1]])


def test_a_collator_of_transformers_pads_as_ever(tmp_path):
    model, rows = attached(head="sequence"), [{**row, "labels": 1} for row in some_rows()]
    collator = DataCollatorWithPadding(tokenizer())
    cache = cache_layer_states(model, rows, tmp_path / "states", collator, progress=False)
    data = cache.dataset(rows)
    assert torch.isfinite(model(**cache.collator(collator)([data[i] for i in range(12)])).loss)
