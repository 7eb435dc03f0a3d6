"""Adapters that judge while a model writes: the tokens are the model's, the judgements those of the texts afterwards."""

import threading

import pytest
import torch
from families import FAMILIES
from support import METHODS
from support_judging import EOS, JUDGES, OPTIONS, PAD, check_judgements, ends_of, judges_of, prompts, writer, written
from transformers import GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from fusion_adapters import FUSIONS
from fusion_adapters.tuner import collecting

WAYS = {
    "greedy": {},
    "sampled": {"do_sample": True},
    "warm": {"do_sample": True, "temperature": 1.7, "top_k": 20, "repetition_penalty": 1.2},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prompt in chunks": {"prefill_chunk_size": 3},
    "several of each": {"do_sample": True, "num_return_sequences": 2},
    "long": {"do_sample": True, "max_new_tokens": 40, "min_new_tokens": 40},
}


def judge(family="llama", batch=None, seed=3, **options):
    model, many = writer(family)
    batch, options = prompts() if batch is None else batch, {**OPTIONS, **options}
    plain = written(model, seed, **batch, **{k: v for k, v in options.items() if k != "read_last"})
    answer = written(many, seed, **batch, **options)
    assert torch.equal(answer.sequences, plain)
    mask = batch["attention_mask"].repeat_interleave(options.get("num_return_sequences", 1), 0)
    check_judgements(many, answer, ends_of(plain, batch["input_ids"].shape[1]), mask)
    return answer


@pytest.mark.parametrize("way", WAYS)
def test_tokens_are_the_models_and_judgements_those_of_the_texts(way):
    answer = judge(**WAYS[way])
    assert list(answer.judgements) == list(JUDGES)
    assert answer["tags"].logits.shape[1] == answer.sequences.shape[1] - 1


@pytest.mark.parametrize("family", ["gpt2", "qwen3", "gemma2", "mixtral", "gpt-neox"])
@pytest.mark.parametrize("way", ["sampled", "no cache", "static cache"])
def test_other_decoders(family, way):
    judge(family, **WAYS[way])


@pytest.mark.parametrize("pad", [PAD, EOS])
def test_what_follows_the_end_of_a_text_does_not_count(pad):
    answer = judge(seed=0, batch=prompts(8), do_sample=True, max_new_tokens=50, pad_token_id=pad)
    ends = ends_of(answer.sequences, 7)
    assert len(set(ends)) > 2  # rows that end at several places, else this tests nothing


@pytest.mark.parametrize("piece", [1, 5, 1000])
@pytest.mark.parametrize("way", ["sampled", "no cache", "prompt in chunks"])
def test_pieces_of_any_size_give_the_same(monkeypatch, piece, way):
    monkeypatch.setattr(collecting, "PIECE", piece)
    judge(**WAYS[way])


def test_so_many_positions_wait_and_no_more(monkeypatch):
    waiting, finish = [], collecting.Collector.finish

    def spied(self, *args):
        result = finish(self, *args)
        waiting.append(sum(step.new for step in self._waiting) * 3)
        return result

    monkeypatch.setattr(collecting, "PIECE", 12)
    monkeypatch.setattr(collecting.Collector, "finish", spied)
    judge(do_sample=True, min_new_tokens=12)
    assert waiting == [0] + [3, 6, 9, 0] * 2 + [3, 6, 9]


@pytest.mark.parametrize("pool", [None, "mean"])
def test_every_method(pool):
    model, _ = writer()
    methods = {name: fields for name, fields in METHODS.items() if not FUSIONS[fields["fusion"]].mixes_positions}
    many = judges_of(model, {f"by-{n}": {"task_type": "SEQ_CLS", **f, "fusion_pool": pool} for n, f in methods.items()})
    answer = many.generate(**prompts(), **OPTIONS)
    assert torch.equal(answer.sequences, model.generate(**prompts(), **OPTIONS))
    check_judgements(many, answer, ends_of(answer.sequences, 7), prompts()["attention_mask"])


@pytest.mark.parametrize(
    ("family", "way"),
    [("llama", way) for way in ("greedy", "sampled", "no cache", "static cache", "several of each")]
    + [("gpt2", "sampled"), ("gemma2", "greedy")],
)
def test_the_last_token_is_read_if_asked(family, way):
    answer = judge(family, read_last=True, **WAYS[way])
    assert isinstance(answer.output, torch.Tensor)
    assert answer["tags"].logits.shape[1] == answer.sequences.shape[1]


