"""Fitting in one streamed pass: which positions count, the same whatever the batches, and after a stop the same to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import FAMILIES
from peft import LoraConfig, get_peft_model
from support import LORA, attached, disturb, tiny
from support_cache import pad
from support_shortcuts import fitted, moments_of, rows_of_tokens, states_of

from fusion_adapters.shortcuts import FUSED, MAT, FitOptions, fit_shortcuts, solve
from fusion_adapters.shortcuts import fitting as fitting_module
from fusion_adapters.shortcuts.moments import pairs_of
from fusion_adapters.shortcuts.stream import Choice
from fusion_adapters.states import StaleCacheError

HERE = Path(__file__).parents[1]
L = 4


def equal(a, b):
    return [(s.kind, s.sources, s.target) for s in a] == [(s.kind, s.sources, s.target) for s in b] and all(
        torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


def counting(read):
    """A collator that leaves a note of each batch."""

    def collate(batch):
        read.append(len(batch))
        return pad(batch)

    return collate


def near(a, b):
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "head", "skip"), [("llama", "lm", 1), ("bert", "mlm", 0)])
def test_the_stream_reads_the_states_of_all_real_positions_and_solves_as_from_one_piece(family, head, skip):
    """Layer 0 are the embeddings, and the last state is that before the final norm; both read literally."""
    model, rows = tiny(family, head), rows_of_tokens()
    result = fit_shortcuts(model, rows, pad, FitOptions(fused=[0, 2], ridge=1e-4), progress=False)
    states = states_of(model, rows, skip)
    assert result.positions == len(states[0]) == sum(len(row["input_ids"]) - skip for row in rows)
    for shortcut in result.shortcuts:
        once = solve(moments_of(states, pairs_of(shortcut.sources, L)), shortcut.sources, L, ridge=1e-4)
        torch.testing.assert_close(shortcut.weight, once.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(shortcut(states), once(states), rtol=1e-4, atol=1e-4)
    if family == "llama":
        with torch.no_grad():
            ids = torch.tensor([rows[0]["input_ids"]])
            output = model(ids, output_hidden_states=True)
        assert torch.equal(states[0][: ids.shape[1] - skip], output.hidden_states[0][0, skip:])
        torch.testing.assert_close(model.model.norm(states[L][: ids.shape[1] - skip]), output.hidden_states[-1][0, skip:])


def test_batches_of_any_size_give_the_same():
    options = {"fused": [0], "ridge": 1e-4}
    near(fitted(batch_size=1, **options), fitted(batch_size=7, **options))
    near(fitted(batch_size=1, **options), fitted(batch_size=500, **options))


def test_a_fit_from_one_position_a_row_takes_one_that_the_seed_chooses():
    model, rows = tiny("llama", "lm"), rows_of_tokens()
    first = fit_shortcuts(model, rows, pad, FitOptions(positions="one", ridge=1e-3), progress=False)
    assert first.positions == len(rows)
    assert equal(first.shortcuts, fitted(model, positions="one", ridge=1e-3))
    near(first.shortcuts, fitted(model, positions="one", ridge=1e-3, batch_size=3))
    assert not equal(first.shortcuts, fitted(model, positions="one", ridge=1e-3, seed=1))
    drawn = [Choice("one", seed=s).of(rows[1], 1) for s in range(300)]
    assert all(len(places) == 1 for places in drawn)
    assert {place for (place,) in drawn} == set(range(len(rows[1]["input_ids"]))), "some position is never drawn"
    places, length = Choice("one", skip=2).of(rows[1], 1), len(rows[1]["input_ids"])
    assert 2 <= places[0] < length and Choice("one", skip=length).of(rows[1], 1) == []


def test_a_fit_at_labelled_positions_takes_these_alone():
    model, rows = tiny("bert", "mlm"), rows_of_tokens(labelled=True)
    result = fit_shortcuts(model, rows, pad, FitOptions(positions="labelled", fused=None, ridge=1e-3), progress=False)
    states = states_of(model, rows)
    wanted = torch.cat([torch.tensor(row["labels"]) != -100 for row in rows])
    assert result.positions == int(wanted.sum())
    for shortcut in result.shortcuts:
        chosen = {layer: state[wanted] for layer, state in states.items()}
        once = solve(moments_of(chosen, pairs_of(shortcut.sources, L)), shortcut.sources, L, ridge=1e-3)
        torch.testing.assert_close(shortcut.weight, once.weight, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="positions='labelled', and a row has no labels"):
        fitted(model, positions="labelled")


def test_what_is_skipped_at_the_beginning_is_one_position_for_decoders_and_can_be_set():
    model = tiny("llama", "lm")
    assert equal(fitted(model, ridge=1e-3), fitted(model, ridge=1e-3, skip=1))
    assert not equal(fitted(model, ridge=1e-3), fitted(model, ridge=1e-3, skip=0))
    with pytest.raises(ValueError, match="skip=-1"):
        FitOptions(skip=-1)
    with pytest.raises(ValueError, match="no position to fit a shortcut to"):
        fitted(model, skip=100)


@pytest.mark.filterwarnings("ignore:The shortcut from")
def test_a_default_fit_fits_models_of_any_depth():
    for depth in (1, 3, 7):
        found = fitted(tiny("llama", "lm", depth=depth), ridge=1e-4)
        assert found.sources(kind=MAT) == list(range(depth))
        assert found.sources(kind=FUSED) == list(range(1, depth))
    assert found.get(5, kind=FUSED).sources == (0, 1, 5)  # of 7 blocks: every sixth, counted from the last


def test_a_stopped_fit_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting_module, "SAVE_EVERY", 0.0)
    model, rows, options = tiny("llama", "lm"), rows_of_tokens(), FitOptions(fused=[0], batch_size=8)
    unbroken = fit_shortcuts(model, rows, pad, options, progress=False)
    for stop in (1, 6, 14):
        read = []

        def stopped(batch, stop=stop, read=read):
            if len(read) == stop:
                raise KeyboardInterrupt
            read.append(len(batch))
            return pad(batch)

        with pytest.raises(KeyboardInterrupt):
            fit_shortcuts(model, rows, stopped, options, folder=tmp_path, progress=False)
        assert (tmp_path / fitting_module.PROGRESS).is_file()
        resumed = fit_shortcuts(model, rows, counting(read), options, folder=tmp_path, progress=False)
        assert len(read) == 15, "a batch was read twice, or left out"
        assert equal(resumed.shortcuts, unbroken.shortcuts) and resumed.positions == unbroken.positions
        assert not list(tmp_path.iterdir())


KILLED = """
import os, sys
from support import tiny
from support_cache import pad
from support_shortcuts import rows_of_tokens
from fusion_adapters.shortcuts import FitOptions, fit_shortcuts, fitting
fitting.SAVE_EVERY = 0.0
read = []
def dying(batch):
    read.append(0)
    if len(read) == 9:
        os._exit(9)
    return pad(batch)
