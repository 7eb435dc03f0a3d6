"""What cannot be judged while it is written: one clear error each, before anything is written."""

import pytest
import torch
from families import FAMILIES
from support import attached, disturb, tiny
from support_judging import JUDGES, OPTIONS, PAD, judges_of, prompts, writer
from transformers import AutoModel, CompileConfig, DynamicCache, GenerationConfig

from fusion_adapters import ManyAdapters


class Counts:
    """How many tokens a streamer is given."""

    def __init__(self):
        self.tokens = 0

    def put(self, value):
        self.tokens += value.numel()

    def end(self):
        pass


REFUSED = {
    "beams": ({"num_beams": 3}, r"beam search \(num_beams=3\)"),
    "sampled beams": ({"num_beams": 2, "do_sample": True, "num_return_sequences": 2}, "num_beams=2"),
    "lookup": ({"prompt_lookup_num_tokens": 3}, r"assisted generation \(prompt_lookup_num_tokens=3\)"),
    "contrastive": ({"penalty_alpha": 0.6, "top_k": 4}, r"contrastive search \(penalty_alpha=0.6\)"),
    "own loop": ({"custom_generate": lambda *_, **__: None}, "asks for custom_generate, in"),
    "guidance": ({"guidance_scale": 1.5}, "guidance_scale=1.5 runs the model on other texts"),
    "healing": ({"token_healing": True}, "token_healing=True"),
    "paged": ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
    "compiled": ({"compile_config": CompileConfig()}, "compile_config"),
    "by a config": ({"generation_config": GenerationConfig(num_beams=4)}, "num_beams=4"),
    "missing": ({"adapters": ["tone", "toxic"]}, "no adapter 'toxic'; there are 'tags'"),
    "none": ({"adapters": []}, "No adapter was named"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    given, message = REFUSED[case]
    streamer = Counts()
    with pytest.raises(ValueError, match=message) as error:
        writer()[1].generate(**{**prompts(), **OPTIONS, "streamer": streamer, **given})
    assert "\n" not in str(error.value)
    assert not streamer.tokens


def test_an_assistant():
    model, many = writer()
    with pytest.raises(ValueError, match=r"assisted generation \(assistant_model\)"):
        many.generate(**prompts(), **OPTIONS, assistant_model=model)


def test_what_the_models_own_settings_ask_for():
    model = FAMILIES["llama"].build("causal")
    many = judges_of(model, {"tone": JUDGES["tone"]})
    model.generation_config.num_beams = 2
    with pytest.raises(ValueError, match="num_beams=2"):
        many.generate(**prompts(), **OPTIONS)
    many.generate(**prompts(), **OPTIONS, num_beams=1)


def test_a_fusion_that_mixes_positions():
    model = FAMILIES["llama"].build("causal")
    many = judges_of(model, {"tone": JUDGES["tone"], "deep": {"task_type": "SEQ_CLS", "fusion": "deeper"}})
    for use_cache in (True, False):
        with pytest.raises(ValueError, match=r"The fusion of 'deep' \(Deeper\) reads other positions .* KV cache") as error:
            many.generate(**prompts(), **OPTIONS, use_cache=use_cache)
        assert "\n" not in str(error.value)
    answer = many.generate(**prompts(), **OPTIONS, adapters=["tone"])
    assert many(input_ids=answer.sequences, adapters=["deep"])["deep"].logits.shape == (3, 3)


def test_prompts_that_are_not_tokens_or_were_read_before():
    model, many = writer()
    embedded = model.get_input_embeddings()(prompts()["input_ids"])
    with pytest.raises(ValueError, match="inputs_embeds bring a prompt without token ids"):
        many.generate(inputs_embeds=embedded, **OPTIONS)
    cache = DynamicCache(config=model.config)
    empty = many.generate(**prompts(), **OPTIONS, past_key_values=cache)
    assert torch.equal(empty.sequences, model.generate(**prompts(), **OPTIONS))
    with pytest.raises(ValueError, match="past_key_values holds 18 positions already"):
        many.generate(**prompts(), **OPTIONS, past_key_values=cache)


def test_models_that_write_no_text(tmp_path):
    disturb(attached("llama", "sequence", fusion="concat")).save_pretrained(tmp_path)
    tiny("llama", "lm").save_pretrained(tmp_path / "model")
    many = ManyAdapters.from_pretrained(AutoModel.from_pretrained(tmp_path / "model"), {"tone": str(tmp_path)})
    with pytest.raises(ValueError, match="a LlamaModel, which writes no text"):
        many.generate(**prompts(), **OPTIONS)
    with pytest.raises(ValueError, match="a LlamaModel, which writes no text"):
        ManyAdapters(attached("llama", "sequence", fusion="concat")).generate(**prompts(), **OPTIONS)
    with pytest.raises(ValueError, match="a BertModel, which writes no text"):
        ManyAdapters(attached("bert", "token", fusion="concat")).generate(**prompts(), **OPTIONS)


def test_a_model_with_a_generate_of_its_own():
    model = FAMILIES["llama"].build("causal")
    many = judges_of(model, {"tone": JUDGES["tone"]})
    many.host.generate = lambda inputs, **_: torch.cat([inputs, torch.full_like(inputs, PAD)], 1)
    with pytest.raises(RuntimeError, match="a generate of its own: of 14 positions, 0 could be followed"):
        many.generate(prompts()["input_ids"])
