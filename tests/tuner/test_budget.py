"""Counts without weights equal those of built adapters; the solver takes the largest width that fits."""

import json
import warnings

import pytest
import torch
from families import FAMILIES, attach, first_head
from peft import LoraConfig, PeftModel, get_peft_model
from support import METHODS
from transformers import AlbertConfig, BertConfig, LlamaConfig, LlamaModel, MixtralConfig

from fusion_adapters import FusionConfig
from fusion_adapters.cli import main
from fusion_adapters.fusions import Budget, Fusion
from fusion_adapters.tuner.budget import fit_budget, resolve_budget
from fusion_adapters.tuner.costs import compare_budgets, count_config
from fusion_adapters.tuner.counts import count_trainable, skeleton
from fusion_adapters.tuner.sizes import read_count

LLAMA_70B = {"hidden_size": 8192, "num_hidden_layers": 80, "intermediate_size": 28672, "num_attention_heads": 64}
SMALL = LlamaConfig(hidden_size=64, num_hidden_layers=4, num_attention_heads=4, intermediate_size=128, vocab_size=100)


def config_of(family, lora, **fields):
    spec = FAMILIES[family]
    more = {"r": 4, "target_modules": spec.lora} if lora else {}
    return FusionConfig(**spec.fields(first_head(family), **more, **fields))


# every method in each family, with LoRA and without in turn
COUNTED = [
    (family, method, (i + j) % 2 == 1)
    for i, family in enumerate(("bert", "gpt2", "t5-both", "albert", "mamba"))
    for j, method in enumerate(METHODS)
]


@pytest.mark.parametrize(("family", "method", "lora"), COUNTED)
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
    assert count_config(FusionConfig(fusion="concat", fusion_budget="none"), model)["fusion"] == 7_078_656
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


def test_copies_of_the_last_block_are_fitted_by_their_number():
    model, config = LlamaModel(SMALL), FusionConfig(fusion="deeper", fusion_copy_last=True)
    one = count_config(config, model)["fusion"]
    fitted = fit_budget(config, model, 3 * one - 1)
    assert fitted.fusion_num_blocks == 2 and count_config(fitted, model)["fusion"] == 2 * one
    with pytest.raises(ValueError, match=rf"one copy of the backbone's last block trains {one:,}"):
        fit_budget(config, model, one - 1)
    attached = get_peft_model(model, FusionConfig(fusion="deeper", fusion_copy_last=True, fusion_budget=2 * one))
    assert count_trainable(attached)["fusion"] == 2 * one


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
        (["--parameters", "1M", "--lora", "q_proj,value"], "no module 'value' for LoRA. Its linear maps are: down_proj,"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["budget", "--model", str(tmp_path), *arguments])
        assert stop.value.code == 2
        assert message in " ".join(capsys.readouterr().err.split())


def test_the_shell_takes_lists_with_blanks(tmp_path, capsys):
    SMALL.save_pretrained(tmp_path)
    arguments = ["budget", "--model", str(tmp_path), "--parameters", "50k", "--json"]
    main([*arguments, "--methods", "concat, mlp", "--lora", "q_proj, v_proj"])
    loose = capsys.readouterr().out
    main([*arguments, "--methods", "concat,mlp", "--lora", "q_proj,v_proj"])
    assert loose == capsys.readouterr().out and json.loads(loose)[2]["choice"]["r"] == 50_000 // (4 * 2 * 128)


def test_added_flops_are_a_share_of_the_weights_that_a_token_meets():
    def percent(config):
        (row,) = compare_budgets(skeleton(config), ["concat"], 20_000, [])
        return row["flops_percent"] / row["parameters"]

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "vocab_size": 100}
    # one block run twelve times costs what twelve blocks cost
    shared = percent(AlbertConfig(**sizes, num_hidden_layers=12, embedding_size=64))
    assert shared == pytest.approx(percent(BertConfig(**sizes, num_hidden_layers=12)), rel=0.02)
    # two of four experts run, or two of eight
    four, eight = (
        percent(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=n, num_experts_per_tok=2)) for n in (4, 8)
    )
    assert four == pytest.approx(eight, rel=0.01)


def test_numbers_as_people_write_them():
    assert [read_count(t) for t in ("1000000", "1M", "2.5m", "50k", "1_000", "1,000")] == [
        10**6,
        10**6,
        2_500_000,
        50_000,
        1000,
        1000,
    ]
    for text in ("2,5M", "1,0000", "1.2.3M"):  # a decimal comma is not a thousand
        with pytest.raises(ValueError, match="is not a number of parameters"):
            read_count(text)


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


