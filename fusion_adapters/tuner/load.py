"""The load that is under way: which folder or tensors a call of peft or transformers brings in, and what it has changed so far."""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import hf_hub_download
from torch import Tensor

from .undo import Before

_DOWNLOAD = frozenset(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename"}
_OPEN = threading.local()


@dataclass
class Load:
    """One call that loads an adapter.

    Attributes:
        folder: The adapter's folder or hub id; None if its tensors are given.
        where: The subfolder, revision and the like, as for a download.
        key_mapping: peft's renaming of tensors.
        tensors: The tensors, if they are given instead of a folder.
        plain: Whether transformers loads, into a model without peft's wrapping; it renames tensors in its own way.
        before: The model as it was, once a fusion adapter was added to it.
        compared: Whether all tensors were compared with the adapter in the model.
    """

    folder: str | None
    where: dict[str, Any]
    key_mapping: Mapping[str, str] | None = None
    tensors: dict[str, Tensor] | None = None
    plain: bool = False
    before: Before | None = None
    compared: bool = False

    @property
    def source(self) -> tuple[str, dict[str, Any]] | None:
        """Where the files lie, as in `FusionConfig.source`."""
        return None if self.folder is None else (self.folder, self.where)


def download_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a call's arguments that say where a file is downloaded from."""
    return {k: v for k, v in given.items() if k in _DOWNLOAD}


def current_load() -> Load | None:
    """The innermost load under way in this thread."""
    loads = getattr(_OPEN, "loads", [])
    return loads[-1] if loads else None


@contextlib.contextmanager
def under_way(load: Load) -> Iterator[None]:
    """In the body, a load is under way; if the body fails, the model is put back as it was."""
    _OPEN.loads = [*getattr(_OPEN, "loads", []), load]
    try:
        yield
    except BaseException:
        if load.before is not None:
            load.before.restore()
        raise
    finally:
        _OPEN.loads = _OPEN.loads[:-1]
