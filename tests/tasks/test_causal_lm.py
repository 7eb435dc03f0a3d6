"""Causal language modelling: which pieces of texts, completions and conversations are predicted, and what is refused."""

import itertools
import json
import math

import pytest
import torch
from support_causal import CHATML, FORGETFUL, FORMS, PAIRS, TASK, TEXTS, tokenizer
from torch import nn

from fusion_adapters.tasks.base import IGNORED, Example
from fusion_adapters.tasks.chat import ChatTemplate, asked, conversation
from fusion_adapters.tasks.data import DataRecipe
from fusion_adapters.tasks.registry import TASKS
from fusion_adapters.tasks.rows import windowed
from fusion_adapters.tasks.splits import load_splits
from fusion_adapters.tasks.tables import Table

PROMPTED = {"path": ".", "text": "question", "completion": "answer"}


def pieces(text, words=None):
    return (words or tokenizer())(text, add_special_tokens=False)["input_ids"]


def encoded(example, max_length=64, words=None):
    return TASK.encode([example], words or tokenizer(), [], max_length)


def read(columns, **keys):
    data = DataRecipe(path=".", **keys)
    TASK.check_keys(data)
    TASK.check_data(data)
    return TASK.examples(Table(columns, "a.jsonl"), data)


def labelled(row):
    return [label for label in row["labels"] if label != IGNORED]


@pytest.mark.parametrize("bos", [False, True])
def test_every_piece_of_a_text_is_predicted_but_the_first(bos):
    words = tokenizer(bos)
    (row,) = encoded(Example([TEXTS[0]], []), words=words).rows
    own = [*([words.bos_token_id] if bos else []), *pieces(TEXTS[0], words), words.eos_token_id]
    assert row == {"input_ids": own, "attention_mask": [1] * len(own), "labels": [IGNORED, *own[1:]]}


@pytest.mark.parametrize("max_length", [8, 9, 16])
def test_a_long_text_becomes_rows_that_predict_each_piece_once(max_length):
    long = " ".join(TEXTS)
    found = TASK.encode([Example([long], []), Example(["anna lives"], [])], tokenizer(), [], max_length)
    first = [row for row, (index, _) in zip(found.rows, found.words, strict=True) if index == 0]
    own = [*pieces(long), tokenizer().eos_token_id]
    assert [own[0], *(piece for row in first for piece in labelled(row))] == own
    assert all(len(row["input_ids"]) <= max_length and row["labels"][0] == IGNORED for row in found.rows)
    for before, row in itertools.pairwise(first):
        assert row["input_ids"][0] == before["input_ids"][-1]
    assert found.notes == {"split_texts": 1, "cut_prompts": 0, "texts_without_pieces": 0}


@pytest.mark.parametrize("joint", [None, "\n", " and "])
@pytest.mark.parametrize("bos", [False, True])
def test_packing_loses_no_piece(joint, bos):
    words = tokenizer(bos)
    data = DataRecipe(path=".", packing=True, joint=joint, max_length=16)
    found = TASK.encoded([Example([text], []) for text in TEXTS], words, [], data)
    start, end = [3] if bos else [], words.eos_token_id
    if joint is None:
        whole = [piece for text in TEXTS for piece in [*start, *pieces(text, words), end]]
    else:
        between = pieces(joint, words)
        whole = [*start, *[piece for text in TEXTS for piece in [*between, *pieces(text, words)]][len(between) :]]
    assert [whole[0], *(piece for row in found.rows for piece in labelled(row))] == whole
    assert {len(row["input_ids"]) for row in found.rows[:-1]} == {16}


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("separator", [None, "", " -> "])
def test_the_loss_is_of_completions_alone(bos, separator):
    words = tokenizer(bos)
    columns = {"question": [a for a, _ in PAIRS], "answer": [b for _, b in PAIRS]}
    examples = read(columns, text="question", completion="answer", separator=separator)
    assert len(examples) == 3
    for (asks, answers), example in zip(PAIRS, examples, strict=True):
        (row,) = encoded(example, words=words).rows
        prompt = [*([3] if bos else []), *pieces(asks + ("\n" if separator is None else separator), words)]
        answer = [*pieces(answers, words), words.eos_token_id]
        assert row["input_ids"] == prompt + answer
        assert row["labels"] == [IGNORED] * len(prompt) + answer


@pytest.mark.parametrize("form", ["columns", "messages"])
def test_a_chat_template_is_written_and_answers_have_labels(form):
    talk = [{"role": "user", "content": "who"}, {"role": "assistant", "content": "bob"}]
    if form == "columns":
        (example,) = read({"question": ["who"], "answer": ["bob"]}, text="question", completion="answer", chat=True)
    else:
        (example,) = read({"text": ["a"], "messages": [talk]}, chat=True)
    (row,) = encoded(example).rows
    prompt = pieces("<|im_start|>user\nwho<|im_end|>\n<|im_start|>assistant\n")
    assert row["input_ids"] == [*prompt, *pieces("bob<|im_end|>\n")]
    assert row["labels"] == [IGNORED] * len(prompt) + pieces("bob<|im_end|>") + [IGNORED]
    assert ChatTemplate(tokenizer()).prompt(asked("who")) == prompt


