"""Readers, cuts and label sets, and what they say of bad files."""

import os
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from support_text import SENTENCES, conll

from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.splits import load_splits, read_file

TOKENS, TEXTS = TASKS["token_classification"], TASKS["sequence_classification"]
REAL = Path(os.environ.get("FUSION_ADAPTERS_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the data folder FUSION_ADAPTERS_DATA is absent")


def read_conll(path):
    """The examples of a CoNLL file."""
    recipe = DataRecipe(path=str(path.parent), format="conll")
    return TOKENS.examples(read_file(path, recipe, TOKENS), recipe)


def write(folder, text, name="train.conll"):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8"))
    return path


def splits(folder, task=TOKENS, seed=1, **fields):
    return load_splits(DataRecipe(path=str(folder), **({"train": "train.conll"} | fields)), task, seed)


def test_conll_with_tabs_spaces_and_blank_lines_that_hold_white_space(tmp_path):
    path = write(
        tmp_path, "\ufeff-DOCSTART- O\n\nAnna\tB-PER\r\nlives\tO\r\n \t \nNew NNP I-LOC\nYork NNP I-LOC\nBob NNP I-PER\n\n\n"
    )
    examples = read_conll(path)
    assert [e.words for e in examples] == [["Anna", "lives"], ["New", "York", "Bob"]]
    assert examples[1].labels == ["B-LOC", "I-LOC", "B-PER"], "IOB1 becomes BIO"


def test_conll_words_may_be_strange_characters(tmp_path):
    words = ["\ufe0f", "a\u2028b", "\x85", "\u00a0x"]
    (example,) = read_conll(write(tmp_path, "".join(f"{w}\tO\n" for w in words)))
    assert example.words == words
    words = ["10\u00a0000", "a\u3000b", "\u2009x"]  # not blanks between columns
    (example,) = read_conll(write(tmp_path, "".join(f"{w} NN O \n" for w in words)))
    assert example.words == words


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"is empty \(0 bytes"),
        ("\n \n\t\n", "is empty"),
        ("Anna\tB-PER\nlives\n", "line 2: 'lives' is not a word and a tag"),
        ("Anna\tPER\n", "line 1.*O, B-TYPE or I-TYPE"),
        (b"caf\xe9\tO\n", r"not UTF-8 text \(byte 3\)"),
    ],
)
def test_bad_conll_files(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read_conll(write(tmp_path, content))


def test_a_missing_file_lists_what_is_there(tmp_path):
    write(tmp_path, conll(SENTENCES), "training.conll")
    with pytest.raises(FileNotFoundError, match=r"train\.conll.*The folder holds: training\.conll"):
        splits(tmp_path)


def test_csv_keeps_texts_as_they_stand(tmp_path):
    write(tmp_path, 'text,category\n"two\nlines, ""quoted""",a\nNA,b\nnull,a\n007,b\n' + "x,a\n" * 6, "train.csv")
    data = splits(tmp_path, TEXTS, train="train.csv", dev_fraction=0.1)
    texts = {e.words[0] for e in data.train + data.dev}
    assert {'two\nlines, "quoted"', "NA", "null", "007", "x"} == texts
    assert data.labels == ["a", "b"]


@pytest.mark.parametrize("name", ["train.json", "train.jsonl"])
def test_json_with_tokens_and_tags(tmp_path, name):
    rows = Dataset.from_list([{"tokens": [w for w, _ in s], "tags": [t for _, t in s]} for s in SENTENCES * 2])
    rows.to_json(tmp_path / name, lines=name.endswith("l"))
    data = splits(tmp_path, train=name)
    assert len(data.train) + len(data.dev) == 6
    assert data.labels == ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", 'text,label\nhello,a\n"two, three\n', "is not valid CSV"),
        ("train.csv", "text,label\nhello,a,b\n", r"row 1 has 3 fields, but the header has 2 \(text, label\)"),
        ("train.json", "[1, 2", "is not valid JSON"),
        ("train.jsonl", '{"text": "a", "label": "b"}\n{"text": "a"}\n', "objects with the same keys"),
        ("train.json", '{"text": "a"}', "objects with the same keys"),
    ],
)
def test_bad_tables(tmp_path, name, content, message):
    write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        splits(tmp_path, TEXTS, train=name)


