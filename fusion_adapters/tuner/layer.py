"""The layer that holds the fusions of all adapters of a model, and feeds the active one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..backbone.blocks import Backbone
from ..backbone.families import input_embeddings
from ..backbone.fingerprint import fingerprints
from ..backbone.quantization import keep_unpacked
from ..backbone.replay import FusedState, GivenStates
from ..backbone.taps import Taps
from ..backbone.walk import modules_of
from ..fusions import Context, Fusion
from ..fusions.pooling import Means
from .active import modules_in, trains
from .casts import warn_if_cast, warn_if_cast_in_call
from .drafts import is_draft, named_blocks
from .fusing import Fusing
from .lower import depth_of
from .rows import FusingRows
from .threads import Calls, Follower, deleted


class FusionLayer(Follower, AuxiliaryTrainingWrapper, BaseTunerLayer):
    """The fusions of all adapters of a model, one of them active, and the taps that feed it.

    It hangs in the module tree as a child of the backbone, so that peft, transformers, optimizers and `.to()` find its
    parameters. To peft it is a training wrapper (its weights are saved and loaded whole) and a tuner layer (peft and
    transformers switch it on and off with the LoRA layers).

    Args:
        backbone: The stack that it fuses, up to where that adapter does.
        adapter_name: The name of the first adapter.
        fusion: That adapter's fusion.
        model: See `Taps`.
        check: See `Taps`.
        known: The backbone's fingerprints, if they are known.
        calls: The calls of the model; None for one that no thread shares.
    """

    adapter_layer_names: tuple[str, ...] = ("fusions",)

    def __init__(
        self,
        backbone: Backbone,
        adapter_name: str,
        fusion: Fusion,
        model: nn.Module | None = None,
        check: Callable[[nn.Module, Any], GivenStates | FusedState] | None = None,
        known: dict[str, str] | None = None,
        calls: Calls | None = None,
    ) -> None:
        super().__init__(nn.Identity(), adapter_name, fusion=fusion)
        self._active_adapter: list[str] = []
        self.calls = Calls() if calls is None else calls
        self.training = backbone.root.training
        # plain attributes of a plain object: registered, the backbone would become a child of its own child
        self.backbone = backbone.whole
        # by depth, see Backbone.depth; now: a training may change what they are of (bias='all')
        self.fingerprints = {backbone.depth: fingerprints(backbone) if known is None else known}
        self._trainable: dict[str, bool] = {}
        self.as_given: set[str] = set()  # adapters attached with autocast_adapter_dtype=False
        self.cast_told = False
        self.named_blocks = named_blocks(backbone)
        self.taps = Taps(
            backbone.root, self.backbone.blocks, self, backbone.causal, backbone.hidden_size, model, check, self.calls
        )
        self.taps.skip_above(self._depth(fusion))

    # what a forward pass does

    def wanted_layers(self) -> frozenset[int] | None:
        """The layer states that the active fusion reads; None if none is active."""
        fusion = self.active_fusion
        return None if fusion is None else frozenset(fusion.layers)

    @property
    def mixes_positions(self) -> bool:
        """Whether the active fusion's result at a position depends on other positions."""
        fusion = self.active_fusion
        return fusion is not None and (fusion.mixes_positions or fusion.pools)

    @property
    def active_fusion(self) -> Fusion | None:
        """The active adapter's fusion; None if adapters are disabled or none is active."""
        active, disabled = self.state_in_call()
        if disabled or not active or (self.calls is not None and self.calls.here.unfused):
            return None
        fusion = self.fusions._modules.get(active[0])
        if fusion is None:
            raise deleted(active[0])
        return fusion  # type: ignore[return-value]

    def begin(self) -> Fusing | FusingRows | None:
        """What fuses in a call of this thread that begins now; None if no fusion is active."""
        fusion = self.active_fusion
        if fusion is None or is_draft(self):
            return None
        rows = None if self.calls is None else self.calls.here.rows
        if rows is not None:
            own = {name: self.fusing(name) for name in dict.fromkeys(rows) if name in self.fusions}
            return FusingRows(own, rows, self.backbone.num_layers, self.backbone.model_type)
        if self.training and torch.is_grad_enabled():
            warn_if_cast_in_call(self)
        asked = None if self.calls is None else self.calls.here.recording
        recording = asked[1] if asked is not None and asked[0] is self and fusion.has_weights else None
        return self._fusing(fusion, recording)

    def _fusing(self, fusion: Fusion, recording: list[Tensor] | None = None) -> Fusing:
        mixes = fusion.mixes_positions or fusion.pools
        return Fusing(self, fusion, frozenset(fusion.layers), mixes, self._depth(fusion), recording)

    def fusing(self, name: str) -> Fusing:
        """What fuses in a call of an adapter, whoever is active."""
        return self._fusing(self.fusions[name])  # type: ignore[arg-type]

    @property
    def running(self) -> Backbone:
        """What runs of the backbone under the active fusion: all of it, or its lower blocks (`fusion_depth`)."""
        fusion = self.active_fusion
        depth = None if fusion is None else depth_of(fusion)
        return self.backbone if depth is None else self.backbone.lower(depth)

    def _depth(self, fusion: Fusion) -> int:
        depth = depth_of(fusion)
        return self.backbone.num_layers if depth is None else depth

    def forward(  # type: ignore[override]
        self,
        states: Sequence[Tensor | None],
        last: Tensor,
        context: Context,
        fusion: Fusion,
        recording: list[Tensor] | None = None,
    ) -> Tensor:
        """The fused state by one adapter's fusion, see `Fuse`; its weights over depth go into `recording`."""
        chosen: list[Any] = [states[i] for i in fusion.layers]
        means = Means(context, last) if fusion.pools and not context.means else None
        if means is not None and not fusion.mixes_positions:
            last, *chosen = [means(state) for state in (last, *chosen)]
        if fusion.stop_gradient and last.requires_grad:
            fused = _fuse(fusion, [state.detach() for state in chosen], last.detach(), context, recording)
            fused = fused + (last - last.detach())  # adds zero, and the gradient that z_L has without a fusion
        else:
            fused = _fuse(fusion, chosen, last, context, recording)
        # blocks over positions want positions to look at: the mean is of what they answer
        return means(fused) if means is not None and fusion.mixes_positions else fused

    @contextlib.contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """In the body, calls of this thread leave the weights over depth in the list that it gives."""
        assert self.calls is not None
        here, found = self.calls.here, []  # type: ignore[var-annotated]
        before, here.recording = here.recording, (self, found)
        try:
            yield found
        finally:
            here.recording = before

    @contextlib.contextmanager
    def unfused(self) -> Iterator[None]:
        """In the body, calls of this thread leave the fusion out, and LoRA and heads as they are."""
        assert self.calls is not None
        here = self.calls.here
        before, here.unfused = here.unfused, True
        try:
            yield
        finally:
            here.unfused = before

    def trains_states(self) -> bool:
        """Whether something trains in what runs of the backbone, so that its layer states change."""
        return trains(self.running.upstream)

    def train(self, mode: bool = True) -> FusionLayer:
        """Sets the mode of the fusions, and keeps a backbone in which nothing trains in evaluation mode.

        The layer states are then a function of the input alone. The backbone's own `train()` reaches this layer last.
        """
        super().train(mode)
        if not mode:
            return self
        warn_if_cast(self)
        frozen: set[nn.Module] = set()
        unreached = self.running.unreached
        frozen.update(block.eval() for block in self.running.above if id(block) in unreached)
        if not self.trains_states():
            root = self.backbone.root
            root.training = False
            for module in (*root.children(), *self.backbone.upstream):
                if module is self or trains([module]):
                    continue
                # most blocks have gone with the child of the root that holds them
                frozen.add(module.eval() if module.training else module)
        keep_unpacked(modules_in([self.backbone.base], without=frozen))
        embeddings = input_embeddings(self.backbone.base)
        if frozen and getattr(embeddings, "neftune_noise_alpha", None) and not embeddings.training:
            warnings.warn(
                "neftune_noise_alpha adds no noise here: nothing trains inside the backbone, which therefore stays in evaluation "
                "mode, embeddings included. Leave it out, or add LoRA.",
                stacklevel=2,
            )
        return self

    # what peft and transformers ask of a wrapper and of a tuner layer

    @property
    def weight(self) -> Tensor:
        raise AttributeError("a fusion layer has no weight of a wrapped module")

    @property
    def bias(self) -> Tensor:
        raise AttributeError("a fusion layer has no bias of a wrapped module")

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.fusions = nn.ModuleDict()

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        super().update(adapter_name)
        if "fusion" in kwargs:
            self.fusions[adapter_name] = kwargs["fusion"]

    def add(self, adapter_name: str, fusion: Fusion, backbone: Backbone, marks: dict[str, str]) -> None:
        """Adds an adapter's fusion; the backbone is that up to where it fuses, `marks` are its fingerprints."""
        self.update(adapter_name, fusion=fusion)
        self.fingerprints.setdefault(backbone.depth, marks)
        self.taps.skip_above(self._depth(fusion))

    def _get_available_adapters(self) -> set[str]:
        return set(self.fusions)

    def config(self) -> Any:
        return None if self.named_blocks is None else self.backbone.root.config

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        names = [adapter_name] if isinstance(adapter_name, str) else adapter_name
        known = [name for name in names if name in self.fusions]
        if len(known) > 1:
            raise ValueError(
                f"{len(known)} adapters with a fusion cannot be active together ({', '.join(known)}): each replaces the "
                "output of the last block. Activate one of them."
            )
        return known[0] if known else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        chosen = self.check_set_adapter(adapter_names)
        for name, fusion in self.fusions.items():
            fusion.requires_grad_(name == chosen and not inference_mode)
        self._trainable.clear()  # enabling again must not undo this
        self._active_adapter = [] if chosen is None else [chosen]
        self.switched()
        if self.training:  # another adapter may train inside the backbone where this one does not
            self.backbone.root.train()

    def enable_adapters(self, enabled: bool) -> None:
        if enabled == (not self._disable_adapters):
            return
        self._disable_adapters = not enabled
        self.switched()
        if enabled:
            for name, parameter in self.fusions.named_parameters():
                parameter.requires_grad_(self._trainable.get(name, parameter.requires_grad))
            return
        self._trainable = {name: p.requires_grad for name, p in self.fusions.named_parameters()}
        self.fusions.requires_grad_(False)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None = None) -> None:
        if adapter_name not in self.fusions:
            return
        if adapter_name in self._active_adapter:  # first: a call that begins meanwhile has the next one
            self.set_adapter((new_active_adapters or sorted({*self.fusions} - {adapter_name}))[:1])
        del self.fusions[adapter_name]
        self._adapters.discard(adapter_name)
        self.as_given.discard(adapter_name)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:  # type: ignore[override]
        return {k: state_dict[v] for k, v in self.adapter_state_dict_load_map(adapter_name).items()}

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self.fusions:
            return {}
        return {k: f"fusions.{adapter_name}.{k}" for k in self.fusions[adapter_name].state_dict()}

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Nothing to merge: while LoRA is folded into the weights, the fusion stays where it is."""

    def unmerge(self) -> None:
        """Nothing to undo, see `merge`."""

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return False

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        if adapter_name in self.fusions and not any(p.is_meta for p in self.fusions[adapter_name].parameters()):
            self.fusions[adapter_name].to(device or self.backbone.lower(depth_of(self.fusions[adapter_name])).device)


def _fuse(
    fusion: Fusion, chosen: Sequence[Tensor], last: Tensor, context: Context, recording: list[Tensor] | None
) -> Tensor:
    if recording is None:
        return fusion(chosen, last, context)
    fused, weights = fusion(chosen, last, context, return_weights=True)
    recording.append(weights.detach())
    return fused


def fusion_layers(model: nn.Module) -> list[FusionLayer]:
    """The fusion layers of an attached model: one, or for an encoder-decoder one for each stack that has fusions."""
    return [m for m in modules_of(model) if isinstance(m, FusionLayer)]
