"""Layer fusion as a method of peft: adapters that read all layers of a frozen transformers model.

Importing the package registers the method with peft. A LoRA recipe becomes a fusion recipe by one word::

    from fusion_adapters import FusionConfig
    config = FusionConfig(fusion="dwatt", task_type="TOKEN_CLS", r=8, target_modules=["query", "value"])
    model = get_peft_model(backbone, config)
"""

from .config import FusionConfig
from .fusions import FUSIONS
from .quantization import quantization_config
from .tuner import FusionModel, depth_weights, register

__version__ = "0.1.0"
__all__ = ["FUSIONS", "FusionConfig", "FusionModel", "depth_weights", "quantization_config"]

register()
