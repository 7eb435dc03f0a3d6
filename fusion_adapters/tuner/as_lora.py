"""What peft does by the type of a config, or by its modules, told in its own words for the time of a call."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from peft.utils import PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES

from .config import FusionConfig


@contextlib.contextmanager
def marked_lora_free(config: FusionConfig) -> Iterator[None]:
    """For the time of an injection, says "no LoRA" in peft's way; None would let peft choose modules."""
    if config.has_lora:
        yield
        return
    config.target_modules = DUMMY_TARGET_MODULES
    try:
        yield
    finally:
        config.target_modules = None


@contextlib.contextmanager
def as_lora(config: Any) -> Iterator[None]:
    """In the body, the config's type is LoRA's, for what peft does by the type."""
    own, config.peft_type = config.peft_type, PeftType.LORA
    try:
        yield
    finally:
        config.peft_type = own
