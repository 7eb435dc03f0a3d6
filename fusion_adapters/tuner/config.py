"""`FusionConfig`: the one object a user writes, a LoRA config with the fields of a fusion."""

from __future__ import annotations

import enum
import textwrap
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, Union

from peft import LoraConfig

from ..fusions import fusion_class, fusion_options
from .card import ModelClass, add_loading_section
from .checks import METHOD_OPTIONS, check_fields
from .digest import OPTIONS, options_digest
from .lora import changes_lora, names_lora


class FusionPeftType(str, enum.Enum):  # noqa: UP042 - as peft has its own
    """Our key in peft's registry. peft's own enum is closed; its look-ups are by string value."""

    FUSION = "FUSION"


# How far the best learning rates of fusions lie above LoRA's, 2e-4, on encoders and on decoders (docs/decoders.md).
ALPHA, ALPHA_OF_DECODERS = 8.0, 2.0


def _optional(text: str) -> Any:
    return field(default=None, metadata={"help": text})


if TYPE_CHECKING:

    class _MethodOptions(LoraConfig):
        def __getattr__(self, name: str) -> Any: ...

else:
    _MethodOptions = make_dataclass(
        "_MethodOptions",
        [
            (f"fusion_{name}", Optional[Union[option.kinds or (Any,)]], _optional(option.help))  # noqa: UP007, UP045
            for name, option in METHOD_OPTIONS.items()
        ],
        bases=(LoraConfig,),
        namespace={"__module__": __name__, "__doc__": "LoRA's config with the options of all methods."},
    )


