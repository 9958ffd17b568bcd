"""Word times -> text stream, and audio or codes -> samples."""

import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.audio.codec import encode_audio
from finetune.audio.codes import fingerprint_mimi, load_codes, save_codes
from finetune.audio.files import read_audio, to_frames
from finetune.cli import UserError
from finetune.data import interleaver
from finetune.data.batch import TextStats
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer, load_dialogue_codes
from finetune.data.manifest import Line, read_manifest, resolve_path
from tests.data.support import tokenizers
from tests.support import write_wav

EPAD, PAD = 0, 3


class Pieces:
    """A tokenizer in which the word "7:3" has the three tokens 700, 701, 702."""

    def encode(self, text, add_bos, add_eos):
        number, length = text.split(":")
        return [100 * int(number) + i for i in range(int(length))]


def place(words, start_sec, frames, keep=True):
    ids, stats = Interleaver(Pieces(), keep_and_shift=keep)(words, start_sec, frames)
    return ids.tolist(), stats


def words_at(*items):
    """Words of (tokens, start, end)."""
    return [(f"{i + 1}:{length}", start, end) for i, (length, start, end) in enumerate(items)]


def random_words(seed):
    """(words, frames): some words begin before the window, overlap, last no time, or end after it."""
    rng = random.Random(seed)
    frames = rng.randint(1, 150)
    times = sorted(round(rng.uniform(-2, frames / 12.5 + 1), 2) for _ in range(rng.randint(0, 40)))
    return words_at(*((rng.randint(1, 6), t, t + rng.choice([0.0, 0.05, 0.3, 1.0])) for t in times)), frames


