"""The windows of manifests, their endless order, and the parts that ranks take of it."""

import gzip
import itertools
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest

from finetune.cli import UserError
from finetune.data.windows import EvalOrder, ManifestIndex, RankShare, WindowOrder, count_windows, open_windows
from tests.data.support import write_lines
from tests.support import PEAK, ROOT

# --- windows of manifests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "seconds, windows", [(0.0, 1), (0.01, 1), (4.0, 1), (4.001, 2), (0.56, 1), (8.0, 2), (8.08, 3), (10.0, 3)]
)
def test_a_file_has_as_many_windows_as_its_frames_need(seconds, windows):
    assert count_windows(seconds, 50) == windows  # 50 frames are 4 s


def test_a_duration_of_whole_windows_has_no_more():
    assert count_windows(0.56, 7) == 1, "0.56 * 12.5 is 7.000000000000001"


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_windows_of_a_manifest(tmp_path, suffix, opener):
    lines = [{"path": "a.wav", "duration": 10}, "", {"path": "ü.wav", "duration": 4.01}, " \t\x0c"]
    lines += [{"path": "c.wav", "duration": 0, "note": "x" * 5000}]
    index = ManifestIndex(write_lines(tmp_path / f"m.jsonl{suffix}", lines, opener), window_frames=50)
    assert len(index) == 3 + 2 + 1 and index.files == 3 and index.codes == 0
    assert [index.window(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert [(index.line(i).number, index.line(i).path) for i in range(3)] == [
        (1, tmp_path / "a.wav"), (3, tmp_path / "ü.wav"), (5, tmp_path / "c.wav")
    ]  # fmt: skip
    assert index.line(2).fields == lines[4] and index.line(2).manifest == index.path


def test_the_first_bad_lines_are_listed(tmp_path):
    lines = [{"path": "a.wav", "duration": 1}, "{broken", {"path": "a.wav"}, {"path": "a.wav", "duration": True}]
    path = write_lines(tmp_path / "m.jsonl", lines)
    with pytest.raises(UserError) as error:
        ManifestIndex(path, 50)
    assert all(f"{path}, line {number}: " in str(error.value) for number in (2, 3, 4)) and "more" not in str(
        error.value
    )
    with pytest.raises(UserError) as error:
        ManifestIndex(write_lines(path, [*lines, {"path": "../a.wav", "duration": 3}]), 50)
    assert "line 5" not in str(error.value) and "1 more" in str(error.value) and "\n" not in str(error.value)


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


def test_weights_and_sizes_of_sources(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [{"path": "a.wav", "duration": 9}])
    b = write_lines(tmp_path / "b.jsonl", [{"path": "b.wav", "duration": 1}] * 2)
    windows = open_windows(f"{a}:3,{b}:1", 50)
    assert windows.sizes == [3, 2] and len(windows) == 5 and windows.weights == [0.75, 0.25]
    assert [index.path for index in windows.indexes] == [a, b]


def test_prompts_of_files_are_read_by_ranks_in_turn(tmp_path):
    prompts = {"text_prompt": "t", "voice_prompt": "v"}
    lines = [{"path": f"{i}.wav", "duration": 9} for i in range(4)]
    lines += [{"path": "4.wav", "duration": 9} | prompts, {"path": "5.wav", "duration": 9, "text_prompt": "own"}]
    for i in range(6):
        (tmp_path / f"{i}.json").write_text(json.dumps({"alignments": [], "voice_prompt": f"{i}.pt"}))
    (tmp_path / "3.json").write_text('{"voice_prompt": ')
    a, b = write_lines(tmp_path / "a.jsonl", lines), write_lines(tmp_path / "b.jsonl", lines[:1])
    windows = open_windows(f"{a},{b}", 50)
    voices = lambda *share: [(line.path.stem, extra.get("voice_prompt")) for line, extra in windows.prompts(*share)]
    first, second = (
        [("0", "0.pt"), ("2", "2.pt"), ("4", None), ("0", "0.pt")],
        [("1", "1.pt"), ("3", None), ("5", "5.pt")],
    )
    assert voices(0, 2) == first and voices(1, 2) == second and sorted(voices()) == sorted(first + second)


def test_a_long_manifest_takes_little_memory(tmp_path):
    """A line of 60 bytes on disk may take 400 bytes, with the order of its windows; the lines alone would take more."""
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        for i in range(100_000):
            file.write(f'{{"path": "calls/{i:07d}.wav", "duration": {i % 600}.5}}\n')
    code = (
        "import sys, resource\nfrom pathlib import Path\n"
        "from finetune.data.windows import ManifestIndex, WindowOrder\n"
        f"rss = lambda: {PEAK} / 1024\n"
        "before = rss()\n"
        "index = ManifestIndex(Path(sys.argv[1]), 1250)\n"
        "order = WindowOrder([len(index)], None, 0, True)\n"
        "lines = [index.line(index.window(order(p)[1])[0]) for p in range(100)]\n"
        "print(len(index), rss() - before)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    windows, megabytes = map(float, done.stdout.split())
    assert windows > 300_000 and megabytes < 40


# --- order ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_holds_each_window_once(shuffle):
    order = WindowOrder([17], None, seed=3, shuffle=shuffle)
    epochs = [[order(17 * e + i) for i in range(17)] for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == [(0, i) for i in range(17)]
    assert (epochs[0] == epochs[1]) != shuffle
    again = WindowOrder([17], None, seed=3, shuffle=shuffle)
    assert [again(p) for p in (40, 3, 22)] == [order(p) for p in (40, 3, 22)], "a function of the position alone"


def test_the_order_of_a_seed_never_changes():
    """A run that is resumed with another version of this package must read the same windows."""
    order = WindowOrder([7], None, seed=3, shuffle=True)
    expected = [np.random.default_rng([3, 1, 0, epoch]).permutation(7).tolist() for epoch in range(2)]
    assert [order(p)[1] for p in range(14)] == [window for epoch in expected for window in epoch]
    assert expected == [[2, 1, 4, 0, 5, 6, 3], [2, 0, 3, 6, 5, 4, 1]]
    assert [WindowOrder([7], None, 4, True)(p)[1] for p in range(7)] != expected[0]
    mixed = WindowOrder([4, 2], [0.5, 0.5], seed=3, shuffle=True)
    drawn = [mixed(p) for p in range(12)]
    labels = [np.random.default_rng([3, 0, epoch]).permutation([0, 0, 0, 1, 1, 1]).tolist() for epoch in range(2)]
    assert [source for source, _ in drawn] == labels[0] + labels[1] and labels[0] != labels[1], "epochs differ"
    for source, size in ((0, 4), (1, 2)):
        passes = [np.random.default_rng([3, 1, source, i]).permutation(size).tolist() for i in range(3)]
        assert [window for s, window in drawn if s == source] == list(itertools.chain(*passes))[:6]


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


def test_a_mixture_that_is_not_shuffled_alternates():
    order = WindowOrder([4, 2], [2 / 3, 1 / 3], seed=0, shuffle=False)
    assert [order(p) for p in range(12)] == 2 * [(0, 0), (1, 0), (0, 1), (0, 2), (1, 1), (0, 3)]
    order = WindowOrder([4, 1], None, seed=0, shuffle=False)
    assert [order(p) for p in range(5)] == [(0, 0), (0, 1), (1, 0), (0, 2), (0, 3)], "evenly, not all at the start"


def test_a_source_of_little_weight_may_have_no_window_in_an_epoch():
    order = WindowOrder([9, 1], [0.999, 0.001], seed=0, shuffle=True)
    assert {order(p)[0] for p in range(10)} == {0} and order.quotas == [10, 0]


def test_evaluation_reads_evenly_spread_windows_of_all_sources():
    spread = lambda samples: [order(i) for order in [EvalOrder([10, 5], samples)] for i in range(len(order))]
    assert spread(6) == [(0, 0), (0, 2), (0, 5), (0, 7), (1, 0), (1, 2)]
    every = [(0, i) for i in range(10)] + [(1, i) for i in range(5)]
    assert spread(None) == spread(15) == spread(99) == every


# --- ranks ------------------------------------------------------------------------------------------------------


def test_ranks_and_microbatches_partition_the_stream():
    for batch, ranks in ((1, 4), (4, 1), (2, 2)):
        taken = [p for m in range(6) for r in range(ranks) for p in RankShare(batch, r, ranks, position=8).positions(m)]
        assert taken == list(range(8, 8 + 6 * batch * ranks))
    step = lambda batch, ranks, micro: sorted(
        p for m in range(micro) for r in range(ranks) for p in RankShare(batch, r, ranks).positions(m)
    )
    assert step(4, 1, 1) == step(1, 4, 1) == step(1, 1, 4) == step(1, 2, 2), "the same windows in the same step"
    assert RankShare(4, 1, 2, position=8).microbatches is None


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("position", [0, 2])
def test_a_finite_stream_ends_after_as_many_microbatches_on_all_ranks(ranks, position):
    shares = [RankShare(2, r, ranks, position, stop=7) for r in range(ranks)]
    count = -(-(7 - position) // (2 * ranks))
    assert {share.microbatches for share in shares} == {count}
    assert [p for m in range(count) for share in shares for p in share.positions(m)] == list(range(position, 7))
    assert not any(shares[-1].positions(count)), "beyond the end there is nothing"