@dataclass
class FusionConfig(_MethodOptions):
    """Configuration of a fusion adapter, with or without LoRA inside the backbone.

    All fields of `peft.LoraConfig` keep their meaning: with an option of LoRA (`r`, `lora_alpha`, ...) or `target_modules`
    there is LoRA in the backbone, by default in the modules that peft chooses for the model; with none of them the fusion
    trains alone. The options of a method are None for its own default; one that the method does not have is refused.

    Args:
        fusion: The method, a name in `FUSIONS`.
        fusion_layers: The layer states to fuse, `0` (embeddings) to `L` (last block) or negative; `"every:4"`: the last block and each
            fourth below it; `"last:8"`: the last eight blocks; None means `1 .. L`.
        fusion_OPTION: The options of the methods, which stand here by name in `help(FusionConfig)`.
        fusion_depth: Where the backbone ends for this adapter: the fusion reads no state above that block, and its result stands
            for the block's output; blocks above do not run, and need not be loaded (`load_cut`). A number from 1, or a fraction
            of the blocks in (0, 1), which becomes the number when attached. None means the last. `fusion_layers` then counts
            from there: None means `1 .. fusion_depth`, -1 that block. In recipes also `auto`: the run chooses on development data.
        fusion_budget: How many parameters fusion and LoRA may train together: a number, `"1M"`, `"dwatt-paper"` (what the
            paper's DWAtt would train), `"lora:r=16"` (what that LoRA would) or `"none"` (the method's own width, whatever the
            backbone). When attached, the method's free width (see `fit_budget`) is set to the largest that fits, and this field to
            None. Left out, with no width given, the fusion trains at most what a LoRA of rank 8 on the attention projections
            would (see `default_parameters`).
        fusion_stop_gradient: With LoRA: the fusion reads the layer states, but sends no gradient back through them, so that
            LoRA learns as it would without the fusion, by what reaches the last block's output directly.
        fusion_pool: `"mean"`: each layer state is replaced by a mean over the positions of the text, before the fusion, so that a head
            that picks one position picks the mean (see `fusions.pooling.Means`). For heads over whole texts. None or `"last"`: nothing
            is pooled, and a decoder's head reads the last token.
        fusion_norm: `"rms"`: the fusion computes in units of each state's root mean square, and adds in those of `z_L`, so that
            layers of very different scale weigh alike; `"none"`: on the states as they are. None is `"rms"` on decoders, `"none"` on
            other backbones and in the papers' forms.
        fusion_alpha: How many times a parameter of the fusion, or of the task head, counts for what is stored: Adam moves both as a
            learning rate so many times as high would, so that their best rate lies where LoRA's does. None means 2 on
            decoders and 8 on other backbones, in the papers' forms 1.
        fusion_shortcuts: For `fusion="shortcut"`: the folder of linear shortcuts (`save_shortcuts`) whose maps a fresh adapter takes
            over. They are saved with it, and this field is then None: the folder is not needed again.
        fusion_lora: Whether there is LoRA in the backbone; None: if an option of LoRA or its modules are given. True or
            False in a saved adapter.
        fusion_blocks: Name of the backbone's list of blocks, for models where it is not found.
        fusion_stack: For an encoder-decoder: `"encoder"`, `"decoder"` or `"both"` (a fusion in each); None means the
            stack that the head reads, the decoder where there is one.
        fusion_model_type: Filled in when attached: the backbone's model type.
        fusion_hidden_size: Filled in when attached: the backbone's width; a list for both stacks of an encoder-decoder.
        fusion_num_layers: Filled in when attached: the backbone's depth; a list for both stacks.
        fusion_fingerprint: Filled in when attached: a signature of the backbone's weights.
        fusion_gguf: Filled in when attached: name and digest of the GGUF file that the backbone was loaded from.
        fusion_digest: Filled in when saved: digests of the options and of the weights, see `tuner/digest.py`.
        fusion_labels: Filled in when saved: the names of a classifier's outputs, in their order (the model's `id2label`).

    Raises:
        ValueError: If a field does not fit; the message says what would.
    """

    fusion: str = field(default="dwatt", metadata={"help": "The fusion method, a name in fusion_adapters.FUSIONS."})
    fusion_layers: list[int] | str | None = _optional(
        "Layer states to fuse, a list, 'every:4' or 'last:8'; None means the outputs of all blocks."
    )
    fusion_depth: int | float | None = _optional(
        "The block at which the backbone ends: a number, or a fraction of the blocks."
    )
    fusion_budget: int | str | None = _optional("Trainable parameters to choose the method's width by.")
    fusion_stop_gradient: bool = field(
        default=False, metadata={"help": "Whether the fusion sends no gradient into a backbone with LoRA."}
    )
    fusion_pool: str | None = _optional("'mean': means over a text's positions in the place of its layer states.")
    fusion_norm: str | None = _optional("'rms' to fuse the states in units of their root mean square; 'none'.")
    fusion_alpha: float | None = _optional("How many times the parameters of fusion and head count; None: 8, on decoders 2.")
    fusion_shortcuts: str | None = _optional("'shortcut': folder of linear shortcuts whose maps a fresh adapter takes over.")
    fusion_lora: bool | None = _optional("Whether there is LoRA in the backbone; None: if an option of LoRA is given.")
    fusion_blocks: str | None = _optional("Name of the backbone's list of blocks.")
    fusion_stack: str | None = _optional("Stack of an encoder-decoder: 'encoder', 'decoder' or 'both'.")
    fusion_model_type: str | None = _optional("Filled in when attached.")
    fusion_hidden_size: int | list[int] | None = _optional("Filled in when attached.")
    fusion_num_layers: int | list[int] | None = _optional("Filled in when attached.")
    fusion_fingerprint: str | None = _optional("Filled in when attached.")
    fusion_gguf: str | None = _optional("Filled in when attached.")
    fusion_digest: dict[str, str] | None = _optional("Filled in when saved.")
    fusion_labels: list[str] | None = _optional("Filled in when saved.")

    if TYPE_CHECKING:  # the options are not known before the methods are imported

        def __init__(self, fusion: str = "dwatt", **fields: Any) -> None: ...

    def __new__(cls, *args: Any, **fields: Any) -> FusionConfig:  # noqa: D102
        config = super().__new__(cls)
        config.__dict__["named"] = frozenset(fields)  # what somebody wrote, defaults included
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        if names_lora(self.__dict__.pop("named")) and self.fusion_lora is None:
            self.fusion_lora = True
        self.peft_type = FusionPeftType.FUSION  # type: ignore[assignment]
        # null in a file, of which peft takes the keys
        self.rank_pattern, self.alpha_pattern = self.rank_pattern or {}, self.alpha_pattern or {}
        # A config that names a backbone was saved with an adapter and belongs to that backbone.
        self.bound = self.fusion_num_layers is not None
        # Where the config was loaded from; its weights are checked against the model before they are used.
        self.source: tuple[str, dict[str, Any]] | None = None
        # Whether it is in a model; its digest is then that of its last save, and the weights may have moved on.
        self.attached = False
        # The class of the model that it is attached to, for the card; known when the adapter is saved.
        self.model_class: ModelClass | None = None
        check_fields(self)

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
        config: Any = super().from_pretrained(str(pretrained_model_name_or_path), subfolder=subfolder, **kwargs)
        if not isinstance(config, FusionConfig):
            kind = getattr(config.peft_type, "value", config.peft_type)
            raise ValueError(
                f"The adapter in {str(pretrained_model_name_or_path)!r} is no fusion, its peft_type is {kind!r}. Load it as what it is, "
                f"{type(config).__name__}.from_pretrained, or PeftModel.from_pretrained without a config; its weights do not fit a fusion."
            )
        else:
            download, _, _ = cls._split_kwargs(kwargs)
            config.source = (str(pretrained_model_name_or_path), {"subfolder": subfolder, **download})
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Saves the config; adds to the model card that peft wrote beside it how the adapter is loaded."""
        if self.fusion_digest is not None:  # of the weights that are saved with it
            self.fusion_digest = {**self.fusion_digest, OPTIONS: options_digest(self)}
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
        given = {name: getattr(self, f"fusion_{name}") for name in METHOD_OPTIONS}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def widths(self) -> dict[str, Any]:
        """Those options of the method that say its size, without the prefix; None where they were not set."""
        return {name: getattr(self, f"fusion_{name}") for name in fusion_class(self.fusion).widths}

    def settle_options(self, causal: bool) -> None:
        """Writes the defaults for an encoder or a (causal) decoder, so that a saved adapter does not change when a default does."""
        for name, default in fusion_options(self.fusion).items():
            if getattr(self, f"fusion_{name}") is None:
                setattr(self, f"fusion_{name}", default)
        self.fusion_norm = self.norm_on(causal)
        self.fusion_alpha = self.alpha_on(causal)

    def norm_on(self, causal: bool) -> str:
        """`fusion_norm`, or its default: `"rms"` on decoders; none in papers' forms, copies of a block, and adapters saved without it."""
        if self.fusion_norm is not None:
            return self.fusion_norm
        plain = self.bound or self.options.get("init") == "paper" or self.options.get("copy_last", False)
        return "rms" if causal and not plain else "none"

    def alpha_on(self, causal: bool) -> float:
        """`fusion_alpha`, or its default for an encoder or a decoder; the papers' forms, and adapters saved without it, have 1."""
        if self.fusion_alpha is not None or self.bound or self.options.get("init") == "paper":
            return self.alpha
        return ALPHA_OF_DECODERS if causal else ALPHA

    @property
    def alpha(self) -> float:
        """`fusion_alpha` as it is settled; 1 where it is not."""
        return 1.0 if self.fusion_alpha is None else float(self.fusion_alpha)

    @property
    def has_lora(self) -> bool:
        """Whether the config puts LoRA into the backbone."""
        if self.target_modules or self.target_parameters:
            return True
        if self.bound:  # what was saved with an adapter names the modules
            return False
        return changes_lora(self) if self.fusion_lora is None else self.fusion_lora


def _told_options() -> str:
    lines = (f"        fusion_{name}: {option.help}" for name, option in METHOD_OPTIONS.items())
    return "\n".join(textwrap.fill(line, 125, subsequent_indent=" " * 12) for line in lines)


if FusionConfig.__doc__:  # python -OO has none
    _line = next(line for line in FusionConfig.__doc__.splitlines() if "fusion_OPTION" in line)
    FusionConfig.__doc__ = FusionConfig.__doc__.replace(_line, _told_options())
