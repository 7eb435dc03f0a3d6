"""Shortcuts on classifiers of texts: the class after all positions of a text are cast, against a literal reading."""

import math

import pytest
import torch
from sklearn.metrics import r2_score
from support import tiny
from support_text import tokenizer
from transformers import AutoModel, DataCollatorWithPadding

from fusion_adapters.shortcuts import FitOptions, TextReadout, fit_shortcuts
from fusion_adapters.shortcuts.evaluate import evaluate_shortcuts

CLASSES = 12


def classifier(family):
    model = tiny(family, "sequence", labels=CLASSES)
    torch.manual_seed(5)
    head = model.classifier if family == "bert" else model.score
    head.weight.data.normal_()
    for name, parameter in model.named_parameters():
        if "embeddings.word" in name or "embed_tokens" in name:
            parameter.data.normal_()  # texts that differ
    return model


def some_rows(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    rows = [torch.randint(1, 50, (n,), generator=generator).tolist() for n in lengths]
    return [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": 0} for ids in rows]


@pytest.fixture(params=["bert", "llama"])
def model(request):
    return classifier(request.param)


@pytest.fixture
def collator():
    return DataCollatorWithPadding(tokenizer())


def padded(rows, collator):
    return dict(collator([{k: v for k, v in row.items() if k != "labels"} for row in rows]))


def test_the_last_state_leads_to_the_models_own_scores(model, collator):
    inputs = padded(some_rows(5), collator)
    base = model.base_model
    states = {}
    blocks = base.encoder.layer if hasattr(base, "encoder") else base.layers
    handle = blocks[-1].register_forward_hook(
        lambda _, __, out: states.update(last=out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        expected = model(**inputs).logits
    handle.remove()
    readout = TextReadout(model)
    torch.testing.assert_close(readout(inputs, states["last"]), expected, rtol=0, atol=0)
    beside = torch.where(inputs["attention_mask"][..., None] == 1, states["last"], 7.0)  # what stands at padding
    torch.testing.assert_close(readout(inputs, beside), expected)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, expected, rtol=0, atol=0)  # the model is as it was


def test_scores_are_those_of_a_literal_reading(collator):
    model = classifier("bert")
    rows, held_out = some_rows(60), some_rows(9, seed=1)
    fitted = fit_shortcuts(model, rows, collator, FitOptions(ridge=1e-3, fused=None), progress=False)
    scores = evaluate_shortcuts(
        model, fitted.shortcuts, held_out, collator, readout=TextReadout(model), batch_size=4, progress=False
    )
    assert {(s.kind, s.source) for s in scores} == {(kind, i) for kind in ("mat", "identity") for i in range(4)}
    for score in scores:
        shortcut = fitted.shortcuts.get(score.source, kind=score.kind)
        hits, surprisal, wanted, found = {1: 0, 5: 0, 10: 0}, 0.0, [], []
        for row in held_out:
            with torch.no_grad():
                ids = torch.tensor([row["input_ids"]])
                states = model(input_ids=ids, output_hidden_states=True).hidden_states
                full = model(input_ids=ids).logits[0]
                cast = shortcut({score.source: states[score.source]})
                said = int(model.classifier(model.bert.pooler(cast))[0].argmax())
            for k in hits:
                hits[k] += said in full.topk(k).indices.tolist()
            surprisal -= float(full.log_softmax(-1)[said])
            wanted.append(states[4][0])
            found.append(cast[0])
        assert score.predictions == len(held_out) and score.positions == sum(len(r["input_ids"]) for r in held_out)
        assert score.precision == {k: count / len(held_out) for k, count in hits.items()}
        assert math.isclose(score.surprisal, surprisal / len(held_out), rel_tol=1e-5)
        assert math.isclose(score.r2, r2_score(torch.cat(wanted), torch.cat(found)), rel_tol=1e-4)


def test_a_decoder_that_reads_the_last_token_is_judged_in_padded_batches_as_alone(collator):
    model, rows = classifier("llama"), some_rows(40)
    fitted = fit_shortcuts(model, rows, collator, FitOptions(ridge=1e-3), progress=False)
    one, many = (
        evaluate_shortcuts(
            model, fitted.shortcuts, rows[:8], collator, readout=TextReadout(model), batch_size=n, progress=False
        )
        for n in (1, 8)
    )
    for first, second in zip(one, many, strict=True):
        assert first.precision == second.precision and first.predictions == 8
        assert math.isclose(first.surprisal, second.surprisal, rel_tol=1e-4)


def test_few_classes_have_no_precision_at_more(collator):
    model, rows = tiny("bert", "sequence", labels=3), some_rows(20)
    fitted = fit_shortcuts(model, rows, collator, FitOptions(sources=[2], ridge=1e-3, fused=None), progress=False)
    scores = evaluate_shortcuts(model, fitted.shortcuts, rows, collator, readout=TextReadout(model), progress=False)
    assert all(set(score.precision) == {1} for score in scores)


def test_other_models_are_refused():
    with pytest.raises(ValueError, match="BertForMaskedLM gives no scores of classes for a text"):
        TextReadout(tiny("bert", "mlm"))
    with pytest.raises(ValueError, match="use Readout"):
        TextReadout(AutoModel.from_config(tiny("bert", "mlm").config))
