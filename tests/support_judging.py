"""Language models with judges on their backbone, and what the judges say of the same texts afterwards."""

from __future__ import annotations

import tempfile
from functools import cache

import torch
from families import FAMILIES, VOCABULARY
from peft import get_peft_model
from support import disturb
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fusion_adapters import FusionConfig, ManyAdapters, share_backbone

PAD, EOS, LABELS = 0, 2, 3
HEADS = {"TOKEN_CLS": AutoModelForTokenClassification, "SEQ_CLS": AutoModelForSequenceClassification}
JUDGES = {
    "tags": {"task_type": "TOKEN_CLS", "fusion": "dwatt"},
    "tone": {"task_type": "SEQ_CLS", "fusion": "concat"},
    "pooled": {"task_type": "SEQ_CLS", "fusion": "dwatt", "fusion_pool": "mean"},
    "low": {"task_type": "SEQ_CLS", "fusion": "scalar_mix", "fusion_depth": 2},
    "low-pooled": {"task_type": "SEQ_CLS", "fusion": "attnres", "fusion_depth": 3, "fusion_pool": "mean"},
}
OPTIONS = {"max_new_tokens": 12, "pad_token_id": PAD}


def judges_of(model, judges=JUDGES, **config):
    """Fresh adapters, moved off the identity, saved and loaded onto a model's backbone."""
    config = {"num_labels": LABELS, **config}
    with tempfile.TemporaryDirectory() as folder:
        for i, (name, fields) in enumerate(judges.items()):
            torch.manual_seed(i)
            own = share_backbone(model, HEADS[fields["task_type"]], **config)
            disturb(get_peft_model(own, FusionConfig(**fields)), scale=0.5).save_pretrained(f"{folder}/{name}")
        return ManyAdapters.from_pretrained(model, {name: f"{folder}/{name}" for name in judges})


@cache
def writer(family="llama", **settings):
    """A language model and judges on its backbone; for tests that change neither."""
    model = FAMILIES[family].build("causal", **settings)
    return model, judges_of(model)


def prompts(rows=3, length=7, seed=0):
    """Prompts of which the first is padded by two on the left."""
    ids = torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(ids)
    ids[0, :2] = PAD
    mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def written(model, seed=3, **options):
    """What `model.generate` returns for a seed."""
    torch.manual_seed(seed)
    return model.generate(**options)


def ends_of(sequences, length, eos=EOS):
    """Where each text ends, by the first token of its end after a prompt of that length."""
    found = []
    for row in sequences.tolist():
        places = [i for i in range(length, len(row)) if row[i] == eos]
        found.append(places[0] + 1 if places else len(row))
    return found


def check_judgements(many, answer, ends, prompt, tolerance=1e-5):
    """Each judgement is that of the text by itself, from its first real token to its end, as far as it was read."""
    for name in answer.judgements:
        judgement = answer[name]
        mask = judgement.attention_mask
        for i, end in enumerate(ends):
            start = 0 if prompt is None else int((prompt[i] == 0).sum())
            place = slice(start, min(end, mask.shape[1]))
            expected = torch.zeros_like(mask[i])
            expected[place] = 1
            assert torch.equal(mask[i], expected), (name, i)
            alone = many(input_ids=answer.sequences[i : i + 1, place], adapters=[name])[name].logits[0]
            own = judgement.logits[i] if judgement.logits.dim() == 2 else judgement.logits[i, place]
            torch.testing.assert_close(own, alone, atol=tolerance, rtol=0)