def test_of_a_longer_conversation_every_answer_has_labels_and_what_comes_after_is_left_out():
    parts = [
        ("system", "be old"),
        ("user", "who"),
        ("assistant", "bob"),
        ("user", "where"),
        ("assistant", "rome"),
        ("user", "ah"),
    ]
    (example,) = read({"messages": [[{"role": role, "content": words} for role, words in parts]]}, chat=True)
    (row,) = encoded(example, 128).rows
    whole = "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in parts[:-1])
    assert tokenizer().decode(row["input_ids"]) == whole
    assert tokenizer().decode(labelled(row)) == "bob<|im_end|>rome<|im_end|>"


def test_a_long_prompt_loses_its_beginning_and_no_piece_of_the_completion():
    words = tokenizer()
    prompt, answer = pieces("the old man " * 20), [*pieces("acme corp"), words.eos_token_id]
    found = encoded(Example(["the old man " * 20, "acme corp"], []), 16)
    (row,) = found.rows
    kept = 16 - len(answer)
    assert row["input_ids"] == [*prompt[-kept:], *answer] and labelled(row) == answer
    assert found.notes == {"split_texts": 0, "cut_prompts": 1, "texts_without_pieces": 0}

    answer = [*pieces("acme corp in rome " * 9), words.eos_token_id]
    found = encoded(Example(["the old man " * 20, "acme corp in rome " * 9], []), 16)
    assert [piece for row in found.rows for piece in labelled(row)] == answer
    assert found.rows[0]["input_ids"][:8] == prompt[-8:], "half a row is the prompt's"
    assert all(len(row["input_ids"]) <= 16 for row in found.rows)
    assert found.notes == {"split_texts": 1, "cut_prompts": 1, "texts_without_pieces": 0}


@pytest.mark.parametrize("seed", range(20))
def test_windows_predict_every_labelled_piece_once_with_half_a_row_before_it(seed):
    generator = torch.Generator().manual_seed(seed)
    size, length = int(torch.randint(2, 90, (), generator=generator)), int(torch.randint(2, 30, (), generator=generator))
    own = list(range(1000, 1000 + size))
    wanted = [piece if torch.rand((), generator=generator) < 0.4 else IGNORED for piece in own]
    found = windowed(own, wanted, length)
    assert [piece for _, row in found for piece in labelled(row)] == [piece for piece in wanted[1:] if piece != IGNORED]
    for start, row in found:
        assert row["input_ids"] == own[start : start + length]
        first = next(i for i, label in enumerate(row["labels"]) if label != IGNORED)
        assert first >= min(start + first, length // 2) and first > 0


def test_texts_without_pieces_are_counted():
    words = tokenizer()
    words.backend_tokenizer.normalizer = None
    found = TASK.encode([Example([""], []), Example(["anna lives"], []), Example(["who", ""], [])], words, [], 32)
    assert len(found.rows) == 1 and found.notes["texts_without_pieces"] == 2


@pytest.mark.parametrize("form", FORMS)
def test_files_are_read_in_every_form(tmp_path, form):
    from support_causal import write_data

    write_data(tmp_path)
    data = load_splits(DataRecipe(path=str(tmp_path), **{"max_length": 32, **FORMS[form]}), TASK, 1)
    words, labels = {
        "text": ({len(TEXTS): 1}, []),
        "packed": ({len(TEXTS): 1}, []),
        "completion": ({}, []),
        "chat": ({}, ["user", "assistant"]),
        "messages": ({}, ["user", "assistant"]),
    }[form]
    assert data.labels == [] and data.train[0].labels == labels
    if words:
        assert [example.words for example in data.test] == [[text] for text in TEXTS]
    elif form == "completion":
        assert [example.words for example in data.test] == [[a + "\n", b] for a, b in PAIRS]
    else:
        assert data.test == [conversation(pair) for pair in PAIRS]


def test_packed_texts_that_are_drawn_keep_their_order(tmp_path):
    (tmp_path / "a.txt").write_text("\n".join(f"text {i}" for i in range(100)) + "\n", encoding="utf-8")
    data = DataRecipe(path=str(tmp_path), train="a.txt", limit=40, packing=True)
    packed = [e.words[0] for e in load_splits(data, TASK, 1).train]
    alone = [e.words[0] for e in load_splits(data.model_copy(update={"packing": False}), TASK, 1).train]
    assert packed == sorted(alone, key=lambda text: int(text.split()[1])) != alone


def test_scores_against_values_worked_out_by_hand():
    scores = TASK.score([7, 8, 1, 2], [(7, 0.5), (8, 1.5), (9, 0.25), (4, 3.75)])
    assert scores == pytest.approx({"loss": 1.5, "perplexity": math.exp(1.5), "accuracy": 0.5})
    assert TASK.main.name == "loss" and TASK.main.better(1.0, 2.0)


TALK = [{"role": "user", "content": "who"}]


@pytest.mark.parametrize(
    ("columns", "keys", "message"),
    [
        ({"text": ["a"]}, {"completion": "answer"}, r"no column 'answer'; it has 'text'. Set data.completion"),
        ({"prompt": ["a"], "completion": ["b"]}, {}, r"does not say what to do with them. Set data.completion: completion"),
        ({"text": ["a", "b"], "answer": ["b", ""]}, {"completion": "answer"}, r"row 1: column 'answer' has no value"),
        (
            {"text": ["a", "b"], "answer": ["b", " \n"]},
            {"completion": "answer"},
            r"row 1: the completion in column 'answer' is blank",
        ),
        ({"text": ["a"], "answer": ["b"]}, {"completion": "answer", "packing": True}, r"each example is a row of its own"),
        ({"text": ["a"]}, {"joint": "\n"}, r"Set data.packing: true, or remove joint"),
        ({"text": ["a"]}, {"separator": " "}, r"data.separator stands between data.text and data.completion"),
        ({"text": ["a"]}, {"label": "text"}, r"Name the column of what should follow the text in data.completion"),
        ({"messages": [TALK]}, {}, r"holds lists of messages.*set data.chat: true"),
        (
            {"messages": ["a"]},
            {"chat": True},
            r"row 0: column 'messages' holds a str, and data.chat without data.completion",
        ),
        ({"messages": ["['a']"]}, {"chat": True}, r"printed list where messages belong. Write the data as JSON Lines"),
        ({"messages": [TALK]}, {"chat": True}, r"none of the 1 messages has the role 'assistant'"),
        ({"messages": [[{"role": "user"}]]}, {"chat": True}, r"message 0: 'content' is None, and must be a text"),
        (
            {"messages": [[*TALK, {"role": "assistant", "content": " "}]]},
            {"chat": True},
            r"row 0: column 'messages', message 1: the answer is empty",
        ),
    ],
)
def test_data_that_do_not_fit_are_refused(columns, keys, message):
    with pytest.raises(ValueError, match=message) as caught:
        read(columns, **keys)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("completion", "a"), ("chat", True), ("packing", True), ("max_new_tokens", 3), ("joint", ""), ("separator", "")],
)
def test_other_tasks_refuse_its_keys(key, value):
    for task in TASKS.values():
        if task is not TASK:
            with pytest.raises(ValueError, match=rf"data.{key}, which task: {task.name} does not know"):
                task.check_keys(DataRecipe(path=".", **{key: value}))


