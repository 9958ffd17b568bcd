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
from finetune.audio.files import read_audio
from finetune.cli import UserError
from finetune.data.batch import TextStats, collate
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer
from finetune.data.manifest import Line, read_manifest, resolve_path
from tests.data.support import DELAYS, tokenizers
from tests.support import write_wav

EPAD, PAD = 0, 3


class Pieces:
    """A tokenizer in which the word "7:3" has the three tokens 700, 701, 702."""

    def encode(self, text, add_bos, add_eos):
        assert not add_bos and not add_eos and text == text.strip()
        number, length = text.split(":")
        return [100 * int(number) + i for i in range(int(length))]


def words_at(*items):
    return [(f"{i + 1}:{length}", start, end) for i, (length, start, end) in enumerate(items)]


def random_words(rng, duration):
    times = sorted(round(rng.uniform(-2, duration + 1), 2) for _ in range(rng.randint(0, 40)))
    return words_at(*((rng.randint(1, 6), t, t + rng.choice([0.0, 0.05, 0.3, 1.0])) for t in times))


def reference(words, frames, keep):
    """Step through the frames: words queue, or replace each other; one token per frame."""
    out, queue = [PAD] * frames, []
    pending = [w for w in words if w[1] >= 0]
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
    rng = random.Random(seed)
    frames = rng.randint(1, 150)
    words = [w for w in random_words(rng, frames / 12.5) if w[1] >= 0]
    ids, _ = Interleaver(Pieces(), keep_and_shift=keep)(words, 0.0, frames)
    assert ids.tolist() == reference(words, frames, keep)


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("seed", range(60))
def test_every_token_is_placed_or_counted(seed, keep):
    rng = random.Random(seed)
    frames = rng.randint(1, 150)
    words = random_words(rng, frames / 12.5)
    ids, stats = Interleaver(Pieces(), keep_and_shift=keep)(words, 0.0, frames)
    placed = [i for i in ids.tolist() if i not in (EPAD, PAD)]
    assert len(ids) == frames and len(placed) == stats.placed and len(set(placed)) == len(placed)
    touching = [w for w in words if w[1] * 12.5 < frames and (w[1] >= 0 or w[2] > 0)]
    assert stats.words == len(touching)
    assert stats.placed + stats.dropped == sum(int(w[0].split(":")[1]) for w in touching)
    assert placed == sorted(placed), "order of words and tokens"
    for frame in range(1, frames):  # EPAD is where padding ends
        if ids[frame] == EPAD:
            assert frame + 1 < frames and ids[frame + 1] not in (EPAD, PAD)


def test_crowded_words_are_delayed_or_truncated():
    words = words_at((8, 0.0, 0.5), (7, 0.16, 0.6))  # the second is due when two of eight tokens are out
    _, stats = Interleaver(Pieces())(words, 0.0, 20)
    assert stats.placed == 15 and stats.dropped == 0
    assert (stats.late, stats.late_frames) == (1, 6)
    _ids, stats = Interleaver(Pieces(), keep_and_shift=False)(words, 0.0, 20)
    assert stats.placed == 9 and stats.dropped == 6


def test_words_without_duration_are_placed():
    ids, stats = Interleaver(Pieces())(words_at((2, 0.4, 0.4)), 0.0, 10)
    assert ids.tolist() == [PAD] * 4 + [EPAD, 100, 101] + [PAD] * 3 and stats.dropped == 0


def test_times_are_relative_to_the_window():
    whole, _ = Interleaver(Pieces())(words_at((1, 0.8, 1.0), (1, 2.4, 2.6)), 0.0, 40)
    part, stats = Interleaver(Pieces())(words_at((1, 0.8, 1.0), (1, 2.4, 2.6)), 1.6, 20)
    assert part.tolist() == whole[20:].tolist() and stats.words == 1


@pytest.mark.parametrize("begin", [0, 40, 1240, 44_960])
def test_a_word_at_the_start_of_a_frame_is_due_in_it(begin):
    """Whatever k * 0.08 is in binary."""
    for k in range(1, 200):
        ids, _ = Interleaver(Pieces())([("1:1", round((begin + k) * 0.08, 2), 9e9)], begin / 12.5, 200)
        assert ids[k] == 100 and ids[k - 1] == EPAD and (ids != PAD).sum() == 2
        early = round((begin + k) * 0.08, 2) - 0.01
        assert Interleaver(Pieces())([("1:1", early, 9e9)], begin / 12.5, 200)[0][k - 1] == 100


def test_a_word_of_the_previous_window_needs_room_before_its_end():
    place = lambda end: Interleaver(Pieces())([("1:3", 0.9, end)], 1.0, 10)[1]
    assert place(1.24).placed == 3 and place(1.161).placed == 3 and place(1.16).placed == 0
    assert place(1.0) == TextStats(), "one that ends at the start of the window is not part of it"
    assert place(1.001) == TextStats(words=1, dropped=3)


