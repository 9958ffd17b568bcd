"""The cache of files."""

from finetune.data.cache import LRUCache


def test_the_least_recently_used_values_are_evicted():
    cache, made = LRUCache(megabytes=1), []
    get = lambda key: cache.get(key, lambda: (made.append(key) or f"value {key}", 300_000))
    assert [get(key) for key in range(3)] == ["value 0", "value 1", "value 2"]
    get(0)
    get(3)  # 1 is now the least recently used
    get(0), get(2), get(3)
    assert made == [0, 1, 2, 3] and cache.used == 900_000
    get(1)
    assert made == [0, 1, 2, 3, 1] and cache.used == 900_000


def test_a_value_that_is_too_large_is_kept_alone():
    cache = LRUCache(megabytes=1)
    cache.get("a", lambda: ("a", 10))
    assert cache.get("b", lambda: ("b", 2**21)) == "b" and cache.used == 2**21
    assert cache.get("b", lambda: 1 / 0) == "b"
    assert cache.get("c", lambda: ("c", 2**20)) == "c" and cache.used == 2**20, "a full cache is not over its limit"
    cache.get("d", lambda: ("d", 0))
    assert cache.get("c", lambda: 1 / 0) == "c"
