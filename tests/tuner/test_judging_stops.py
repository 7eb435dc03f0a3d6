"""Stopping a generation by what an adapter says of the text so far, and the judgements by the names of their labels."""

import pytest
import torch
from families import FAMILIES
from support_judging import EOS, JUDGES, OPTIONS, PAD, check_judgements, judges_of, prompts, writer, written
from transformers import LlamaForSequenceClassification

from fusion_adapters import ManyAdapters

# no token for padding is written as a text's own, which heads over whole texts would not read
LONG = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": True, "pad_token_id": PAD, "suppress_tokens": [PAD]}
NAMES = ["kind", "rude", "toxic"]


def so_far(many, sequences, name, label):
    """The probability of a label for each text as far as it has been read when each token is written, `(B, tokens)`."""
    found = []
    for i, row in enumerate(sequences):
        steps = []
        for length in range(7, len(row)):
            logits = many(input_ids=row[None, 2 if i == 0 else 0 : length], adapters=[name])[name].logits
            steps.append((logits[:, -1] if logits.dim() == 3 else logits)[0].softmax(-1)[label])
        found.append(torch.stack(steps))
    return torch.stack(found)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("name", JUDGES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_text_ends_as_soon_as_the_label_is_more_likely(family, name, every):
    model, many = writer(family)
    plain = written(model, **prompts(6), **LONG)
    seen = so_far(many, plain, name, 1)
    if name == "tags":  # the likeliest of the tokens since it was asked last
        seen = torch.stack([seen[:, max(0, i - every + 1) if i else 0 : i + 1].amax(1) for i in range(seen.shape[1])], 1)
    seen = seen[:, ::every]
    above = float(seen.amax(1).sort().values[3]) - 1e-4  # for some of the texts
    stop = many.stop_when(name, 1, above=above, every=every)
    answer = written(many, **prompts(6), **LONG, stopping_criteria=[stop])
    ends = []
    for i in range(6):
        steps = (seen[i] > above).nonzero().flatten().tolist()
        ends.append(7 + 1 + steps[0] * every if steps else plain.shape[1])
    assert len(set(ends)) > 1 and max(ends) == plain.shape[1] and min(ends) < plain.shape[1]
    for i, end in enumerate(ends):
        assert torch.equal(answer.sequences[i, :end], plain[i, :end])
        assert (answer.sequences[i, end:] == PAD).all()
    check_judgements(many, answer, ends, prompts(6)["attention_mask"])


def test_at_once_and_never():
    model, many = writer()
    at_once = many.generate(**prompts(), **OPTIONS, stopping_criteria=[many.stop_when("tone", 0, above=0.0)])
    assert at_once.sequences.shape[1] == 8
    never = many.generate(**prompts(), **OPTIONS, stopping_criteria=[many.stop_when("tone", 0, above=0.99999)])
    assert torch.equal(never.sequences, model.generate(**prompts(), **OPTIONS))


def test_padding_that_is_the_token_of_the_end_is_not_judged():
    _, many = writer()
    seen = so_far(many, written(many, **prompts(6), **LONG).sequences, "tone", 1)
    above = float(seen.amax(1).sort().values[3]) - 1e-4
    options = {**LONG, "pad_token_id": EOS, "stopping_criteria": [many.stop_when("tone", 1, above=above)]}
    answer = written(many, **prompts(6), **options)
    stopped = [i for i in range(6) if (seen[i] > above).any()]
    for i in stopped:
        end = 8 + int((seen[i] > above).nonzero()[0])
        start = 2 if i == 0 else 0
        assert (answer.sequences[i, end:] == EOS).all()
        assert answer["tone"].attention_mask[i].sum() == min(end, answer.sequences.shape[1] - 1) - start
    assert 0 < len(stopped) < 6


class OwnHead(LlamaForSequenceClassification):
    """A head of somebody's own, which may read the text in any way."""


def test_a_head_of_ones_own_is_asked_about_the_whole_text():
    model, plain = writer()
    folder_of = {name: plain.models[name] for name in ("tone", "pooled")}
    many = _saved(model, folder_of, OwnHead)
    for name in folder_of:
        own, known = many.stop_when(name, 1, above=0.5), plain.stop_when(name, 1, above=0.5)
        assert known._alone and not own._alone
        answers = [
            written(m, **prompts(6), **LONG, adapters=[name], stopping_criteria=[stop])
            for m, stop in ((many, own), (plain, known))
        ]
        assert torch.equal(answers[0].sequences, answers[1].sequences)


def _saved(model, models, head):
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, own in models.items():
            own.save_pretrained(f"{folder}/{name}", selected_adapters=[name])
        places = {name: f"{folder}/{name}/{name}" for name in models}
        return ManyAdapters.from_pretrained(model, places, heads=dict.fromkeys(models, head))


def test_outside_of_a_generation_that_it_judges():
    model, many = writer()
    stop = many.stop_when("tone", 1, above=0.5)
    message = "outside of a generation that 'tone' judges"
    with pytest.raises(RuntimeError, match=message):
        stop(torch.ones(1, 3, dtype=torch.long), None)
    with pytest.raises(RuntimeError, match=message):
        model.generate(**prompts(), **OPTIONS, stopping_criteria=[stop])
    with pytest.raises(ValueError, match=r"'tone' does not judge here: adapters=\['tags'\]"):
        many.generate(**prompts(), **OPTIONS, adapters=["tags"], stopping_criteria=[stop])
    with pytest.raises(ValueError, match="another ManyAdapters"):
        writer("gpt2")[1].generate(**prompts(), **OPTIONS, stopping_criteria=[stop])


def test_what_stop_when_refuses():
    _, many = writer()
    with pytest.raises(ValueError, match="no adapter 'toxic'; there are 'tags'"):
        many.stop_when("toxic", above=0.5)
    with pytest.raises(ValueError, match="'tone' needs a label; its 3 are 'LABEL_0'"):
        many.stop_when("tone", above=0.5)
    with pytest.raises(ValueError, match="has no label 'toxic'"):
        many.stop_when("tone", "toxic", above=0.5)
    with pytest.raises(ValueError, match=r"has no label 3; .* 0 to 2"):
        many.stop_when("tone", 3, above=0.5)
    for above in (1.0, 90, -0.1):
        with pytest.raises(ValueError, match="no probability that could be exceeded"):
            many.stop_when("tone", 1, above=above)
    with pytest.raises(ValueError, match="every=0"):
        many.stop_when("tone", 1, above=0.5, every=0)


def test_labels_by_name():
    model = FAMILIES["llama"].build("causal")
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    many = judges_of(model, {n: JUDGES[n] for n in ("tags", "tone")}, num_labels=3, **labels)
    stop = many.stop_when("tone", "toxic", above=0.2)
    assert stop.label == 2
    answer = many.generate(**prompts(), **OPTIONS)
    tone, tags = answer["tone"], answer["tags"]
    torch.testing.assert_close(tone.probability("rude"), tone.logits.softmax(-1)[:, 1])
    torch.testing.assert_close(tone.probability(1), tone.probability("rude"))
    outside = tags.attention_mask == 0
    assert outside.any() and not tags.probabilities[outside].any()
    torch.testing.assert_close(tags.probabilities[~outside].sum(-1), torch.ones(int((~outside).sum())))
    with pytest.raises(ValueError, match="no label 'warm'; its 3 are 'kind', 'rude', 'toxic'"):
        tone.probability("warm")


def test_one_number_two_classes_and_several_labels_at_once():
    model = FAMILIES["llama"].build("causal")
    tone = {"tone": JUDGES["tone"]}
    number = judges_of(model, tone, num_labels=1)
    answer = number.generate(**prompts(), **OPTIONS)
    assert torch.equal(answer["tone"].probability(), answer["tone"].logits[:, 0])
    above = float(answer["tone"].logits.min()) - 100  # no probability
    stopped = number.generate(**prompts(), **OPTIONS, stopping_criteria=[number.stop_when("tone", above=above)])
    assert stopped.sequences.shape[1] == 8
    two = judges_of(model, tone, num_labels=2).generate(**prompts(), **OPTIONS)["tone"]
    torch.testing.assert_close(two.probability(), two.logits.softmax(-1)[:, 1])
    several = judges_of(model, tone)
    several.models["tone"].get_base_model().config.problem_type = "multi_label_classification"
    answer = several.generate(**prompts(), **OPTIONS)["tone"]
    torch.testing.assert_close(answer.probabilities, answer.logits.sigmoid())