def test_only_one_word_of_the_previous_window_is_repeated():
    ids, stats = Interleaver(Pieces())(words_at((1, 0.5, 1.5), (1, 0.7, 1.5), (1, 1.24, 1.5)), 1.0, 6)
    assert ids.tolist() == [200, PAD, EPAD, 300, PAD, PAD] and stats == TextStats(words=3, placed=2, dropped=1)


def test_words_longer_than_a_minute_are_not_repeated():
    for start, words in ((100.0 - 59.9, 1), (100.0 - 60.1, 0)):
        ids, stats = Interleaver(Pieces())([("1:2", start, 101.0)], 100.0, 20)
        assert stats.words == words and ids.tolist()[:2] == ([100, 101] if words else [PAD, PAD])


def test_a_full_cache_of_words_changes_nothing(monkeypatch):
    monkeypatch.setattr("finetune.data.interleaver._MAX_WORDS", 3)
    interleaver, words = Interleaver(Pieces()), words_at(*((2, i, i + 0.1) for i in range(12)))
    for _ in range(2):
        assert interleaver(words, 0.0, 200)[0].tolist() == reference(words, 200, True)
        assert len(interleaver._cache) <= 4


def test_a_word_that_began_before_is_kept_only_if_it_fits():
    for length, room, placed in ((3, 0.24, 3), (4, 0.24, 0)):
        ids, stats = Interleaver(Pieces())(words_at((length, 0.9, 1.0 + room)), 1.0, 10)
        assert (stats.placed, stats.dropped) == (placed, length - placed)
    ids, stats = Interleaver(Pieces())(words_at((3, 0.9, 1.5), (1, 1.08, 1.2)), 1.0, 10)
    assert ids[1] == 200 and stats.dropped == 3, "the word that belongs to the window goes first"


def test_text_ends_with_the_audio():
    ids, stats = Interleaver(Pieces())(words_at((5, 0.64, 1.0), (2, 0.72, 1.0)), 0.0, 10)
    assert len(ids) == 10 and stats.placed == 2 and stats.dropped == 5


def test_words_are_stripped():
    assert Interleaver(Pieces())([(" 7:2\n", 0.08, 0.5)], 0.0, 4)[0].tolist() == [EPAD, 700, 701, PAD]


def test_words_are_encoded_alone_without_bos(parts):
    _, tokenizer = parts
    ids, _ = Interleaver(tokenizer)([("hello", 0.08, 0.5)], 0.0, 8)
    expected = tokenizer.encode("hello")
    assert ids.dtype == torch.int64 and ids.tolist()[: 1 + len(expected)] == [EPAD, *expected] and 1 not in expected


def test_a_window_of_a_long_file_takes_the_words_that_touch_it():
    """Searching 5,000 words gives the same as only the words near the window."""
    rng = random.Random(0)
    starts = sorted(rng.uniform(0, 2000) for _ in range(5000))
    words = [(f"{i % 9 + 1}:{rng.randint(1, 2)}", t, t + rng.choice((0.1, 0.5, 20.0))) for i, t in enumerate(starts)]
    place = Interleaver(Pieces())
    for begin in (0.0, 3.2, 999.36, 1996.8, 2100.0):
        near = [word for word in words if word[2] > begin - 1 and word[1] < begin + 9]
        (ids, stats), (alone, stats_alone) = place(words, begin, 100), place(near, begin, 100)
        assert ids.tolist() == alone.tolist() and stats == stats_alone
        assert (stats.words > 0) == (begin < 2090)


# --- samples ----------------------------------------------------------------------------------------------------


def test_live_and_stored_codes_give_the_same_first_window(parts, encoded):
    live, stored = tokenizers(parts)
    for line in read_manifest(encoded, []):
        a, b = (t.encode([t.read(line, 0)])[0] for t in (live, stored))
        assert a.codes.shape == (17, 40) and torch.equal(a.codes, b.codes) and torch.equal(a.loss_mask, b.loss_mask)
        assert a.name == b.name == f"{line.path} at 0.00 s" and a.text == b.text