def test_wrong_columns_name_those_that_exist(tmp_path):
    write(tmp_path, "utterance,intent\nhello,a\n", "train.csv")
    with pytest.raises(ValueError, match=r"no column 'text', 'sentence'; it has 'utterance', 'intent'\. Set data\.text"):
        splits(tmp_path, TEXTS, train="train.csv")
    with pytest.raises(ValueError, match="no column 'intnt'"):
        splits(tmp_path, TEXTS, train="train.csv", text="utterance", label="intnt")


def test_labels_outside_the_label_set(tmp_path):
    write(tmp_path, conll(SENTENCES))
    write(tmp_path, "Anna\tB-PERS\nBob\tI-PERS\nRome\tB-LOC\n", "test.conll")
    with pytest.raises(ValueError, match=r"test: 2 labels lie outside the label set \(B-PERS, I-PERS\).*set has 7 labels"):
        splits(tmp_path, test="test.conll")
    with pytest.raises(ValueError, match="outside the label set"):
        splits(tmp_path, labels=["O", "B-PER"])


def test_the_cut_for_development_is_disjoint_and_the_same_for_every_seed(tmp_path):
    write(tmp_path, conll([[(f"w{i}", "B-X" if i % 5 else "O")] for i in range(50)]))
    first, second = splits(tmp_path, seed=1, dev_fraction=0.2), splits(tmp_path, seed=2, dev_fraction=0.2)
    assert [e.words for e in first.dev] == [e.words for e in second.dev]
    assert len(first.dev) == 10 and len(first.train) == 40
    assert not {e.words[0] for e in first.dev} & {e.words[0] for e in first.train}


def test_the_limit_draws_by_the_seed(tmp_path):
    write(tmp_path, conll([[(f"w{i}", "B-X" if i % 5 else "O")] for i in range(50)]))
    draws = [[e.words for e in splits(tmp_path, seed=s, limit=20).train] for s in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]
    assert len(draws[0]) == 20
    with pytest.raises(ValueError, match=r"data\.limit=60, but there are 45 training examples"):
        splits(tmp_path, limit=60)


def test_a_folder_laid_out_like_a_hub_dataset(tmp_path):
    names = ["O", "B-LOC", "I-LOC", "B-ORG", "I-ORG", "B-PER", "I-PER"]
    features = Features({"tokens": List(Value("string")), "ner_tags": List(ClassLabel(names=names))})
    rows = [{"tokens": [w for w, _ in s], "ner_tags": [names.index(t) for _, t in s]} for s in SENTENCES]
    part = Dataset.from_list(rows, features=features)
    for split in ("train", "validation", "test"):
        part.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    assert isinstance(DatasetDict({"train": part}), DatasetDict)
    data = load_splits(DataRecipe(path=str(tmp_path / "set")), TOKENS, 1)
    assert data.train[0].labels == [t for _, t in SENTENCES[0]]
    assert len(data.train) == len(data.dev) == len(data.test) == 3
    with pytest.raises(ValueError, match="has no split 'held_out'; it has"):
        load_splits(DataRecipe(path=str(tmp_path / "set"), test="held_out"), TOKENS, 1)


