"""Counts without weights equal those of built adapters; the solver takes the largest width that fits."""

import json

import pytest
from families import FAMILIES, attach, first_head
from peft import LoraConfig, PeftModel, get_peft_model
from support import METHODS
from transformers import LlamaConfig, LlamaModel

from fusion_adapters import FusionConfig
from fusion_adapters.budget import count_config, count_trainable, fit_budget, skeleton
from fusion_adapters.cli import main
from fusion_adapters.counts import read_count

LLAMA_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64}
SMALL = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, vocab_size=100)


def config_of(family, lora, **fields):
    spec = FAMILIES[family]
    more = {"r": 4, "target_modules": spec.lora} if lora else {}
    return FusionConfig(**spec.fields(first_head(family), **more, **fields))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("lora", [False, True], ids=["alone", "lora"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5-both", "albert", "mamba"])
def test_counts_equal_those_of_the_built_adapter(family, method, lora):
    built = count_trainable(attach(family, lora=lora, **METHODS[method]))
    model = FAMILIES[family].build(first_head(family))
    config = config_of(family, lora, **METHODS[method])
    assert count_config(config, model) == built
    assert config.fusion_num_layers is None, "the config was changed"
    assert count_trainable(model)["fusion"] == 0


def test_closed_formulas_at_the_published_size():
    model = skeleton(LlamaConfig(hidden_size=768, num_hidden_layers=12, num_attention_heads=12))
    assert count_config(FusionConfig.paper("dwatt"), model)["fusion"] == 7_729_824
    assert count_config(FusionConfig(fusion="concat"), model)["fusion"] == 7_078_656
    assert count_config(FusionConfig(fusion="deeper"), model)["fusion"] == 7_087_872
    lora = FusionConfig(fusion="last", r=16, target_modules=["q_proj", "v_proj"])
    assert count_config(lora, model)["total"] == 12 * 2 * 16 * (768 + 768)


@pytest.mark.parametrize("method", ["dwatt", "concat", "mlp", "deeper"])
@pytest.mark.parametrize("budget", [30_000, 100_000, 1_000_000])
@pytest.mark.parametrize("lora", [False, True])
def test_the_largest_width_within_the_budget_is_taken(method, budget, lora):
    model = LlamaModel(SMALL)
    fields = {"r": 2, "target_modules": ["q_proj"]} if lora else {}
    fitted = fit_budget(FusionConfig(fusion=method, **fields), model, budget)
    total = count_config(fitted, model)["total"]
    assert total <= budget
    name = "fusion_feedforward" if method == "deeper" else "fusion_bottleneck"
    wider = FusionConfig(**{**fitted.to_dict(), "peft_type": None, name: getattr(fitted, name) + 1})
    more = count_config(wider, model)["total"]
    assert more > budget or getattr(fitted, name) == 4 * 64
    assert budget - total < 0.02 * budget or method == "deeper"


def test_lora_alone_gets_the_largest_rank():
    model = LlamaModel(SMALL)
    config = FusionConfig(fusion="last", r=8, target_modules=["q_proj", "v_proj"])
    fitted = fit_budget(config, model, 10_000)
    per_rank = count_config(FusionConfig(fusion="last", r=1, target_modules=["q_proj", "v_proj"]), model)["lora"]
    assert fitted.r == 10_000 // per_rank and count_config(fitted, model)["total"] <= 10_000
    assert config.r == 8


@pytest.mark.parametrize(
    "options", [{}, {"use_dora": True}, {"lora_bias": True}, {"rank_pattern": {"layers.0.*q_proj": 3}}, {"bias": "all"}]
)
def test_the_rank_is_the_largest_with_every_option_of_lora(options):
    model, budget = LlamaModel(SMALL), 20_000

    def trained(rank):
        counts = count_config(FusionConfig(fusion="last", r=rank, target_modules=["q_proj", "v_proj"], **options), model)
        return counts["lora"] + counts["other"]

    config = FusionConfig(fusion="last", r=2, target_modules=["q_proj", "v_proj"], **options)
    rank = fit_budget(config, model, budget).r
    assert trained(rank) <= budget < trained(rank + 1)


def test_a_rank_that_a_pattern_sets_cannot_be_chosen():
    config = FusionConfig(fusion="last", target_modules=["q_proj"], rank_pattern={"q_proj": 3})
    with pytest.raises(ValueError, match=r"rank_pattern sets the rank of every module \(1,536 parameters\)"):
        fit_budget(config, LlamaModel(SMALL), 20_000)


def test_biases_that_lora_trains_count():
    model = FAMILIES["bert"].build(first_head("bert"))
    config = config_of("bert", True, fusion="dwatt", bias="all")
    counts = count_config(fit_budget(config, model, 20_000), model)
    assert counts["other"] > 0 and 19_000 < counts["total"] - counts["head"] <= 20_000


def test_a_width_is_the_one_that_is_built():
    fitted = fit_budget(FusionConfig(fusion="dwconcat"), LlamaModel(SMALL), 30_000)
    assert fitted.fusion_bottleneck % 4 == 0  # heads


def test_a_budget_that_is_too_small_names_the_smallest():
    model = LlamaModel(SMALL)
    for method in ("dwatt", "concat", "mlp", "deeper"):
        smallest = {"fusion_bottleneck": 1} if method != "deeper" else {"fusion_feedforward": 1}
        count = count_config(FusionConfig(fusion=method, **smallest), model)["fusion"]
        fit_budget(FusionConfig(fusion=method), model, count)
        with pytest.raises(ValueError, match=rf"budget of {count - 1:,} parameters is too small.*trains {count:,}"):
            fit_budget(FusionConfig(fusion=method), model, count - 1)
    assert fit_budget(FusionConfig(fusion="scalar_mix"), model, 5).fusion == "scalar_mix"
    with pytest.raises(ValueError, match=r"'scalar_mix', which has no width to choose"):
        fit_budget(FusionConfig(fusion="scalar_mix"), model, 2)


def test_the_shell_fits_a_70b_model_from_its_configuration(tmp_path, capsys):
    LlamaConfig(**LLAMA_70B, num_key_value_heads=8, vocab_size=128256).save_pretrained(tmp_path)
    main(["budget", "--model", str(tmp_path), "--parameters", "500M", "--lora", "q_proj,v_proj", "--json"])
    rows = {row["method"]: row for row in json.loads(capsys.readouterr().out)}
    assert set(rows) == {"dwatt", "concat", "deeper", "mlp", "lora"}
    for row in rows.values():
        assert 0 < row["parameters"] <= 500_000_000 and row["bytes"] == 4 * row["parameters"]
        assert 0 < row["flops_percent"] < 1
        assert row["parameters"] > 0.95 * 500_000_000
    assert rows["lora"]["parameters"] == rows["lora"]["choice"]["r"] * 80 * (2 * 8192 + 8192 + 1024)
    main(["budget", "--model", str(tmp_path), "--parameters", "200M"])
    shown = capsys.readouterr().out
    assert "bottleneck" in shown and "268,525,569" in shown  # one block of deeper is larger


def test_the_shell_says_what_is_wrong(tmp_path, capsys):
    LlamaConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4).save_pretrained(tmp_path)
    for arguments, message in (
        (["--parameters", "many"], "'many' is not a number of parameters"),
        (["--parameters", "1M", "--methods", "dwat"], "Did you mean 'dwatt'"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["budget", "--model", str(tmp_path), *arguments])
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_numbers_as_people_write_them():
    assert [read_count(t) for t in ("1000000", "1M", "2.5m", "50k", "1_000", "1,000")] == [
        10**6,
        10**6,
        2_500_000,
        50_000,
        1000,
        1000,
    ]


@pytest.mark.parametrize("method", ["dwatt", "concat", "mlp", "deeper"])
def test_a_budget_in_the_config_sets_the_width_when_attached(method, tmp_path):
    model = get_peft_model(LlamaModel(SMALL), FusionConfig(fusion=method, fusion_budget="100k"))
    config = model.active_peft_config
    assert 90_000 < count_trainable(model)["fusion"] <= 100_000
    assert config.fusion_budget is None  # the width says it now, also in the saved config
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(model.unload(), str(tmp_path), is_trainable=True)
    assert count_trainable(loaded)["fusion"] == count_config(config, LlamaModel(SMALL))["fusion"]


def test_budgets_named_after_other_methods():
    paper = count_config(FusionConfig.paper("dwatt"), LlamaModel(SMALL))["fusion"]
    for method in ("concat", "dwatt"):
        model = get_peft_model(LlamaModel(SMALL), FusionConfig(fusion=method, fusion_budget="dwatt-paper"))
        assert 0.98 * paper < count_trainable(model)["fusion"] <= paper
    lora = count_trainable(get_peft_model(LlamaModel(SMALL), LoraConfig(r=16)))["lora"]  # peft's usual modules
    model = get_peft_model(LlamaModel(SMALL), FusionConfig(fusion="concat", fusion_budget="lora:r=16"))
    assert 0.95 * lora < count_trainable(model)["fusion"] <= lora
    config = FusionConfig(fusion="concat", fusion_budget="lora:r=32", r=4, target_modules=["q_proj"])
    counts = count_trainable(get_peft_model(LlamaModel(SMALL), config))
    assert counts["lora"] == 4 * 4 * (64 + 64)  # LoRA keeps its rank, the fusion takes the rest
    assert 0.95 < counts["total"] / (4 * 32 * (64 + 64)) <= 1


def test_a_budget_that_cannot_be_is_refused_early():
    for budget in ("lots", "lora:r=0", 0, "dwatt_paper"):
        with pytest.raises(ValueError, match="fusion_budget="):
            FusionConfig(fusion_budget=budget)
    with pytest.raises(ValueError, match=r"fusion_budget='1M' chooses the width.*fusion_bottleneck set it too"):
        FusionConfig(fusion_budget="1M", fusion_bottleneck=8)
    model = LlamaModel(SMALL)
    with pytest.raises(ValueError, match="too small"):
        get_peft_model(model, FusionConfig(fusion_budget=100))
    assert not hasattr(model, "layer_fusion")
    unknown = LlamaModel(LlamaConfig(**SMALL.to_dict()))
    unknown.config.model_type = "newcomer"
    with pytest.raises(ValueError, match="no usual modules for LoRA in a 'newcomer'"):
        get_peft_model(unknown, FusionConfig(fusion_budget="lora:r=16"))
