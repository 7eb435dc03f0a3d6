"""Tables, CoNLL and JSON files as people have them: read right, or refused with what to do."""

import json
import warnings

import pytest
from datasets import Dataset

from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits, read_file

TOKENS, TEXTS, NUMBERS = (TASKS[name] for name in ("token_classification", "sequence_classification", "regression"))


def read(folder, content, name="train.tsv", task=TEXTS, **fields):
    """The words and labels of each example of a file."""
    (folder / name).write_text(content, encoding="utf-8")
    recipe = DataRecipe(path=str(folder), train=name, **fields)
    task.check_data(recipe)
    return [(e.words, e.labels) for e in task.examples(read_file(folder / name, recipe, task), recipe)]


def texts(folder, content, name="train.tsv", **fields):
    return [(words[0], labels[0]) for words, labels in read(folder, content, name, **fields)]


def splits(folder, content, name="train.csv", task=TEXTS, **fields):
    (folder / name).write_text(content, encoding="utf-8")
    return load_splits(DataRecipe(path=str(folder), train=name, **fields), task, 1)


# tables

MARKS = 'sentence\tlabel\n"a fine film\t1\nso-called art\t0\nit is 15"\t0\n"Great" , he said .\t1\n'


def test_marks_in_a_tsv_are_text(tmp_path):
    found = [('"a fine film', "1"), ("so-called art", "0"), ('it is 15"', "0"), ('"Great" , he said .', "1")]
    assert texts(tmp_path, MARKS) == found
    assert texts(tmp_path, MARKS.replace("\t", "|"), "train.csv", quoting=False, delimiter="|") == found


@pytest.mark.parametrize(
    "content",
    [
        '"text"\t"label"\n"a"\t"x"\n"b"\t"y"\n',
        'text\tlabel\n"he said ""a"""\tx\nb\ty\n',
    ],
)
def test_a_tsv_that_a_program_quoted_asks(content, tmp_path):
    with pytest.raises(ValueError, match=r"between quotation marks.*data\.quoting: true"):
        texts(tmp_path, content)
    assert texts(tmp_path, content, quoting=True)[1] == ("b", "y")
    if content.startswith("text"):
        assert texts(tmp_path, content, quoting=False)[0][0] == '"he said ""a"""'


def test_a_row_that_marks_cut_in_two_names_the_setting(tmp_path):
    with pytest.raises(ValueError, match=r"row 1 has 1 fields, but the header has 2.*set data\.quoting: true"):
        texts(tmp_path, 'text\tlabel\n"two\nlines"\tx\n')
    assert texts(tmp_path, 'text\tlabel\n"two\nlines"\tx\n', quoting=True) == [("two\nlines", "x")]
    with pytest.raises(ValueError, match=r"not valid CSV.*set data\.quoting: false"):
        texts(tmp_path, 'text,label\n"Great" she said,x\n', "train.csv")


def test_other_delimiters(tmp_path):
    with pytest.raises(ValueError, match=r"one column, 'text;label'.*separated by ';' in this file, set data\.delimiter"):
        texts(tmp_path, "text;label\na, b;x\n", "train.csv")
    assert texts(tmp_path, "text;label\na, b;x\n", "train.csv", delimiter=";") == [("a, b", "x")]
    assert texts(tmp_path, "text\tlabel\na\tx\n", "train.csv", delimiter="\\t") == [("a", "x")]
    for wrong in (";;", '"', ""):
        with pytest.raises(ValueError, match="one character"):
            DataRecipe(path="x", delimiter=wrong)


@pytest.mark.parametrize("name", ["train.tsv", "train.csv"])
def test_a_field_of_any_length_and_a_delimiter_at_the_end_of_the_line(name, tmp_path):
    sign = "\t" if name.endswith("tsv") else ","
    long = "word " * 30_000
    content = f"text\tlabel\n{long}\tx\t\nb\ty\t\t\n\nc\tz\n".replace("\t", sign)
    assert texts(tmp_path, content, name) == [(long, "x"), ("b", "y"), ("c", "z")]
    assert texts(tmp_path, "text\tlabel\t\nb\ty\t\nc\tz\n".replace("\t", sign), name) == [("b", "y"), ("c", "z")]
    with pytest.raises(ValueError, match="row 1 has 3 fields"):
        texts(tmp_path, "text\tlabel\nb\ty\tz\n".replace("\t", sign), name)


