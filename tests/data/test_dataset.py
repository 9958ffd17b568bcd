"""Batches of a run: their windows and prompts, bad files, worker processes, and memory."""

import gc
import itertools
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.data.dataset import Microbatches, _prefetch, get_dataset_iterator, spread_samples
from finetune.data.interleaver import Interleaver, PrecomputedTokenizer
from finetune.data.manifest import read_manifest
from finetune.data.windows import EvalOrder, RankShare, WindowOrder, Windows, open_windows
from tests.data.support import DELAYS, prompted, tokenizers, write_lines
from tests.support import ROOT, alive


def take(count, *args, **kwargs):
    """The first batches of an iterator, which is then closed."""
    stream = get_dataset_iterator(*args, **kwargs)
    batches = list(itertools.islice(stream, count))
    stream.close()
    return batches


# --- windows and prompts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [False, True])
def test_batches_hold_the_windows_of_their_positions(parts, encoded, shuffle):
    _, stored = tokenizers(parts)
    windows = open_windows(f"{encoded}:3,{encoded}:1", 40)
    order = WindowOrder(windows.sizes, [0.75, 0.25], 5, shuffle)
    lines = list(read_manifest(encoded, []))
    batches = take(4, windows, stored, RankShare(3, 1, 2, position=4), DELAYS, 8, seed=5, shuffle=shuffle)
    for i, batch in enumerate(batches):
        for row, position in enumerate(range(4 + 6 * i + 3, 4 + 6 * i + 6)):
            source, window = order(position)
            file, part = windows.indexes[source].window(window)
            sample = stored.encode([stored.read(lines[file], part)])[0]
            assert batch.names[row] == sample.name
            assert torch.equal(batch.codes[row, :, : sample.codes.shape[1]], sample.codes)
        assert not batch.problems and batch.counts.shape == (10,)


def test_a_single_source_ignores_its_weight(parts, encoded):
    _, stored = tokenizers(parts)
    windows = open_windows(f"{encoded}:0.5", 40)
    names = [name for batch in take(len(windows), windows, stored, RankShare(1), DELAYS, 8) for name in batch.names]
    assert len(set(names)) == len(windows)


def prompt_frames(batch):
    return (~batch.loss_mask & (batch.codes != -1).any(1)).sum(1).tolist()


