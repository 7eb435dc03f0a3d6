"""`fusion-adapters predict` with several runs: a table, lines of JSON, a file that is whole or not there."""

import json
import sys

import pytest
from support_answering import CLASSES, LORA, TAGS, make_run, save_backbone

from fusion_adapters import load_run, predict
from fusion_adapters.cli import main
from fusion_adapters.runs import several

TEXTS = ["Anna lives in Oslo.", "Bob works at Acme"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    backbone = save_backbone(folder / "model")
    return [
        make_run(folder / "ner", backbone, "token_classification", TAGS, fusion="dwatt"),
        make_run(folder / "intent", backbone, "sequence_classification", CLASSES, fusion="concat"),
        make_run(folder / "lora", backbone, "regression", fusion="dwatt", **LORA["bert"]),
    ]


def says(capsys, folders, *arguments, texts=TEXTS):
    capsys.readouterr()
    given = [part for text in texts for part in ("--text", text)]
    main(["predict", *map(str, folders), *given, *map(str, arguments)])
    return capsys.readouterr()


def beside(folder, text):
    """What a run says alone, without the text."""
    (alone,) = predict(load_run(folder), [text])
    return {key: value for key, value in alone.items() if key != "text"}


def test_lines_of_json(folders, capsys):
    said = says(capsys, folders, "--json")
    expected = [{"text": text, "answers": {f.name: beside(f, text) for f in folders}} for text in TEXTS]
    assert [json.loads(line) for line in said.out.splitlines()] == expected
    assert "lora has LoRA in the blocks, which changes them: its passes are its own." in said.err
    assert "2/2" in said.err and "answers" in said.err, "the bar"
    assert "1/1" not in says(capsys, folders, "--json", texts=TEXTS[:1]).err


def test_a_table_for_each_text(folders, capsys):
    hostile = "anna [lives] \x1b[31m in oslo"
    said = says(capsys, folders[:2], texts=[TEXTS[0], hostile]).out
    lines = said.splitlines()
    assert lines[0].strip() == TEXTS[0] and any("anna [lives] \u241b[31m in oslo" in line for line in lines)
    assert not set(said) & set("\x1b")
    rows = [line for line in lines if "intent" in line]
    assert len(rows) == 2 and sum("ner" in line for line in lines) == 2
    label = beside(folders[1], TEXTS[0])
    assert f"{label['label']} {label['probability']:.2f}" in rows[0] and TEXTS[0] not in rows[0]
    assert rows[0].index("\u2502") == rows[1].index("\u2502"), "one width of names for all texts"


def test_a_file_of_answers(folders, capsys, tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    said = says(capsys, folders, "--output", path)
    assert said.out.strip() == str(path) and "2/2" in said.err
    assert path.read_text(encoding="utf-8") == says(capsys, folders, "--json").out
    assert sorted(p.name for p in path.parent.iterdir()) == ["answers.jsonl"]
    says(capsys, folders[:1], "--output", path)
    assert path.read_text(encoding="utf-8") == says(capsys, folders[:1], "--json").out, "of one run, its own lines"
    assert [json.loads(line)["text"] for line in path.read_text().splitlines()] == TEXTS


def test_one_run_answers_as_ever(folders, capsys):
    run = load_run(folders[0])
    said = says(capsys, folders[:1], "--json")
    assert [json.loads(line) for line in said.out.splitlines()] == predict(run, TEXTS)
    assert "answers" not in said.err
    assert says(capsys, folders[1:2]).out.splitlines()[0] == TEXTS[0]


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, ValueError])
def test_a_file_that_was_not_finished_is_not_there(stopped, folders, capsys, tmp_path, monkeypatch):
    answers = several.LoadedRuns._answers
    asked = []

    def one(self, text):
        asked.append(text)
        if len(asked) > 1:
            raise stopped("stop")
        return answers(self, text)

    monkeypatch.setattr(several.LoadedRuns, "_answers", one)
    path = tmp_path / "answers.jsonl"
    with pytest.raises(SystemExit) as stop:
        says(capsys, folders, "--output", path)
    assert stop.value.code == (130 if stopped is KeyboardInterrupt else 2)
    assert len(asked) == 2 and not list(tmp_path.iterdir())
    path.write_text("earlier")
    with pytest.raises(SystemExit):
        says(capsys, folders, "--output", path)
    assert path.read_text() == "earlier"


def test_lines_come_before_the_last_text_is_answered(folders, capsys, monkeypatch):
    answers = several.LoadedRuns._answers

    def one(self, text):
        if text == TEXTS[1]:
            raise ValueError("stop")
        return answers(self, text)

    monkeypatch.setattr(several.LoadedRuns, "_answers", one)
    with pytest.raises(SystemExit):
        says(capsys, folders[:2], "--json")
    said = capsys.readouterr()
    assert [json.loads(line)["text"] for line in said.out.splitlines()] == TEXTS[:1]
    assert "Error: stop" in said.err


def test_no_bar_among_answers_on_a_terminal(folders, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert "answers" not in says(capsys, folders[:2], "--json").err


def test_what_is_wrong_is_one_paragraph(folders, capsys, tmp_path):
    for arguments, told in (
        ((folders[0], folders[0]), "ner' is given twice. Give each run once."),
        ((folders[0], tmp_path), "holds no run: there is no run.json in it"),
        ((folders[0], folders[1], "--output", tmp_path), "is a folder. Give the name of a file, for example"),
    ):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(["predict", *map(str, arguments), "--text", "anna"])
        error = capsys.readouterr().err
        error = error[error.index("Error:") :].strip()
        assert stop.value.code == 2 and told in error and "\n" not in error
