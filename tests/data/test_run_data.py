"""The data of a run: what is checked at its start, what its settings change, and when Mimi is loaded."""

import contextlib
import multiprocessing
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch

from finetune.audio.codes import fingerprint_mimi, load_codes, save_codes
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data import run_data
from finetune.data.interleaver import InterleavedTokenizer, PrecomputedTokenizer
from finetune.data.manifest import read_manifest
from finetune.data.run_data import RunData, what_to_do
from finetune.distributed import World
from finetune.model.pretrained import MOSHI, PERSONAPLEX, lm_kwargs, open_pretrained
from tests.data.support import write_lines
from tests.support import live, write_config


class Ranks:
    def __init__(self, size):
        self.values, self.barrier = [None] * size, threading.Barrier(size, timeout=60)


@dataclass(frozen=True)
class ThreadWorld(World):
    """Ranks that are threads of this process."""

    ranks: Ranks | None = None

    def gather(self, value):
        self.ranks.values[self.rank] = value
        self.ranks.barrier.wait()
        values = list(self.ranks.values)
        self.ranks.barrier.wait()
        return values

    @contextlib.contextmanager
    def main_first(self):
        if not self.is_main:
            self.ranks.barrier.wait()
        yield
        if self.is_main:
            self.ranks.barrier.wait()


def one_rank(device="cpu"):
    return ThreadWorld(0, 1, 0, 1, torch.device(device), ranks=Ranks(1))


class Checkpoint:
    """A checkpoint that counts how often Mimi is loaded from it."""

    def __init__(self, folder):
        self.real, self.loaded = open_pretrained(str(folder)), 0

    def __getattr__(self, name):
        return getattr(self.real, name)

    def mimi(self, device):
        self.loaded += 1
        return self.real.mimi(device)


@pytest.fixture
def start(world, tmp_path):
    """Makes the data of a run with these settings."""

    lock = threading.Lock()

    def make(prompts=False, ranks=None, checkpoint=None, context=None, **settings):
        checkpoint = checkpoint or Checkpoint(world / "model")
        with lock:
            args = load_args(write_config(tmp_path, world, **settings))
        kwargs = lm_kwargs(checkpoint, PERSONAPLEX if prompts else MOSHI)
        kwargs |= {} if context is None else {"context": context}
        return RunData(args, prompts, checkpoint, kwargs, None, ranks or one_rank())

    return make


# --- prompts ----------------------------------------------------------------------------------------------------


def voices_manifest(world, folder, names):
    """A manifest of two files with codes, each with its own voice."""
    lines = []
    for name, line in zip(names, read_manifest(world / "codes/train_precomputed.jsonl", [])):
        codes = world / "codes" / line.fields["codes_path"]
        paths = {"path": str(line.path), "codes_path": str(codes)}
        lines.append(line.fields | paths | {"voice_prompt": name, "text_prompt": "Hi."})
    return write_lines(folder / "voices.jsonl", lines)


def test_every_rank_has_the_voices_of_all_lines(world, tmp_path, start):
    names = sorted(path.name for path in (world / "data/voices").glob("*.wav"))[:2]
    data = {"data.train_data": str(voices_manifest(world, tmp_path, names)), "do_eval": False}
    ranks = Ranks(2)
    worlds = [ThreadWorld(rank, 2, rank, 2, torch.device("cpu"), ranks=ranks) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda each: start(prompts=True, ranks=each, **data), worlds))
    assert [len(scanned) for scanned, _ in ranks.values] == [1, 1], "each rank reads half of the lines"
    for run in runs:
        assert {path.name for path in run.prompter.voices} == set(names)
        for position in range(2):
            assert next(run.batches(position)).problems == []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_prompts_of_training_and_held_out_files_are_checked(world, tmp_path, start, split):
    manifest = voices_manifest(world, tmp_path, ["none.wav"])
    with pytest.raises(UserError, match=r"none\.wav"):
        start(prompts=True, **{f"data.{split}_data": str(manifest)})
    start(prompts=False, **{f"data.{split}_data": str(manifest)})


def test_window_and_prompt_fit_the_context_before_voices_are_loaded(start):
    settings = {"duration_sec": 4, "prompt.max_sec": 16}  # 50 + 200 frames
    assert start(prompts=True, context=250, **settings).prompter.max_frames == 200
    assert start(context=249, **settings).prompter is None, "without prompts there is nothing to forget"
    with pytest.raises(UserError, match=r"duration_sec 4 and prompt\.max_sec 16"):
        start(prompts=True, context=249, **settings)


# --- codes and Mimi ---------------------------------------------------------------------------------------------