def test_prompts_are_dropped_by_the_position_of_the_window(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    prompter, _, stored = prompted(parts, world, windows, drop_text=0.5, drop_voice=0.3)
    batches = lambda count, *args, seed=7, **kwargs: take(
        count, windows, stored, RankShare(*args, **kwargs), DELAYS, 16, seed=seed
    )
    lengths = [length for batch in batches(len(windows) * 2, 1) for length in prompt_frames(batch)]
    for position, length in enumerate(lengths):
        file, _ = windows.indexes[0].window(position % len(windows))
        line = windows.indexes[0].line(file)
        about = json.loads(line.path.with_suffix(".json").read_text())
        voice = prompter.voices[world / "data/voices" / about["voice_prompt"]].frames
        draws = np.random.default_rng([7, 2, position]).random(2)
        expected = 11 + (draws[0] >= 0.5) * len(prompter.encode(about["text_prompt"])) + (draws[1] >= 0.3) * voice
        assert length == expected
    assert lengths[: len(windows)] != lengths[len(windows) :], "in another epoch, other prompts are dropped"
    assert prompt_frames(batches(1, 2, rank=1, world_size=2, position=4)[0]) == lengths[6:8], "on any number of ranks"
    assert [n for batch in batches(6, 4, seed=8) for n in prompt_frames(batch)] != lengths[:24]


def test_evaluation_reads_each_window_once_and_drops_no_prompt(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    _, _, stored = prompted(parts, world, windows, drop_text=1.0, drop_voice=1.0)
    for ranks, samples in ((1, None), (2, 5)):
        shares = [RankShare(2, rank, ranks, position=3) for rank in range(ranks)]
        settings = {"evaluation": True, "eval_samples": samples, "shuffle": True}
        batches = [take(None, windows, stored, share, DELAYS, 16, **settings) for share in shares]
        assert len({len(each) for each in batches}) == 1
        order = EvalOrder(windows.sizes, samples)
        positions = [windows.indexes[0].window(order(i)[1]) for i in range(len(order))]
        wanted = [f"{windows.indexes[0].line(file).path} at {part * 3.2:.2f} s" for file, part in positions]
        found = [name for step in zip(*batches) for batch in step for name in batch.names]
        assert found == wanted
        assert all(
            length > 11 + 12
            for each in batches
            for batch in each
            for length in prompt_frames(batch)[: len(batch.names)]
        )
    dropped = take(1, windows, stored, RankShare(4), DELAYS, 16)
    assert prompt_frames(dropped[0]) == [11] * 4


def test_spread_samples_are_those_of_an_evaluation(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    _, _, stored = prompted(parts, world, windows, drop_text=1.0)
    (batch,) = take(None, windows, stored, RankShare(5), DELAYS, 16, evaluation=True, eval_samples=5)
    samples = spread_samples(windows, stored, 5)
    assert [sample.name for sample in samples] == batch.names and all(sample.prompt_ids for sample in samples)
    assert len(spread_samples(windows, stored, 1000)) == len(windows)


def test_live_batches_equal_stored_ones_of_first_windows(parts, encoded):
    """The audio of a whole microbatch is encoded together."""
    live, stored = tokenizers(parts, window_frames=400)
    audio = [line.fields | {"path": str(line.path)} for line in read_manifest(encoded, [])][:2]
    manifest = write_lines(
        encoded.with_name("audio.jsonl"), [{k: v for k, v in a.items() if k != "codes_path"} for a in audio]
    )
    a = take(1, open_windows(str(manifest), 400), live, RankShare(2), DELAYS, 8, workers=1)[0]
    b = take(1, open_windows(str(encoded), 400), stored, RankShare(2), DELAYS, 8)[0]
    assert a.names == b.names and torch.equal(a.codes, b.codes) and torch.equal(a.counts, b.counts)


# --- bad files --------------------------------------------------------------------------------------------------


def bad_corpus(world, folder):
    """A line for each way in which a file can be bad, between good ones."""
    good = next(read_manifest(world / "data/train.jsonl", []))
    data = good.path.read_bytes()

    def copy_file(name, audio=data, sidecar='{"alignments": []}', duration=good.duration):
        (folder / f"{name}.wav").write_bytes(audio)
        if sidecar is not None:
            (folder / f"{name}.json").write_text(sidecar)
        return {"path": f"{name}.wav", "duration": duration}

    mono = bytearray(data[:44])
    mono[22] = 1
    mono[28:34] = (48000).to_bytes(4, "little") + (2).to_bytes(2, "little")
    lines = [
        copy_file("good"),
        {"path": "missing.wav", "duration": 3},
        copy_file("no_sidecar", sidecar=None),
        copy_file("no_alignments", sidecar="{}"),
        copy_file("broken_sidecar", sidecar="{"),
        copy_file("wrong_times", sidecar='{"alignments": [["a", [1], "SPEAKER_MAIN"]]}'),
        copy_file("not_audio", audio=b"hello"),
        copy_file("mono", audio=bytes(mono) + data[44:]),
        copy_file("truncated", audio=data[:44]),
    ]
    shutil.copy(folder / "good.wav", folder / "overstated.wav")
    (folder / "overstated.json").write_text('{"alignments": []}')
    lines.append({"path": "overstated.wav", "duration": good.duration + 2})
    return write_lines(folder / "bad.jsonl", lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_left_out_and_named(world, parts, tmp_path, workers):
    live, _ = tokenizers(parts, window_frames=400)
    windows = open_windows(str(bad_corpus(world, tmp_path)), 400)
    batches = list(get_dataset_iterator(windows, live, RankShare(4), DELAYS, 8, workers=workers, evaluation=True))
    names = [name for b in batches for name in b.names]
    problems = [problem for b in batches for problem in b.problems]
    assert [n.split("/")[-1].split()[0] for n in names] == ["good.wav", "overstated.wav"]
    for file in ("missing.wav", "no_sidecar.json", "no_alignments.json", "broken_sidecar.json", "wrong_times.json",
                 "not_audio.wav", "mono.wav", "truncated.wav"):  # fmt: skip
        assert sum(problem.startswith(f"{tmp_path / file}: ") for problem in problems) == 1, file
    assert len(names) + len(problems) == len(windows)
    assert [len(batch.codes) for batch in batches] == [1, 1, 1] and int(batches[1].counts.sum()) == 0


# --- processes and memory ---------------------------------------------------------------------------------------


def test_workers_change_nothing_and_end_with_the_iterator(parts, encoded):
    _, stored = tokenizers(parts)
    windows = open_windows(str(encoded), 40)
    before = set(multiprocessing.active_children())
    stream = get_dataset_iterator(windows, stored, RankShare(2), DELAYS, 8, workers=2, shuffle=True)
    first = [next(stream) for _ in range(5)]
    direct = get_dataset_iterator(windows, stored, RankShare(2), DELAYS, 8, workers=0, shuffle=True)
    for a, b in zip(first, direct):
        assert torch.equal(a.codes, b.codes) and a.names == b.names
    resumed = get_dataset_iterator(windows, stored, RankShare(2, position=6), DELAYS, 8, workers=2, shuffle=True)
    assert next(resumed).names == first[3].names
    workers = set(multiprocessing.active_children()) - before
    stream.close()
    resumed.close()
    assert len(workers) == 4 and set(multiprocessing.active_children()) == before


def test_only_the_training_process_has_mimi(parts, encoded, monkeypatch):
    """A forked process should not hold tensors of a GPU."""
    from finetune.data import dataset

    streams = []
    monkeypatch.setattr(dataset, "_load", lambda stream, workers: streams.append(stream) or [([], [])])
    (live, _), windows = tokenizers(parts), open_windows(str(encoded), 40)
    windows = Windows(windows.indexes, windows.weights, precomputed=False)
    assert len(list(get_dataset_iterator(windows, live, RankShare(1), DELAYS, 8, workers=1))) == 1
    assert streams[0].tokenizer.mimi is None and live.mimi is parts[0] and streams[0].tokenizer.cache is live.cache


@pytest.mark.parametrize("workers, pin, prefetches", [(0, False, False), (2, False, True), (2, True, False)])
def test_only_workers_without_pinning_need_a_thread_that_prefetches(monkeypatch, workers, pin, prefetches):
    from finetune.data import dataset

    given = []
    monkeypatch.setattr(dataset, "_load", lambda stream, *args: given.append(args) or iter([1, 2]))
    monkeypatch.setattr(dataset, "_prefetch", lambda batches: given.append("prefetch") or batches)
    stream = Microbatches([], None, RankShare(1), None, None)
    finish = lambda drafts, problems: None
    assert list(dataset.get_precomputed_iterator(stream, finish, workers, pin)) == [1, 2]
    assert given == [(workers, pin)] + ["prefetch"] * prefetches and stream.finish is finish


def test_batches_are_pinned_if_asked(parts, encoded, monkeypatch):
    from finetune.data import dataset

    loaders = []
    monkeypatch.setattr(dataset, "DataLoader", lambda *args, **kwargs: loaders.append(kwargs) or iter([]))
    windows, (_, stored) = open_windows(str(encoded), 40), tokenizers(parts)
    for pin in (False, True):
        assert list(get_dataset_iterator(windows, stored, RankShare(1), DELAYS, 8, workers=3, pin=pin)) == []
    assert [(each["pin_memory"], each["num_workers"]) for each in loaders] == [(False, 3), (True, 3)]


def test_a_killed_worker_ends_the_run_with_a_sentence():
    """In a process of its own, because torch raises wherever the signal interrupts the main thread."""
    code = (
        "import multiprocessing, time\n"
        "from torch.utils.data import IterableDataset\n"
        "from finetune import cli\n"
        "from finetune.data.dataset import _load\n"
        "class Endless(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        while True: yield 1\n"
        "def train():\n"
        "    batches = _load(Endless(), 1)\n"
        "    next(batches)\n"
        "    multiprocessing.active_children()[0].kill()\n"
        "    for _ in range(1000): next(batches), time.sleep(0.01)\n"
        "cli.run(train)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(r"(?m)^error: DataLoader worker \(pid.*(killed by signal|exited).*num_workers", done.stderr)


def test_workers_end_with_a_killed_run():
    """Also those that have more to hand over than a pipe holds, and although they ignore SIGTERM."""
    code = (
        "import numpy as np, os, signal, time\n"
        "from torch.utils.data import IterableDataset\n"
        "from finetune.data.dataset import _load\n"
        "class Large(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        while True: yield os.getpid(), np.zeros(2**20)\n"
        "signal.alarm(60)\n"  # ends this process if it hangs
        "batches = _load(Large(), 2)\n"
        "pids = [next(batches)[0], next(batches)[0]]\n"
        "for pid in pids: os.kill(pid, 15), os.kill(pid, 2), os.kill(pid, 10), os.kill(pid, 12)\n"
        "print(*pids, type(next(batches)[1]).__name__, flush=True)\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    *workers, kind = parent.stdout.readline().split()
    time.sleep(1)
    workers = list(map(int, workers))
    ignored = all(map(alive, workers))
    parent.kill()
    parent.communicate()
    deadline = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert kind == "ndarray", "items come as they are"
    assert len(set(workers)) == 2 and ignored and not any(map(alive, workers))


def test_memory_does_not_grow_over_epochs(parts, encoded):
    """With a cache that holds one entry, so that each file is opened and parsed again and again."""
    stored = PrecomputedTokenizer(Interleaver(parts[1]), 40, cache_mb=0.001)
    windows = open_windows(str(encoded), 40)
    stream = get_dataset_iterator(windows, stored, RankShare(4), DELAYS, 8, shuffle=True)
    maps = lambda: Path("/proc/self/maps").read_text().count("\n")

    def epochs(count):
        for _ in range(count * len(windows) // 4):
            next(stream)
        gc.collect()
        return tracemalloc.get_traced_memory()[0], maps()

    tracemalloc.start()
    try:
        seen = [epochs(10) for _ in range(5)]
    finally:
        tracemalloc.stop()
    # A leak grows in each span; what is set up once, or a table of Python that doubles, grows in one.
    assert min(after[0] - before[0] for before, after in itertools.pairwise(seen)) < 20 * 10 * len(windows)  # bytes
    assert min(after[1] - before[1] for before, after in itertools.pairwise(seen)) <= 0


def test_a_batch_is_taken_while_the_previous_one_is_in_use():
    taken = []

    def source():
        for i in range(3):
            taken.append(i)
            yield i

    ahead = _prefetch(source())
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while taken != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [0, 1] and list(ahead) == [1, 2]