def test_a_test_split_without_labels_is_left_out(tmp_path):
    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["no", "yes"])})
    for split, labels in (("train", [0, 1, 0, 1]), ("test", [-1, -1])):  # as in GLUE
        part = Dataset.from_dict({"sentence": [f"s{i}" for i in range(len(labels))], "label": labels}, features=features)
        (tmp_path / "set").mkdir(exist_ok=True)
        part.to_parquet(tmp_path / "set" / f"{split}-00000-of-00001.parquet")
    found = splits(tmp_path / "set", TEXTS, train=None, dev_fraction=0.25)
    assert len(found.train) == 3 and found.test == [] and found.labels == ["no", "yes"]
    with pytest.raises(ValueError, match=r"test, column 'label': -1 is the number of none of the 2 classes"):
        splits(tmp_path / "set", TEXTS, train=None, test="test")


@pytest.mark.parametrize("name", ["train.conll", "train.csv"])
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_a_file_without_examples_is_named(tmp_path, name, split):
    task = TOKENS if name.endswith("conll") else TEXTS
    full, none = (conll(SENTENCES), "-DOCSTART- O\n\n") if task == TOKENS else ("text,label\na,x\nb,y\n", "text,label\n")
    files = {}
    for part in ("train", "dev", "test"):
        files[part] = name.replace("train", part)
        write(tmp_path, none if part == split else full, files[part])
    with pytest.raises(ValueError, match=rf"'{files[split]}' holds no examples.*data\.{split}"):
        splits(tmp_path, task, **files)


def test_a_missing_value_is_no_text_and_no_label(tmp_path):
    for rows, message in (
        ('[{"text": "a", "label": "x"}, {"text": null, "label": "y"}]', "row 1: column 'text' has no value"),
        ('[{"text": "a", "label": null}, {"text": "b", "label": "y"}]', "row 0: column 'label' has no value"),
    ):
        write(tmp_path, rows, "train.json")
        with pytest.raises(ValueError, match=message):
            splits(tmp_path, TEXTS, train="train.json")
    write(tmp_path, '[{"tokens": ["a", null], "tags": ["O", "O"]}]', "train.json")
    with pytest.raises(ValueError, match="row 0: column 'tokens' has no value"):
        splits(tmp_path, train="train.json")


def test_a_path_that_is_nothing():
    with pytest.raises(FileNotFoundError, match="'no/such/place' cannot be read"):
        load_splits(DataRecipe(path="no/such/place", train="train.conll"), TOKENS, 1)


def entities(examples):
    return sum(label.startswith("B-") for e in examples for label in e.labels)


def test_a_file_as_path_is_told_apart_from_its_folder(tmp_path):
    (tmp_path / "d.csv").write_text("text,label\ngood,1\nbad,0\n")
    with pytest.raises(ValueError, match=r"names the folder.*data\.train: d\.csv"):
        load_splits(DataRecipe(path=str(tmp_path / "d.csv")), TOKENS, 1)


def test_the_packaged_corpus():
    data = load_splits(DataRecipe(path="package:quickstart", train="train.conll", test="test.conll"), TOKENS, 1)
    assert (len(data.train) + len(data.dev), len(data.test)) == (300, 150)
    assert entities(data.train + data.dev) == 491 and entities(data.test) == 248
    assert {label[2:] for label in data.labels} - {""} == {"PER", "ORG", "LOC", "PROD"}
    sentences = [tuple(e.words) for e in data.train + data.dev + data.test]
    assert len(set(sentences)) == 450


@needs_real_data
def test_wnut17_as_its_source_counts_it():
    files = {"train": "wnut17train.conll", "dev": "emerging.dev.conll", "test": "emerging.test.annotated"}
    data = splits(REAL / "ner-wnut17", format="conll", **files)
    assert [len(part) for part in (data.train, data.dev, data.test)] == [3394, 1009, 1287]
    assert [entities(part) for part in (data.train, data.dev, data.test)] == [1975, 836, 1079]
    assert len(data.labels) == 13


@needs_real_data
def test_wikigold_as_its_source_counts_it():
    examples = read_conll(REAL / "ner-wikigold" / "wikigold.conll.txt")
    documents = 145  # lines -DOCSTART-, which the source counts as sentences of one token
    assert (len(examples), sum(len(e.words) for e in examples)) == (1841 - documents, 39152 - documents)
    assert entities(examples) == 3558


