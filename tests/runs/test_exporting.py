"""Programs of fusion and head: the model's answers from states of a bare backbone, in a process with torch alone."""

import itertools
import json
import re
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch
from families import FAMILIES, GRID, VOCABULARY, attach
from support import METHODS, attached, disturb, layer_of, tiny
from support_export import call_elsewhere, calls_of, texts
from support_text import save_decoder, write_recipe
from transformers import LlamaForTokenClassification

from fusion_adapters import FUSIONS, export_model, load_run, quantization_config
from fusion_adapters.cli import main
from fusion_adapters.states import cache_layer_states

PADDED = [*texts(VOCABULARY), *texts(VOCABULARY, padding="left")]


def export(folder, family, head, fields, **settings):
    """A changed adapter, the bare model, and the note of the program that was exported."""
    bare = FAMILIES[family].build(head, **settings)
    model = disturb(attach(family, head, model=FAMILIES[family].build(head, **settings), **fields), scale=0.3).eval()
    return model, bare, export_model(model, folder)


def check_methods(cases, folder):
    found = []
    for family, head, name, fields in cases:
        model, bare, note = export(folder / f"{family}.{name}", family, head, fields, num_hidden_layers=3)
        wanted = ["states", "attention_mask"] if FUSIONS[fields["fusion"]].mixes_positions else ["states"]
        assert list(note["inputs"]) == wanted, name
        found.append((folder / f"{family}.{name}" / "program.pt2", calls_of(model, bare, note, PADDED)))
    call_elsewhere(found, folder)


def test_every_method(tmp_path):
    families = itertools.cycle(("llama", "bert"))
    check_methods([(next(families), "token", name, {"fusion": name}) for name in FUSIONS], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_every_method_and_option(family, tmp_path):
    check_methods([(family, "token", name, fields) for name, fields in METHODS.items()], tmp_path)


# What lies between the fused state and the answer: pooler, norm, the choice of a position, the vocabulary. With them the inputs that
# are wanted beside the states, and the layers.
MASK, IDS, ALL = "attention_mask", "input_ids", [1, 2, 3, 4]
HEADS = {
    "trained-pooler": ("bert", "sequence", {"modules_to_save": ["pooler"], "fusion": "last"}, [], [4]),
    "last-token": ("llama", "sequence", {"fusion": "concat"}, [IDS], ALL),
    "mean": ("llama", "sequence", {"fusion": "concat", "fusion_pool": "mean"}, [MASK, IDS], ALL),
    "lower": ("llama", "token", {"fusion": "concat", "fusion_depth": 2, "fusion_layers": [0, 1]}, [], [0, 1, 2]),
    "causal": ("llama", "causal", {"fusion": "scalar_mix"}, [], ALL),
}
MORE_HEADS = {
    "mean-deeper": ("llama", "sequence", {"fusion_pool": "mean", "fusion": "deeper"}, [MASK, IDS], [4]),
    "mean-encoder": ("bert", "sequence", {"fusion_pool": "mean", "fusion": "concat"}, [MASK], ALL),
    "lower-repeated": ("albert", "sequence", {"fusion_depth": 2}, [], [1, 2]),
    "some-layers": ("gpt2", "sequence", {"fusion_layers": "every:2"}, [IDS], [2, 4]),
    "masked": ("bert", "masked", {}, [], ALL),
    "dense-head": ("roberta", "sequence", {}, [], ALL),
}


@pytest.mark.parametrize("heads", [HEADS, pytest.param(MORE_HEADS, marks=pytest.mark.slow)], ids=["some", "more"])
def test_heads_pools_and_depths(heads, tmp_path):
    cases = []
    for name, (family, head, fields, beside, layers) in heads.items():
        model, bare, note = export(tmp_path / name, family, head, fields)
        assert (list(note["inputs"])[1:], note["layers"]) == (beside, layers), name
        cases.append((tmp_path / name / "program.pt2", calls_of(model, bare, note, PADDED)))
    call_elsewhere(cases, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "head"), [(f, h) for f, h in GRID if h in ("token", "sequence", "masked", "causal")])