def test_a_large_fusion_that_nobody_chose_is_told():
    sizes = {"hidden_size": 2048, "num_hidden_layers": 13, "num_attention_heads": 2, "head_dim": 8, "intermediate_size": 8}
    model = LlamaModel(LlamaConfig(**sizes, vocab_size=50))
    with pytest.warns(
        UserWarning, match=r"'concat' in its published form trains 54,528,000 parameters.*0\.2 GiB.*fusion_budget"
    ):
        get_peft_model(model, FusionConfig.paper("concat")).unload()
    for chosen in (
        {},
        {"fusion_budget": "none"},
        {"fusion_budget": "60M"},
        {"fusion_bottleneck": 2048},
        {"fusion_layers": [-1]},
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            get_peft_model(model, FusionConfig(fusion="concat", **chosen)).unload()


def test_a_budget_named_after_lora_keeps_to_the_named_blocks():
    model = LlamaModel(SMALL)
    model.others = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(4))  # as many as there are blocks
    with pytest.raises(ValueError, match="2 were found"):
        get_peft_model(model, FusionConfig(fusion="concat", fusion_budget=10_000))
    config = FusionConfig(fusion="concat", fusion_budget="lora:r=16", target_modules=["q_proj"], r=1, fusion_blocks="layers")
    assert resolve_budget(config, model) == 4 * 16 * (64 + 64)


def test_a_budget_that_cannot_be_is_refused_early():
    for budget in ("lots", "lora:r=0", 0, "dwatt_paper", "2,5M", 0.5, 1e6 + 0.5, float("nan"), float("inf"), True, [1000]):
        with pytest.raises(ValueError, match="fusion_budget="):
            FusionConfig(fusion_budget=budget)
    assert FusionConfig(fusion_budget=1e6).fusion_budget == 10**6  # as YAML reads 1e6
    with pytest.raises(ValueError, match=r"fusion_layers=3 is no choice of layers"):
        FusionConfig(fusion_layers=3)
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


def test_a_width_of_any_name_is_solved():
    class Narrow(Fusion):
        widths = ("inner_rank",)

    def fitted(parameters, count):
        return Narrow.fit_widths(Budget("narrow", parameters, 8, {}, count))

    assert fitted(100, lambda inner_rank: 2 + 7 * inner_rank) == {"inner_rank": 14}
    assert fitted(100, lambda inner_rank: 7 * (inner_rank // 4)) == {"inner_rank": 56}  # rounded down by the method
    with pytest.raises(ValueError, match=r"'narrow' with an inner_rank of 1 trains 101\."):
        fitted(100, lambda inner_rank: 100 + inner_rank)
    with pytest.raises(ValueError, match="'narrow' trains 3 parameters whatever its fusion_inner_rank"):
        fitted(100, lambda inner_rank: 3)


@pytest.mark.parametrize("fields", [{}, {"fusion": "last"}, {"bias": "lora_only"}, {"fusion_depth": 2}], ids=str)
@pytest.mark.parametrize("budget", [60_000, "lora:r=16"])
@pytest.mark.parametrize(
    ("family", "head"),
    [("bert", "token"), ("bert", "qa"), ("bert", "sequence"), ("llama", "token"), ("gpt2", "token"), ("vit", "image")],
)
def test_all_linear_leaves_out_the_head(family, head, budget, fields):
    spec = FAMILIES[family]
    fields = spec.fields(head, target_modules="all-linear", r=2, **fields)
    limit = resolve_budget(FusionConfig(**fields, fusion_budget=budget), spec.build(head))
    if budget == "lora:r=16":  # what that LoRA trains beside a head
        plain = {**fields, "fusion": "last", "r": 16, "bias": "none"}
        assert limit == count_trainable(attach(family, head, **plain))["lora"]
    model = attach(family, head, **fields, fusion_budget=budget)
    assert not any("lora_" in name for name, _ in model.named_parameters() if name.split(".")[2] in ("classifier", "score"))
    counts, config = count_trainable(model), model.peft_config["default"]
    free = {"r": config.r + 1} if config.fusion == "last" else {"fusion_bottleneck": config.fusion_bottleneck + 1}
    wider = count_trainable(attach(family, head, **{**fields, **free}))
    fitted, next_one = (c["fusion"] + c["lora"] + c["other"] for c in (counts, wider))
    assert fitted <= limit < next_one
    assert count_config(FusionConfig(**fields, fusion_budget=budget), spec.build(head)) == counts