def test_labels_that_look_alike_are_refused_with_their_numbers(tmp_path):
    content = "text,label\na,yes\nb,yes \nc,no\nd,No\ne,no\n"
    with pytest.raises(ValueError, match=r"'yes' \(1 times\) and 'yes ' \(1 times\); 'no' \(2 times\) and 'No' \(1 times\)"):
        splits(tmp_path, content)
    assert len(splits(tmp_path, content, labels=["yes", "yes ", "no", "No"]).labels) == 4
    (tmp_path / "test.csv").write_text("text,label\na,yes \n")
    with pytest.raises(ValueError, match=r"test: 1 labels lie outside the label set \('yes '\)"):
        splits(tmp_path, "text,label\na,yes\nb,no\nc,no\n", test="test.csv")
    with pytest.raises(ValueError, match=r"'B-PER' \(1 times\) and 'B-Per' \(1 times\)"):
        splits(tmp_path, "Anna\tB-PER\nBob\tB-Per\n", "train.conll", TOKENS)


@pytest.mark.parametrize("label", ["['a', 'b']", "['a' 'b']", "[]", "[0 1 1]", "[0.0, 1.0]"])
def test_printed_lists_are_no_label(label, tmp_path):
    with pytest.raises(ValueError, match=r"row 1: .* in column 'label' is a printed list"):
        texts(tmp_path, f"text\tlabel\nb\tx\na\t{label}\n")


def test_printed_lists_are_no_words_and_marks_in_brackets_are_labels(tmp_path):
    with pytest.raises(ValueError, match=r"texts of printed lists\. Write the data as JSON Lines"):
        read(tmp_path, "tokens\ttags\n['a', 'b']\t['O', 'O']\n", task=TOKENS)
    assert texts(tmp_path, "text\tlabel\n['a']\t[noise]\n") == [("['a']", "[noise]")]


# pairs


@pytest.mark.parametrize("names", [("sentence1", "sentence2"), ("question", "sentence"), ("premise", "hypothesis")])
@pytest.mark.parametrize("task", [TEXTS, NUMBERS])
def test_half_of_a_pair_is_not_read_in_silence(names, task, tmp_path):
    content = f"{names[0]}\t{names[1]}\tlabel\na\tb\t1\n"
    with pytest.raises(ValueError, match=rf"holds pairs, '{names[0]}' and '{names[1]}'.*task: sentence_pairs"):
        read(tmp_path, content, task=task)
    with pytest.warns(UserWarning, match=rf"reads '{names[1]}' alone, half of a pair with '{names[0]}'"):
        assert read(tmp_path, content, task=task, text=names[1])[0][0] == ["b"]
    assert read(tmp_path, content, task=TASKS["sentence_pairs"]) == [(["a", "b"], ["1"])]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path, content.replace("label", "text\tlabel").replace("b\t1", "b\tc\t1"), task=TEXTS)[0][0] == ["c"]


# JSON


def test_json_lines_by_another_name_say_so(tmp_path):
    rows = '{"text": "a", "label": "x"}\n{"text": "b", "label": "y"}\n'
    with pytest.raises(ValueError, match=r"it is JSON Lines, not JSON.*ending \.jsonl"):
        texts(tmp_path, rows, "train.json")
    with pytest.raises(ValueError, match=r"train\.jsonl, line 3, is not valid JSON"):
        texts(tmp_path, rows + "{'text': 'c'}", "train.jsonl")


@pytest.mark.parametrize("content", ["[" * 100_000, "[1" + "0" * 5_000 + "]"])
def test_json_that_python_cannot_hold(content, tmp_path):
    with pytest.raises(ValueError, match=r"train\.json (is not valid JSON|must hold objects)"):
        texts(tmp_path, content, "train.json")


# tags

NUMBERED = [{"tokens": ["the", "cat"], "ner_tags": [0, 0]}, {"tokens": ["Anna", "left"], "ner_tags": [1, 0]}]


@pytest.mark.parametrize("rows", [NUMBERED, NUMBERED[::-1], [{**row, "ner_tags": list("10")} for row in NUMBERED]])
def test_tags_that_are_numbers_ask_for_names_and_take_them(rows, tmp_path):
    with pytest.raises(ValueError, match=r"row 0, column 'ner_tags': [01] is the number of a tag.*as data\.labels"):
        read(tmp_path, json.dumps(rows), "train.json", TOKENS)
    found = read(tmp_path, json.dumps(rows), "train.json", TOKENS, labels=["O", "B-PER", "I-PER"])
    assert [labels[0] for _, labels in found] == [["O", "B-PER"][int(row["ner_tags"][0])] for row in rows]
    with pytest.raises(ValueError, match=r"1 is the number of a tag, and data\.labels has 1 names"):
        read(tmp_path, json.dumps(rows), "train.json", TOKENS, labels=["O"])


