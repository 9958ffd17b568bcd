"""Order, shares, samples and batches; and that no bad file ends a run or goes unnoticed."""

import gc
import gzip
import itertools
import json
import math
import multiprocessing
import re
import subprocess
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch

from finetune.args import PromptArgs
from finetune.audio.codec import encode_audio
from finetune.audio.codes import audio_fingerprint, fingerprint_mimi, load_codes, save_codes
from finetune.audio.files import read_audio
from finetune.cli import UserError
from finetune.data.batch import Sample, TextStats, collate
from finetune.data.cache import LRUCache
from finetune.data.dataset import _ahead, get_dataset_iterator
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.manifest import Line, read_manifest, resolve_path
from finetune.data.prompter import Prompter
from finetune.data.windows import EvalOrder, ManifestIndex, RankShare, WindowOrder, open_windows
from finetune.model.pretrained import open_pretrained
from finetune.prompts.hybrid import prompt_length
from finetune.prompts.recordings import codes_folder, encode_recordings, load_recording
from finetune.prompts.same_speaker import SAME_SPEAKER, load_same_speaker, same_speaker_file, save_same_speaker
from finetune.prompts.voices import VoiceBook, load_voices
from finetune.streams import SINE_TOKENS
from tests.support import PEAK, ROOT, write_wav

DELAYS = [0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]

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


def test_ranks_and_microbatches_partition_the_stream():
    for batch, ranks in ((1, 4), (4, 1), (2, 2)):
        taken = [p for m in range(6) for r in range(ranks) for p in RankShare(batch, r, ranks, position=8).positions(m)]
        assert sorted(taken) == list(range(8, 8 + 6 * batch * ranks))
    step = lambda batch, ranks, micro: sorted(
        p for m in range(micro) for r in range(ranks) for p in RankShare(batch, r, ranks).positions(m)
    )
    assert step(4, 1, 1) == step(1, 4, 1) == step(1, 1, 4) == step(1, 2, 2), "the same windows in the same step"


def test_evaluation_takes_the_same_spread_windows_on_any_number_of_ranks():
    order = EvalOrder([10, 5], 6)
    windows = [order(i) for i in range(len(order))]
    assert windows == [(0, 0), (0, 2), (0, 5), (0, 7), (1, 0), (1, 2)]
    for ranks in (1, 2, 4):
        shares = [RankShare(2, r, ranks, stop=len(order)) for r in range(ranks)]
        assert len({s.microbatches for s in shares}) == 1
        taken = [p for s in shares for m in range(s.microbatches) for p in s.positions(m)]
        assert sorted(taken) == list(range(6))


# --- manifests --------------------------------------------------------------------------------------------------


def write_lines(path, lines, opener=open):
    with opener(path, "wt") as file:
        file.writelines(json.dumps(line) + "\n" if isinstance(line, dict) else line + "\n" for line in lines)
    return path


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_windows_of_a_manifest(tmp_path, suffix, opener):
    lines = [{"path": "a.wav", "duration": 10}, "", {"path": "ü.wav", "duration": 4.01}]
    lines.append({"path": "c.wav", "duration": 0})
    index = ManifestIndex(write_lines(tmp_path / f"m.jsonl{suffix}", lines, opener), window_frames=50)
    assert len(index) == 3 + 2 + 1 and index.files == 3
    assert [index.window(i) for i in range(6)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0)]
    assert index.line(1).path == tmp_path / "ü.wav" and index.line(1).number == 3
    assert index.line(2).path == tmp_path / "c.wav"


