"""Cached layer states: one forward pass of a frozen backbone, then training without it.

cache = cache_layer_states(model, rows, "states", collator)
Trainer(model, arguments, cache.collator(collator), cache.dataset(rows)).train()
"""

from .cache import LayerStateCache
from .dataset import CachedCollator, CachedDataset
from .extract import cache_layer_states
from .key import cache_key
from .plan import Plan, plan_cache
from .source import Source, adapters_digest, source_of
from .storage import StaleCacheError

__all__ = [
    "CachedCollator",
    "CachedDataset",
    "LayerStateCache",
    "Plan",
    "Source",
    "StaleCacheError",
    "adapters_digest",
    "cache_key",
    "cache_layer_states",
    "plan_cache",
    "source_of",
]
