"""The data of a run: what is checked at its start, what its settings change, and when Mimi is loaded."""

import contextlib
import itertools
import json
import multiprocessing
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

import train
from finetune.audio.codes import fingerprint_mimi, load_codes, save_codes
from finetune.audio.files import read_audio, to_int16, write_wav
from finetune.audio.words import read_words
from finetune.cli import UserError
from finetune.config import load_args
from finetune.data import run_data
from finetune.data.dataset import Microbatches
from finetune.data.interleaver import InterleavedTokenizer, Interleaver
from finetune.data.manifest import read_manifest
from finetune.data.run_data import RunData
from finetune.data.windows import RankShare, WindowOrder
from finetune.distributed import World
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from tests.data.support import write_lines
from tests.support import PERSONAPLEX_CODES, live, write_config


@dataclass(frozen=True)
class FakeWorld(World):
    """One rank after the other: each receives the values of those before it, separately for each call."""

    values: list = field(default_factory=list)
    calls: list = field(default_factory=list)

    def gather(self, value):
        self.values.extend([[]] * (len(self.calls) == len(self.values)))
        values = self.values[len(self.calls)] = [*self.values[len(self.calls)], value]
        self.calls.append(value)
        return values

    def main_first(self):
        return contextlib.nullcontext()


class Checkpoint(Pretrained):
    """A checkpoint that counts how often Mimi is loaded from it."""

    loaded = 0

    def mimi(self, *args):
        self.loaded += 1
        return super().mimi(*args)


@pytest.fixture
def start(world, tmp_path):
    """Makes the data of a run with these settings."""

    def make(prompts=False, rank=None, context=None, **settings):
        checkpoint = Checkpoint(str(world / "model"))
        args = load_args(write_config(tmp_path, world, PERSONAPLEX_CODES if prompts else "codes", **settings))
        kwargs = lm_kwargs(checkpoint, PERSONAPLEX if prompts else MOSHI)
        kwargs |= {} if context is None else {"context": context}
        return RunData(args, prompts, checkpoint, kwargs, None, rank or FakeWorld(0, 1, 0, 1, torch.device("cpu")))

    return make


def voices_manifest(world, folder, names, codes=PERSONAPLEX_CODES):
    """A manifest of files with codes, each with its own voice."""
    lines = []
    for name, line in zip(names, read_manifest(world / codes / "train_precomputed.jsonl", [])):
        paths = {"path": str(line.path), "codes_path": str(world / codes / line.fields["codes_path"])}
        paths["words_path"] = str(line.words_path)
        lines.append(line.fields | paths | {"voice_prompt": name, "text_prompt": "Hi."})
    return str(write_lines(folder / "voices.jsonl", lines))


def test_each_rank_scans_a_part_of_the_lines_and_has_the_voices_of_all(world, tmp_path, start):
    names = sorted(path.name for path in (world / "data/voices").glob("*.wav"))[:2]
    data = {"data.train_data": voices_manifest(world, tmp_path, names), "do_eval": False}
    values = []
    ranks = [FakeWorld(rank, 2, rank, 2, torch.device("cpu"), values=values) for rank in range(2)]
    first, last = (start(prompts=True, rank=rank, **data) for rank in ranks)
    assert {path.name for path in first.prompter.voices} == {names[0]}
    assert {path.name for path in last.prompter.voices} == set(names) and [len(v) for v, _ in values[0]] == [1, 1]
    for position in range(2):
        assert next(last.batches(position)).problems == []


@pytest.mark.parametrize("split", ["train", "eval"])
def test_prompts_of_training_and_held_out_files_are_checked(world, tmp_path, start, split):
    data = lambda *codes: {f"data.{split}_data": voices_manifest(world, tmp_path, ["none.wav"], *codes)}
    with pytest.raises(UserError, match=r"none\.wav"):
        start(prompts=True, **data())
    start(prompts=False, **data("codes"))


def test_window_and_prompt_must_fit_the_context(start):
    settings = {"context": 249, "duration_sec": 4, "prompt.max_sec": 16}  # 50 + 200 frames
    assert start(**settings).prompter is None, "without prompts there is nothing to forget"
    with pytest.raises(UserError, match=r"duration_sec 4 and prompt\.max_sec 16"):
        start(prompts=True, **settings)