@pytest.mark.parametrize(
    "line, sentence",
    [
        ("{broken", "line 2"),
        ({"path": "a.wav"}, "line 2"),
        ({"path": "a.wav", "duration": "long"}, "line 2"),
        ({"path": "a.wav", "duration": -1}, "line 2"),
        ({"duration": 3}, "line 2"),
        ("[1]", "line 2"),
        ({"path": "a.wav", "duration": 1e300}, "line 2"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_broken_lines_are_named_by_number(tmp_path, line, sentence):
    path = write_lines(tmp_path / "m.jsonl", [{"path": "a.wav", "duration": 1}, line])
    with pytest.raises(UserError, match=sentence):
        ManifestIndex(path, 50)


def test_a_torn_archive_is_named(tmp_path):
    path = write_lines(tmp_path / "m.jsonl.gz", [{"path": "a.wav", "duration": 1}] * 5000, gzip.open)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    for content in (whole[:-20], bytes(flipped), b"no archive"):
        path.write_bytes(content)
        for use in (lambda: ManifestIndex(path, 50), lambda: list(read_manifest(path, []))):
            with pytest.raises(UserError, match=r"m\.jsonl\.gz: cannot be read to its end, beyond line \d+ \(.+\)"):
                use()


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_a_manifest_as_editors_of_windows_write_it(tmp_path, suffix, opener):
    path = tmp_path / f"m.jsonl{suffix}"
    with opener(path, "wb") as file:
        file.write('\ufeff{"path": "ä.wav", "duration": 1}\r\n{"path": "b.wav", "duration": 1}\r\n'.encode())
    index, problems = ManifestIndex(path, 50), []
    assert [index.line(i).path.name for i in range(2)] == ["ä.wav", "b.wav"]
    assert [line.path.name for line in read_manifest(path, problems)] == ["ä.wav", "b.wav"] and not problems


def test_a_line_that_is_no_utf8_is_a_bad_line(tmp_path):
    (tmp_path / "m.jsonl").write_bytes(b'{"path": "\xe4.wav", "duration": 1}\n{"path": "b.wav", "duration": 1}\n')
    problems = []
    assert [line.number for line in read_manifest(tmp_path / "m.jsonl", problems)] == [2]
    assert "line 1: not JSON" in problems[0]


def test_an_empty_manifest_is_an_error_at_once(tmp_path):
    with pytest.raises(UserError, match="empty"):
        ManifestIndex(write_lines(tmp_path / "m.jsonl", [""]), 50)


def test_paths_are_relative_to_the_manifest_and_may_not_leave_it(tmp_path):
    path = tmp_path / "m.jsonl"
    assert resolve_path(path, "x/a.wav") == tmp_path / "x/a.wav"
    assert resolve_path(path, "/data/a.wav").is_absolute()
    with pytest.raises(UserError, match="leaves the manifest's folder"):
        resolve_path(path, "../a.wav")


def test_codes_in_all_lines_or_in_none(tmp_path):
    a = write_lines(tmp_path / "a.jsonl", [{"path": "a.wav", "duration": 1, "codes_path": "a.pt"}] * 2)
    b = write_lines(tmp_path / "b.jsonl", [{"path": "a.wav", "duration": 1}])
    c = write_lines(tmp_path / "c.jsonl", [{"path": "a.wav", "duration": 1, "codes_path": "a.pt"},
                                           {"path": "b.wav", "duration": 1}])  # fmt: skip
    assert open_windows(str(a), 50).precomputed and not open_windows(str(b), 50).precomputed
    for mixed in (f"{a},{b}", str(c)):
        with pytest.raises(UserError, match="codes"):
            open_windows(mixed, 50)


def test_a_long_manifest_costs_little_memory(tmp_path):
    """200,000 lines: a fifth of what must fit in 1 GB."""
    path = tmp_path / "m.jsonl"
    with path.open("w") as file:
        for i in range(200_000):
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
    done = subprocess.run([sys.executable, "-c", code, path], cwd=ROOT, capture_output=True, text=True, check=True)
    windows, megabytes = map(float, done.stdout.split())
    assert windows > 600_000 and megabytes < 60


# --- samples ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(world):
    checkpoint = open_pretrained(str(world / "model"))
    return checkpoint.mimi("cpu"), sentencepiece.SentencePieceProcessor(str(checkpoint.tokenizer_path()))


@pytest.fixture(scope="module")
def encoded(world, parts, tmp_path_factory):
    """The corpus with codes, as precompute_codes.py lays it out, made by hand."""
    mimi, _ = parts
    folder = tmp_path_factory.mktemp("encoded")
    lines = []
    for i, line in enumerate(itertools.islice(read_manifest(world / "data/train.jsonl", []), 4)):
        codes = torch.stack(encode_audio(mimi, list(read_audio(line.path)))).to(torch.int16)
        save_codes(folder / f"{i}.pt", codes, line.fields["duration"], fingerprint_mimi(mimi),
                         audio_fingerprint(line.path))  # fmt: skip
        lines.append(line.fields | {"path": str(line.path), "codes_path": f"{i}.pt"})
    return write_lines(folder / "train_precomputed.jsonl", lines)


def tokenizers(parts, window_frames=40):
    mimi, pieces = parts
    interleaver = Interleaver(pieces)
    return (
        InterleavedTokenizer(interleaver, window_frames, mimi=mimi),
        PrecomputedTokenizer(interleaver, window_frames, mimi_fingerprint=fingerprint_mimi(mimi)),
    )


def test_both_tokenizers_give_the_same_first_window_of_each_file(parts, encoded):
    live, stored = tokenizers(parts)
    for line in read_manifest(encoded, []):
        a, b = (t.encode([t.read(line, 0)])[0] for t in (live, stored))
        assert a.codes.shape == (17, 40) and torch.equal(a.codes, b.codes) and torch.equal(a.loss_mask, b.loss_mask)
        assert a.name == b.name and a.text == b.text


def test_later_windows_have_the_text_of_live_ones_and_codes_that_have_heard_the_beginning(parts, encoded):
    live, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    a, b = (t.encode([t.read(line, 1)])[0] for t in (live, stored))
    assert torch.equal(a.codes[0], b.codes[0])
    whole = load_codes(resolve_path(encoded, line.fields["codes_path"]))["codes"].long().flatten(0, 1)
    assert torch.equal(b.codes[1:], whole[:, 40:80])


def test_the_last_window_is_as_long_as_what_is_left(parts, encoded):
    _, stored = tokenizers(parts, window_frames=60)
    line = next(read_manifest(encoded, []))
    frames = round(line.fields["duration"] * 12.5)
    sample = stored.encode([stored.read(line, frames // 60)])[0]
    assert sample.codes.shape[1] == frames % 60


def test_text_streams_end_with_the_audio(parts, encoded):
    """A window longer than the file: frames past its end are no target at all, rather than padding to be learnt."""
    _, stored = tokenizers(parts, window_frames=1000)
    samples = [stored.encode([stored.read(line, 0)])[0] for line in itertools.islice(read_manifest(encoded, []), 2)]
    batch = collate(samples, [], DELAYS, 8)
    short = min(range(2), key=lambda i: samples[i].codes.shape[1])
    length = samples[short].codes.shape[1]
    assert (batch.codes[short, :, length:] == -1).all() and not batch.loss_mask[short, length:].any()
    assert int(batch.counts[:2].sum()) == sum(s.codes.shape[1] for s in samples)


def test_codes_of_another_codec_or_of_a_changed_file_are_refused(parts, encoded, tmp_path):
    _, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    with pytest.raises(UserError, match="made by Mimi"):
        other = PrecomputedTokenizer(stored.interleaver, 40, mimi_fingerprint="another")
        other.read(line, 0)
    copy = tmp_path / "copy.wav"
    copy.write_bytes(line.path.read_bytes()[:-5000] + bytes(5000))
    copy.with_suffix(".json").write_text(line.path.with_suffix(".json").read_text())
    with pytest.raises(UserError, match="changed"):
        stored.read(line._replace(path=copy), 0)


def test_the_cache_is_bounded():
    cache = LRUCache(megabytes=1)
    made = []
    for key in range(10):
        cache.get(key, lambda k=key: (made.append(k) or k, 300_000))
    assert cache.used <= 2**20 and cache.get(9, lambda: 1 / 0) == 9
    cache.get(0, lambda: (made.append(0) or 0, 300_000))
    assert made == [*range(10), 0]


def test_files_of_codes_that_are_mapped_are_bounded_too(tmp_path):
    reader = PrecomputedTokenizer(None, 40, cache_mb=1)
    for i in range(40):
        save_codes(tmp_path / f"{i}.pt", torch.full((2, 8, 50), i), 4.0, "mimi", "audio")
        line = Line(1, tmp_path / f"{i}.wav", {"codes_path": f"{i}.pt"}, tmp_path / "m.jsonl")
        codes, _ = reader._sound(line, 10)
        assert codes.shape == (16, 40) and (codes == i).all()
    rows = Path("/proc/self/maps").read_text().splitlines()
    mapped = {row.split()[-1] for row in rows if str(tmp_path) in row}
    assert 1 <= len(mapped) <= 16


# --- prompts ----------------------------------------------------------------------------------------------------


def prompted(parts, world, **settings):
    """Both tokenizers, with prompts."""
    mimi, pieces = parts
    args = PromptArgs(voices_dir=str(world / "data/voices"), **settings)
    prompter = Prompter(args, pieces, VoiceBook(world / "data/voices", lambda: None))
    load = lambda files: load_voices(
        files, lambda: mimi, lambda: fingerprint_mimi(mimi), None, DELAYS, False
    )  # fmt: skip
    common = (Interleaver(pieces), 40, ["SPEAKER_MAIN"], prompter)
    both = (InterleavedTokenizer(*common, mimi=mimi),
            PrecomputedTokenizer(*common, mimi_fingerprint=fingerprint_mimi(mimi)))  # fmt: skip
    return prompter, load, both


def test_each_window_begins_with_its_own_prompt(parts, world, encoded):
    mimi, pieces = parts
    prompter, load, both = prompted(parts, world)
    windows = open_windows(str(encoded), 40)
    prompter.voices = load(prompter.check([prompter.scan(windows.prompts())]))
    for line in read_manifest(encoded, []):
        about = json.loads(line.path.with_suffix(".json").read_text())
        voice = world / "data/voices" / about["voice_prompt"]
        sound = load_recording(voice)
        codes = encode_audio(mimi, [torch.from_numpy(sound)])[0]
        ids = pieces.encode(about["text_prompt"])
        for index in (0, 1):
            for tokenizer in both:
                sample = tokenizer.encode([tokenizer.read(line, index)])[0]
                dialogue = int(sample.loss_mask.sum())
                assert sample.codes.shape[1] - dialogue == codes.shape[1] - 1 + 6 + len(ids) + 6
                assert not sample.loss_mask[:-dialogue].any() and sample.loss_mask[-dialogue:].all()
                assert torch.equal(sample.codes[1:9, : codes.shape[1] - 1], codes[:, 1:])
                start = codes.shape[1] - 1 + 6
                assert sample.codes[0, start : start + len(ids)].tolist() == ids
                assert (torch.tensor(SINE_TOKENS) == sample.codes[9:, :-dialogue].T).all()


def test_prompts_are_dropped_by_position_and_their_silences_stay(parts, world, encoded):
    prompter, load, (_, stored) = prompted(parts, world, drop_text=0.5, drop_voice=0.5)
    windows = open_windows(str(encoded), 40)
    prompter.voices = load(prompter.check([prompter.scan(windows.prompts())]))
    line = next(read_manifest(encoded, []))
    draw = lambda position: stored.encode([stored.read(line, 0, np.random.default_rng([0, 2, position]))])[0]
    lengths = [int((~draw(position).loss_mask).sum()) for position in range(40)]
    assert len(set(lengths)) == 4 and min(lengths) == 11, "with and without each, and two silences less the first frame"
    assert lengths == [int((~draw(position).loss_mask).sum()) for position in range(40)]
    never = stored.encode([stored.read(line, 0)])[0]
    assert int((~never.loss_mask).sum()) == max(lengths), "an evaluation drops nothing"


def test_long_voices_are_cut_and_long_texts_refused(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    prompter, load, (_, stored) = prompted(parts, world, max_sec=4.0)
    prompter.voices = load(prompter.check([prompter.scan(windows.prompts())]))
    line = next(read_manifest(encoded, []))
    assert int((~stored.encode([stored.read(line, 0)])[0].loss_mask).sum()) == 50
    prompter, load, _ = prompted(parts, world, max_sec=2.0)
    with pytest.raises(UserError, match=r"\d+ tokens, and prompt.max_sec 2 has room for 2 beside 12 frames"):
        prompter.voices = load(prompter.check([prompter.scan(windows.prompts())]))


def test_an_empty_prompt_in_a_manifest_leaves_it_to_the_json(parts, world, tmp_path):
    """pandas writes null where nothing is."""
    fields = {"text_prompt": None, "voice_prompt": None}
    manifest_path = write_lines(tmp_path / "m.jsonl", [{"path": "a.wav", "duration": 1} | fields])
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [], "text_prompt": "You are Ada.", "voice_prompt": "v"}))
    prompter, _, _ = prompted(parts, world, text="Somebody.", voice="w")
    ((line, extra),) = open_windows(str(manifest_path), 40).prompts()
    assert prompter.names(line, extra) == ("You are Ada.", "v")
    assert prompter.names(line, {}) == ("Somebody.", "w")


def test_all_missing_voices_are_listed_at_once(parts, world, tmp_path):
    lines = [{"path": f"{i}.wav", "duration": 1, "voice_prompt": f"NAT{i}", "text_prompt": "Hi."} for i in range(3)]
    windows = open_windows(str(write_lines(tmp_path / "m.jsonl", lines)), 40)
    prompter, load, _ = prompted(parts, world)
    with pytest.raises(UserError) as error:
        prompter.voices = load(prompter.check([prompter.scan(windows.prompts())]))
    assert all(f"NAT{i}" in str(error.value) for i in range(3))


def test_a_torn_voice_in_the_cache_is_made_anew(parts, world, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = sorted((world / "data/voices").glob("*.wav"))[:2]
    made, problems = encode_recordings(paths, lambda: parts[0], fingerprint_mimi(parts[0]))
    kept = list(codes_folder().iterdir())
    assert len(kept) == 2 and not problems
    kept[0].write_bytes(b"")
    kept[1].write_bytes(kept[1].read_bytes()[:-100])
    again, _ = encode_recordings(paths, lambda: parts[0], fingerprint_mimi(parts[0]))
    assert all(torch.equal(again[path], made[path]) for path in paths)
    assert all(torch.load(path).dtype == torch.int16 for path in kept)
    cached, _ = encode_recordings(paths, lambda: pytest.fail("no codec is wanted"), fingerprint_mimi(parts[0]))
    assert all(torch.equal(cached[path], made[path]) for path in paths)


def test_ranks_share_the_reading_of_prompts(parts, world, encoded):
    windows = open_windows(str(encoded), 40)
    prompter, *_ = prompted(parts, world)
    alone = prompter.check([prompter.scan(windows.prompts())])
    shares = [list(windows.prompts(rank, 3)) for rank in range(3)]
    assert sum(map(len, shares)) == windows.indexes[0].files and max(map(len, shares)) < windows.indexes[0].files
    assert sorted(prompter.check(map(prompter.scan, shares))) == sorted(alone)


def test_a_voice_that_comes_after_the_start_is_one_bad_window(parts, world, encoded):
    prompter, _, (_, stored) = prompted(parts, world)
    assert not prompter.voices
    with pytest.raises(UserError, match="was not there when the run began"):
        stored.read(next(read_manifest(encoded, [])), 0)


def test_batches_are_pinned_for_a_gpu(parts, encoded, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self + 0)
    stored = PrecomputedTokenizer(Interleaver(parts[1]), 40)
    batch = collate(stored.encode([stored.read(line, 0) for line in read_manifest(encoded, [])]), [], DELAYS, 16)
    pinned = batch.pin_memory()
    for a, b in zip((batch.codes, batch.loss_mask, *batch.plan), (pinned.codes, pinned.loss_mask, *pinned.plan)):
        assert torch.equal(a.long(), b.long()) and a.data_ptr() != b.data_ptr()


def test_a_manifest_that_is_replaced_stays_what_it_was(tmp_path):
    lines = [{"path": f"{i}.wav", "duration": 8.0, "note": "x" * (300 * i)} for i in range(20)]
    path = write_lines(tmp_path / "m.jsonl", lines)
    index = ManifestIndex(path, 40)
    write_lines(tmp_path / "new.jsonl", lines[5:]).replace(path)
    assert [index.line(i).fields for i in range(20)] == lines


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    """Not even those that have more to hand over than a pipe holds."""
    code = (
        "import numpy as np, os, time\n"
        "from torch.utils.data import IterableDataset\n"
        "from finetune.data.dataset import _load\n"
        "class Large(IterableDataset):\n"
        "    def __iter__(self):\n"
        "        while True: yield os.getpid(), np.zeros(2**20)\n"
        "batches = _load(Large(), 2)\n"
        "print(next(batches)[0], next(batches)[0], flush=True)\n"
        "time.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = list(map(int, parent.stdout.readline().split()))
    time.sleep(1)
    parent.kill()
    parent.wait()
    alive = lambda pid: Path(f"/proc/{pid}").exists() and "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    deadline = time.monotonic() + 15
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(workers) == 2 and not any(map(alive, workers))


def test_same_speaker_is_heard_from_outside_the_window(parts, world, encoded):
    mimi, _ = parts
    _, _, (live, stored) = prompted(parts, world, voice=SAME_SPEAKER)
    lines = list(read_manifest(encoded, []))
    for line in lines:
        line.fields["voice_prompt"] = SAME_SPEAKER
    with pytest.raises(UserError, match="--same-speaker"):
        stored.read(lines[0], 0)
    files = [(line.path, resolve_path(encoded, line.fields["codes_path"])) for line in lines]
    assert save_same_speaker(files, mimi, fingerprint_mimi(mimi)) == {}
    voiced = 0
    for line in lines:
        for index in range(math.ceil(line.fields["duration"] * 12.5 / 40)):
            a, b = (t.encode([t.read(line, index)])[0] for t in (live, stored))
            assert torch.equal(a.codes, b.codes), "live and stored are one"
            draft = stored.read(line, index)
            assert a.voiceless == (draft.prompt.voice is None)
            if draft.prompt.voice is not None:
                voiced += 1
                codes = files[0][1].with_name(line.fields["codes_path"])
                spans = load_same_speaker(same_speaker_file(codes), None, ["SPEAKER_MAIN"])
                window = (index * 3.2, index * 3.2 + 3.2)
                used = next(s for s in spans if torch.equal(s["codes"].long()[:, : draft.prompt.voice.frames],
                                                            draft.prompt.voice.codes))  # fmt: skip
                assert used["end"] <= window[0] or used["start"] >= window[1]
    assert voiced


def test_a_text_that_fills_the_prompt_leaves_no_voice(parts, world, encoded):
    text = "You are Ada."
    line = next(read_manifest(encoded, []))
    line.fields.update(voice_prompt=SAME_SPEAKER, text_prompt=text)
    files = [(line.path, resolve_path(encoded, line.fields["codes_path"]))]
    assert save_same_speaker(files, parts[0], fingerprint_mimi(parts[0])) == {}
    prompter, _, (live, _) = prompted(parts, world)
    window = next(i for i in range(9) if live.read(line, i).prompt.pcm is not None)
    frames = prompt_length(0, len(prompter.encode(text)))
    for more in (0, 1):
        _, _, both = prompted(parts, world, max_sec=(frames + more + 0.1) / 12.5)
        for tokenizer in both:
            [sample] = tokenizer.encode([tokenizer.read(line, window)])
            assert int((~sample.loss_mask).sum()) == frames + more and sample.voiceless == (not more)
    same_speaker_file(files[0][1]).unlink()


@pytest.mark.parametrize("quiet", [3, 6], ids=["first", "all"])
def test_same_speaker_passes_over_words_in_silence(parts, world, tmp_path, quiet):
    """The best stretch, or each, stands where the channel is silent."""
    mimi, _ = parts
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (2, 9 * 24_000))
    sound[0, : quiet * 24_000] = 0
    write_wav(tmp_path / "a.wav", sound, 24_000)
    words = [["so", [0.0, 1.9], "SPEAKER_MAIN"], ["and", [3.0, 4.5], "SPEAKER_MAIN"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": words}))
    assert save_same_speaker([(tmp_path / "a.wav", tmp_path / "a.pt")], mimi, "mimi") == {}
    kept = load_same_speaker(same_speaker_file(tmp_path / "a.pt"), "mimi", ["SPEAKER_MAIN"])
    assert [stretch["start"] for stretch in kept] == ([3.0] if quiet == 3 else [])

    line = {"path": "a.wav", "duration": 9, "voice_prompt": SAME_SPEAKER, "text_prompt": "Hi."}
    line = next(read_manifest(write_lines(tmp_path / "m.jsonl", [line]), []))
    _, _, (live, _) = prompted(parts, world)
    [sample] = live.encode([live.read(line, 2)])
    assert sample.voiceless == (not kept)
    if kept:
        codes = kept[0]["codes"].long()
        assert torch.equal(sample.codes[1:9, : codes.shape[1] - 1], codes[:, 1:])


# --- bad input --------------------------------------------------------------------------------------------------


def bad_corpus(world, folder):
    """One line for each way in which a file can be bad, between good ones."""
    import shutil

    good = next(read_manifest(world / "data/train.jsonl", []))
    data = good.path.read_bytes()

    def copy(name, audio=data, sidecar='{"alignments": []}', duration=good.fields["duration"]):
        (folder / f"{name}.wav").write_bytes(audio)
        if sidecar is not None:
            (folder / f"{name}.json").write_text(sidecar)
        return {"path": f"{name}.wav", "duration": duration}

    mono = bytearray(data[:44])
    mono[22] = 1
    mono[28:34] = (48000).to_bytes(4, "little") + (2).to_bytes(2, "little")
    lines = [
        copy("good"),
        {"path": "missing.wav", "duration": 3},
        copy("no_sidecar", sidecar=None),
        copy("no_alignments", sidecar="{}"),
        copy("broken_sidecar", sidecar="{"),
        copy("wrong_times", sidecar='{"alignments": [["a", [1], "SPEAKER_MAIN"]]}'),
        copy("not_audio", audio=b"hello"),
        copy("mono", audio=bytes(mono) + data[44:]),
        copy("truncated", audio=data[:44]),
    ]
    shutil.copy(folder / "good.wav", folder / "overstated.wav")
    (folder / "overstated.json").write_text('{"alignments": []}')
    lines.append({"path": "overstated.wav", "duration": good.fields["duration"] + 2})
    return write_lines(folder / "bad.jsonl", lines)


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_files_are_left_out_and_named(world, parts, tmp_path, workers):
    live, _ = tokenizers(parts, window_frames=400)
    windows = open_windows(str(bad_corpus(world, tmp_path)), 400)
    batches = get_dataset_iterator(windows, live, RankShare(4), DELAYS, 8, workers=workers, evaluation=True)
    batches = list(batches)
    names = [name for b in batches for name in b.names]
    problems = "\n".join(p for b in batches for p in b.problems)
    assert [n.split("/")[-1].split()[0] for n in names] == ["good.wav", "overstated.wav"]
    for part in ("missing.wav: no such file", "no_sidecar.json: missing", 'no_alignments.json: has no "alignments"',
                 "broken_sidecar.json: not readable", "wrong_times.json: alignment 0", "not_audio.wav",
                 "mono.wav: has 1 channel", "truncated.wav"):  # fmt: skip
        assert part in problems, part
    assert len(names) + problems.count("\n") + 1 == len(windows)


def test_a_batch_of_bad_files_only_has_no_targets_and_still_a_shape():
    batch = collate([], ["bad"], DELAYS, 16)
    assert batch.codes.shape == (1, 17, 2) and int(batch.counts.sum()) == 0 and len(batch.plan.word_rows) == 1


def test_padding_is_no_target():
    """A batch counts what its windows count alone: padding behind the shorter does not change its last frame."""
    generator = np.random.default_rng(0)
    samples = [
        Sample(codes, torch.ones(codes.shape[1], dtype=torch.bool), None, "", TextStats())
        for codes in (torch.from_numpy(generator.integers(4, 2000, (17, t))) for t in (9, 5))
    ]
    together = collate(samples, [], DELAYS, 16).counts
    alone = sum(collate([s], [], DELAYS, 16).counts for s in samples)
    assert together.tolist() == alone.tolist()


def test_no_worker_outlives_a_run(world, parts, encoded):
    _, stored = tokenizers(parts)
    windows = open_windows(str(encoded), 40)
    before = set(multiprocessing.active_children())
    stream = get_dataset_iterator(windows, stored, RankShare(2), DELAYS, 8, workers=2, shuffle=True)
    first = [next(stream) for _ in range(5)]
    direct = get_dataset_iterator(windows, stored, RankShare(2), DELAYS, 8, workers=0, shuffle=True)
    for a, b in zip(first, direct):
        assert torch.equal(a.codes, b.codes) and a.names == b.names, "workers change nothing"
    resumed = get_dataset_iterator(windows, stored, RankShare(2, position=6), DELAYS, 8, workers=2, shuffle=True)
    assert next(resumed).names == first[3].names
    workers = set(multiprocessing.active_children()) - before
    stream.close()
    resumed.close()
    assert len(workers) == 4 and set(multiprocessing.active_children()) == before


def test_a_killed_worker_is_told_in_a_sentence():
    """In a process of its own: torch raises where the signal of the death happens to find the main thread."""
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


def test_memory_does_not_grow_over_epochs(parts, encoded):
    """With a cache that holds nothing for long, so that each file is opened and parsed anew."""
    interleaver = Interleaver(parts[1])
    stored = PrecomputedTokenizer(interleaver, 40, cache_mb=0.001)
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
        seen = [epochs(25) for _ in range(6)]
    finally:
        tracemalloc.stop()
    # A leak is in each span; what is set up once, or a table of Python's that doubles, is in one.
    assert min(after[0] - before[0] for before, after in itertools.pairwise(seen)) < 20 * 25 * len(windows)  # bytes
    assert min(after[1] - before[1] for before, after in itertools.pairwise(seen)) <= 0


def test_a_batch_is_taken_while_the_one_before_is_in_use():
    taken = []

    def source():
        for i in range(3):
            taken.append(i)
            yield i

    ahead = _ahead(source())
    assert next(ahead) == 0
    deadline = time.monotonic() + 5
    while taken != [0, 1] and time.monotonic() < deadline:
        time.sleep(0.01)
    assert taken == [0, 1] and list(ahead) == [1, 2]
