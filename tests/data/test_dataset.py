"""Batches of a run: their windows and prompts, bad files, worker processes, and memory."""

import gc
import itertools
import json
import multiprocessing
import re
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data import dataset
from finetune.data.dataset import get_dataset_iterator, spread_samples
from finetune.data.interleaver import Interleaver, PrecomputedTokenizer
from finetune.data.manifest import read_manifest
from finetune.data.windows import EvalOrder, RankShare, WindowOrder, open_windows
from tests.data.support import DELAYS, prompted, tokenizers, write_lines
from tests.support import ROOT, alive, script, wait_for, write_wav


def batches_of(windows, tokenizer, share, count=None, dep_q=8, **settings):
    """The first batches of an iterator, which is then closed."""
    stream = get_dataset_iterator(windows, tokenizer, share, DELAYS, dep_q, **settings)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


def live_windows(encoded, window_frames):
    """The windows of the manifest's audio, without its codes."""
    lines = [line.fields | {"path": str(line.path)} for line in read_manifest(encoded, [])]
    lines = [{key: value for key, value in line.items() if key != "codes_path"} for line in lines]
    return open_windows(str(write_lines(encoded.with_name("audio.jsonl"), lines)), window_frames)


# --- windows and prompts ----------------------------------------------------------------------------------------


def test_batches_hold_the_windows_of_their_positions(parts, encoded):
    _, stored = tokenizers(parts)
    windows = open_windows(f"{encoded}:3,{encoded}:1", 40)
    order = WindowOrder(windows.sizes, [0.75, 0.25], 5, shuffle=True)
    lines = list(read_manifest(encoded, []))
    share = RankShare(3, 1, 2, position=4)
    batches = batches_of(windows, stored, share, 4, seed=5, shuffle=True)

    def length(position):
        source, window = order(position)
        return windows.indexes[source].length(window)

    for i, batch in enumerate(batches):
        for row, position in enumerate(share.positions(i, length)):
            source, window = order(position)
            file, part = windows.indexes[source].window(window)
            sample = stored.encode([stored.read(lines[file], part)])[0]
            assert batch.names[row] == sample.name
            assert torch.equal(batch.codes[row, :, : sample.codes.shape[1]], sample.codes)
        assert not batch.problems and batch.counts.shape == (10,)


def test_windows_that_are_left_out_leave_the_others_where_they_are(parts, encoded):
    _, stored = tokenizers(parts)
    windows, share = open_windows(str(encoded), 40), RankShare(3)
    whole = batches_of(windows, stored, share, 4, seed=5, shuffle=True)
    unwanted = {whole[0].names[1], *whole[2].names}
    rest = batches_of(windows, stored, share, 4, seed=5, shuffle=True, skip=sorted(unwanted))
    assert [batch.names for batch in rest] == [[n for n in batch.names if n not in unwanted] for batch in whole]
    assert not any(batch.problems for batch in rest) and not rest[2].counts.any()
    held_out = batches_of(windows, stored, RankShare(len(windows)), evaluation=True)
    assert unwanted <= set(held_out[0].names), "an evaluation leaves nothing out"


def prompt_frames(batches):
    return [n for batch in batches for n in (~batch.loss_mask & (batch.codes != -1).any(1)).sum(1).tolist()]


