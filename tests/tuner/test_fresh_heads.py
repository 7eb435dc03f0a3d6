"""Weights that a checkpoint lacks: told at attaching for every head of transformers, with names that train and save them."""

import ast
import copy
import re
import warnings

import pytest
import torch
import transformers
from families import FAMILIES, LENGTH, VOCABULARY
from peft import PeftModel, get_peft_model
from support import disturb
from torch import nn
from transformers.models.auto import modeling_auto

from fusion_adapters import FusionConfig

TRIED = (
    *("bert", "roberta", "deberta-v2", "electra", "albert", "distilbert", "modernbert"),
    *("llama", "gpt2", "qwen2", "t5", "bart", "vit", "wav2vec2"),
)


def heads_of(family):
    """Every class with a head that transformers has for a family."""
    config = getattr(transformers, FAMILIES[family].config)
    mappings = [m for n, m in vars(modeling_auto).items() if re.fullmatch(r"MODEL_FOR_\w+_MAPPING", n)]
    found = {kind for mapping in mappings if config in mapping for kind in _several(mapping[config]) if _is_of(kind, config)}
    return sorted(kind.__name__ for kind in found)


def _is_of(kind, config):
    return kind.__module__.split(".")[2] == config.__module__.split(".")[2]  # Qwen2 has a head of another family too


def _several(kinds):
    return kinds if isinstance(kinds, (tuple, list)) else (kinds,)


PAIRS = [
    (family, head) for family in TRIED for head in heads_of(family) if head != "BartForCausalLM"
]  # its blocks are not found


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The folder of a family's checkpoint without a head, saved once."""
    folders = {}

    def folder(family):
        if family not in folders:
            spec = FAMILIES[family]
            torch.manual_seed(0)
            config = getattr(transformers, spec.config)(**spec.settings)
            folders[family] = tmp_path_factory.mktemp(family)
            transformers.AutoModel.from_config(config).save_pretrained(folders[family])
        return folders[family]

    return folder


def load(folder, head, seed=0, **options):
    torch.manual_seed(seed)
    return getattr(transformers, head).from_pretrained(folder, **options)


