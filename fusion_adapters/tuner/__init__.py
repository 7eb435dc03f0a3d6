"""The peft method: its tuner, its layer, and its entry in peft's registry.

The only package that touches peft's internals.
"""

from __future__ import annotations

import peft
from peft import mapping
from peft.tuners.lora import LoraModel

from .active import adapters_in_use, idle_tensors, scalings_in_use, tensors_in_use
from .config import FusionConfig, FusionPeftType
from .depth import depth_weights
from .heads import TASK_HEADS
from .layer import FusionLayer, fusion_layers
from .model import FusionModel
from .pooling import reads_means
from .replay import layers_read
from .use import use_adapter
from .ways import accompany

__all__ = [
    "TASK_HEADS",
    "FusionLayer",
    "FusionModel",
    "adapters_in_use",
    "depth_weights",
    "fusion_layers",
    "idle_tensors",
    "layers_read",
    "reads_means",
    "register",
    "scalings_in_use",
    "tensors_in_use",
    "use_adapter",
]


def register() -> None:
    """Enters the method into peft's registry. Called when this room is imported.

    Raises:
        ImportError: If the installed peft is not one that this package was tested with.
    """
    hooks = ("_get_adapter_state_dict", "_remap_adapter_state_dict_for_load")
    names = ("PEFT_TYPE_TO_CONFIG_MAPPING", "PEFT_TYPE_TO_TUNER_MAPPING", "PEFT_TYPE_TO_PREFIX_MAPPING")
    lacking = [n for n in names if not hasattr(mapping, n)] + [n for n in hooks if not hasattr(LoraModel, n)]
    if lacking:
        raise ImportError(
            f"fusion-adapters needs peft 0.21.2; the installed peft {peft.__version__} lacks {', '.join(lacking)}. Install "
            "'peft>=0.21.2,<0.22'."
        )
    mapping.PEFT_TYPE_TO_CONFIG_MAPPING[FusionPeftType.FUSION] = FusionConfig  # type: ignore[index]
    mapping.PEFT_TYPE_TO_TUNER_MAPPING[FusionPeftType.FUSION] = FusionModel  # type: ignore[index]
    mapping.PEFT_TYPE_TO_PREFIX_MAPPING[FusionPeftType.FUSION] = LoraModel.prefix  # type: ignore[index]
    accompany()


register()