def test_tokenizers_without_end_or_template_are_refused():
    words = tokenizer(template=None)
    with pytest.raises(
        ValueError, match=r"has no chat template, which data.chat needs. Use a model that was made for chats"
    ):
        encoded(conversation(["who", "bob"]), words=words)
    words.eos_token = None
    for example in (Example(["who"], []), Example(["who\n", "bob"], [])):
        with pytest.raises(ValueError, match=r"has no end of text \(eos_token\)"):
            encoded(example, words=words)


def test_a_template_that_rewrites_what_came_before_is_refused():
    words = tokenizer(template=FORGETFUL)
    talk = Example(["who", "bob", "where", "rome"], ["user", "assistant"] * 2)
    with pytest.raises(
        ValueError, match=r"as the continuation of its beginning: with 3 messages.*leave data.chat out"
    ) as caught:
        encoded(talk, words=words)
    assert "\n" not in str(caught.value) and "from character" in str(caught.value)
    assert encoded(conversation(["who", "bob"]), words=words).rows == encoded(conversation(["who", "bob"])).rows


def test_a_template_that_refuses_a_conversation_is_quoted():
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system here') }}{% endif %}" + CHATML
    talk = Example(["be old", "who", "bob"], ["system", "user", "assistant"])
    with pytest.raises(ValueError, match=r"refuses the first 2 messages of a conversation \(no system here\)"):
        encoded(talk, words=tokenizer(template=strict))


def test_a_template_that_ends_answers_by_no_special_token_has_labels_to_its_end():
    plain = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (row,) = encoded(conversation(["who", "bob"]), words=tokenizer(template=plain)).rows
    assert labelled(row) == pieces("bob\n") and ChatTemplate(tokenizer(template=plain)).ends() == []


def test_the_collator_pads_labels_with_what_the_loss_ignores():
    words = tokenizer()
    rows = TASK.encode([Example([text], []) for text in TEXTS[:3]], words, [], 64).rows
    batch = TASK.collator(words)(json.loads(json.dumps(rows)))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert bool((batch["labels"][batch["attention_mask"] == 0] == nn.CrossEntropyLoss().ignore_index).all())