def test_every_family_of_one_stack(family, head, tmp_path):
    if FAMILIES[family].build(head).config.is_encoder_decoder:
        with pytest.raises(ValueError, match="is an encoder-decoder"):
            export(tmp_path / "out", family, head, {})
        return
    model, bare, note = export(tmp_path / "out", family, head, {"fusion": "concat"})
    assert head != "token" or list(note["inputs"]) == ["states"]
    batches = [b for b in PADDED if b["input_ids"].shape != (1, 1)]
    call_elsewhere([(tmp_path / "out" / "program.pt2", calls_of(model, bare, note, batches))], tmp_path)


def test_nothing_of_the_backbone_and_no_path_is_in_the_file(tmp_path):
    model, _, note = export(tmp_path / "out", "llama", "sequence", {"fusion": "concat"})
    program = torch.export.load(tmp_path / "out" / "program.pt2")
    expected = sum(p.numel() for p in model.parameters() if p.requires_grad) + 32  # the final norm
    assert sum(t.numel() for t in program.state_dict.values()) == expected and not program.constants
    assert note["bytes"] == (tmp_path / "out" / "program.pt2").stat().st_size < 4 * expected + 200_000
    with zipfile.ZipFile(tmp_path / "out" / "program.pt2") as archive:
        for name in archive.namelist():
            assert b"site-packages" not in archive.read(name) and b"fusion_adapters" not in archive.read(name), name


def test_states_of_any_float_and_what_is_no_such_states(tmp_path):
    model, bare, note = export(tmp_path / "out", "bert", "token", {"fusion": "scalar_mix"})
    program = torch.export.load(tmp_path / "out" / "program.pt2").module()
    ((inputs, expected),) = calls_of(model, bare, note, texts(VOCABULARY, [(2, 11)]))
    for dtype, near in ((torch.float64, 1e-6), (torch.float16, 1e-2), (torch.bfloat16, 5e-2)):
        found = program(states=inputs["states"].to(dtype))
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=near, atol=near)
    for wrong in (inputs["states"][1:], inputs["states"][..., 1:]):
        with pytest.raises((AssertionError, RuntimeError)):
            program(states=wrong)


def test_a_16_bit_backbone(tmp_path):
    bare = FAMILIES["llama"].build("sequence").bfloat16()
    model = disturb(attach("llama", "sequence", model=bare, fusion="concat"), scale=0.3).eval()
    note = export_model(model, tmp_path / "out")
    assert note["inputs"]["states"]["dtype"] == "bfloat16"
    assert note["compared"]["largest_difference"] < 3e-2


@pytest.mark.parametrize("bits", [8, 4])
def test_a_quantised_backbone(bits, tmp_path):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed (extra: quantised)")
    tiny("llama", "token", width=64).save_pretrained(tmp_path / "base")
    options = {"quantization_config": quantization_config(bits), "dtype": torch.float32, "device_map": {"": "cpu"}}
    loaded = LlamaForTokenClassification.from_pretrained(tmp_path / "base", **options)
    note = export_model(disturb(attached("llama", model=loaded, fusion="concat")), tmp_path / "out")
    assert note["layers"] == [1, 2, 3, 4] and note["compared"]["largest_difference"] < 1e-5
    assert note["bytes"] < (tmp_path / "base" / "model.safetensors").stat().st_size


def test_the_model_is_left_as_it_was(tmp_path):
    model = disturb(attach("llama", "token", fusion="concat")).eval()
    (batch,) = texts(VOCABULARY, [(2, 11)])
    before = model(**batch, output_hidden_states=True).logits  # transformers' own hooks come with the first such call
    names, hooks = [n for n, _ in model.named_parameters()], [len(m._forward_hooks) for m in model.modules()]
    export_model(model, tmp_path / "out")
    assert names == [n for n, _ in model.named_parameters()]
    assert hooks == [len(m._forward_hooks) for m in model.modules()]
    assert torch.equal(model(**batch).logits, before) and layer_of(model).taps.open_calls == 0