@needs_real_data
def test_banking77_as_its_source_counts_it():
    data = splits(REAL / "cls-banking77", TEXTS, train="train.csv", test="test.csv", label="category")
    assert (len(data.train) + len(data.dev), len(data.test), len(data.labels)) == (10003, 3080, 77)


@pytest.mark.parametrize("part", ["dev", "test"])
def test_too_few_examples_to_cut_a_part_off(part, tmp_path):
    write(tmp_path, conll(SENTENCES[:1]))
    with pytest.raises(ValueError, match=rf"1 training examples are too few to cut 1 .* data\.{part}_fraction=0\.5 asks"):
        splits(tmp_path, **{f"{part}_fraction": 0.5})


@pytest.mark.parametrize(
    ("tags", "bio"),
    [
        ("B-PER I-PER O I-PER", "B-PER I-PER O B-PER"),
        ("I-PER I-PER B-PER I-LOC", "B-PER I-PER B-PER B-LOC"),  # IOB1
        ("B-PER E-PER S-PER S-PER O", "B-PER I-PER B-PER B-PER O"),  # BIOES
        ("B-PER I-PER L-PER U-LOC U-LOC", "B-PER I-PER I-PER B-LOC B-LOC"),  # BILOU
        ("E-PER O L-PER", "B-PER O B-PER"),
    ],
)
def test_every_scheme_becomes_bio(tags, bio, tmp_path):
    tags = tags.split()
    path = write(tmp_path, "".join(f"w\t{tag}\n" for tag in tags))
    assert read_conll(path)[0].labels == bio.split()
    Dataset.from_list([{"tokens": ["w"] * len(tags), "tags": tags}] * 3).to_json(tmp_path / "train.jsonl")
    assert splits(tmp_path, train="train.jsonl").train[0].labels == bio.split()


def test_tags_of_no_scheme_are_refused(tmp_path):
    Dataset.from_list([{"tokens": ["a", "b"], "tags": ["NN", "IN"]}] * 3).to_json(tmp_path / "train.jsonl")
    with pytest.raises(ValueError, match=r"row 0: 'NN' in column 'tags' is no tag of an entity.*write B-NN"):
        splits(tmp_path, train="train.jsonl")
    write(tmp_path, conll(SENTENCES))
    with pytest.raises(ValueError, match=r"data\.labels holds 'E-PER', 'NN'"):
        splits(tmp_path, labels=["O", "B-PER", "E-PER", "NN"])


def test_files_without_an_ending(tmp_path):
    write(tmp_path, conll(SENTENCES * 2), "train")
    Dataset.from_list([{"tokens": ["wrong"], "tags": ["O"]}] * 6).to_json(tmp_path / "train.jsonl")
    data = splits(tmp_path, train="train", format="conll")
    assert {e.words[0] for e in data.train + data.dev} == {"Anna", "Bob", "the"}
    with pytest.raises(ValueError, match=r"format .* cannot be told from its name"):
        splits(tmp_path, train="train")
    with pytest.raises(FileNotFoundError, match=r"There is no file .*folder holds"):
        splits(tmp_path, train="training", format="conll")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.csv", "text,label\na,x\nb,\n", r"row 1: column 'label' has no value"),
        ("train.json", '[{"text": "a", "label": "x"}, {"text": "b", "label": NaN}]', r"row 1: column 'label' has no value"),
        ("train.json", '[{"text": ["a", "b"], "label": "x"}]', r"row 0: column 'text' holds a list where one text belongs"),
        ("train.csv", "text,label,label\na,x,y\n", r"the header has the column 'label' twice"),
    ],
)
def test_what_is_no_text_and_no_label(name, content, message, tmp_path):
    write(tmp_path, content, name)
    with pytest.raises(ValueError, match=message):
        splits(tmp_path, TEXTS, train=name)