def reference(words, frames, keep):
    """Step through the frames: words queue, or replace each other; one token per frame."""
    out, queue, pending = [PAD] * frames, [], list(words)
    for t in range(frames):
        while pending and Fraction(str(pending[0][1])) * Fraction(25, 2) < t + 1:
            ids = Pieces().encode(pending.pop(0)[0], False, False)
            queue = queue + ids if keep else ids
        if queue:
            if t > 0 and out[t - 1] == PAD:
                out[t - 1] = EPAD
            out[t] = queue.pop(0)
    return out


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_equals_the_stepwise_description(seed, keep):
    words, frames = random_words(seed)
    words = [word for word in words if word[1] >= 0]
    assert place(words, 0.0, frames, keep)[0] == reference(words, frames, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_every_token_is_placed_or_counted(seed, keep):
    words, frames = random_words(seed)
    ids, stats = place(words, 0.0, frames, keep)
    placed = [i for i in ids if i not in (EPAD, PAD)]
    assert len(ids) == frames and len(placed) == stats.placed
    assert placed == sorted(set(placed)), "order of words and tokens"
    touching = [w for w in words if w[1] * 12.5 < frames and (w[1] >= 0 or w[2] > 0)]
    assert stats.words == len(touching)
    assert stats.placed + stats.dropped == sum(int(w[0].split(":")[1]) for w in touching)
    for frame in range(1, frames):  # EPAD is where padding ends
        if ids[frame] == EPAD:
            assert frame + 1 < frames and ids[frame + 1] not in (EPAD, PAD)


def test_crowded_words_are_delayed_or_truncated():
    words = words_at((8, 0.0, 0.5), (7, 0.16, 0.6))  # the second is due when two of eight tokens are out
    assert place(words, 0.0, 20)[1] == TextStats(words=2, placed=15, dropped=0, late=1, late_frames=6)
    assert place(words, 0.0, 20, keep=False)[1] == TextStats(words=2, placed=9, dropped=6)


@pytest.mark.parametrize("begin", [0, 40, 1240, 44_960])
def test_a_word_at_the_start_of_a_frame_is_due_in_it(begin):
    """Whatever k * 0.08 is in binary."""
    for k in range(1, 200):
        start = round((begin + k) * 0.08, 2)
        ids, _ = place([("1:1", start, 9e9)], begin / 12.5, 200)
        assert ids[k] == 100 and ids[k - 1] == EPAD and ids.count(PAD) == 198
        assert place([("1:1", start - 0.01, 9e9)], begin / 12.5, 200)[0][k - 1] == 100


@pytest.mark.parametrize("words, placed, stats", [
    ([(3, 99.9, 100.24)], [100, 101, 102], (1, 3, 0)),  # there are as many frames until its end
    ([(3, 99.9, 100.161)], [100, 101, 102], (1, 3, 0)),
    ([(3, 99.9, 100.16)], [], (1, 0, 3)),
    ([(4, 99.9, 100.24)], [], (1, 0, 4)),
    ([(3, 99.9, 100.0)], [], (0, 0, 0)),  # it is not part of this window
    ([(3, 99.9, 100.001)], [], (1, 0, 3)),
    ([(3, 99.9, 100.5), (1, 100.08, 100.2)], [EPAD, 200], (2, 1, 3)),  # the word that belongs here goes first
    ([(1, 99.5, 100.5), (1, 99.7, 100.5), (1, 100.24, 101)], [200, PAD, EPAD, 300], (3, 2, 1)),  # only one of two
    ([(2, 40.1, 101.0)], [100, 101], (1, 2, 0)),
    ([(2, 39.9, 101.0)], [], (0, 0, 0)),  # a word of more than a minute is a mistake
])  # fmt: skip
def test_a_word_of_the_previous_window_is_repeated_if_it_fits(words, placed, stats):
    assert place(words_at(*words), 100.0, 10) == (placed + [PAD] * (10 - len(placed)), TextStats(*stats))


def test_words_are_stripped_and_encoded_alone_without_bos(parts):
    _, tokenizer = parts
    ids, _ = Interleaver(tokenizer)([(" hello\n", 0.08, 0.5)], 0.0, 8)
    expected = tokenizer.encode("hello")
    assert ids.dtype == torch.int64 and ids.tolist()[: 1 + len(expected)] == [EPAD, *expected] and 1 not in expected


def test_a_full_cache_of_words_changes_nothing(monkeypatch):
    monkeypatch.setattr(interleaver, "_MAX_WORDS", 3)
    placer, words = Interleaver(Pieces()), words_at(*((2, i, i + 0.1) for i in range(12)))
    for _ in range(2):
        assert placer(words, 0.0, 200)[0].tolist() == reference(words, 200, True) and len(placer._cache) <= 4


def test_a_window_of_a_long_file_takes_the_words_that_touch_it():
    """Searching 5,000 words gives the same as only the words near the window."""
    rng = random.Random(0)
    starts = sorted(rng.uniform(0, 2000) for _ in range(5000))
    words = [(f"{i % 9 + 1}:{rng.randint(1, 2)}", t, t + rng.choice((0.1, 0.5, 20.0))) for i, t in enumerate(starts)]
    for begin in (0.0, 3.2, 999.36, 1996.8, 2100.0):
        near = [word for word in words if word[2] > begin - 1 and word[1] < begin + 9]
        ids, stats = place(words, begin, 100)
        assert (ids, stats) == place(near, begin, 100) and (stats.words > 0) == (begin < 2090)


# --- samples ----------------------------------------------------------------------------------------------------


def test_a_sample_is_text_then_the_agent_then_the_user(parts, encoded):
    """In the first window of a file, stored codes are those made in training."""
    lines = list(itertools.islice(read_manifest(encoded, []), 2))
    live, stored = (t.encode([t.read(line, 0) for line in lines]) for t in tokenizers(parts))
    for line, sample, other in zip(lines, live, stored):
        agent, user = encode_audio(parts[0], list(read_audio(line.path, 0, 3.2)))
        assert torch.equal(sample.codes[1:9], agent) and torch.equal(sample.codes[9:], user)
        assert not torch.equal(agent, user) and sample.codes.dtype == torch.int64
        words = json.loads(line.path.with_suffix(".json").read_text())["alignments"]
        words = [(text, *times) for text, times, speaker in words if speaker == "SPEAKER_MAIN"]
        ids, stats = Interleaver(parts[1])(sorted(words, key=lambda word: word[1]), 0.0, 40)
        assert torch.equal(sample.codes[0], ids) and sample.text == stats and stats.placed
        assert sample.loss_mask.all() and sample.embeddings is None and sample.voice is None and not sample.voiceless
        assert torch.equal(sample.codes, other.codes) and torch.equal(sample.loss_mask, other.loss_mask)
        assert sample.name == other.name == f"{line.path} at 0.00 s" and sample.text == other.text


def test_later_windows_have_live_text_and_codes_of_the_whole_file(parts, encoded):
    live, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    a, b = (t.encode([t.read(line, 1)])[0] for t in (live, stored))
    assert torch.equal(a.codes[0], b.codes[0]) and b.name == f"{line.path} at 3.20 s"
    whole = load_codes(resolve_path(encoded, line.fields["codes_path"]))["codes"].long().flatten(0, 1)
    assert torch.equal(b.codes[1:], whole[:, 40:80])
    assert torch.equal(a.codes[1:], torch.cat(encode_audio(parts[0], list(read_audio(line.path, 3.2, 3.2)))))


def test_the_last_window_ends_with_the_file(parts, encoded):
    line = next(read_manifest(encoded, []))
    frames = round(line.duration * 12.5)
    for tokenizer in tokenizers(parts, window_frames=60):
        sample = tokenizer.encode([tokenizer.read(line, frames // 60)])[0]
        assert sample.codes.shape[1] == len(sample.loss_mask) == frames % 60
        with pytest.raises(UserError, match=rf"{line.path.name}: .*line 1.*{line.duration}"):
            tokenizer.read(line, frames // 60 + 1)


def test_a_file_that_is_shorter_than_the_manifest_says_is_named_once(parts, encoded, caplog):
    """Windows past its end are refused; the last one has what there is."""
    line = next(read_manifest(encoded, []))
    for extra_sec, warnings in ((0.9, 0), (1.1, 1)):
        stated = line._replace(fields=line.fields | {"duration": line.duration + extra_sec})
        for tokenizer in tokenizers(parts, window_frames=2000):
            caplog.clear()
            frames = {tokenizer.encode([tokenizer.read(stated, 0)])[0].codes.shape[1] for _ in range(2)}
            assert frames == {to_frames(line.duration)}
            assert sum(str(line.path) in record.getMessage() for record in caplog.records) == warnings


def test_codes_with_fewer_frames_than_their_audio_are_refused(parts, encoded, tmp_path):
    line = next(read_manifest(encoded, []))
    entry = load_codes(resolve_path(encoded, line.fields["codes_path"]))
    for missing in (1, 2):
        codes = entry["codes"][..., :-missing]
        save_codes(tmp_path / f"{missing}.pt", codes, entry["duration"], entry["mimi"], entry["audio"])
        short = line._replace(fields=line.fields | {"codes_path": f"{missing}.pt"}, manifest=tmp_path / "m.jsonl")
        if missing == 1:
            load_dialogue_codes(short, None)
        else:
            with pytest.raises(UserError, match=r"2\.pt.*frames"):
                load_dialogue_codes(short, None)


@pytest.mark.parametrize("speakers, present", [(["USER"], [False, True]), (["USER", "AGENT"], [True, True])])
def test_the_text_has_the_words_of_the_speakers(tmp_path, speakers, present):
    write_wav(tmp_path / "a.wav", np.full((2, 24_000 * 4), 0.1), 24_000)
    rows = [["1:1", [0.5, 0.6], "AGENT"], ["2:1", [1.5, 1.6], "USER"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows}))
    draft = InterleavedTokenizer(Interleaver(Pieces()), 50, speakers).read(Line(1, tmp_path / "a.wav", {}, tmp_path), 0)
    assert [token in draft.text for token in (100, 200)] == present and draft.pcm.shape == (2, 96_000)


@pytest.mark.parametrize("drop", [True, False])
def test_tags_are_left_out_of_the_text(tmp_path, drop):
    write_wav(tmp_path / "a.wav", np.full((2, 24_000 * 4), 0.1), 24_000)
    (tmp_path / "a.json").write_text(json.dumps({"alignments": [["1:1", [0.5, 0.6]], ["[2:1]", [1.5, 1.6]]]}))

    class Bracketed(Pieces):
        def encode(self, text, **options):
            return super().encode(text.strip("[]"), **options)

    reader = InterleavedTokenizer(Interleaver(Bracketed()), 50, drop_tags=drop)
    text = reader.read(Line(1, tmp_path / "a.wav", {}, tmp_path), 0).text
    assert 100 in text and (200 in text) != drop


def test_codes_that_training_cannot_use_are_refused(parts, encoded, tmp_path):
    _, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    with pytest.raises(UserError, match="made by Mimi"):
        PrecomputedTokenizer(stored.interleaver, 40, mimi_fingerprint="another").read(line, 0)
    copy = tmp_path / "copy.wav"
    copy.write_bytes(line.path.read_bytes()[:-5000] + bytes(5000))
    with pytest.raises(UserError, match="changed"):
        stored.read(line._replace(path=copy), 0)
    save_codes(tmp_path / "mono.pt", torch.zeros(1, 8, 50), 4.0, fingerprint_mimi(parts[0]), "audio")
    for codes_path, words in ((None, "precompute_codes.py"), ("mono.pt", "1 channel"), ("../a.pt", "leaves"),
                              ("none.pt", "none.pt")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            stored.read(Line(1, tmp_path / "none.wav", {"codes_path": codes_path}, tmp_path / "m.jsonl"), 0)


def test_words_and_codes_of_a_file_are_read_once(parts, encoded, monkeypatch):
    reads = []
    for name in ("read_words", "load_codes"):
        function = getattr(interleaver, name)
        counted = lambda path, *args, function=function: reads.append(path.suffix) or function(path, *args)
        monkeypatch.setattr(interleaver, name, counted)
    _, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    for index in (0, 1, 0):
        stored.read(line, index)
    assert sorted(reads) == [".json", ".pt"]


def test_mapped_files_of_codes_are_bounded(tmp_path):
    reader = PrecomputedTokenizer(None, 40, cache_mb=1)
    for i in range(40):
        save_codes(tmp_path / f"{i}.pt", torch.full((2, 8, 50), i), 4.0, "mimi", "audio")
        line = Line(1, tmp_path / f"{i}.wav", {"codes_path": f"{i}.pt"}, tmp_path / "m.jsonl")
        codes, _ = reader._load(line, 10)
        assert codes.shape == (16, 40) and codes.dtype == torch.int64 and (codes == i).all()
    rows = Path("/proc/self/maps").read_text().splitlines()
    mapped = {row.split()[-1] for row in rows if str(tmp_path) in row}
    assert 1 <= len(mapped) <= 16