def test_what_has_no_such_program_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"works inside the backbone too \(default: LoRA.*fusion alone"):
        export_model(attach("bert", "token", lora=True), tmp_path / "out")
    merged = attach("bert", "token", lora=True)
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"default \(merged\)"):
        export_model(merged, tmp_path / "out")
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder: .*Export a run on an encoder"):
        export_model(attach("t5", "seq2seq"), tmp_path / "out")
    with pytest.raises(ValueError, match="no logits"):
        export_model(attach("bert", "qa"), tmp_path / "out")
    model = attach("bert", "token")
    with model.disable_adapter(), pytest.raises(ValueError, match="no active fusion"):
        export_model(model, tmp_path / "out")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("kind", ["token", "sequence", "decoder"])
def test_a_run_from_the_shell(kind, tmp_path, capsys):
    head = "token" if kind == "token" else "sequence"
    recipe = write_recipe(tmp_path, head, adapter={"fusion": "concat"})
    if kind == "decoder":
        shutil.rmtree(tmp_path / "model")
        save_decoder(tmp_path / "model")
    main(["train", str(recipe), "--output", str(tmp_path / "run")])
    main(["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")])
    assert "layer states" in capsys.readouterr().out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "program.json", "program.pt2"]
    note = json.loads((tmp_path / "out" / "program.json").read_text())
    run = load_run(tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
    assert note["scores"]["labels"] == run.labels and note["backbone"]["name"] == str(tmp_path / "model")
    assert note["adapter"]["digest"] == saved["fusion_digest"]["float32"]
    assert note["backbone"]["fingerprint"] in (tmp_path / "run" / "adapter" / "README.md").read_text()

    call, states = re.findall(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), flags=re.S)
    done = subprocess.run(
        [sys.executable, "-I", "-c", call], cwd=tmp_path / "out", capture_output=True, text=True, check=True
    )
    assert set(re.findall(r"'([^']*)'", done.stdout)) <= {*run.labels}
    rows = [dict(run.tokenizer(text)) for text in ("anna lives in oslo", "the old man")]
    batch = run.tokenizer.pad(rows, return_tensors="pt")
    names = {"batch": batch}
    exec(states, names)
    program = torch.export.load(tmp_path / "out" / "program.pt2").module()
    found = program(states=names["states"], **{name: batch[name] for name in note["inputs"] if name != "states"})
    for row, alone, mask in zip(found, run.logits(rows), batch["attention_mask"], strict=True):
        torch.testing.assert_close(row[mask.bool()] if head == "token" else row, alone, rtol=1e-5, atol=1e-5)


def test_folders(tmp_path, capsys):
    main(["train", str(write_recipe(tmp_path, adapter={"fusion": "last"})), "--output", str(tmp_path / "run")])
    command = ["export", str(tmp_path / "run"), "--output", str(tmp_path / "out")]
    main([*command, "--json"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["layers"] == [4]
    for folder, more, told in (
        ("out", [], "is not empty"),
        ("run", ["--overwrite"], "another thing (a run of"),
        ("model", ["--overwrite"], "no earlier export (no program.json)"),
    ):
        with pytest.raises(SystemExit):
            main([*command[:-1], str(tmp_path / folder), *more])
        assert told in capsys.readouterr().err
    main([*command, "--overwrite"])
    with pytest.raises(SystemExit):
        main(["export", str(tmp_path / "out"), "--output", str(tmp_path / "again")])
    assert "holds no run" in capsys.readouterr().err and not (tmp_path / "again").exists()


def test_states_of_a_cache_and_means_in_their_place(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8], "attention_mask": [1] * 4, "labels": 1}]
    for name, fields in (("tokens", {}), ("means", {"fusion_pool": "mean"})):
        model, _, note = export(tmp_path / name, "llama", "sequence", {"fusion": "concat", **fields})
        cache = cache_layer_states(model, rows, tmp_path / f"{name}.cache", dtype="float32", progress=False)
        states = cache.read([0], note["layers"]).unsqueeze(1)  # (N, 1, T, d)
        assert states.shape[2] == (1 if name == "means" else 4)
        ids = torch.tensor([rows[0]["input_ids"]])
        beside = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        beside = {key: value[:, : states.shape[2]] for key, value in beside.items() if key in note["inputs"]}
        program = torch.export.load(tmp_path / name / "program.pt2").module()
        expected = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(program(states=states, **beside), expected, rtol=1e-5, atol=1e-5)
