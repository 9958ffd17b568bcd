"""Word times, near the thresholds: a token is a letter, a window has 100 frames."""

import json

import pytest

from finetune.args import DataArgs
from finetune.tools.check_data.text_checks import TextChecker
from tests.tools.check_data.conftest import facts_of, kinds_of

FRAME = 0.08  # seconds


class LetterTokenizer:
    """One token per letter; letters beyond ASCII are bytes, and a digit is unknown."""

    def encode(self, text, add_bos, add_eos):
        return [ord(letter) for letter in text]

    def is_byte(self, token):
        return token > 127

    def is_unknown(self, token):
        return chr(token).isdigit()


def check(words, windows=1, keep_and_shift=True, real_sec=None):
    """Check words (text, first frame[, frames]) of a file of `windows` windows."""
    times = [(text, first * FRAME, (first + (rest[0] if rest else 1)) * FRAME) for text, first, *rest in words]
    facts = facts_of(windows=windows)
    facts.windows = [100] * windows
    facts.real_sec = real_sec or windows * 100 * FRAME
    TextChecker(LetterTokenizer(), DataArgs(keep_and_shift=keep_and_shift), 100).check(facts, times, windows * 100)
    return facts


@pytest.mark.parametrize(("letters", "kinds"), [(54, ["late"]), (55, ["crowded"])])
def test_five_tokens_must_be_lost_to_crowding(letters, kinds):
    facts = check([("a" * 50, 0), ("b" * letters, 1)])
    assert kinds_of(facts) == kinds
    assert (facts.tokens, facts.text.dropped) == (50 + letters, letters - 50)


@pytest.mark.parametrize(("letters", "kinds"), [(55, []), (56, ["crowded"])])
def test_more_than_one_percent_must_be_lost_to_crowding(letters, kinds):
    """500 or 501 tokens; the words that fill them are in their windows' first frames."""
    others = [("x" * 99, 100 * i) for i in range(1, 4)] + [("x" * 98, 400)]
    facts = check([("a" * 50, 0), ("b" * letters, 1), *others], windows=5)
    assert [kind for kind in kinds_of(facts) if kind != "late"] == kinds
    assert not kinds or "6 of 501 tokens" in facts.problems[0].detail


def test_the_window_that_loses_most_is_named():
    crowds = [(50, 52, 0), (50, 60, 1), (50, 55, 2)]
    words = [word for a, b, i in crowds for word in (("a" * a, 100 * i), ("b" * b, 100 * i + 1))]
    (problem,) = check(words, windows=3).problems
    assert problem.kind == "crowded" and "17 of 317 tokens" in problem.detail and "10 of them" in problem.detail
    assert "at 8.0 s" in problem.detail


def test_words_at_the_end_of_a_window_are_not_crowded():
    facts = check([("a" * 20, 95), ("b" * 20, 196)], windows=3)
    assert facts.text.dropped == 31 and not facts.problems


@pytest.mark.parametrize(("letters", "kinds"), [(13, []), (14, ["late"])])
def test_text_is_late_from_a_mean_of_one_second(letters, kinds):
    """The second word starts in frame 1 and waits until the first, of `letters` letters, is out: 0.96 or 1.04 s."""
    facts = check([("a" * letters, 0), ("b", 1)])
    assert kinds_of(facts) == kinds and facts.text.late_frames == letters - 1


def test_late_words_are_judged_by_the_mean_of_a_window():
    """A word of the second window is 12 frames late, the next one 2, in the first window both are 13 frames late."""
    words = [("a" * 14, 0), ("b", 1), ("c", 2), ("d" * 13, 100), ("e", 101), ("f", 112)]
    (problem,) = check(words, windows=2).problems
    assert problem.kind == "late" and "at 0.0 s 2 words come 1.0 s late" in problem.detail


@pytest.mark.parametrize(
    ("first", "frames", "kinds"),
    [(99, 1, []), (100, 1, ["past the end"]), (95, 11, []), (95, 12, ["odd times"]), (-1, 1, ["odd times"]),
     (50, -1, ["odd times"]), (50, 0, [])],
)  # fmt: skip
def test_words_outside_of_the_audio(first, frames, kinds):
    assert kinds_of(check([("hi", 10), ("you", first, frames)])) == kinds