def attach_and_listen(model, **fields):
    """What attaching says of weights that are neither trained nor saved; None if nothing."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            get_peft_model(model, FusionConfig(**fields))
        except ValueError as error:
            return str(error)
    said = [str(w.message) for w in caught if "lacks" in str(w.message) or "stays frozen" in str(w.message)]
    assert len(said) <= 1
    return said[0] if said else None


def names_in(message):
    """The list in the message that can be pasted."""
    return ast.literal_eval(re.search(r"modules_to_save=(\[.*?\])", message)[1])


def batch(model, head):
    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    if model.main_input_name == "input_values":
        return {"input_values": torch.randn(2, 400, generator=generator)}
    shape = (2, 3, LENGTH) if "MultipleChoice" in head or "DoubleHeads" in head else (2, LENGTH)
    ids = torch.randint(3, VOCABULARY, shape, generator=generator)
    ids[..., -1] = 2  # the end of a sentence, which heads of encoder-decoders read
    return {"input_ids": ids, **({"decoder_input_ids": ids} if "Generation" in head else {})}


def answers(model, head):
    with torch.no_grad():
        output = model.eval()(**batch(model, head))
    return [v for k, v in output.items() if isinstance(v, torch.Tensor) and v.is_floating_point() and "hidden" not in k]


@pytest.mark.parametrize(("family", "head"), PAIRS)
def test_every_head_is_told_of_with_names_that_work(checkpoints, family, head, tmp_path):
    model, info = load(checkpoints(family), head, output_loading_info=True)
    state = model.state_dict()
    random = {k for k in info["missing_keys"] if state[k].min() != state[k].max() and not k.endswith("masked_spec_embed")}
    said = attach_and_listen(model)
    if not random:
        assert said is None, "nothing is fresh"
        return
    if head == "Wav2Vec2ForXVector":  # has a module of a name in which the backbone's wav2vec2.feature_extractor ends
        assert "'feature_extractor.weight'" in said and "Save the model as it is now" in said
        return
    names = names_in(said)
    for key in random:
        around = [key.rsplit(".", i)[0] for i in range(1, key.count(".") + 1)]
        assert any(name.endswith(n) for name in around for n in names), f"{key} is not covered by {names}"
    modules = [n for n, _ in model.named_modules()]
    assert all(any(n.endswith(name) for n in modules) for name in names), "the names exist in this model"
    # pasted, it is enough, and two loads answer alike
    config = FusionConfig(modules_to_save=names)
    assert attach_and_listen(load(checkpoints(family), head), modules_to_save=names) is None
    trained = disturb(get_peft_model(load(checkpoints(family), head), config))
    expected = answers(trained, head)
    trained.save_pretrained(tmp_path)
    for seed in (1, 2):
        again = PeftModel.from_pretrained(load(checkpoints(family), head, seed), tmp_path)
        for ours, theirs in zip(answers(again, head), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)


def test_masked_lm_on_a_checkpoint_without_its_head_is_refused_where_two_loads_would_differ(checkpoints):
    folder = checkpoints("bert")
    one, two = (answers(load(folder, "BertForMaskedLM", seed), "BertForMaskedLM")[0] for seed in (1, 2))
    assert (one - two).abs().max() > 0.01
    model = load(folder, "BertForMaskedLM")
    before = answers(model, "BertForMaskedLM")[0]
    with pytest.raises(
        ValueError, match=r"The checkpoint of BertForMaskedLM lacks 'cls.predictions.transform'.*\['transform'\]"
    ):
        get_peft_model(model, FusionConfig())
    assert torch.equal(answers(model, "BertForMaskedLM")[0], before) and not hasattr(model, "peft_config")


def test_a_head_that_the_checkpoint_held_may_stay_frozen(tmp_path):
    FAMILIES["distilbert"].build("sequence").save_pretrained(tmp_path)
    for fields in ({}, {"task_type": "SEQ_CLS"}, {"task_type": "SEQ_CLS", "modules_to_save": ["pre_classifier"]}):
        assert attach_and_listen(load(tmp_path, "DistilBertForSequenceClassification"), **fields) is None
    FAMILIES["bert"].build("masked").save_pretrained(tmp_path)
    assert attach_and_listen(load(tmp_path, "BertForMaskedLM")) is None


def test_a_head_of_another_number_of_labels_and_one_put_in_later_are_fresh(tmp_path):
    FAMILIES["bert"].build("token").save_pretrained(tmp_path)
    model = load(tmp_path, "BertForTokenClassification", num_labels=3, ignore_mismatched_sizes=True)
    assert names_in(attach_and_listen(model)) == ["classifier"]
    model = load(tmp_path, "BertForTokenClassification")
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 5))
    assert names_in(attach_and_listen(model)) == ["classifier"]
    assert names_in(attach_and_listen(model, modules_to_save=["classifier.0"])) == ["classifier.0", "classifier.2"]


def test_a_pooler_that_the_checkpoint_lacks_is_named_where_a_head_reads_it(tmp_path):
    FAMILIES["bert"].build("masked").save_pretrained(tmp_path)
    said = attach_and_listen(load(tmp_path, "BertForSequenceClassification"), task_type="SEQ_CLS")
    assert "lacks 'bert.pooler': it has random values" in said and names_in(said) == ["pooler"]
    bare = load(tmp_path, "BertModel")
    with pytest.warns(UserWarning, match=r"The checkpoint of BertModel lacks 'pooler'"):
        get_peft_model(bare, FusionConfig())


def test_names_do_not_find_more_than_is_meant(tmp_path):
    FAMILIES["llama"].build("causal").save_pretrained(tmp_path)
    model = load(tmp_path, "LlamaForCausalLM")
    model.top = nn.ModuleDict({"head": nn.Linear(32, 32), "q_proj": nn.Linear(32, 32)})  # lm_head ends in the one's name
    names = names_in(attach_and_listen(model))
    assert names == ["top"]
    model.head, model.top = model.top.head, None
    said = attach_and_listen(model)
    assert "lacks 'head.weight', 'head.bias'" in said and "Train them" not in said and "Save the model as it is now" in said


def test_a_checkpoint_without_embeddings(tmp_path):
    model = FAMILIES["llama"].build("causal")
    state = {k: v for k, v in model.state_dict().items() if "embed_tokens" not in k}
    model.save_pretrained(tmp_path, state_dict=state)
    said = attach_and_listen(load(tmp_path, "LlamaForCausalLM"))
    assert "lacks 'model.embed_tokens.weight'" in said and "Save the model as it is now" in said


def test_output_embeddings_may_have_been_made_larger(checkpoints, tmp_path):
    """Which leaves no trace that tells them from fresh ones: a warning."""
    with pytest.warns(UserWarning, match=r"lacks 'lm_head'.*modules_to_save=\['lm_head'\].*resize_token_embeddings"):
        get_peft_model(load(checkpoints("llama"), "LlamaForCausalLM"), FusionConfig())
    FAMILIES["llama"].build("causal").save_pretrained(tmp_path)
    model = load(tmp_path, "LlamaForCausalLM")
    model.resize_token_embeddings(130)
    assert "resize_token_embeddings" in attach_and_listen(model)


@pytest.mark.parametrize("change", ["half", "second adapter"])
def test_what_is_fresh_stays_known(checkpoints, change):
    model = load(checkpoints("bert"), "BertForTokenClassification")
    if change == "half":
        assert names_in(attach_and_listen(model.half())) == ["classifier"]
        return
    attached = get_peft_model(model, FusionConfig(modules_to_save=["classifier"], r=2, target_modules=["query"]))
    attached.add_adapter("same", FusionConfig(modules_to_save=["classifier"]))
    with pytest.raises(ValueError, match=r"lacks 'classifier'.*modules_to_save=\['classifier'\]"):
        attached.add_adapter("other", FusionConfig())


def test_an_adapter_saved_without_a_fresh_head_is_told_when_it_is_loaded(checkpoints, tmp_path):
    trained = get_peft_model(
        copy.deepcopy(load(checkpoints("bert"), "BertForMaskedLM")), FusionConfig()
    )  # a copy knows nothing
    trained.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"lacks 'cls.predictions.transform'.*saved without them"):
        PeftModel.from_pretrained(load(checkpoints("bert"), "BertForMaskedLM", 1), tmp_path)


def test_a_model_from_a_configuration_is_judged_by_its_class():
    """Everything in it is random; a head that pre-training does not know is told of."""
    assert attach_and_listen(FAMILIES["bert"].build("masked")) is None
    assert attach_and_listen(FAMILIES["t5"].build("seq2seq").base_model) is None
    said = attach_and_listen(transformers.BertForNextSentencePrediction(FAMILIES["bert"].build("masked").config))
    assert "stays frozen" in said and names_in(said) == ["cls"]
    assert names_in(attach_and_listen(FAMILIES["modernbert"].build("token"), task_type="TOKEN_CLS")) == ["head"]
    said = attach_and_listen(FAMILIES["bart"].build("sequence"), task_type="SEQ_CLS")
    assert "its task_type covers none of its modules" in said and names_in(said) == ["classification_head"]