fit_shortcuts(tiny("llama", "lm"), rows_of_tokens(), dying, FitOptions(fused=[0]), folder=sys.argv[1], progress=False)
"""


def test_a_killed_process_leaves_sums_that_another_goes_on_from(tmp_path):
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": f"{HERE}:{HERE.parent}"},
        check=False,
    )
    assert killed.returncode == 9 and [p.name for p in tmp_path.iterdir()] == [fitting_module.PROGRESS]
    read = []
    model, rows, options = tiny("llama", "lm"), rows_of_tokens(), FitOptions(fused=[0])
    resumed = fit_shortcuts(model, rows, counting(read), options, folder=tmp_path, progress=False)
    assert len(read) == 15 - 8
    assert equal(resumed.shortcuts, fit_shortcuts(model, rows, pad, options, progress=False).shortcuts)


def test_sums_of_another_fit_are_refused_and_damaged_ones_named(tmp_path, monkeypatch):
    monkeypatch.setattr(fitting_module, "SAVE_EVERY", 0.0)
    model, rows = tiny("llama", "lm"), rows_of_tokens()
    file = tmp_path / fitting_module.PROGRESS

    def stopped(batch, read=None):
        if file.is_file():
            raise KeyboardInterrupt
        return pad(batch)

    def fit(model=model, rows=rows, collator=pad, **options):
        return fit_shortcuts(
            model, rows, collator, FitOptions(**{"fused": None, **options}), folder=tmp_path, progress=False
        )

    with pytest.raises(KeyboardInterrupt):
        fit(collator=stopped)
    changed = [dict(rows[0], input_ids=[9, *rows[0]["input_ids"][1:]]), *rows[1:]]
    moved = [*rows[1:], rows[0]]
    typed = [{**row, "position_ids": [0] * len(row["input_ids"])} for row in rows]
    others = [
        {"rows": changed},
        {"rows": moved},
        {"rows": rows[:-1]},
        {"rows": typed},
        {"model": tiny("llama", "lm", seed=1)},
        {"batch_size": 4},
        {"positions": "one"},
        {"skip": 3},
        {"seed": 1},
        {"fused": [0]},
        {"sources": [1, 2]},
    ]
    before = file.read_bytes()
    for other in others:
        with pytest.raises(StaleCacheError, match=r"sums of another fit.*Give another folder, or delete the file"):
            fit(**other)
    assert file.read_bytes() == before
    file.write_bytes(before[: len(before) // 2])
    with pytest.raises(ValueError, match=r"is damaged \(.*\). Delete it"):
        fit()
    file.write_bytes(before)
    solved_otherwise = fit(ridge=0.1)  # how they are solved is no part of the sums
    assert equal(solved_otherwise.shortcuts, fitted(model, fused=None, ridge=0.1))


def test_states_that_are_no_numbers_are_refused_with_the_remedy():
    model = tiny("llama", "lm")
    with torch.no_grad():
        model.model.embed_tokens.weight[50] = float("nan")
    with pytest.raises(ValueError, match=r"of 8?\d+ states of layer 0 hold values that are not finite.*float32 or bfloat16"):
        fitted(model)


def test_left_padding_is_refused():
    def left(rows):
        batch = pad(rows)
        return {**batch, "attention_mask": batch["attention_mask"].flip(1)}

    with pytest.raises(ValueError, match=r"pads on the left.*padding_side = 'right'"):
        fit_shortcuts(tiny("llama", "lm"), rows_of_tokens(), left, progress=False)


def test_an_encoder_decoder_is_refused():
    with pytest.raises(ValueError, match=r"encoder-decoder"):
        fit_shortcuts(FAMILIES["t5"].build("seq2seq"), rows_of_tokens(), pad, progress=False)


def test_a_fusion_that_is_attached_is_left_out_also_one_that_ends_below_the_last_block():
    plain = fitted(tiny("llama", "token"), ridge=1e-3)
    model = disturb(attached("llama", "token", fusion="dwatt"))
    model.train()
    assert equal(fitted(model, ridge=1e-3), plain)
    assert model.training
    lower = disturb(attached("llama", "token", fusion="dwatt", fusion_depth=2))
    assert equal(fitted(lower, ridge=1e-3), plain)


def test_lora_that_is_active_is_part_of_the_states():
    plain = fitted(ridge=1e-3)
    lora = get_peft_model(tiny("llama", "lm"), LoraConfig(**LORA["llama"]))
    assert equal(fitted(lora, ridge=1e-3), plain)  # starts as the identity
    disturb(lora)
    assert not equal(fitted(lora, ridge=1e-3), plain)
    with lora.disable_adapter():
        assert equal(fitted(lora, ridge=1e-3), plain)


def test_a_backbone_in_bfloat16_is_summed_in_float64():
    model, rows = tiny("llama", "lm").bfloat16(), rows_of_tokens()
    states = states_of(model, rows, 1)
    assert states[2].dtype == torch.bfloat16
    found = fitted(model, sources=[2], fused=None, ridge=1e-4).get(2)
    once = solve(moments_of(states, [(2, 2), (2, 4)]), [2], 4, ridge=1e-4)
    assert found.weight.dtype == torch.float32 and found(states).dtype == torch.bfloat16
    assert (found.weight - once.weight).norm() < 0.02 * once.weight.norm()  # padding changes kernels, and bfloat16 rounds
