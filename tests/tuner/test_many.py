"""Several adapters in one pass of the backbone, each of which answers what it answers alone."""

import copy

import pytest
import torch
from families import FAMILIES, attach, first_head, inputs
from peft import PeftModel, get_peft_model
from support import DEPTH, METHODS, TASKS, attached, batch, disturb, tiny
from support_threads import in_threads
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

from fusion_adapters import FusionConfig, ManyAdapters, quantization_config, share_backbone, use_adapter

CLASSES = {"token": AutoModelForTokenClassification, "sequence": AutoModelForSequenceClassification}
CALL = {k: v for k, v in batch().items() if k != "labels"}


def member(base, head, name, labels=3, seed=0, **fields):
    """A model with a head of its own on a shared backbone, and an adapter that has an effect."""
    model = share_backbone(base, CLASSES[head], num_labels=labels)
    torch.manual_seed(seed)
    model = get_peft_model(model, FusionConfig(task_type=TASKS[head], **fields), adapter_name=name)
    return disturb(model, 0.3).eval()


def alone(model, name=None, **call):
    with torch.no_grad(), use_adapter(model, name or model.active_adapter):
        return model(**(call or CALL)).logits


def each_alone(models, **call):
    """What each answers by itself; asked before a pass of all, which must not change it."""
    return {model.active_adapter: alone(model, **call) for model in models}


def check(found, expected, rounded=("topic",)):
    """To the last bit; those of `rounded` compute the same in another order, here means of whole texts alone."""
    assert list(found) == list(expected)
    for name, output in found.items():
        if name in rounded:
            rtol = 1e-5 if output.logits.dtype == torch.float32 else 2**-7
            torch.testing.assert_close(output.logits, expected[name], rtol=rtol, atol=rtol / 10, msg=name)
        else:
            assert torch.equal(output.logits, expected[name]), name


def mixed(family="bert", dtype=torch.float32):
    """Tokens, texts and a number; other sizes of heads, fusions, depths."""
    base = tiny(family, "sequence", dtype=dtype).base_model
    return base, [
        member(base, "token", "entities", 5, fusion="dwatt"),
        member(base, "sequence", "intent", 7, fusion="concat"),
        member(base, "sequence", "stars", 1, fusion="scalar_mix"),
        member(base, "sequence", "topic", 4, fusion="dwconcat", fusion_pool="mean"),
        member(base, "token", "lower", 3, fusion="concat", fusion_depth=2),
        member(base, "sequence", "deep", 2, fusion="deeper"),
    ]


