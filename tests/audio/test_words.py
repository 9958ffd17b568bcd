"""The `.json` next to a recording: words, prompts, and what is refused."""

import json

import pytest

from finetune.audio.words import is_tag, read_alignments, read_prompt_fields, read_sidecar, read_words, sidecar
from finetune.cli import UserError


def test_words_of_the_named_speakers_and_of_nobody_are_read_in_the_order_of_their_starts():
    rows = [["u", [2, 2.5], "SPEAKER_USER"], ["a", [1, 9], "SPEAKER_MAIN"], ["n", [1, 2]], ["o", [3, 4], None]]
    assert read_alignments(rows) == [("a", 1.0, 9.0), ("n", 1.0, 2.0)]
    assert [word[0] for word in read_alignments(rows, ["SPEAKER_USER", "SPEAKER_MAIN"])] == ["a", "n", "u"]


TAGS = ["[laughter]", "<unk>", "{breath}", "((unclear))", "((", "))", "%uh", "*sighs*", " <unk> "]


@pytest.mark.parametrize("text", TAGS)
def test_tags_are_left_out_unless_they_are_wanted(text):
    rows = [["a", [1, 2]], [text, [2, 3]], ["b", [3, 4]]]
    assert is_tag(text) and [word[0] for word in read_alignments(rows)] == ["a", "b"]
    assert read_alignments(rows, drop_tags=False)[1] == (text, 2.0, 3.0)


@pytest.mark.parametrize("text", ["hello", "100%", "%", "(yes)", "[a", "a]", "<3", "5%of", "it's", "-", "日本", ""])
def test_words_are_no_tags(text):
    assert not is_tag(text) and read_alignments([[text, [1, 2]]]) == [(text, 1.0, 2.0)]


BAD_ROWS = [
    ["a", 1, "S"], ["a", [1], "S"], ["a", [1, float("nan")], "S"], ["a", [float("inf"), 2], "S"],
    ["a", [10**400, 2], "S"], [1, [1, 2], "S"], ["a"], None, "a12", {"a": 0, "12": 0},
]  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: str(row)[:20])
def test_a_bad_row_is_named_by_its_index(row):
    with pytest.raises(UserError, match="alignment 1 is"):
        read_alignments([["fine", [0, 1], "OTHER"], row], ["OTHER"])


def test_words_and_prompts_of_a_file(tmp_path):
    content = {"alignments": [["😀 ü", [0.1, 0.30000000000000004], "AGENT"]], "text_prompt": "Hi.",
               "voice_prompt": None, "note": 1}  # fmt: skip
    (tmp_path / "call.1.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    file = sidecar(tmp_path / "call.1.wav")
    assert read_sidecar(file) == content
    words, fields = read_words(file, ["AGENT"])
    assert words == [("😀 ü", 0.1, 0.30000000000000004)] and fields == {"text_prompt": "Hi.", "voice_prompt": None}
    assert read_words(file)[0] == [], "by default only the words of SPEAKER_MAIN"
    assert read_prompt_fields(file) == fields


@pytest.mark.parametrize("content", [None, b"{", b"[]", b"{}", b'{"alignments": 3}', b"\xff", b"[" * 10_000,
                                     b'{"alignments": [["a", [1], "SPEAKER_MAIN"]]}'])  # fmt: skip
def test_a_bad_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_words(tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, '{"text_prompt": ', '["text_prompt"]', '"text_prompt"'])
def test_a_bad_file_has_no_prompts(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert read_prompt_fields(tmp_path / "a.json") == {}


def test_a_file_without_prompts_is_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"alignments": []}')
    monkeypatch.setattr("finetune.audio.words.from_json", lambda raw: pytest.fail("parsed"))
    assert read_prompt_fields(tmp_path / "a.json") == {}
