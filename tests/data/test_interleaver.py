"""Word times -> text stream: nothing lost silently, nothing outside the audio, moshi's own stream where it is right."""

import random
from fractions import Fraction

import pytest

from finetune.audio.words import read_alignments
from finetune.cli import UserError
from finetune.data.interleaver import Interleaver

EPAD, PAD = 0, 3


class Pieces:
    """A tokenizer whose ids tell word and place: word "7:3" has the three tokens 700, 701, 702."""

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
    """Facts, literally: step through the frames, words queue (or replace each other), one token a frame."""
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
    for frame in range(1, frames):  # EPAD stands exactly before text that follows padding
        if ids[frame] == EPAD:
            assert frame + 1 < frames and ids[frame + 1] not in (EPAD, PAD)


def test_default_loses_nothing_where_moshi_finetune_does():
    words = words_at((8, 0.0, 0.5), (7, 0.16, 0.6))  # the second is due when two of eight tokens are out
    _, stats = Interleaver(Pieces())(words, 0.0, 20)
    assert stats.placed == 15 and stats.dropped == 0
    assert (stats.late, stats.late_frames) == (1, 6)
    _ids, stats = Interleaver(Pieces(), keep_and_shift=False)(words, 0.0, 20)
    assert stats.placed == 9 and stats.dropped == 6


def test_zero_length_words_are_words():
    ids, stats = Interleaver(Pieces())(words_at((2, 0.4, 0.4)), 0.0, 10)
    assert ids.tolist() == [PAD] * 4 + [EPAD, 100, 101] + [PAD] * 3 and stats.dropped == 0


def test_times_are_relative_to_the_window():
    whole, _ = Interleaver(Pieces())(words_at((1, 0.8, 1.0), (1, 2.4, 2.6)), 0.0, 40)
    part, stats = Interleaver(Pieces())(words_at((1, 0.8, 1.0), (1, 2.4, 2.6)), 1.6, 20)
    assert part.tolist() == whole[20:].tolist() and stats.words == 1


def test_a_word_that_began_before_is_kept_only_if_it_fits():
    for length, room, placed in ((3, 0.24, 3), (4, 0.24, 0)):
        ids, stats = Interleaver(Pieces())(words_at((length, 0.9, 1.0 + room)), 1.0, 10)
        assert (stats.placed, stats.dropped) == (placed, length - placed)
    ids, stats = Interleaver(Pieces())(words_at((3, 0.9, 1.5), (1, 1.08, 1.2)), 1.0, 10)
    assert ids[1] == 200 and stats.dropped == 3, "the word that belongs to the window goes first"


def test_text_never_passes_the_end_of_the_audio():
    ids, stats = Interleaver(Pieces())(words_at((5, 0.64, 1.0), (2, 0.72, 1.0)), 0.0, 10)
    assert len(ids) == 10 and stats.placed == 2 and stats.dropped == 5


def test_alignments_are_sorted_before_use_and_other_speakers_left_out():
    raw = [["b", [2, 3], "SPEAKER_MAIN"], ["u", [0, 1], "SPEAKER_USER"], ["a", [1, 2], "SPEAKER_MAIN"]]
    assert read_alignments(raw) == [("a", 1.0, 2.0), ("b", 2.0, 3.0)]
    assert len(read_alignments(raw, ["SPEAKER_MAIN", "SPEAKER_USER"])) == 3


@pytest.mark.parametrize("raw", [{}, [["a", 1, "SPEAKER_MAIN"]], [["a", [1, float("nan")], "S"]], [[1, [1, 2], "S"]]])
def test_bad_alignments_are_named(raw):
    with pytest.raises(UserError, match="alignment"):
        read_alignments(raw)


def test_words_are_encoded_alone_without_bos(world):
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(str(world / "model/tokenizer.model"))
    ids, _ = Interleaver(tokenizer)([(" hello ", 0.08, 0.5)], 0.0, 8)
    expected = tokenizer.encode("hello")
    assert ids.tolist()[: 1 + len(expected)] == [EPAD, *expected] and 1 not in expected


def test_a_window_of_a_long_file_takes_the_words_that_touch_it():
    """What is looked up among 5,000 words is what those near the window alone give."""
    rng = random.Random(0)
    starts = sorted(rng.uniform(0, 2000) for _ in range(5000))
    words = [(f"{i % 9 + 1}:{rng.randint(1, 2)}", t, t + rng.choice((0.1, 0.5, 20.0))) for i, t in enumerate(starts)]
    place = Interleaver(Pieces())
    for begin in (0.0, 3.2, 999.36, 1996.8, 2100.0):
        near = [word for word in words if word[2] > begin - 1 and word[1] < begin + 9]
        (ids, stats), (alone, stats_alone) = place(words, begin, 100), place(near, begin, 100)
        assert ids.tolist() == alone.tolist() and stats == stats_alone
        assert (stats.words > 0) == (begin < 2090)
