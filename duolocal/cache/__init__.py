"""Floor 3: the KV cache."""

from duolocal.cache.cache import CacheMemory, DuoCache, Snapshot
from duolocal.cache.home import ON_DEVICE, Placement
from duolocal.cache.selection import SelectionPolicy

__all__ = ["ON_DEVICE", "CacheMemory", "DuoCache", "Placement", "SelectionPolicy", "Snapshot"]
