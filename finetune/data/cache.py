"""An LRU cache bounded by bytes."""

from collections import OrderedDict
from collections.abc import Callable


class LRUCache:
    """A dictionary that forgets what was not used for longest once it holds more than so many bytes."""

    def __init__(self, megabytes: float):
        self.limit, self.used = megabytes * 2**20, 0
        self._items: OrderedDict[object, tuple[object, int]] = OrderedDict()

    def get(self, key: object, make: Callable[[], tuple[object, int]]) -> object:
        """The value of `key`; `make` gives it and its size in bytes where it is not there."""
        if key in self._items:
            self._items.move_to_end(key)
            return self._items[key][0]
        value, size = make()
        self._items[key] = (value, size)
        self.used += size
        while self.used > self.limit and len(self._items) > 1:
            self.used -= self._items.popitem(last=False)[1][1]
        return value
