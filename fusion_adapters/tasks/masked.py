"""Masked language modelling: what stands at the hidden pieces of a text (arXiv 1810.04805)."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, ClassVar, Literal

from rich.markup import escape
from torch import Tensor
from transformers import AutoModelForMaskedLM, PreTrainedTokenizerBase

from .base import IGNORED, Asking, Encoded, Example, FinishedRun, Measure
from .data import DataRecipe
from .language import LOSS, PERPLEXITY, LanguageTask
from .masking import Masker, mask_token_of
from .tables import Table


class MaskedLM(LanguageTask):
    """Pieces hidden as in BERT's pretraining, the same in every epoch; a text that is too long becomes several rows."""

    name: ClassVar[str] = "masked_lm"
    title: ClassVar[str] = "masked language modelling"
    hub_task: ClassVar[str] = "fill-mask"
    # peft has none. Without one, the adapter's config names the model's class, and AutoPeftModel loads head and adapter;
    # FEATURE_EXTRACTION would make it load a model without head.
    peft_type: ClassVar[str | None] = None
    auto_model: ClassVar[Any] = AutoModelForMaskedLM
    text_columns: ClassVar[tuple[str, ...]] = ("text", "sentence")
    measures: ClassVar[tuple[Measure, ...]] = (Measure("accuracy"), LOSS, PERPLEXITY)
    positions: ClassVar[Literal["all", "labelled"]] = "labelled"

    def check_data(self, data: DataRecipe) -> None:
        super().check_data(data)
        if data.label is not None or data.labels is not None:
            raise ValueError(
                f"The recipe sets data.label or data.labels, but task: {self.name} predicts pieces of the texts themselves and reads "
                "no labels. Remove them, or choose the task that has them."
            )

    def examples(self, table: Table, data: DataRecipe) -> list[Example]:
        texts = table.texts(self.text_column(table, data))
        return [Example([text.strip()], []) for text in texts if text.strip()]

    def encode(
        self,
        examples: Sequence[Example],
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        max_length: int,
        label_at: str = "first",
    ) -> Encoded:
        """Labels are the ids of hidden pieces, see `Masker`. Raises ValueError if the tokenizer has no mask token."""
        masker = Masker(tokenizer)
        encoded = Encoded(notes={"split_texts": 0, "rows_without_pieces": 0})
        for index, example in enumerate(examples):
            parts = tokenizer(example.words[0], truncation=True, max_length=max_length, return_overflowing_tokens=True)
            encoded.notes["split_texts"] += len(parts["input_ids"]) > 1
            for pieces in parts["input_ids"]:
                hidden, chosen = masker(pieces)
                if not chosen:  # characters that the tokenizer drops, or does not know
                    encoded.notes["rows_without_pieces"] += 1
                    continue
                row_labels = [IGNORED] * len(pieces)
                for position in chosen:
                    row_labels[position] = pieces[position]
                row = {"input_ids": hidden, "attention_mask": [1] * len(pieces), "labels": row_labels}
                encoded.rows.append(row)
                encoded.words.append((index, []))
        return encoded

    def asking(self, run: FinishedRun, texts: Sequence[str]) -> Asking:
        """For each text `{"text", "filled", "masks": [{"piece", "probability"}]}` with the likeliest piece for each mask."""
        found = []
        for text in texts:
            found.append((yield from self._filled(run, text)))
        return found

    def _filled(self, run: FinishedRun, text: str) -> Generator[list[dict[str, Any]], list[Tensor], dict[str, Any]]:
        mask, written = mask_token_of(run.tokenizer), str(run.tokenizer.mask_token)
        length = run.data.max_length
        parts = run.tokenizer(text, truncation=True, max_length=length, return_overflowing_tokens=True)["input_ids"]
        rows = [{"input_ids": pieces, "attention_mask": [1] * len(pieces)} for pieces in parts if mask in pieces]
        found: list[int] = []
        masks = []
        for row, logits in zip(rows, (yield rows), strict=True):
            positions = [i for i, piece in enumerate(row["input_ids"]) if piece == mask]
            for probabilities in logits[positions].softmax(-1):
                found.append(int(probabilities.argmax()))
                piece = str(run.tokenizer.convert_ids_to_tokens(found[-1]))
                masks.append({"piece": piece, "probability": round(float(probabilities.max()), 4)})
        if not found:
            raise ValueError(
                f"The text {text[:80]!r} holds no {written}, and a masked language model predicts only what stands there. Write "
                f"{written} in place of the words to predict."
            )
        filled = text
        for number in found:
            filled = filled.replace(written, str(run.tokenizer.decode([number])).strip(), 1)
        return {"text": text, "filled": filled, "masks": masks}

    def shown(self, prediction: Mapping[str, Any]) -> str:
        """The filled text, and under it the pieces with their probabilities."""
        found = ", ".join(f"[bold cyan]{escape(mask['piece'])}[/] {mask['probability']:.2f}" for mask in prediction["masks"])
        return f"{escape(prediction['filled'])}\n  {found}"
