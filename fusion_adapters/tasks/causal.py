"""Causal language modelling: each piece from those before it, in texts, completions and conversations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch.nn.functional as F
from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from .base import IGNORED, Asking, Encoded, Example, FinishedRun, Measure
from .chat import ChatTemplate, asked, conversation, read_conversations
from .data import OF_GENERATION, DataRecipe
from .language import LOSS, PERPLEXITY, LanguageTask
from .rows import tiled, windowed
from .tables import Table

BETWEEN = "\n"  # prompt and completion
SHOWN = "\N{HORIZONTAL ELLIPSIS}"  # after a completion that did not end


class CausalLM(LanguageTask):
    """The next piece, of all of a text; or of completions and answers alone, where the data have prompts.

    An example is a text (one word), a prompt with its completion (two words), or a conversation (its parts as words, and who
    says each as labels).
    """

    name: ClassVar[str] = "causal_lm"
    title: ClassVar[str] = "causal language modelling"
    peft_type: ClassVar[str | None] = "CAUSAL_LM"
    hub_task: ClassVar[str] = "text-generation"
    auto_model: ClassVar[Any] = AutoModelForCausalLM
    text_columns: ClassVar[tuple[str, ...]] = ("text", "sentence", "prompt", "messages")
    measures: ClassVar[tuple[Measure, ...]] = (LOSS, PERPLEXITY, Measure("accuracy"))
    predicts_next: ClassVar[bool] = True
    own_keys: ClassVar[tuple[str, ...]] = OF_GENERATION
    # nearly every position has a label, and for each there are as many logits as the vocabulary has pieces
    training_defaults: ClassVar[dict[str, Any]] = {"per_device_eval_batch_size": 8}

    # reading

    def check_data(self, data: DataRecipe) -> None:
        super().check_data(data)
        if data.label is not None or data.labels is not None:
            raise ValueError(
                f"The recipe sets data.label or data.labels, but task: {self.name} predicts pieces of texts and has no label set. Name the "
                "column of what should follow the text in data.completion, or choose the task that has labels."
            )
        if data.packing and (data.chat or data.completion is not None):
            raise ValueError(
                "data.packing joins running texts, and with data.completion or data.chat each example is a row of its own: joined, a "
                "completion would be predicted from those of other prompts too. Leave packing out; training.train_sampling_strategy: "
                "group_by_length saves padding."
            )
        if data.joint is not None and not data.packing:
            raise ValueError("data.joint says what stands between packed texts. Set data.packing: true, or remove joint.")
        if data.separator is not None and (data.chat or data.completion is None):
            raise ValueError(
                "data.separator stands between data.text and data.completion where no chat template writes them. Remove it, or set "
                "data.completion and leave data.chat out."
            )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        assert not isinstance(data.text, list)  # refused by check_data
        if data.chat and data.completion is None:
            return read_conversations(table, table.column(data.text, self.text_columns[::-1], "data.text"))
        name = self.text_column(table, data)
        self._check_form(table, data, name)
        texts = table.texts(name)
        if data.completion is None:
            return [Example([text], []) for text in texts if text.strip()]
        column = table.column(data.completion, (), "data.completion")
        completions = [str(value) for value in table.values(column, empty=False)]
        blank = next((row for row, text in enumerate(completions) if not text.strip()), None)
        if blank is not None:
            raise ValueError(
                f"{table.source}, row {blank}: the completion in column {column!r} is blank, and there is nothing to learn from it. Remove "
                "the row, or fill it in."
            )
        if data.chat:
            return [conversation(parts) for parts in zip(texts, completions, strict=True)]
        return [Example([self._prompt(text, data), end], []) for text, end in zip(texts, completions, strict=True)]

    def _check_form(self, table: Table, data: DataRecipe, name: str) -> None:
        """Raises ValueError if a table has prompts or conversations, and the recipe does not ask for them."""
        first = next(iter(table.columns[name]), None)
        if isinstance(first, list) and first and isinstance(first[0], dict):
            raise ValueError(
                f"{table.source}: column {name!r} holds lists of messages. To train on the answers in them by the tokenizer's chat "
                "template, set data.chat: true."
            )
        if data.text is None and data.completion is None and name == "prompt" and "completion" in table.columns:
            raise ValueError(
                f"{table.source} has the columns 'prompt' and 'completion', and the recipe does not say what to do with them. Set "
                "data.completion: completion to train on completions; to train on the prompts alone on purpose, name them in data.text."
            )

    def _prompt(self, text: str, data: DataRecipe) -> str:
        return text + (BETWEEN if data.separator is None else data.separator)

    # encoding

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        """Labels are the ids of the pieces themselves, -100 in prompts and at the first position.

        Texts and completions end with the tokenizer's end of text. A text that is too long becomes several rows, see `tiled`. A
        prompt that is too long loses its beginning, and the pieces of completions and answers are all there, see `windowed`.

        Raises:
            ValueError: If the tokenizer has no end of text, or none of the chat templates that conversations need.
        """
        template = ChatTemplate(tokenizer) if any(example.labels for example in examples) else None
        encoded = Encoded(notes={"split_texts": 0, "cut_prompts": 0, "texts_without_pieces": 0})
        for index, example in enumerate(examples):
            starts = [0]
            if template is None and len(example.words) == 1:
                pieces = pieces_of(example.words[0], tokenizer)
                rows = list(tiled([*start_of(tokenizer), *pieces, end_of(tokenizer)], max_length)) if pieces else []
            else:
                starts, rows = self._completed(example, tokenizer, template, max_length)
            encoded.notes["split_texts"] += len(rows) > 1
            encoded.notes["cut_prompts"] += bool(rows) and starts[0] > 0
            encoded.notes["texts_without_pieces"] += not rows
            encoded.rows += rows
            encoded.words += [(index, [])] * len(rows)
        return encoded

    def _completed(
        self, example: Example, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate | None, max_length: int
    ) -> tuple[list[int], list[dict[str, Any]]]:
        """The rows of a prompt with its completion, or of a conversation, and where in it they begin."""
        if template is not None:
            pieces, labels = template.pieces(example)
        else:
            before, after = (pieces_of(text, tokenizer) for text in example.words)
            before = [*start_of(tokenizer), *before]
            after = [*after, end_of(tokenizer)] if after else []
            pieces, labels = before + after, [IGNORED] * len(before) + after
        found = windowed(pieces, labels, max_length)
        return [start for start, _ in found], [row for _, row in found]

    def encoded(
        self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, labels: Sequence[str], data: DataRecipe
    ) -> Encoded:
        """As `encode`; with `data.packing` the texts are joined, and cut every `max_length` pieces.

        What stands between them is the end of text, or `data.joint`. Attention reaches over it: a row is one text to the model.
        """
        if not data.packing:
            return super().encoded(examples, tokenizer, labels, data)
        texts = [pieces_of(example.words[0], tokenizer) for example in examples]
        start = start_of(tokenizer)
        if data.joint is None:
            joined = [*chain.from_iterable([*start, *pieces, end_of(tokenizer)] for pieces in texts if pieces)]
        else:
            between = pieces_of(data.joint, tokenizer)
            texts_between = [*chain.from_iterable([*between, *pieces] for pieces in texts if pieces)]
            joined = [*start, *texts_between[len(between) :]]
        rows = list(tiled(joined, data.max_length))
        return Encoded(rows, [(0, []) for _ in rows], {"texts_without_pieces": sum(not pieces for pieces in texts)})

    def tokenize(self, examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, **options: Any) -> Any:
        return tokenizer(["".join(example.words) for example in examples], **options)

    def depth_groups(self, labels: Tensor, shape: Any) -> Tensor:
        return super().depth_groups(F.pad(labels[:, 1:], (0, 1), value=IGNORED), shape)  # of the positions that predict

    # prediction

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each text `{"text", "completion", "ended"}`: what the model writes after it, and whether it came to an end.

        The text is written as in training: with the separator of a prompt after it, or as a question in the chat template.
        """
        yield from ()  # of no row: each piece comes after the one before, see `continued`
        return [self._completion(run, text) for text in texts]

    def _completion(self, run: FinishedRun, text: str) -> dict[str, Any]:
        tokenizer, data = run.tokenizer, run.data
        ends = [end_of(tokenizer)]
        if data.chat:
            template = ChatTemplate(tokenizer)
            pieces = template.prompt(asked(text))
            ends += [piece for piece in template.ends() if piece not in ends]
        else:
            own = text if data.completion is None else self._prompt(text, data)
            pieces = [*start_of(tokenizer), *pieces_of(own, tokenizer)]
        if not pieces:
            raise ValueError(f"The text {text!r} has no word pieces for this tokenizer. Give texts with words.")
        found = run.continued(pieces, data.max_new_tokens, ends)
        written = str(tokenizer.decode(found, skip_special_tokens=True))
        return {"text": text, "completion": written, "ended": len(found) < data.max_new_tokens or found[-1] in ends}

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The text, and under it what the model writes after it."""
        return f"{escape(prediction['text'])}\n  {self.answer(prediction)}"

    def answer(self, prediction: Mapping[str, Any]) -> str:
        """What the model writes."""
        return f"[bold cyan]{escape(prediction['completion'])}[/]{'' if prediction['ended'] else SHOWN}"


def pieces_of(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The pieces of a text alone, without special tokens around it."""
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def start_of(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token that a tokenizer puts before a text (BOS); empty for those that put none."""
    start: Any = tokenizer.bos_token_id
    return [] if start is None or tokenizer("a")["input_ids"][:1] != [start] else [start]  # type: ignore[index]


def end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that ends a text (EOS). Raises ValueError if there is none."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer ({type(tokenizer).__name__}, {len(tokenizer):,} pieces) has no end of text (eos_token), which task: causal_lm "
            "puts after texts and completions. Use the backbone of a causal language model (Llama, Qwen, SmolLM2, ...)."
        )
    return int(tokenizer.eos_token_id)  # type: ignore[arg-type]
