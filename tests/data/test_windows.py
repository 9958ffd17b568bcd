"""The windows of manifests, their endless order, and the parts that ranks take of it."""

import gzip
import json
import random
from collections import Counter

import numpy as np
import pytest

from finetune.cli import UserError
from finetune.data.windows import (
    EvalOrder,
    ManifestIndex,
    RankShare,
    WindowOrder,
    count_windows,
    many_epochs,
    open_windows,
)
from tests.data.support import write_lines
from tests.support import PEAK, script

# --- windows of manifests ---------------------------------------------------------------------------------------


def test_a_file_has_as_many_windows_as_its_frames_need():
    assert [count_windows(seconds, 50) for seconds in (0.0, 4.0, 4.001, 8.0, 8.08)] == [1, 1, 2, 2, 3]
    assert count_windows(0.56, 7) == 1, "0.56 * 12.5 is 7.000000000000001"


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_windows_of_a_manifest(tmp_path, suffix, opener):
    lines = [{"path": "a.wav", "duration": 10}, "", {"path": "ü.wav", "duration": 4.01}, " \t\x0c"]
    lines += [{"path": "c.wav", "duration": 0, "note": "x" * 5000}]
    index = ManifestIndex(write_lines(tmp_path / f"m.jsonl{suffix}", lines, opener), window_frames=50)
    assert len(index) == 3 + 2 + 1 and index.files == 3
    assert [index.window(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    for file, number in enumerate((1, 3, 5)):
        line = index.line(file)
        assert line.number == number and line.path == tmp_path / lines[number - 1]["path"]
        assert line.fields == lines[number - 1] and line.manifest == index.path


def test_the_first_bad_lines_are_listed(tmp_path):
    lines = [{"path": "a.wav", "duration": 1}, "{broken", {"path": "a.wav"}, {"path": "a.wav", "duration": True}]
    path = tmp_path / "m.jsonl"
    for more, others in (([], ""), ([{"path": "../a.wav", "duration": 3}], "1 more")):
        with pytest.raises(UserError) as error:
            ManifestIndex(write_lines(path, lines + more), 50)
        assert all(f"{path}, line {number}: " in str(error.value) for number in (2, 3, 4))
        assert "line 5" not in str(error.value) and others in str(error.value)
        assert ("more" in str(error.value)) == bool(more)


def test_a_manifest_without_files_is_refused(tmp_path):
    for path in (write_lines(tmp_path / "m.jsonl", ["", " "]), tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=path.name):
            ManifestIndex(path, 50)


def test_a_manifest_that_is_replaced_does_not_change_a_run(tmp_path):
    lines = [{"path": f"{i}.wav", "duration": 8.0, "note": "x" * (300 * i)} for i in range(20)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    index = ManifestIndex(path, 40)
    write_lines(tmp_path / "new.jsonl", lines[5:]).replace(path)
    assert [index.line(i).fields for i in range(20)] == lines


def test_all_lines_or_none_have_codes(tmp_path):
    line = {"path": "a.wav", "duration": 1}
    codes = write_lines(tmp_path / "codes.jsonl", [line | {"codes_path": "a.pt"}] * 2)
    audio = write_lines(tmp_path / "audio.jsonl", [line | {"note": "codes_path"}])
    some = write_lines(tmp_path / "some.jsonl", [line | {"codes_path": "a.pt"}, line])
    assert open_windows(str(codes), 50).precomputed and not open_windows(str(audio), 50).precomputed
    for mixed in (f"{audio},{codes}", f"{codes},{audio}", str(some)):
        with pytest.raises(UserError, match="codes"):
            open_windows(mixed, 50)


def test_prompts_of_files_are_read_by_ranks_in_turn(tmp_path):
    lines = [{"path": f"{i}.wav", "duration": 9} for i in range(5)]
    lines[2]["text_prompt"] = "own"
    lines[4] |= {"text_prompt": "t", "voice_prompt": "v"}  # the .json cannot add to these
    for i in range(5):
        (tmp_path / f"{i}.json").write_text(json.dumps({"alignments": [], "voice_prompt": f"{i}.pt"}))
    (tmp_path / "3.json").write_text('{"voice_prompt": ')
    a, b = write_lines(tmp_path / "a.jsonl", lines), write_lines(tmp_path / "b.jsonl", lines[:1])
    windows = open_windows(f"{a},{b}", 50)
    voices = lambda *share: [(line.path.stem, extra.get("voice_prompt")) for line, extra in windows.prompts(*share)]
    first = [("0", "0.pt"), ("2", "2.pt"), ("4", None), ("0", "0.pt")]
    second = [("1", "1.pt"), ("3", None)]
    assert voices(0, 2) == first and voices(1, 2) == second and sorted(voices()) == sorted(first + second)


def test_a_long_manifest_takes_little_memory(tmp_path):
    """A line of 60 bytes on disk may take 400 bytes, with the order of its windows; the lines alone would take more."""
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        for i in range(100_000):
            file.write(f'{{"path": "calls/{i:07d}.wav", "duration": {i % 600}.5}}\n')
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from finetune.data.windows import ManifestIndex, WindowOrder\n"
        f"rss = lambda: {PEAK} / 1024\n"
        "before = rss()\n"
        "index = ManifestIndex(Path(sys.argv[1]), 1250)\n"
        "order = WindowOrder([len(index)], None, 0, True)\n"
        "lines = [index.line(index.window(order(p)[1])[0]) for p in range(100)]\n"
        "print(len(index), rss() - before)\n"
    )
    windows, megabytes = map(float, script("-c", code, path).stdout.split())
    assert windows > 300_000 and megabytes < 40


# --- order ------------------------------------------------------------------------------------------------------


def test_the_order_of_a_seed_never_changes():
    """A run that is resumed, anywhere and with another version of this package, must read the same windows."""
    order = WindowOrder([7], None, seed=3, shuffle=True)
    expected = [np.random.default_rng([3, 1, 0, epoch]).permutation(7).tolist() for epoch in range(2)]
    assert expected == [[2, 1, 4, 0, 5, 6, 3], [2, 0, 3, 6, 5, 4, 1]]
    for positions in (range(14), reversed(range(14))):
        assert all(order(p) == (0, expected[p // 7][p % 7]) for p in positions)
    assert [WindowOrder([7], None, 4, True)(p)[1] for p in range(7)] != expected[0]

    mixed = WindowOrder([4, 2], [0.5, 0.5], seed=3, shuffle=True)
    drawn = [mixed(p) for p in reversed(range(12))][::-1]
    labels = [np.random.default_rng([3, 0, epoch]).permutation([0, 0, 0, 1, 1, 1]).tolist() for epoch in range(2)]
    assert [source for source, _ in drawn] == labels[0] + labels[1] and labels[0] != labels[1], "epochs differ"
    for source, size in ((0, 4), (1, 2)):
        passes = [np.random.default_rng([3, 1, source, i]).permutation(size).tolist() for i in range(3)]
        assert [window for s, window in drawn if s == source] == np.concatenate(passes).tolist()[:6]


@pytest.mark.parametrize("shuffle", [False, True])
def test_mixtures_keep_their_shares_and_go_through_each_source(shuffle):
    sizes = [100, 20, 7]
    order = WindowOrder(sizes, [0.7, 0.2, 0.1], seed=0, shuffle=shuffle)  # of 127 windows: 88.9, 25.4 and 12.7
    drawn = [order(p) for p in range(1270)]
    for epoch in range(10):
        assert Counter(s for s, _ in drawn[epoch * 127 : epoch * 127 + 127]) == {0: 89, 1: 25, 2: 13}
    for source, size in enumerate(sizes):
        mine = [w for s, w in drawn if s == source]
        for start in range(0, len(mine) - size + 1, size):
            assert sorted(mine[start : start + size]) == list(range(size)), "no window twice before all were seen"
    rare = WindowOrder([9, 1], [0.999, 0.001], seed=0, shuffle=shuffle)
    assert {rare(p)[0] for p in range(10)} == {0} and rare.quotas == [10, 0], "none of them in an epoch"


def test_sources_that_are_not_shuffled_alternate():
    order = WindowOrder([4, 2], [2 / 3, 1 / 3], seed=0, shuffle=False)
    assert [order(p) for p in range(12)] == 2 * [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    order = WindowOrder([4, 1], None, seed=0, shuffle=False)
    assert [order(p) for p in range(5)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)], "evenly, not all at the start"
    order = WindowOrder([3], None, seed=0, shuffle=False)
    assert [order(p) for p in range(6)] == 2 * [(0, 0), (0, 1), (0, 2)]


def test_evaluation_reads_evenly_spread_windows_of_all_sources():
    spread = lambda samples: [order(i) for order in [EvalOrder([10, 5], samples)] for i in range(len(order))]
    assert spread(6) == [(0, 0), (0, 2), (0, 5), (0, 7), (1, 0), (1, 2)]
    every = [(0, i) for i in range(10)] + [(1, i) for i in range(5)]
    assert spread(None) == spread(15) == spread(99) == every


# --- ranks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch, ranks", [(1, 4), (4, 1), (2, 2)])
def test_ranks_and_microbatches_partition_the_stream(batch, ranks):
    shares = [RankShare(batch, rank, ranks, position=8) for rank in range(ranks)]
    alike = lambda position: 1
    taken = [p for microbatch in range(6) for share in shares for p in share.positions(microbatch, alike)]
    assert taken == list(range(8, 32)), "a step takes the same windows on any number of ranks"
    assert shares[0].microbatches is None


@pytest.mark.parametrize("ranks, count", [(1, 3), (2, 2), (3, 1), (4, 1)])
def test_a_finite_stream_ends_after_as_many_microbatches_on_all_ranks(ranks, count):
    shares = [RankShare(2, rank, ranks, position=2, stop=7) for rank in range(ranks)]
    assert {share.microbatches for share in shares} == {count}
    length = lambda position: -position
    assert [p for m in range(count) for share in shares for p in share.positions(m, length)] == list(range(2, 7))
    assert not any(shares[-1].positions(count, length)), "beyond the end there is nothing"


@pytest.mark.parametrize("batch, micro, ranks", [(4, 1, 3), (2, 3, 2), (2, 6, 1), (1, 4, 3), (12, 1, 1)])
def test_windows_of_like_length_share_a_microbatch(batch, micro, ranks):
    lengths = random.Random(0).choices(range(1, 100), k=60)
    shares = [RankShare(batch, rank, ranks, position=24, step_microbatches=micro) for rank in range(ranks)]
    for step in range(3):
        numbers = range(step * micro, (step + 1) * micro)
        groups = [share.positions(number, lengths.__getitem__) for number in numbers for share in shares]
        start = 24 + 12 * step
        assert sorted(p for group in groups for p in group) == list(range(start, start + 12)), "each window once"
        assert all(len(group) == batch and group == sorted(group) for group in groups)
        longest = [max(map(lengths.__getitem__, group)) for group in groups]
        shortest = [min(map(lengths.__getitem__, group)) for group in groups]
        assert all(a <= b for a, b in zip(longest, shortest[1:])), "no shorter window is in a later group"


def test_the_lengths_of_windows(tmp_path):
    seconds = (8.0, 20.0, 16.0)
    manifest = write_lines(tmp_path / "m.jsonl", [{"path": f"{i}.wav", "duration": s} for i, s in enumerate(seconds)])
    index = ManifestIndex(manifest, 100)
    assert [index.length(i) for i in range(len(index))] == [100, 100, 100, 50, 100, 100] and index.frames == 550


def test_more_than_16_passes_over_any_manifest_are_many(tmp_path):
    lines = [{"path": f"{i}.wav", "duration": 8.0} for i in range(30)]
    large = write_lines(tmp_path / "large.jsonl", lines)
    small = write_lines(tmp_path / "small.jsonl", lines[:10])
    assert many_epochs(open_windows(str(large), 100), 16 * 30) is None
    assert str(large) in many_epochs(open_windows(str(large), 100), 17 * 30)
    mixture = open_windows(f"{large}:0.5,{small}:0.5", 100)
    assert many_epochs(mixture, 320) is None
    assert str(small) in many_epochs(mixture, 340), "the small one is repeated three times as often"