@pytest.mark.parametrize(
    ("words", "kinds"),
    [("é" * 4 + "a" * 16, []), ("é" * 5 + "a" * 15, ["script"]), ("5" * 5 + "a" * 15, ["script"]), ("é" * 19, [])],
)
def test_a_script_is_unknown_if_over_a_fifth_of_at_least_20_letters_is(words, kinds):
    assert kinds_of(check([(words, 0)])) == kinds


def test_the_densest_window_counts():
    facts = check([("a" * 20, 0), ("b" * 5, 110), ("c" * 50, 210)], windows=3)
    assert facts.densest == pytest.approx(50 / 8)
    assert facts.text.placed == facts.tokens == 75 and facts.text.words == 3


def test_words_of_other_speakers_and_their_order_do_not_count(tmp_path):
    rows = [["b", [2, 3], "A"], ["x", [1, 2], "U"], ["a", [1, 2], "A"], ["c", [4, 5], "B"], ["d", [5, 6]]]
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows, "text_prompt": "Hi."}))
    facts = facts_of(str(tmp_path / "a.wav"))
    words, extra = TextChecker(LetterTokenizer(), DataArgs(speakers=["A", "B"]), 100).read(facts)
    assert [word[0] for word in words] == ["a", "b", "c", "d"] and extra == {"text_prompt": "Hi."}
    assert facts.words == 4 and facts.labels == {"A", "B", "U"}
    assert kinds_of(facts) == ["unsorted"] and "1 of 4" in facts.problems[0].detail


def read(tmp_path, rows, drop_tags=True, **content):
    (tmp_path / "a.json").write_text(json.dumps({"alignments": rows} | content))
    facts = facts_of(str(tmp_path / "a.wav"))
    words, _ = TextChecker(LetterTokenizer(), DataArgs(drop_tags=drop_tags), 100).read(facts)
    return facts, words


def test_tags_of_transcribers_are_counted_and_left_out(tmp_path):
    rows = [[text, [i, i + 1]] for i, text in enumerate(("hello", "[noise]", "%uh", "[noise]"))]
    rows.append(["<unk>", [5, 6], "SPEAKER_USER"])
    for drop, kind, kept in ((True, "dropped tags", 1), (False, "tags", 4)):
        facts, words = read(tmp_path, rows, drop)
        assert kinds_of(facts) == [kind] and len(words) == facts.words == kept
        assert "3 of 4 entries" in facts.problems[0].detail and "[noise], %uh" in facts.problems[0].detail


@pytest.mark.parametrize(
    ("texts", "seconds", "is_found"),
    [
        (["hello this is we"], 1.0, True),
        (["hello"], 3.1, True),
        (["hello"], 3.0, False),
        (["New York"] + ["a"] * 9, 0.5, False),
        (["a b"] * 3 + ["a"] * 9, 0.5, True),
        (["a b"] * 3 + ["a"] * 27, 0.5, False),
        (["a b"] * 2 + ["a"] * 4, 0.5, False),
        ([" hello ", "you"], 0.5, False),
    ],
)
def test_several_words_in_an_entry(texts, seconds, is_found):
    frames = seconds / FRAME
    facts = check([(text, 100 * i, frames) for i, text in enumerate(texts)], windows=len(texts))
    assert kinds_of(facts) == ["sentences"] * is_found


def test_tokens_that_find_no_frame_are_named_with_sentences():
    (problem,) = [p for p in check([("a" * 20 + " " + "b" * 19, 80, 30)]).problems if p.kind == "sentences"]
    assert "50% of the tokens" in problem.detail


@pytest.mark.parametrize(("words", "unsure", "is_found"), [(4, 5, True), (0, 4, False), (20, 5, False), (19, 5, True)])
def test_words_dropped_as_unsure(tmp_path, words, unsure, is_found):
    origin = {"channel": 0, "duration": 9.0, "sound_sec": 5.0, "repairs": {}, "language": "de", "unsure": unsure}
    rows = [["a", [i, i + 0.5], "SPEAKER_MAIN"] for i in range(words)]
    facts, _ = read(tmp_path, rows, **{"annotate.py": {"speakers": {"SPEAKER_MAIN": origin}}})
    assert facts.language == "de" and ("unsure" in kinds_of(facts)) == is_found


@pytest.mark.parametrize("record", [None, [], {"speakers": []}, {"speakers": {"SPEAKER_MAIN": {"language": "de"}}}])
def test_a_record_of_another_program_is_not_read(tmp_path, record):
    facts, _ = read(tmp_path, [["a", [0, 1]]], **{"annotate.py": record})
    assert facts.language is None and not facts.problems
