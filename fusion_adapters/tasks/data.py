"""Where the examples of a recipe are, and how they are cut: its section `data`."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError

from .readers import READERS

# Keys that tasks of generated text alone know, see `Task.own_keys`.
OF_GENERATION = ("completion", "separator", "chat", "packing", "joint", "max_new_tokens")


class DataRecipe(BaseModel):
    """Where the examples are, and how they are cut."""

    model_config = ConfigDict(extra="forbid")

    path: str = Field(description="A folder, a hub dataset id, or package:quickstart.")
    train: str | None = Field(None, description="Training file in the folder, or split of the hub dataset.")
    dev: str | None = Field(None, description="Development file or split; without one, dev_fraction of train is cut off.")
    test: str | None = Field(None, description="Test file or split.")
    config_name: str | None = Field(None, description="Configuration of a hub dataset.")
    format: str | None = Field(None, description="Format of the files; None reads it from the name.")
    text: str | list[str] | None = Field(
        None, description="Column of the text (or of the tokens), a list of two for pairs; None takes the usual names."
    )
    label: str | None = Field(None, description="Column of the label (or of the tags); None takes the usual names.")
    delimiter: str | None = Field(None, description="What separates columns; None is a comma, in .tsv a tab.")
    quoting: bool | None = Field(
        None, description="Whether marks around a field are not part of it; None: yes, but not in .tsv."
    )
    labels: list[str] | None = Field(None, description="The label set; None takes the labels of the training data.")
    dev_fraction: float = Field(
        0.1, gt=0, lt=1, description="Share of train to cut off for development, if there is no dev."
    )
    test_fraction: float | None = Field(
        None, gt=0, lt=1, description="Share of train to cut off for testing, if there is no test; the same for every seed."
    )
    limit: int | None = Field(None, ge=1, description="Use this many training examples, drawn by the seed.")
    max_length: int = Field(
        256,
        ge=8,
        description="Word pieces per row; longer sentences of tokens, and texts of masked_lm and causal_lm, are split.",
    )
    completion: str | None = Field(
        None, description="causal_lm: column of what should follow the text; the loss is of it alone."
    )
    separator: str | None = Field(
        None, description="causal_lm: what stands between text and completion; None is a line break."
    )
    chat: bool = Field(
        False, description="causal_lm: write text and completion, or a column of messages, by the tokenizer's chat template."
    )
    packing: bool = Field(False, description="causal_lm: join texts to rows of max_length.")
    joint: str | None = Field(
        None, description="causal_lm: what stands between packed texts; None is the tokenizer's end of text."
    )
    max_new_tokens: int = Field(64, ge=1, description="causal_lm: pieces that predict writes at most.")

    label_at: Literal["first", "last", "auto"] = Field(
        "auto",
        description="The piece of a word that has its tag: the last is where a causal model has read the word; auto: last for causal "
        "backbones, first for others.",
    )

    @field_validator("text", "label", "completion", mode="before")
    @classmethod
    def _by_number(cls, value: Any) -> Any:
        return str(value) if isinstance(value, int) and not isinstance(value, bool) else value

    @field_validator("delimiter")
    @classmethod
    def _one_sign(cls, value: str | None) -> str | None:
        value = "\t" if value in ("\\t", "tab") else value
        if value is not None and (len(value) != 1 or value in '"\r\n'):
            raise PydanticCustomError("delimiter", 'Input should be one character (for a tab "\\t"), and no quotation mark')
        return value

    @field_validator("format")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and value not in READERS:
            raise PydanticCustomError("format", "Input should be one of {formats}", {"formats": ", ".join(READERS)})
        return value