def test_a_sample_is_text_then_the_agent_then_the_user(parts, encoded):
    live, _ = tokenizers(parts)
    lines = list(itertools.islice(read_manifest(encoded, []), 2))
    samples = live.encode([live.read(line, 0) for line in lines])
    for line, sample in zip(lines, samples):
        agent, user = read_audio(line.path, 0, 3.2)
        assert torch.equal(sample.codes[1:9], encode_audio(parts[0], [agent])[0])
        assert torch.equal(sample.codes[9:], encode_audio(parts[0], [user])[0])
        assert not torch.equal(sample.codes[1:9], sample.codes[9:]) and sample.codes.dtype == torch.int64
        words = json.loads(line.path.with_suffix(".json").read_text())["alignments"]
        words = [(text, *times) for text, times, speaker in words if speaker == "SPEAKER_MAIN"]
        ids, stats = Interleaver(parts[1])(sorted(words, key=lambda word: word[1]), 0.0, 40)
        assert torch.equal(sample.codes[0], ids) and sample.text == stats and stats.placed
        assert sample.loss_mask.all() and sample.embeddings is None and sample.voice is None and not sample.voiceless


def test_later_windows_have_live_text_and_codes_of_the_whole_file(parts, encoded):
    live, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    a, b = (t.encode([t.read(line, 1)])[0] for t in (live, stored))
    assert torch.equal(a.codes[0], b.codes[0]) and b.name == f"{line.path} at 3.20 s"
    whole = load_codes(resolve_path(encoded, line.fields["codes_path"]))["codes"].long().flatten(0, 1)
    assert torch.equal(b.codes[1:], whole[:, 40:80])
    codes = torch.cat(encode_audio(parts[0], list(read_audio(line.path, 3.2, 3.2))))
    assert torch.equal(a.codes[1:], codes)


def test_the_last_window_ends_with_the_file(parts, encoded):
    line = next(read_manifest(encoded, []))
    frames = round(line.duration * 12.5)
    for tokenizer in tokenizers(parts, window_frames=60):
        sample = tokenizer.encode([tokenizer.read(line, frames // 60)])[0]
        assert sample.codes.shape[1] == frames % 60
        with pytest.raises(UserError, match=rf"{line.path.name}: .*line 1.*{line.duration}"):
            tokenizer.read(line, frames // 60 + 1)


def test_text_streams_end_with_the_audio(parts, encoded):
    """In a window longer than the file, frames past its end are no targets, rather than padding to be learnt."""
    _, stored = tokenizers(parts, window_frames=1000)
    samples = [stored.encode([stored.read(line, 0)])[0] for line in itertools.islice(read_manifest(encoded, []), 2)]
    batch = collate(samples, [], DELAYS, 8)
    short = min(range(2), key=lambda i: samples[i].codes.shape[1])
    length = samples[short].codes.shape[1]
    assert (batch.codes[short, :, length:] == -1).all() and not batch.loss_mask[short, length:].any()
    assert int(batch.counts[:2].sum()) == sum(s.codes.shape[1] for s in samples)


@pytest.mark.parametrize("speakers", [["SPEAKER_MAIN"], ["SPEAKER_USER"], ["SPEAKER_USER", "SPEAKER_MAIN"]])
def test_the_text_has_the_words_of_the_speakers(tmp_path, speakers):
    write_wav(tmp_path / "a.wav", np.full((2, 24_000 * 4), 0.1), 24_000)
    rows = [["1:1", [0.5, 0.6], "SPEAKER_MAIN"], ["2:1", [1.5, 1.6], "SPEAKER_USER"]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows}))
    draft = InterleavedTokenizer(Interleaver(Pieces()), 50, speakers).read(Line(1, tmp_path / "a.wav", {}, tmp_path), 0)
    wanted = {100: "SPEAKER_MAIN" in speakers, 200: "SPEAKER_USER" in speakers}
    assert {token: token in draft.text.tolist() for token in wanted} == wanted and draft.pcm.shape == (2, 96_000)


def test_mono_audio_is_refused(parts, tmp_path):
    write_wav(tmp_path / "a.wav", np.full((1, 24_000), 0.1), 24_000)
    with pytest.raises(UserError, match=r"a\.wav: .*1 channel"):
        tokenizers(parts)[0].read(Line(1, tmp_path / "a.wav", {}, tmp_path), 0)


def test_codes_that_training_cannot_use_are_refused(parts, encoded, tmp_path):
    _, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    with pytest.raises(UserError, match="made by Mimi"):
        PrecomputedTokenizer(stored.interleaver, 40, mimi_fingerprint="another").read(line, 0)
    copy = tmp_path / "copy.wav"
    copy.write_bytes(line.path.read_bytes()[:-5000] + bytes(5000))
    copy.with_suffix(".json").write_text(line.path.with_suffix(".json").read_text())
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
        function = getattr(__import__("finetune.data.interleaver", fromlist=[name]), name)
        counted = lambda path, *args, function=function: reads.append(path.suffix) or function(path, *args)
        monkeypatch.setattr(f"finetune.data.interleaver.{name}", counted)
    _, stored = tokenizers(parts)
    line = next(read_manifest(encoded, []))
    for index in (0, 1, 0):
        stored.read(line, index)
    assert sorted(reads) == [".pt", ".wav"]


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
