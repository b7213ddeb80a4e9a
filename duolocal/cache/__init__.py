"""Floor 3: the KV cache."""

from duolocal.cache.cache import CacheMemory, DuoCache, Snapshot

__all__ = ["CacheMemory", "DuoCache", "Snapshot"]