def test_some_of_the_adapters():
    _, many = writer()
    answer = many.generate(**prompts(), **OPTIONS, adapters=["low", "tags"])
    assert list(answer.judgements) == ["low", "tags"]
    everyone = many.generate(**prompts(), **OPTIONS)
    for name in ("low", "tags"):
        torch.testing.assert_close(answer[name].logits, everyone[name].logits)


def test_what_generate_returns_besides():
    model, many = writer()
    options = {**OPTIONS, "return_dict_in_generate": True, "output_scores": True}
    plain, answer = model.generate(**prompts(), **options), many.generate(**prompts(), **options)
    assert torch.equal(answer.sequences, plain.sequences)
    assert all(torch.equal(*pair) for pair in zip(answer.output.scores, plain.scores, strict=True))
    assert answer.output.past_key_values.get_seq_length() == plain.past_key_values.get_seq_length()


def test_settings_by_a_config_and_of_the_model():
    model = FAMILIES["llama"].build("causal")
    many = judges_of(model)
    config = GenerationConfig(max_new_tokens=5, pad_token_id=PAD)
    answer = many.generate(**prompts(), generation_config=config)
    assert torch.equal(answer.sequences, model.generate(**prompts(), generation_config=config))
    assert not config.disable_compile and config.return_dict_in_generate in (None, False)
    model.generation_config.max_new_tokens = 3  # after the adapters were loaded
    model.generation_config.pad_token_id = PAD
    assert torch.equal(many.generate(**prompts()).sequences, model.generate(**prompts()))


def test_prompts_without_a_mask_and_none_at_all():
    model, many = writer()
    ids = prompts()["input_ids"]  # padded, which the ids tell
    answer = many.generate(ids, **OPTIONS)
    assert torch.equal(answer.sequences, model.generate(ids, **OPTIONS))
    check_judgements(many, answer, ends_of(answer.sequences, 7), prompts()["attention_mask"])
    answer = many.generate(**OPTIONS)  # from the token that begins texts
    assert torch.equal(answer.sequences, model.generate(**OPTIONS))
    check_judgements(many, answer, ends_of(answer.sequences, 1), None)


def test_heads_without_a_token_for_padding():
    _, many = writer(pad_token_id=None)
    answer = written(many, **prompts(), **OPTIONS, do_sample=True)
    check_judgements(many, answer, ends_of(answer.sequences, 7), prompts()["attention_mask"])
    stop = many.stop_when("tone", 0, above=0.0)
    assert many.generate(**prompts(), **OPTIONS, stopping_criteria=[stop]).sequences.shape[1] == 8


class Asks(BaseStreamer):
    """Asks the same adapters of other texts after each token."""

    def __init__(self, many):
        self.many, self.tokens, self.answers = many, [], []

    def put(self, value):
        self.tokens.append(value.tolist())
        self.many(input_ids=torch.tensor([[5, 6, 7]]))
        self.answers.append(self.many.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, adapters=["pooled"]))

    def end(self):
        self.tokens.append("end")


def test_calls_within_a_generation():
    _, many = writer()
    streamer, alone = Asks(many), many.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3)
    answer = judge(batch={k: v[1:2] for k, v in prompts().items()})
    again = many.generate(prompts()["input_ids"][1:2], **OPTIONS, streamer=streamer)
    assert torch.equal(again.sequences, answer.sequences)
    written = [t for token in streamer.tokens[1:-1] for t in token]
    assert written == answer.sequences[0, 7:].tolist() and streamer.tokens[-1] == "end"
    for name in JUDGES:
        torch.testing.assert_close(again[name].logits, answer[name].logits)
    for inner in streamer.answers:
        torch.testing.assert_close(inner["pooled"].logits, alone["pooled"].logits)


class Fails(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        if input_ids.shape[1] > 9:
            raise KeyboardInterrupt
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_an_interrupted_generation_leaves_nothing():
    _, many = writer()
    with pytest.raises(KeyboardInterrupt):
        many.generate(**prompts(), **OPTIONS, stopping_criteria=[Fails()])
    assert many.begin() is None and many._taps.open_calls == 0
    judge()


def test_several_threads_at_once():
    model, many = writer()
    batches = [prompts(seed=i) for i in range(4)]
    found = [None] * 4

    def run(i):
        found[i] = [many.generate(**batches[i], **OPTIONS, adapters=[name]) for name in ("tone", "pooled", "tags")]

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, answers in enumerate(found):
        plain = model.generate(**batches[i], **OPTIONS)
        for answer in answers:
            assert torch.equal(answer.sequences, plain)
            check_judgements(many, answer, ends_of(plain, 7), batches[i]["attention_mask"])