def test_each_answers_as_alone(family):
    _, models = mixed(family)
    expected = each_alone(models)
    many = ManyAdapters(*models)
    assert many.names == ["entities", "intent", "stars", "topic", "lower", "deep"]
    check(many(**CALL), expected)
    check(many(adapters=["stars", "lower"], **CALL), {name: expected[name] for name in ("stars", "lower")})
    assert each_alone(models).keys() == expected.keys()
    assert all(torch.equal(logits, expected[name]) for name, logits in each_alone(models).items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("fields", [{}, {"fusion_pool": "mean"}, {"fusion_depth": 3}], ids=["", "pooled", "lower"])
def test_every_fusion(family, method, fields):
    base = tiny(family, "sequence").base_model
    options = METHODS[method] | fields
    models = [member(base, "sequence", "first", **options), member(base, "sequence", "second", 4, seed=1, fusion="laya")]
    if not fields.get("fusion_pool"):
        models.append(member(base, "token", "third", 2, seed=2, **options))
    expected = each_alone(models)
    together = fields.get("fusion_pool") or method.startswith("concat")
    check(ManyAdapters(*models)(**CALL), expected, rounded=["first", "third"] if together else [])


@pytest.mark.parametrize("fields", [{}, {"fusion_norm": "rms"}, {"fusion_bottleneck": 8}, {"fusion_pool": "mean"}])
def test_products_that_are_taken_together(family, fields):
    base = tiny(family, "sequence").base_model
    models = [member(base, "sequence", f"a{i}", i + 2, seed=i, fusion="concat", **fields) for i in range(3)]
    models.append(member(base, "token", "other", fusion="concat", fusion_layers=[1, 2], seed=9))
    models.append(member(base, "token", "lower", fusion="concat", fusion_depth=2, seed=10))
    ids = torch.randint(1, 100, (6, 3))
    call = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = each_alone(models, **call)
    check(ManyAdapters(*models)(**call), expected, rounded=["a0", "a1", "a2"])


def test_adapters_of_one_model(family):
    model = attached(family, "token", fusion="dwatt")
    for name, method in {"b": "concat", "c": "laya"}.items():
        model.add_adapter(name, FusionConfig(fusion=method, task_type="TOKEN_CLS"))
        model.set_adapter(name)
        disturb(model, 0.2)
    model.set_adapter("b")
    expected = {name: alone(model.eval(), name) for name in ("default", "b", "c")}
    check(ManyAdapters(model)(**CALL), expected)
    assert model.active_adapter == "b"
    assert torch.equal(alone(model, "b"), model(**CALL).logits.detach())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_padding_and_batches(family, padding):
    _, models = mixed(family)
    ids, mask = torch.randint(1, 100, (5, 11)), torch.ones(5, 11, dtype=torch.long)
    if padding == "left":
        mask[1, :4] = mask[3, :9] = 0
    elif padding == "right":
        mask[1, 7:] = mask[3, 2:] = 0
    call = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    expected = each_alone(models, **call)
    check(ManyAdapters(*models)(**call), expected)


def test_in_16_bits(family):
    _, models = mixed(family, torch.bfloat16)
    expected = each_alone(models)
    check(ManyAdapters(*models)(**CALL), expected)


def test_losses(family):
    _, models = mixed(family)
    labels = {"entities": batch("token")["labels"], "stars": torch.tensor([0.3, 2.0])}
    found = ManyAdapters(*models)(labels=labels, **CALL)
    assert found["intent"].loss is None
    for model in (models[0], models[2]):
        with torch.no_grad():
            torch.testing.assert_close(
                found[model.active_adapter].loss, model(labels=labels[model.active_adapter], **CALL).loss, rtol=0, atol=0
            )


def test_the_blocks_run_once(family):
    _, models = mixed(family)
    many = ManyAdapters(*models)
    many(**CALL)  # once, for a stand-in to see how a block answers
    ran = []
    for model in [many.host, *models]:
        for module in model.modules():
            if type(module).__name__ in ("BertAttention", "LlamaAttention"):
                module.register_forward_hook(lambda module, args, output: ran.append(module))
    many(**CALL)
    assert len(ran) == DEPTH
    ran.clear()
    many(adapters=["lower"], **CALL)
    assert len(ran) == 2, "the blocks above the deepest fusion do not run"


def test_weights_are_shared_and_left_alone(family):
    base, models = mixed(family)
    before = {n: p.clone() for n, p in base.named_parameters()}
    many = ManyAdapters(*models)
    many(**CALL)
    own = {id(p) for p in base.parameters()}
    for model in [*models, many.host]:
        blocks = [
            p for n, p in model.named_parameters() if "layer" in n and "fusion" not in n and "modules_to_save" not in n
        ]
        assert len(blocks) > 4 * DEPTH
        assert all(id(p) in own for p in blocks)
    assert all(torch.equal(p, before[n]) for n, p in base.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in base.modules()), "the model that was given has no hooks"


def test_saved_and_loaded_each_by_itself(family, tmp_path):
    base, models = mixed(family)
    expected, folders = each_alone(models), {}
    for model in models:
        model.save_pretrained(tmp_path)
        folders[model.active_adapter] = tmp_path / model.active_adapter
    given = copy.deepcopy(base)
    many = ManyAdapters.from_pretrained(given, folders)
    assert not hasattr(given, "peft_config")
    check(many(**CALL), expected)
    # and on a model that was loaded as any other
    model = tiny(family, "sequence", labels=7)
    own = PeftModel.from_pretrained(model, folders["intent"]).eval()
    assert torch.equal(own(**CALL).logits, expected["intent"])


def test_adding_and_removing(family, tmp_path):
    base, models = mixed(family)
    for model in models:
        model.save_pretrained(tmp_path)
    many = ManyAdapters.from_pretrained(base, {"entities": tmp_path / "entities"})
    many.add("topic", tmp_path / "topic")
    check(many(adapters=["topic"], **CALL), {"topic": alone(models[3])})
    with pytest.raises(ValueError, match="There is an adapter 'topic' already"):
        many.add("topic", tmp_path / "intent")
    many.remove("entities")
    assert list(many(**CALL)) == ["topic"]
    many.add("entities", tmp_path / "entities")
    assert torch.equal(many(**CALL)["entities"].logits, alone(models[0]))
    many.remove("topic")
    many.remove("entities")
    with pytest.raises(ValueError, match="No adapter was named, and one pass is for at least one; there are none"):
        many(**CALL)
    with pytest.raises(ValueError, match="There is no adapter 'topic'; there are none"):
        many.remove("topic")


def test_names_of_labels_come_with_the_adapter(family, tmp_path):
    base = tiny(family, "sequence").base_model
    names = ["O", "B-LOC", "I-LOC"]
    model = share_backbone(
        base, CLASSES["token"], id2label=dict(enumerate(names)), label2id={n: i for i, n in enumerate(names)}
    )
    model = disturb(get_peft_model(model, FusionConfig(task_type="TOKEN_CLS")))
    model.save_pretrained(tmp_path)
    many = ManyAdapters.from_pretrained(base, {"places": tmp_path})
    assert many.models["places"].config.id2label == dict(enumerate(names))
    assert torch.equal(many(**CALL)["places"].logits, alone(model.eval()))


def test_adapters_with_the_same_head_share_a_model(family, tmp_path):
    base = tiny(family, "sequence").base_model
    for name in ("a", "b"):
        member(base, "token", name, fusion="dwatt", seed=ord(name)).save_pretrained(tmp_path)
    many = ManyAdapters.from_pretrained(base, {"a": tmp_path / "a", "b": tmp_path / "b"})
    assert many.models["a"] is many.models["b"]
    a, b = (many(**CALL)[name].logits for name in ("a", "b"))
    assert not torch.allclose(a, b, atol=1e-3)
    many.remove("a")
    assert torch.equal(many(**CALL)["b"].logits, b)


FAMILIES_OF_ONE_STACK = [n for n, f in FAMILIES.items() if f.stack is None and n not in ("t5", "bart", "whisper")]


@pytest.mark.parametrize("name", FAMILIES_OF_ONE_STACK)
def test_over_the_families(name):
    head = first_head(name)
    model = attach(name, fusion="dwatt")
    other = attach(name, model=FAMILIES[name].build(head), name="other", fusion="concat")  # equal weights, in memory twice
    for each in (model, other):
        disturb(each, 0.1).eval()
    call = {k: v for k, v in inputs(name, head).items() if k not in ("labels", "start_positions", "end_positions")}
    with torch.no_grad():
        expected = [each(**call)[0] for each in (model, other)]
    found = ManyAdapters(model, other)(**call)
    assert torch.equal(found["default"][0], expected[0])
    assert torch.equal(found["other"][0], expected[1])


def test_eight_threads_with_different_adapters(family):
    _, models = mixed(family)
    many = ManyAdapters(*models)
    calls = [{k: v.roll(i, 1) for k, v in CALL.items()} for i in range(4)]
    expected = [{m.active_adapter: alone(m, **call) for m in models} for call in calls]
    sets = [["entities"], ["intent", "lower"], ["deep", "topic"], None]

    def work(i):
        def ask():
            for _ in range(15):
                found = many(adapters=sets[i % 4], **calls[i // 2])
                check(found, {name: expected[i // 2][name] for name in found})

        return ask

    assert in_threads(*(work(i) for i in range(8))) == [None] * 8


def test_what_is_refused(tmp_path):
    base, models = mixed()
    many = ManyAdapters(*models)
    with pytest.raises(ValueError, match="There is no adapter 'toxic'; there are 'entities', 'intent'"):
        many(adapters=["toxic", "intent"], **CALL)
    with pytest.raises(ValueError, match="No adapter was named"):
        many(adapters=[], **CALL)
    with pytest.raises(ValueError, match="There is no adapter 'other'"):
        many(labels={"other": torch.zeros(2)}, **CALL)
    with pytest.raises(ValueError, match="start_positions: of several models"):
        many(**CALL, start_positions=torch.zeros(2))
    with pytest.raises(ValueError, match="output_hidden_states: of several models"):
        many(**CALL, output_hidden_states=True)
    with pytest.raises(ValueError, match="Two adapters are named 'intent'"):
        ManyAdapters(*models, member(base, "sequence", "intent", fusion="dwatt"))
    with pytest.raises(ValueError, match=r"holds LoRA, which changes the blocks"):
        ManyAdapters(member(base, "token", "lora", fusion="dwatt", r=4, target_modules=["query"]))
    with pytest.raises(ValueError, match="attached to another backbone than the others: other weights"):
        ManyAdapters(models[0], member(tiny(head="sequence", seed=1).base_model, "token", "far", fusion="dwatt"))
    with pytest.raises(ValueError, match=r"width 16, and the others' has 4 of width 32"):
        ManyAdapters(models[0], member(tiny(head="sequence", width=16).base_model, "token", "narrow", fusion="dwatt"))
    with pytest.raises(ValueError, match=r"trains modules before or in the blocks"):
        ManyAdapters(models[0], attached(fusion="dwatt", modules_to_save=["word_embeddings"]))
    with pytest.raises(ValueError, match="got no model"):
        ManyAdapters()
    with pytest.raises(ValueError, match="has no fusion adapter"):
        ManyAdapters(tiny())
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        ManyAdapters(attach("t5"))
    with pytest.raises(ValueError, match="came with models of their own"):
        many.add("more", tmp_path)
    member(base, "token", "lora", fusion="dwatt", r=4, target_modules=["query"]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds LoRA \(r=4\)"):
        ManyAdapters.from_pretrained(base, {"lora": tmp_path / "lora"})
    assert torch.equal(many(**CALL)["intent"].logits, alone(models[1])), "nothing of it has changed anything"


@pytest.mark.parametrize("bits", [8, 4])
def test_quantised_backbones(family, bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    tiny(family, "sequence", width=64).save_pretrained(tmp_path / "base")
    load = {"quantization_config": quantization_config(bits), "device_map": {"": "cpu"}, "dtype": torch.float32}
    for name, head, method in (("a", "token", "dwatt"), ("b", "sequence", "concat")):
        model = CLASSES[head].from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True, **load)
        torch.manual_seed(ord(name))
        model = get_peft_model(model, FusionConfig(fusion=method, task_type=TASKS[head]), adapter_name=name)
        disturb(model, 0.3).save_pretrained(tmp_path)
    base = CLASSES["sequence"].from_pretrained(tmp_path / "base", **load)
    many = ManyAdapters.from_pretrained(base, {name: tmp_path / name for name in ("a", "b")})
    found = many(**CALL)
    for name, head in (("a", "token"), ("b", "sequence")):
        model = CLASSES[head].from_pretrained(tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True, **load)
        own = PeftModel.from_pretrained(model, tmp_path / name, adapter_name=name).eval()
        assert torch.equal(found[name].logits, alone(own))
