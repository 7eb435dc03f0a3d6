"""LoRA whose modules lie above `fusion_depth`, in blocks that do not run: refused, or told of."""

import warnings

import pytest
import torch
from peft import PeftModel
from support import attached, disturb, logits, tiny

from fusion_adapters import FusionConfig, cut_model
from fusion_adapters.tuner import fusion_layers
from fusion_adapters.tuner.costs import count_config

QUERY = {"r": 4, "target_modules": ["query"]}
ABOVE = "layer.3.attention.self.query"


def told(model):
    """The numbers of the blocks, from 0, that have LoRA."""
    return sorted({int(name.split(".layer.")[1].split(".")[0]) for name, _ in model.named_parameters() if "lora_A" in name})


@pytest.mark.parametrize(
    ("fields", "asked", "least"),
    [
        ({**QUERY, "layers_to_transform": [2, 3]}, r"\['query'\], layers_to_transform=\[2, 3\], .* and 1 more\.", 3),
        ({**QUERY, "layers_to_transform": 3, "layers_pattern": "layer"}, r"\['query'\], layers_to_transform=3, ", 4),
        ({"r": 4, "target_modules": r".*layer\.3\..*(query|value)"}, r"layer.*3.*, which means .* and 1 more\.", 4),
        ({"r": 4, "target_modules": [ABOVE, "classifier"]}, rf"\['classifier', '{ABOVE}'\]", 4),
        ({"layers_to_transform": [3]}, r"\['query', 'value'\], layers_to_transform=\[3\]", 4),
        ({**QUERY, "exclude_modules": r".*layer\.[012].*"}, r"\['query'\], which means .bert.encoder.layer.3", 4),
        ({**QUERY, "layers_to_transform": [3], "fusion_budget": 90_000}, r"layers_to_transform=\[3\]", 4),
        ({**QUERY, "layers_to_transform": [3], "fusion": "last", "fusion_budget": 90_000}, r"layers_to_transform=\[3\]", 4),
        ({"target_modules": [ABOVE], "fusion_budget": "lora:r=500"}, ABOVE, 4),
        ({**QUERY, "layers_to_transform": [3], "modules_to_save": ["pooler"]}, r"layers_to_transform=\[3\]", 4),
    ],
)
def test_all_of_it_above_is_refused(fields, asked, least):
    model = tiny()
    with pytest.raises(ValueError, match=rf"blocks 3 to 4, which do not run: .*{asked}") as error:
        attached(model=model, fusion_depth=2, **fields)
    said = str(error.value)
    assert "fusion_depth=2: all modules" in said and f"a fusion_depth of {least} or more" in said and "\n" not in said
    assert torch.equal(logits(model), logits(tiny())) and not fusion_layers(model) and not told(model)
    with pytest.raises(ValueError, match="which do not run"):
        count_config(FusionConfig(task_type="TOKEN_CLS", fusion_depth=2, **fields), tiny())
    attached(model=model, fusion_depth=least, **fields)
    assert told(model) and max(told(model)) == least - 1


@pytest.mark.parametrize("fields", [{"target_modules": ["nothing"]}, {**QUERY, "layers_to_transform": [9]}])
def test_what_is_nowhere_has_the_message_of_peft(fields):
    with pytest.raises(ValueError, match="No modules were targeted"):
        attached(fusion_depth=2, **fields)


@pytest.mark.parametrize(
    ("fields", "out"),
    [
        ({**QUERY, "layers_to_transform": [1, 2, 3]}, r"\[2, 3\] of layers_to_transform"),
        ({"target_modules": ["layer.1.attention.self.query", ABOVE]}, rf"\['{ABOVE}'\] of target_modules"),
    ],
)
def test_some_of_it_above_is_told(fields, out, tmp_path):
    with pytest.warns(UserWarning, match=f"LoRA does not go into {out}: blocks above fusion_depth=2 do not run"):
        model = disturb(attached(fusion_depth=2, **fields))
    assert told(model) == [1]
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA does not go into")
        for base in (tiny(), cut_model(tiny(), 2)):
            torch.testing.assert_close(logits(PeftModel.from_pretrained(base, tmp_path)), logits(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "fields",
    [QUERY, {"r": 4}, {"target_modules": "all-linear"}, {"target_modules": r".*\.(query|value)"}, {**QUERY, "layers_to_transform": [0]},
     {**QUERY, "fusion_depth": 4, "layers_to_transform": [3]}],
)  # fmt: skip
def test_names_of_modules_in_every_block_are_no_matter(fields):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="LoRA does not go into")
        model = attached(**{"fusion_depth": 2, **fields})
    assert told(model)
