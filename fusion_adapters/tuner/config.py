"""`FusionConfig`: the one object a user writes, a LoRA config with the fields of a fusion."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from peft import LoraConfig

from ..fusions import fusion_class, fusion_options
from .card import add_loading_section
from .sizes import check_budget


class FusionPeftType(str, enum.Enum):  # noqa: UP042 - as peft has its own
    """Our key in peft's registry. peft's own enum is closed; its look-ups are by string value."""

    FUSION = "FUSION"


# Fields named fusion_* that are not options of a method.
_GENERAL = {
    "fusion_layers",
    "fusion_budget",
    "fusion_stop_gradient",
    "fusion_blocks",
    "fusion_stack",
    "fusion_model_type",
    "fusion_hidden_size",
    "fusion_num_layers",
    "fusion_fingerprint",
}


# Of values that are not None; a text that reaches a fusion is found only when it is built, or in the first forward pass.
_TYPES: dict[str, tuple[Any, str]] = {
    "fusion_bottleneck": (Real, "a width (a whole number) or a fraction of the hidden size"),
    "fusion_dropout": (Real, "a number"),
    "fusion_temperature": (Real, "a number"),
    "fusion_heads": (Integral, "a whole number"),
    "fusion_num_blocks": (Integral, "a whole number"),
    "fusion_feedforward": (Integral, "a whole number"),
    "fusion_scale": (bool, "true or false"),
    "fusion_copy_last": (bool, "true or false"),
}


def _option(text: str) -> Any:
    return field(default=None, metadata={"help": text})


@dataclass
class FusionConfig(LoraConfig):
    """Configuration of a fusion adapter, with or without LoRA inside the backbone.

    All fields of `peft.LoraConfig` keep their meaning, with one exception: `target_modules=None` means no LoRA. The
    options of a method are None for its own default; an option that the method does not have is refused.

    Args:
        fusion: The method, a name in `FUSIONS`.
        fusion_layers: The layer states to fuse, `0` (embeddings) to `L` (last block) or negative; None means `1 .. L`.
        fusion_bottleneck: Width of the method's inner layer; an int, or a float as fraction of the hidden size.
        fusion_heads: Heads of the method's attention (over depth in `dwatt` and `dwconcat`, over positions in `deeper`).
        fusion_scale: Whether `dwatt` scales its scores by the square root of the size of a head.
        fusion_dropout: Probability of dropping a weight over depth in training.
        fusion_weights: `"uniform"` gives `dwatt` and `dwconcat` the same weight for every layer, a control.
        fusion_temperature: Divides the scores of `laya`.
        fusion_init: `"identity"` (a fresh adapter leaves the model's answers as they were) or `"paper"`.
        fusion_num_blocks: How many blocks `deeper` adds.
        fusion_feedforward: Feed-forward width of the blocks that `deeper` adds.
        fusion_copy_last: Whether `deeper` starts from copies of the backbone's last block.
        fusion_budget: How many parameters fusion and LoRA may train together: a number, `"1M"`, `"dwatt-paper"` (what the
            paper's DWAtt would train) or `"lora:r=16"` (what that LoRA would). When attached, the method's free width (see
            `fit_budget`) is set to the largest that fits, and this field to None.
        fusion_stop_gradient: With LoRA: the fusion reads the layer states, but sends no gradient back through them, so that
            LoRA learns as it would without the fusion, by what reaches the last block's output directly.
        fusion_blocks: Name of the backbone's list of blocks, for models where it is not found.
        fusion_stack: For an encoder-decoder: `"encoder"`, `"decoder"` or `"both"` (a fusion in each); None means the
            stack that the head reads, the decoder where there is one.
        fusion_model_type: Filled in when attached: the backbone's model type.
        fusion_hidden_size: Filled in when attached: the backbone's width; a list for both stacks of an encoder-decoder.
        fusion_num_layers: Filled in when attached: the backbone's depth; a list for both stacks.
        fusion_fingerprint: Filled in when attached: a signature of the backbone's weights.

    Raises:
        ValueError: If a field does not fit; the message says what would.
    """

    fusion: str = field(default="dwatt", metadata={"help": "The fusion method, a name in fusion_adapters.FUSIONS."})
    fusion_layers: list[int] | None = _option("Layer states to fuse; None means the outputs of all blocks.")
    fusion_bottleneck: float | None = _option(
        "Width of the method's inner layer: int, or float as fraction of the hidden size."
    )
    fusion_heads: int | None = _option("Heads of the method's attention.")
    fusion_scale: bool | None = _option("Whether dwatt scales its scores.")
    fusion_dropout: float | None = _option("Dropout on the weights over depth.")
    fusion_weights: str | None = _option("'attention', or 'uniform' for the control.")
    fusion_temperature: float | None = _option("Temperature of laya's softmax over depth.")
    fusion_init: str | None = _option("'identity' or 'paper'.")
    fusion_num_blocks: int | None = _option("How many blocks 'deeper' adds.")
    fusion_feedforward: int | None = _option("Feed-forward width of the blocks that 'deeper' adds.")
    fusion_copy_last: bool | None = _option("Whether 'deeper' copies the backbone's last block.")
    fusion_budget: int | str | None = _option("Trainable parameters to choose the method's width by.")
    fusion_stop_gradient: bool = field(
        default=False, metadata={"help": "Whether the fusion sends no gradient into a backbone with LoRA."}
    )
    fusion_blocks: str | None = _option("Name of the backbone's list of blocks.")
    fusion_stack: str | None = _option("Stack of an encoder-decoder: 'encoder', 'decoder' or 'both'.")
    fusion_model_type: str | None = _option("Filled in when attached.")
    fusion_hidden_size: int | list[int] | None = _option("Filled in when attached.")
    fusion_num_layers: int | list[int] | None = _option("Filled in when attached.")
    fusion_fingerprint: str | None = _option("Filled in when attached.")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = FusionPeftType.FUSION  # type: ignore[assignment]
        # A config that names a backbone was saved with an adapter and belongs to that backbone.
        self.bound = self.fusion_num_layers is not None
        # Where the config was loaded from; its weights are checked against the model before they are used.
        self.source: tuple[str, dict[str, Any]] | None = None
        self._check_types()
        self._check_method()
        self._check_budget()
        self._check_lora()

    @classmethod
    def paper(cls, fusion: str, **kwargs: Any) -> FusionConfig:
        """The published form of a method (for `dwatt` and `concat`: arXiv 2209.15168, see docs/methods.md).

        Args:
            fusion: The method's name.
            **kwargs: Further fields; they win over the preset.
        """
        preset = {f"fusion_{name}": value for name, value in fusion_class(fusion).paper.items()}
        return cls(fusion=fusion, **{**preset, **kwargs})

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, subfolder: str | None = None, **kwargs: Any
    ) -> FusionConfig:
        """Loads the config of a saved adapter from a folder or a hub id; see `peft.PeftConfig.from_pretrained`."""
        config = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if isinstance(config, FusionConfig):
            download, _, _ = cls._split_kwargs(kwargs)
            config.source = (str(pretrained_model_name_or_path), {"subfolder": subfolder, **download})
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the config; adds to the model card that peft wrote beside it how the adapter is loaded."""
        super().save_pretrained(save_directory, **kwargs)
        add_loading_section(save_directory, self)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dictionary, as they are saved."""
        values = super().to_dict()
        if values["modules_to_save"]:  # peft adds the names of heads each time that an adapter is attached
            values["modules_to_save"] = list(dict.fromkeys(values["modules_to_save"]))
        return values

    @property
    def options(self) -> dict[str, Any]:
        """The method's options that were set, without the prefix `fusion_`."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name.startswith("fusion_")}
        return {n.removeprefix("fusion_"): v for n, v in given.items() if n not in _GENERAL and v is not None}

    def settle_options(self) -> None:
        """Writes the method's defaults into the fields, so that a saved adapter does not change when a default does."""
        for name, default in fusion_options(self.fusion).items():
            if getattr(self, f"fusion_{name}") is None:
                setattr(self, f"fusion_{name}", default)

    @property
    def has_lora(self) -> bool:
        """Whether the config puts LoRA into the backbone."""
        return bool(self.target_modules) or bool(self.target_parameters)

    def _check_types(self) -> None:
        for name, (kind, words) in _TYPES.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, kind) or isinstance(value, bool) is not (kind is bool)):
                raise ValueError(f"{name}={value!r} must be {words}.")
        if isinstance(self.modules_to_save, str):
            raise ValueError(
                f"modules_to_save={self.modules_to_save!r} is a text, of which peft would take each letter for a name. Give a list, "
                f"[{self.modules_to_save!r}]."
            )

    def _check_method(self) -> None:
        known = fusion_options(self.fusion)
        for name, value in self.options.items():
            if name not in known:
                offered = ", ".join(f"fusion_{option}" for option in known) or "none"
                raise ValueError(
                    f"fusion={self.fusion!r} has no option fusion_{name} (given: {value!r}). Its options are: {offered}. "
                    "Remove the field, or choose another method."
                )
        if self.fusion_dropout is not None and not 0 <= self.fusion_dropout < 1:
            raise ValueError(f"fusion_dropout={self.fusion_dropout} must be at least 0 and below 1.")
        if self.fusion_stack not in (None, "encoder", "decoder", "both"):
            raise ValueError(
                f"fusion_stack={self.fusion_stack!r} is unknown. Use 'encoder', 'decoder', 'both', or leave it unset."
            )
        if self.fusion_layers is not None:
            if not isinstance(self.fusion_layers, (list, tuple, range)):
                raise ValueError(
                    f"fusion_layers={self.fusion_layers!r} is not a list of layers. Give one, for example [1, 2, 3]; negatives "
                    "count from the end."
                )
            self.fusion_layers = [int(i) for i in self.fusion_layers]

    def _check_budget(self) -> None:
        if self.fusion_budget is None:
            return
        self.fusion_budget = check_budget(self.fusion_budget)
        given = [f for f in ("fusion_bottleneck", "fusion_num_blocks", "fusion_feedforward") if getattr(self, f) is not None]
        if given:
            raise ValueError(
                f"fusion_budget={self.fusion_budget!r} chooses the width of {self.fusion!r}, but {' and '.join(given)} "
                "set it too. Give one of them."
            )

    def _check_lora(self) -> None:
        if self.fusion_stop_gradient and not self.has_lora:
            raise ValueError(
                "fusion_stop_gradient=True keeps the fusion's gradients from LoRA, but target_modules=None asks for a fusion "
                "without LoRA. Set target_modules, or leave fusion_stop_gradient unset."
            )
        if self.layer_replication:
            raise ValueError(
                "layer_replication changes the number of blocks under the fusion, and the adapter would not fit the "
                "backbone it was made for. Leave it unset; a deeper backbone has to be built before attaching."
            )
        if self.bias != "none" and not self.has_lora:
            raise ValueError(
                f"bias={self.bias!r} trains biases of the backbone, but target_modules=None asks for a fusion alone, which "
                "trains nothing inside it. Set target_modules, or leave bias='none'."
            )