def test_mimi_is_loaded_for_live_codes_and_for_new_voices(world, start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = start()
    assert data._checkpoint.loaded == 0 and isinstance(data._tokenizers[id(data.train)], PrecomputedTokenizer)
    assert data.decoder() is not data.decoder() and data._checkpoint.loaded == 2, "it does not stay in memory"
    data = start(prompts=True)
    assert data._checkpoint.loaded == 1 and data.mimi.cache_info().currsize == 0, "and neither after encoding voices"
    data = start(prompts=True)
    assert data._checkpoint.loaded == 0, "the voices are cached"
    data = start(prompts=True, **live(world))
    assert data._checkpoint.loaded == 1 and isinstance(data._tokenizers[id(data.held_out)], InterleavedTokenizer)
    assert data.decoder() is data.mimi() and data._checkpoint.loaded == 1
    mixed = start(**{"data.eval_data": live(world)["data.eval_data"]})
    assert mixed._checkpoint.loaded == 1 and mixed.train.precomputed and not mixed.held_out.precomputed


def test_codes_of_another_codec_end_the_run_at_its_start(world, tmp_path, start):
    line = next(read_manifest(world / "codes/train_precomputed.jsonl", []))
    entry = load_codes(world / "codes" / line.fields["codes_path"])
    save_codes(tmp_path / "other.pt", entry["codes"], 3.0, "another codec", "audio")
    lines = [line.fields | {"path": str(line.path), "codes_path": "other.pt"}]
    settings = {"data.train_data": str(write_lines(tmp_path / "other.jsonl", lines))}
    with pytest.raises(UserError, match=r"other\.pt.*another codec"):
        start(**settings)
    (tmp_path / "other.pt").write_bytes(b"torn")
    (problem,) = next(start(**settings).batches(0)).problems
    assert "other.pt" in problem, "a damaged file only costs its windows"


def test_codes_are_checked_against_the_codec_of_the_model(world, start):
    data = start()
    fingerprint = fingerprint_mimi(data._checkpoint.real.mimi("cpu"))
    assert {each.mimi_fingerprint for each in data._tokenizers.values()} == {fingerprint}


# --- settings ---------------------------------------------------------------------------------------------------


def test_settings_reach_the_tokenizers(start):
    data = start(
        **{"data.speakers": ["A", "B"], "data.keep_and_shift": False, "data.cache_mb": 3, "duration_sec": 0.57}
    )
    assert data.window_frames == 8
    for tokenizer in data._tokenizers.values():
        assert tokenizer.speakers == ["A", "B"] and tokenizer.interleaver.keep_and_shift is False
        assert tokenizer.cache.limit == 3 * 2**20 and tokenizer.window_frames == 8 and tokenizer.prompter is None
    assert start().prompter is None and start(prompts=True)._tokenizers.popitem()[1].prompter is not None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_reach_the_iterators(start, monkeypatch, device):
    settings = {"seed": 11, "batch_size": 3, "eval_max_samples": 4, "data.num_workers": 2, "data.shuffle": False}
    data = start(ranks=ThreadWorld(0, 1, 0, 1, torch.device(device), ranks=Ranks(1)), **settings)
    data.world = replace(data.world, rank=1, size=2)
    given = []
    monkeypatch.setattr(
        run_data, "get_dataset_iterator", lambda *args, **kwargs: given.append((args, kwargs)) or iter(())
    )
    monkeypatch.setattr(data, "_streams", set())
    data.batches(90), data.eval_batches()
    (train, train_settings), (held_out, eval_settings) = given
    assert (
        train[0] is data.train
        and train[1] is data._tokenizers[id(data.train)]
        and train[3:] == (data.delays, data.dep_q)
    )
    assert held_out[0] is data.held_out and held_out[1] is data._tokenizers[id(data.held_out)]
    share = train[2]
    assert (share.batch_size, share.rank, share.world_size, share.position, share.stop) == (3, 1, 2, 90, None)
    common = {"workers": 2, "pin": device == "cuda"}
    assert train_settings == common | {"seed": 11, "shuffle": False}
    assert eval_settings == common | {"evaluation": True, "eval_samples": 4}


def test_held_out_data_are_opened_only_for_evaluations(start):
    assert start(do_eval=False).held_out is None
    data = start(eval_max_samples=3)
    names = lambda: [name for batch in data.eval_batches() for name in batch.names]
    assert names() == names() and len(names()) == 3
    assert len(data.eval_samples(2)) == 2 and all("/eval/" in sample.name for sample in data.eval_samples(2))


def test_all_workers_end_when_the_data_are_closed(start):
    before = set(multiprocessing.active_children())
    data = start(**{"data.num_workers": 1})
    streams = [data.batches(0), data.eval_batches()]
    for stream in streams:
        next(stream)
    assert len(set(multiprocessing.active_children()) - before) == 2
    data.close()
    assert set(multiprocessing.active_children()) == before
    assert [next(stream, None) for stream in streams] == [None, None]


def test_a_message_lists_the_first_problems():
    problems = [f"file {i}" for i in range(25)]
    shown = what_to_do(problems)
    assert (
        "check_data" in shown
        and [p for p in problems if f"{p}\n" in f"{shown}\n"] == problems[:20]
        and "5 more" in shown
    )