def test_mimi_is_loaded_for_live_codes_and_for_new_voices(world, start, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    loaded = lambda data: data._checkpoint.loaded
    data = start()
    assert loaded(data) == 0
    assert data.decoder() is not data.decoder() and loaded(data) == 2, "it does not stay in memory"
    data = start(prompts=True)
    assert loaded(data) == 1 and data.mimi.cache_info().currsize == 0, "and neither after encoding voices"
    assert loaded(start(prompts=True)) == 0, "the voices are cached"
    data = start(prompts=True, **live(world))
    assert loaded(data) == 1 and isinstance(data._tokenizers[id(data.held_out)], InterleavedTokenizer)
    assert data.decoder() is data.mimi() and loaded(data) == 1
    mixed = start(**{"data.eval_data": live(world)["data.eval_data"]})
    assert loaded(mixed) == 1 and mixed.train.precomputed and not mixed.held_out.precomputed


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


def test_settings_reach_the_tokenizers(start):
    speakers = ["A", "SPEAKER_MAIN"]
    settings = {"data.speakers": speakers, "data.keep_and_shift": False, "data.cache_mb": 3, "duration_sec": 0.57}
    settings["data.drop_tags"] = False
    for prompts in (False, True):
        data = start(prompts, **settings)
        assert data.window_frames == 8 and (data.prompter is not None) == prompts
        for tokenizer in data._tokenizers.values():
            assert tokenizer.speakers == speakers and tokenizer.interleaver.keep_and_shift is False
            assert tokenizer.cache.limit == 3 * 2**20 and tokenizer.window_frames == 8
            assert tokenizer.prompter is data.prompter and tokenizer.drop_tags is False
            assert tokenizer.mimi_fingerprint == fingerprint_mimi(data.mimi())


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_settings_reach_the_iterators(start, monkeypatch, device):
    settings = {"seed": 11, "batch_size": 3, "eval_max_samples": 4, "data.num_workers": 2, "data.shuffle": False}
    settings["data.skip"] = ["a.wav at 0.00 s"]
    data = start(rank=FakeWorld(1, 2, 1, 2, torch.device(device)), **settings)
    given = []
    monkeypatch.setattr(
        run_data, "get_dataset_iterator", lambda *args, **kwargs: given.append((args, kwargs)) or iter(())
    )
    monkeypatch.setattr(data, "_streams", set())
    data.batches(90), data.eval_batches()
    for (windows, tokenizer, *_, delays, dep_q), _ in given:
        assert tokenizer is data._tokenizers[id(windows)] and (delays, dep_q) == (data.delays, data.dep_q)
    (train, train_settings), (held_out, eval_settings) = given
    assert train[0] is data.train and held_out[0] is data.held_out
    share = train[2]
    assert (share.batch_size, share.rank, share.world_size, share.position, share.stop) == (3, 1, 2, 90, None)
    common = {"workers": 2, "pin": device == "cuda"}
    assert train_settings == common | {"seed": 11, "shuffle": False, "skip": ["a.wav at 0.00 s"]}
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


# --- Voices that are there --------------------------------------------------------------------------------------------


@pytest.fixture
def short_calls(world, tmp_path):
    """Settings with calls that are no longer than a window, whose voice is same_speaker; `fields` of each line.

    Each call is three short ones, one after the other.
    """

    def make(*fields, split="train", **settings) -> dict:
        parts, lines = list(read_manifest(world / "data/train.jsonl", [])), []
        for i, own in enumerate(fields):
            path, pcm, words, seconds = tmp_path / f"{split}{i}.wav", [], [], 0.0
            for part in parts[3 * i : 3 * i + 3]:
                pcm.append(read_audio(part.path))
                for word, (start, end), who in json.loads(part.words_path.read_text())["alignments"]:
                    words.append([word, [start + seconds, end + seconds], who])
                seconds += part.duration
            write_wav(path, to_int16(np.concatenate(pcm, axis=1)))
            path.with_suffix(".json").write_text(json.dumps({"alignments": words}))
            prompts = {"voice_prompt": "same_speaker", "text_prompt": "Hi."}
            lines.append({"path": path.name, "duration": seconds} | prompts | own)
        path = write_lines(tmp_path / f"{split}_{len(fields)}.jsonl", lines)
        return {f"data.{split}_data": str(path), "do_eval": split == "eval", "duration_sec": 60, **settings}

    return make


def drafts(data, count, first=0, windows=None):
    """The windows of a stream from a position on, without Mimi."""
    windows = windows or data.train
    order = WindowOrder(windows.sizes, windows.weights, 0, data.args.data.shuffle)
    share, tokenizer = RankShare(1, position=first), data._tokenizers[id(windows)]
    stream = Microbatches(windows.indexes, order, share, tokenizer, seed=0)
    return [found for found, _ in itertools.islice(stream, count) for found in found]


def test_windows_without_a_voice_end_the_run_before_it_begins(start, short_calls):
    for settings in (short_calls({}, {}, {}), short_calls({}, {}, {}, split="eval")):
        with pytest.raises(UserError, match=r"3 of 3 windows.*duration_sec=.*reserve_sec=.*allow_voiceless") as error:
            start(prompts=True, **settings)
        assert ("data.eval_data" in str(error.value)) == settings["do_eval"]
        assert start(prompts=False, **settings).voiceless_share == 0.0
    data = start(prompts=True, **short_calls({}, {}, {}), **{"prompt.allow_voiceless": True})
    assert data.voiceless_share == 1.0 and all(draft.prompt.voiceless for draft in drafts(data, 3))


def test_what_the_error_says_helps(start, short_calls):
    with pytest.raises(UserError) as error:
        start(prompts=True, **short_calls({}, {}, {}))
    shorter, reserve = (re.search(rf"{key}=([\d.]+)", str(error.value))[1] for key in ("duration_sec", "reserve_sec"))
    data = start(prompts=True, **short_calls({}, {}, {}, **{"duration_sec": float(shorter)}))
    assert data.voiceless_share == 0.0 and len(data.train) > 3
    data = start(prompts=True, **short_calls({}, {}, {}, **{"prompt.reserve_sec": float(reserve)}))
    assert data.voiceless_share == 0.0
    for draft in drafts(data, 3):
        cut = draft.prompt.head + draft.prompt.tail
        assert 0 < cut <= float(reserve) * 12.5 + 1 and draft.prompt.pcm is not None
        path, seconds = re.fullmatch(r"(.*) at (.*) s", draft.name).groups()
        start_sec, frames = float(seconds), len(draft.text)
        assert start_sec == draft.prompt.head / 12.5
        assert np.array_equal(draft.pcm, read_audio(path, start_sec, frames / 12.5)), "the rest of the call"
        words, _ = read_words(Path(path).with_suffix(".json"))
        assert torch.equal(draft.text, Interleaver(data.text_tokenizer)(words, start_sec, frames)[0])


def test_calls_of_one_speaker_lend_each_other_a_voice_on_any_number_of_ranks(start, short_calls):
    settings = short_calls(*[{"speaker": name} for name in "aabbbb"], **{"data.shuffle": True})
    values = []
    first, last = (FakeWorld(rank, 2, rank, 2, torch.device("cpu"), values=values) for rank in range(2))
    with pytest.raises(UserError, match="of 6 windows"):  # knows its own half only
        start(prompts=True, rank=first, **settings)
    one, two = (start(prompts=True, rank=rank, **settings) for rank in (None, last))
    assert one.voiceless_share == two.voiceless_share == 0.0
    voices = [[draft.prompt.pcm for draft in drafts(data, 30)] for data in (one, two)]
    assert all(np.array_equal(a, b) for a, b in zip(*voices, strict=True))
    assert all(np.array_equal(a, draft.prompt.pcm) for a, draft in zip(voices[0][11:], drafts(two, 19, first=11)))
    assert len({voice.tobytes() for voice in voices[0]}) == 6, "all calls lend theirs"


def test_the_share_is_that_of_the_mixture_and_in_the_log(start, short_calls, caplog):
    """One of four windows opts out, and the one of the other manifest has no voice; these are drawn as 3 to 1."""
    few, many = short_calls({"voice_prompt": ""}, {"speaker": "a"}, {"speaker": "a"}, {"speaker": "a"}), short_calls({})
    mixture = f"{few['data.train_data']}:0.75,{many['data.train_data']}:0.25"
    settings = {"data.train_data": mixture, "prompt.allow_voiceless": True, "prompt.drop_voice": 0.2}
    data = start(prompts=True, **few | settings)
    share = 0.75 / 4 + 0.25
    assert data.voiceless_share == pytest.approx(share)
    with caplog.at_level("INFO"):
        train.describe(data.args, PERSONAPLEX, "weights", data, data.world)
    assert f"{100 * (share + 0.2 * (1 - share)):.1f} % of the windows are without a voice" in caplog.text


def test_files_without_a_text_prompt_are_told_once(start, short_calls, caplog):
    settings = short_calls(
        {"voice_prompt": "", "text_prompt": ""}, {"voice_prompt": ""}, {"voice_prompt": "", "text_prompt": " "}
    )
    assert start(prompts=True, **settings).voiceless_share == 1.0
    assert [record.levelname for record in caplog.records] == ["WARNING"] and "2 files have no text" in caplog.text


def test_segments_that_are_not_encoded_end_the_run(start, world, tmp_path):
    path = voices_manifest(world, tmp_path, ["same_speaker"] * 3)
    with pytest.raises(UserError, match=r"\.voices: missing; run precompute_codes\.py with --same-speaker"):
        start(prompts=True, **{"data.train_data": path, "do_eval": False})


# --- Words and sound --------------------------------------------------------------------------------------------------


@pytest.fixture
def spoilt(world, tmp_path):
    """Settings with a copy of the recordings in which the words of the first `files` are late."""

    def make(seconds: float, files: int) -> dict:
        lines = list(read_manifest(world / "data/train.jsonl", []))[:12]
        for i, line in enumerate(lines):
            content = json.loads(line.path.with_suffix(".json").read_text())
            late = seconds if i < files else 0.0
            content["alignments"] = [[w, [s + late, e + late], who] for w, (s, e), who in content["alignments"]]
            (tmp_path / f"{i}.json").write_text(json.dumps(content))
            shutil.copy(line.path, tmp_path / f"{i}.wav")
        rows = [line.fields | {"path": f"{i}.wav"} for i, line in enumerate(lines)]
        return {"data.train_data": str(write_lines(tmp_path / "spoilt.jsonl", rows)), "do_eval": False}

    return make


def test_words_that_disagree_with_the_sound_are_a_warning_at_the_start(start, spoilt, caplog):
    start(**spoilt(0.0, 99))
    assert not caplog.records
    data = start(**spoilt(0.5, 99))
    assert len(data.train) > 0 and [record.levelname for record in caplog.records] == ["WARNING"]
    assert "in 12 of 12 files" in caplog.text and "0.5 s late" in caplog.text and "0.wav" in caplog.text
    caplog.clear()
    start(**spoilt(0.5, 1))
    assert "in 1 of 12 files" in caplog.text
    caplog.clear()
    start(rank=FakeWorld(1, 2, 1, 2, torch.device("cpu")), **spoilt(0.5, 99))
    assert not caplog.records, "only the main rank warns"


def test_files_that_cannot_be_compared_cost_no_run(start, spoilt, tmp_path, caplog, monkeypatch):
    settings = spoilt(0.5, 99)
    (tmp_path / "0.wav").unlink()
    (tmp_path / "1.wav").write_bytes(b"no audio")
    (tmp_path / "2.json").write_text("{")
    write_wav(tmp_path / "3.wav", np.zeros((1, 24_000), np.int16))
    (tmp_path / "4.json").write_text('{"alignments": []}')
    start(**settings)
    assert "in 7 of 7 files" in caplog.text
    caplog.clear()
    monkeypatch.setattr(run_data.time, "monotonic", iter(range(0, 10_000, 4)).__next__)
    start(**settings)
    assert not caplog.records, "no time is left for the second file, and the first is not there"
