"""Conversations: read from a column of messages, and written by a tokenizer's chat template, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from .base import IGNORED, Example
from .tables import WRITE_LISTS, Table, is_printed_list

ASKS, ANSWERS = "user", "assistant"


def read_conversations(table: Table, name: str) -> list[Example]:
    """The conversations of a column: the parts as words, who says each as labels.

    Raises:
        ValueError: If a value is no list of messages (`role` and `content`, both texts), or nobody answers in it.
    """
    examples = []
    for row, messages in enumerate(table.values(name, lists=True)):
        where = f"{table.source}, row {row}: column {name!r}"
        if is_printed_list(messages):
            raise ValueError(f"{where} holds a printed list where messages belong. {WRITE_LISTS}")
        if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
            raise ValueError(
                f"{where} holds a {type(messages).__name__}, and data.chat without data.completion reads lists of messages, each with "
                "'role' and 'content'. Name another column (data.text), or the column of answers (data.completion)."
            )
        for number, message in enumerate(messages):
            for key in ("role", "content"):
                if not isinstance(message.get(key), str):
                    raise ValueError(
                        f"{where}, message {number}: {key!r} is {message.get(key)!r:.80}, and must be a text. Correct the message; calls "
                        "of tools and parts that are no text are not read."
                    )
        if not any(message["role"] == ANSWERS for message in messages):
            raise ValueError(f"{where}: none of the {len(messages)} messages has the role {ANSWERS!r}. Remove the row.")
        empty = next((i for i, m in enumerate(messages) if m["role"] == ANSWERS and not m["content"].strip()), None)
        if empty is not None:
            raise ValueError(f"{where}, message {empty}: the answer is empty. Remove the row, or fill it in.")
        examples.append(Example([m["content"] for m in messages], [m["role"] for m in messages]))
    return examples


def conversation(parts: Sequence[str]) -> Example:
    """A question and its answer."""
    return Example(list(parts), [ASKS, ANSWERS])


def asked(text: str) -> Example:
    """The conversation that begins with a text and waits for an answer."""
    return Example([text], [ASKS])


class ChatTemplate:
    """A tokenizer's chat template, of which it is known where the answers of a conversation stand.

    An answer is what the template adds to the conversation before it, with the words that open an answer already written. So
    that this can be told, and so that a model reads in training what it reads when it is asked, the template must write a
    conversation as the continuation of its beginning.

    Args:
        tokenizer: A tokenizer with a chat template.

    Raises:
        ValueError: If it has none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"The tokenizer ({type(tokenizer).__name__}, {len(tokenizer):,} pieces) has no chat template, which data.chat needs. Use a "
                "model that was made for chats (Instruct), or leave data.chat out: data.text and data.completion need no template."
            )
        self.tokenizer = tokenizer
        self.special = frozenset(tokenizer.all_special_ids)

    def prompt(self, example: Example) -> list[int]:
        """The pieces of a conversation and of the words that open an answer."""
        return self._pieces(self._written(example, len(example.words), opens=True))

    def pieces(self, example: Example) -> tuple[list[int], list[int]]:
        """The pieces of a conversation up to its last answer, and their labels.

        Labelled are the answers, up to the special token that ends them if there is one.

        Returns:
            The ids, and for each the id again if it belongs to an answer, else -100.

        Raises:
            ValueError: If the template refuses the conversation, or writes its beginning in another way when it goes on.
        """
        pieces: list[int] = []
        labels: list[int] = []
        written = ""
        for i, role in enumerate(example.labels):
            if role != ANSWERS:
                continue
            before, after = self._written(example, i, opens=True), self._written(example, i + 1)
            for begun, whole, turns in ((written, before, i), (before, after, i + 1)):
                if not whole.startswith(begun):
                    self._refuse(begun, whole, turns)
            others, own = self._pieces(before[len(written) :]), self._pieces(after[len(before) :])
            ends = [position for position, piece in enumerate(own, start=1) if piece in self.special]
            end = ends[-1] if ends else len(own)
            pieces += others + own
            labels += [IGNORED] * len(others) + own[:end] + [IGNORED] * (len(own) - end)
            written = after
        return pieces, labels

    def ends(self) -> list[int]:
        """The special tokens that end an answer; empty if the template writes none there."""
        _, labels = self.pieces(Example(["a", "b"], [ASKS, ANSWERS]))
        last = [label for label in labels if label != IGNORED][-1]
        return [last] if last in self.special else []

    def _pieces(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]

    def _written(self, example: Example, turns: int, opens: bool = False) -> str:
        from jinja2 import TemplateError

        parts = zip(example.labels[:turns], example.words[:turns], strict=True)
        messages: Any = [{"role": role, "content": words} for role, words in parts]
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opens))
        except (TemplateError, TypeError, LookupError, ValueError, AttributeError) as error:
            why, roles = " ".join(str(error).split()), ", ".join(example.labels[:turns]) or "none"
            raise ValueError(
                f"The tokenizer's chat template refuses the first {turns} messages of a conversation ({why}). Their roles: {roles}; its "
                f"first message begins {example.words[0][:60]!r}. Bring the data into the order that the template knows."
            ) from error

    def _refuse(self, begun: str, whole: str, turns: int) -> None:
        same = next((i for i, (a, b) in enumerate(zip(begun, whole, strict=False)) if a != b), min(len(begun), len(whole)))
        raise ValueError(
            f"The tokenizer's chat template does not write a conversation as the continuation of its beginning: with {turns} messages its "
            f"text is another from character {same} on ({whole[same : same + 40]!r} in the place of {begun[same : same + 40]!r}). Which "
            "pieces are the answer cannot be told then. Use a tokenizer whose template keeps what came before, or leave data.chat out and "
            "give the columns data.text and data.completion."
        )