@pytest.mark.parametrize(
    ("tag", "right"),
    [
        ("B_PER", "B-PER"),
        ("I.LOC", "I-LOC"),
        ("S:X", "S-X"),
        ("b-PER", "B-PER"),
        ("PER-B", "B-PER"),
        ("PER_I", "I-PER"),
        ("o", "O"),
    ],
)
def test_tags_with_other_joints_are_told_how_they_are_written(tag, right, tmp_path):
    Dataset.from_list([{"tokens": ["a"], "tags": [tag]}]).to_json(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=rf"Write {right} for {tag}, in all tags alike") as caught:
        read(tmp_path, (tmp_path / "a.jsonl").read_text(), "train.jsonl", TOKENS)
    assert "part of speech" not in str(caught.value)
    with pytest.raises(ValueError, match=rf"line 1: 'a {tag}' is not a word and a tag.*Write {right} for {tag}"):
        read(tmp_path, f"a\t{tag}\n", "train.conll", TOKENS)


# CoNLL

GERMEVAL = "#\thttp://a [2010]\n1\tMaier\tB-PER\tO\n2\tsagte\tO\tO\n\n#\thttp://b\n1\tBerlin\tB-LOC\tB-ORG\n2\tist\tO\tO\n"
MAIER, BERLIN = (["Maier", "sagte"], ["B-PER", "O"]), (["Berlin", "ist"], ["B-LOC", "O"])


def conll(folder, content, **fields):
    return read(folder, content, "train.conll", TOKENS, **fields)


def test_columns_by_number(tmp_path):
    with pytest.raises(
        ValueError, match=r"the first column numbers the words.*line 2, 1 is '1', 2 is 'Maier', 3 is 'B-PER', 4 is 'O'"
    ):
        conll(tmp_path, GERMEVAL)
    assert conll(tmp_path, GERMEVAL, text=2, label=3) == [MAIER, BERLIN]
    assert conll(tmp_path, GERMEVAL, text="2")[1] == (BERLIN[0], ["B-ORG", "O"])  # the last column
    with pytest.raises(ValueError, match=r"line 2: .* in column 5 is no tag"):
        conll(tmp_path, GERMEVAL, text=2, label=5)
    with pytest.raises(ValueError, match=r"data\.text and data\.label name the same column \(2\)"):
        conll(tmp_path, GERMEVAL, text=2, label=2)


@pytest.mark.parametrize("first", ["# global.columns = ID FORM OUTER INNER\n", "ID\tFORM\tOUTER\tINNER\n"])
def test_columns_by_the_names_of_a_header(first, tmp_path):
    assert conll(tmp_path, first + GERMEVAL, text="FORM", label="OUTER") == [MAIER, BERLIN]
    assert conll(tmp_path, first + GERMEVAL, text="FORM", label=3) == [MAIER, BERLIN]
    with pytest.raises(
        ValueError, match=r"no column 'WORD' \(data\.text\); its first line has 'ID', 'FORM', 'OUTER', 'INNER'"
    ):
        conll(tmp_path, first + GERMEVAL, text="WORD", label="OUTER")


def test_a_header_that_nobody_names_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"line 1: 'word tag' .*If it is a header, name its columns"):
        conll(tmp_path, "word\ttag\nAnna\tB-PER\n")
    assert conll(tmp_path, "word\ttag\nAnna\tB-PER\n", text="word", label="tag") == [(["Anna"], ["B-PER"])]


@pytest.mark.parametrize(
    ("content", "sentences"),
    [
        ("# id 1 domain=en\nAnna _ _ B-PER\n\n# id 2\nx _ _ O\n", [["Anna"], ["x"]]),
        ("#begin document (a); part 000\nAnna B-PER\n#end document\nx O\n", [["Anna"], ["x"]]),
        ("Anna B-PER\n-DOCSTART- -X- O O\nx O\n", [["Anna"], ["x"]]),
        ("# O\n#tag O\n\nx B-X\n", [["#", "#tag"], ["x"]]),  # words
        ("Anna\tB-PER\t\nlives\tO\t\n\nx\tO\t\n", [["Anna", "lives"], ["x"]]),
        ("1 B-X\n\n1 O\n", [["1"], ["1"]]),  # no sentence of two words: nothing counts
        ("1 B-X\nman O\n\n2 O\n", [["1", "man"], ["2"]]),
    ],
)
def test_comments_document_marks_and_ends_of_lines(content, sentences, tmp_path):
    assert [words for words, _ in conll(tmp_path, content)] == sentences


@pytest.mark.parametrize("line", ["#tag", "Anna\t", "x\t\t"])
def test_a_word_without_a_tag_is_no_comment(line, tmp_path):
    with pytest.raises(ValueError, match=r"line 1: .* is not a word and a tag"):
        conll(tmp_path, f"{line}\nx\tO\n")
