"""An LRU cache bounded by bytes."""

from collections import OrderedDict
from collections.abc import Callable


class LRUCache:
    """Evicts the least recently used values while they take more than `megabytes` together."""

    def __init__(self, megabytes: float):
        self.limit, self.used = megabytes * 2**20, 0
        self._items: OrderedDict[object, tuple[object, int]] = OrderedDict()

    def get(self, key: object, make: Callable[[], tuple[object, int]]) -> object:
        """Return the value of `key`. If it is not cached, `make` returns (value, size in bytes)."""
        if key not in self._items:
            self._items[key] = make()
            self.used += self._items[key][1]
            while self.used > self.limit and len(self._items) > 1:
                self.used -= self._items.popitem(last=False)[1][1]
        self._items.move_to_end(key)
        return self._items[key][0]