def test_prompts_are_dropped_by_the_position_of_the_window(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    prompter, _, stored = prompted(parts, world, windows, drop_text=0.5, drop_voice=0.3)
    frames = lambda count, share, seed=7: prompt_frames(batches_of(windows, stored, share, count, 16, seed=seed))
    lengths = frames(len(windows) * 2, RankShare(1))
    for position, length in enumerate(lengths):
        line = windows.indexes[0].line(windows.indexes[0].window(position % len(windows))[0])
        about = json.loads(line.path.with_suffix(".json").read_text())
        voice = prompter.voices[world / "data/voices" / about["voice_prompt"]].frames
        draws = np.random.default_rng([7, 2, position]).random(2)
        expected = 11 + (draws[0] >= 0.5) * len(prompter.encode(about["text_prompt"])) + (draws[1] >= 0.3) * voice
        assert length == expected
    assert lengths[: len(windows)] != lengths[len(windows) :], "in another epoch, other prompts are dropped"
    share = RankShare(2, rank=1, world_size=2, position=4)
    taken = share.positions(0, lambda position: windows.indexes[0].length(position % len(windows)))
    assert frames(1, share) == [lengths[position] for position in taken], "on any number of ranks"
    assert frames(6, RankShare(4), seed=8) != lengths[:24]


def test_evaluation_reads_each_window_once_and_drops_no_prompt(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    _, _, stored = prompted(parts, world, windows, drop_text=1.0, drop_voice=1.0)
    for ranks, count in ((1, None), (2, 5)):
        shares = [RankShare(2, rank, ranks, position=3) for rank in range(ranks)]
        settings = {"dep_q": 16, "evaluation": True, "eval_samples": count, "shuffle": True}
        by_rank = [batches_of(windows, stored, share, **settings) for share in shares]
        assert len({len(batches) for batches in by_rank}) == 1
        found = [name for step in zip(*by_rank) for batch in step for name in batch.names]
        order = EvalOrder(windows.sizes, count)
        places = [windows.indexes[0].window(order(i)[1]) for i in range(len(order))]
        assert found == [f"{windows.indexes[0].line(file).path} at {part * 3.2:.2f} s" for file, part in places]
        assert all(n > 11 + 12 for batches in by_rank for batch in batches if batch.names
                   for n in prompt_frames([batch])[: len(batch.names)])  # fmt: skip
        samples = spread_samples(windows, stored, count or 1000)
        assert [sample.name for sample in samples] == found and all(sample.prompt_ids for sample in samples)
    assert prompt_frames(batches_of(windows, stored, RankShare(4), 1, 16)) == [11] * 4


def test_live_batches_equal_stored_ones_of_first_windows(parts, encoded):
    """The audio of a whole microbatch is encoded together."""
    live, stored = tokenizers(parts, window_frames=400)
    [a] = batches_of(live_windows(encoded, 400), live, RankShare(2), 1, workers=1)
    [b] = batches_of(open_windows(str(encoded), 400), stored, RankShare(2), 1)
    assert a.names == b.names and torch.equal(a.codes, b.codes) and torch.equal(a.counts, b.counts)


def test_bad_files_are_left_out_and_named(parts, tmp_path):
    names = ("good", "overstated", "mono", "truncated", "not_audio", "no_json", "missing")
    for name in names:
        write_wav(tmp_path / f"{name}.wav", np.full((1 if name == "mono" else 2, 48_000), 0.1), 24_000)
        (tmp_path / f"{name}.json").write_text('{"alignments": []}')
    (tmp_path / "truncated.wav").write_bytes((tmp_path / "good.wav").read_bytes()[:44])
    (tmp_path / "not_audio.wav").write_text("hello")
    (tmp_path / "missing.wav").unlink()
    (tmp_path / "no_json.json").unlink()
    lines = [{"path": f"{name}.wav", "duration": 4 if name == "overstated" else 2} for name in names]
    windows = open_windows(str(write_lines(tmp_path / "bad.jsonl", lines)), 400)

    batches = batches_of(windows, tokenizers(parts, 400)[0], RankShare(2), evaluation=True)
    found = [name for batch in batches for name in batch.names]
    assert found == [f"{tmp_path}/{name}.wav at 0.00 s" for name in ("good", "overstated")]
    files = [problem.split(": ")[0] for batch in batches for problem in batch.problems]
    bad = ("mono.wav", "truncated.wav", "not_audio.wav", "no_json.json", "missing.wav")
    assert files == [str(tmp_path / file) for file in bad]
    assert [len(batch.codes) for batch in batches] == [2, 1, 1, 1] and int(batches[1].counts.sum()) == 0


# --- processes and memory ---------------------------------------------------------------------------------------


def test_workers_change_nothing_and_end_with_the_iterator(parts, encoded):
    _, stored = tokenizers(parts)
    windows = open_windows(str(encoded), 40)
    iterate = lambda workers, position=0: get_dataset_iterator(
        windows, stored, RankShare(2, position=position), DELAYS, 8, workers=workers, shuffle=True
    )
    before = set(multiprocessing.active_children())
    stream, resumed = iterate(workers=2), iterate(workers=2, position=6)
    first = [next(stream) for _ in range(5)]
    for a, b in zip(first, iterate(workers=0)):
        assert torch.equal(a.codes, b.codes) and a.names == b.names
    assert next(resumed).names == first[3].names
    workers = set(multiprocessing.active_children()) - before
    stream.close()
    resumed.close()
    assert len(workers) == 4 and set(multiprocessing.active_children()) == before


def test_only_the_training_process_has_mimi(parts, encoded, monkeypatch):
    """A forked process should not hold tensors of a GPU."""
    streams, (live, _) = [], tokenizers(parts)
    monkeypatch.setattr(dataset, "_load", lambda stream, workers: streams.append(stream) or [([], [])])
    assert len(batches_of(live_windows(encoded, 40), live, RankShare(1), workers=1)) == 1
    assert streams[0].tokenizer.mimi is None and live.mimi is parts[0] and streams[0].tokenizer.cache is live.cache


@pytest.mark.parametrize("workers, pin, ahead", [(0, False, 0), (2, False, 1), (2, True, 0)])
def test_batches_of_workers_are_taken_ahead(parts, encoded, monkeypatch, workers, pin, ahead):
    """While the previous one is in use. DataLoader has a thread of its own where it pins them."""
    taken = []

    def loader(stream, num_workers, pin_memory, **options):
        assert (num_workers, pin_memory) == (workers, pin)
        for i in range(3):
            taken.append(i)
            yield i

    monkeypatch.setattr(dataset, "DataLoader", loader)
    windows, (_, stored) = open_windows(str(encoded), 40), tokenizers(parts)
    stream = get_dataset_iterator(windows, stored, RankShare(1), DELAYS, 8, workers=workers, pin=pin)
    assert next(stream) == 0
    wait_for(lambda: len(taken) == 2) if ahead else time.sleep(0.1)
    assert len(taken) == 1 + ahead and list(stream) == [1, 2]


ENDLESS = """
import multiprocessing, os, signal, time
import numpy as np
from torch.utils.data import IterableDataset
from finetune import cli
from finetune.data.dataset import _load

class Endless(IterableDataset):
    def __iter__(self):
        while True:
            yield os.getpid(), np.zeros(2**20)  # more than a pipe holds

signal.alarm(90)  # ends this process if it hangs
"""


def test_a_killed_worker_ends_the_run_with_a_sentence():
    """In a process of its own, because torch raises wherever the signal interrupts the main thread."""
    code = """
def train():
    batches = _load(Endless(), 1)
    os.kill(next(batches)[0], 9)
    for _ in range(1000):
        next(batches), time.sleep(0.01)

cli.run(train)
"""
    done = script("-c", ENDLESS + code, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"(?m)^error: DataLoader worker \(pid.*(killed by signal|exited).*num_workers", done.stderr)


def test_workers_end_with_a_killed_run():
    """Although they ignore the signals that a training process handles."""
    code = """
batches = _load(Endless(), 2)
pids = [next(batches)[0], next(batches)[0]]
for pid in pids:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        os.kill(pid, number)
print(*pids, type(next(batches)[1]).__name__, flush=True)
time.sleep(100)
"""
    parent = subprocess.Popen([sys.executable, "-c", ENDLESS + code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    *workers, kind = parent.stdout.readline().split()
    time.sleep(1)
    workers = set(map(int, workers))
    assert len(workers) == 2 and all(map(alive, workers)) and kind == "ndarray", "items come as they are"
    parent.kill()
    parent.communicate()
    wait_for(lambda: not any(map(alive, workers)), 15)


def test_memory_does_not_grow_over_epochs(parts, encoded):
    """With a cache that holds one entry, so that each file is opened and parsed again and again."""
    stored = PrecomputedTokenizer(Interleaver(parts[1]), 40, cache_mb=0.001)
    windows = open_windows(str(encoded), 40)
    stream = get_dataset_iterator(windows, stored, RankShare(len(windows)), DELAYS, 8, shuffle=True)
    used = []
    tracemalloc.start()
    for _ in range(9):
        for _ in range(10):
            next(stream)
        gc.collect()
        used.append((tracemalloc.get_traced_memory()[0], Path("/proc/self/maps").read_text().count("\n")))
    tracemalloc.stop()
    # A leak grows in each span; what is set up once, or a table of Python that doubles, grows in one.
    memory, maps = np.diff(used, axis=0).min(axis=0)
    assert memory < 20 * 10 * len(windows) and maps <= 0  # bytes
