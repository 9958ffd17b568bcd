"""The `.json` next to a recording: words, prompts, and what is refused."""

import json

import pytest

from finetune.audio.words import (
    parse_word,
    read_alignments,
    read_prompt_fields,
    read_sidecar,
    read_words,
    sidecar,
)
from finetune.cli import UserError


def test_the_json_has_the_name_of_the_audio(tmp_path):
    assert sidecar(tmp_path / "call.1.wav") == tmp_path / "call.1.json"


def test_words_are_in_the_order_of_their_starts():
    rows = [["c", [2, 2.5], "S"], ["a", [1, 9], "S"], ["b", [1, 2], "S"], ["z", [0.5, 3], "S"]]
    assert read_alignments(rows, ["S"]) == [("z", 0.5, 3.0), ("a", 1.0, 9.0), ("b", 1.0, 2.0), ("c", 2.0, 2.5)]


def test_words_of_the_named_speakers_and_of_nobody_are_read():
    rows = [["u", [0, 1], "SPEAKER_USER"], ["a", [1, 2], "SPEAKER_MAIN"], ["n", [2, 3]], ["o", [3, 4], None]]
    assert [word[0] for word in read_alignments(rows)] == ["a", "n"]
    assert [word[0] for word in read_alignments(rows, ["SPEAKER_USER", "SPEAKER_MAIN"])] == ["u", "a", "n"]


BAD_ROWS = [
    ["a", 1, "S"], ["a", [1], "S"], ["a", [1, 2, 3], "S"], ["a", [1, float("nan")], "S"], ["a", [float("inf"), 2], "S"],
    ["a", [10**400, 2], "S"], ["a", [None, 2], "S"], [1, [1, 2], "S"], [["a"], [1, 2], "S"], ["a"], [], {}, None, "a12",
    {"a": 0, "12": 0},
]  # fmt: skip


@pytest.mark.parametrize("row", BAD_ROWS, ids=lambda row: str(row)[:20])
def test_a_bad_row_is_named_by_its_index(row):
    with pytest.raises(ValueError):
        parse_word(row)
    with pytest.raises(UserError, match="alignment 1 is"):
        read_alignments([["fine", [0, 1], "OTHER"], row], ["OTHER"])


@pytest.mark.parametrize("rows", [{}, None, "abc", 3])
def test_alignments_that_are_no_list_are_refused(rows):
    with pytest.raises(UserError, match="alignments"):
        read_alignments(rows)


def test_words_and_prompts_of_a_file(tmp_path):
    content = {"alignments": [["ü", [0.1, 0.30000000000000004], "AGENT"]], "text_prompt": "Hi.", "voice_prompt": None,
               "note": 1}  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    assert read_sidecar(tmp_path / "a.wav") == content
    words, fields = read_words(tmp_path / "a.wav", ["AGENT"])
    assert words == [("ü", 0.1, 0.30000000000000004)] and fields == {"text_prompt": "Hi.", "voice_prompt": None}
    assert read_words(tmp_path / "a.wav")[0] == [], "by default only the words of SPEAKER_MAIN"
    assert read_prompt_fields(tmp_path / "a.wav") == fields


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '"alignments"', '{"alignments": 3}', b"\xff", "[" * 10_000,
                                     '{"alignments": [["a", [1], "SPEAKER_MAIN"]]}'])  # fmt: skip
def test_a_bad_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        read_words(tmp_path / "a.wav")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: ") and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [None, "{", '{"text_prompt": ', '["text_prompt"]', '"text_prompt"', "3"])
def test_a_bad_file_has_no_prompts(tmp_path, content):
    if content is not None:
        (tmp_path / "a.json").write_text(content)
    assert read_prompt_fields(tmp_path / "a.wav") == {}


def test_a_file_without_prompts_is_not_parsed(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text('{"alignments": []}')
    (tmp_path / "b.json").write_text('{"alignments": [], "voice_prompt": "v.wav"}')
    monkeypatch.setattr("finetune.audio.words.from_json", lambda raw: {"voice_prompt": len(raw)})
    assert read_prompt_fields(tmp_path / "a.wav") == {} and read_prompt_fields(tmp_path / "b.wav") == {
        "voice_prompt": 43
    }
