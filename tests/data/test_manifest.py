"""Lines of manifests, durations, paths and weighted sources."""

import gzip
import json
from pathlib import Path

import pytest

from finetune.cli import UserError
from finetune.data.manifest import (
    Line,
    check_duration,
    parse_line,
    parse_sources,
    raw_lines,
    read_manifest,
    resolve_path,
)
from tests.data.support import write_lines


@pytest.mark.parametrize("written, seconds", [("0", 0.0), ("3", 3.0), ("63.25", 63.25), ("1e6", 1e6), ("1000000", 1e6)])
def test_good_durations(tmp_path, written, seconds):
    line = parse_line(tmp_path / "m.jsonl", 1, f'{{"path": "a.wav", "duration": {written}}}'.encode())
    check_duration(line)
    assert line.duration == seconds and type(line.duration) is float


BAD_DURATIONS = [
    "true", "false", '"3"', '""', "-1", "-0.001", "2e6", "1000000.01", "NaN", "Infinity", "-Infinity", "1e400",
    "1" + 400 * "0", "[3]", "{}",
]  # fmt: skip


@pytest.mark.parametrize("written", BAD_DURATIONS, ids=lambda written: written[:12])
def test_bad_durations_are_reported_by_file_and_line(tmp_path, written):
    path = write_lines(tmp_path / "m.jsonl", ["", f'{{"path": "a.wav", "duration": {written}}}'])
    problems = []
    assert list(read_manifest(path, problems, timed=True)) == []
    assert len(problems) == 1 and problems[0].startswith(f"{path}, line 2: ") and '"duration"' in problems[0]
    (line,) = read_manifest(path, untimed := [])
    assert line.duration is None and untimed == problems, "without `timed` the file is still read"


@pytest.mark.parametrize("fields", [{"path": "a.wav"}, {"path": "a.wav", "duration": None}])
def test_a_missing_duration_is_a_problem_only_where_it_is_needed(tmp_path, fields):
    path = write_lines(tmp_path / "m.jsonl", [fields, {"path": "b.wav", "duration": 1}])
    problems = []
    assert [(line.number, line.duration) for line in read_manifest(path, problems)] == [(1, None), (2, 1.0)]
    assert problems == []
    assert [line.number for line in read_manifest(path, problems, timed=True)] == [2]
    assert len(problems) == 1 and f"{path}, line 1: " in problems[0]


BAD_LINES = [
    b"{broken", b"[1]", b"3", b'"a.wav"', b"[" * 100_000, b'{"duration": 3}', b'{"path": 7, "duration": 3}',
    b'{"path": "", "duration": 3}', b'{"path": "../a.wav", "duration": 3}', b'{"path": "\xe4.wav"}',
    b'{"path": "a\\u0000.wav"}', b'{"path": "a\\ud83d.wav"}',
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD_LINES, ids=lambda raw: str(raw[:20]))
def test_bad_lines_are_left_out_and_reported(tmp_path, raw):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"path": "a.wav", "duration": 1}\n' + raw + b'\n\n{"path": "b.wav", "duration": 1}\n')
    problems = []
    lines = list(read_manifest(path, problems))
    assert [(line.number, line.path) for line in lines] == [(1, tmp_path / "a.wav"), (4, tmp_path / "b.wav")]
    assert len(problems) == 1 and problems[0].startswith(f"{path}, line 2: ") and "\n" not in problems[0]


def test_a_line_keeps_all_of_its_fields(tmp_path):
    fields = {"path": "x/a.wav", "duration": 2, "extra": [1, None], "text_prompt": "é"}
    line = parse_line(tmp_path / "m.jsonl", 7, json.dumps(fields).encode())
    assert line == Line(7, tmp_path / "x/a.wav", fields, tmp_path / "m.jsonl")


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_files_of_windows_editors_are_read(tmp_path, suffix, opener):
    path, problems = tmp_path / f"m.jsonl{suffix}", []
    with opener(path, "wb") as file:
        file.write('\ufeff{"path": "ä.wav", "duration": 1}\r\n\r\n{"path": "b.wav", "duration": 1}\r\n'.encode())
    assert [line.path.name for line in read_manifest(path, problems)] == ["ä.wav", "b.wav"] and not problems


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_lines_have_numbers_and_offsets(tmp_path, suffix, opener):
    content = b"\n{a}\n \t\r\n{bc}\n{d}"
    with opener(tmp_path / f"m{suffix}", "wb") as file:
        file.write(content)
    lines = list(raw_lines(tmp_path / f"m{suffix}"))
    assert lines == [(2, 1, b"{a}\n"), (4, 9, b"{bc}\n"), (5, 14, b"{d}")]
    assert all(content[offset:].startswith(raw) for _, offset, raw in lines)


def test_a_damaged_archive_is_named(tmp_path):
    path = write_lines(tmp_path / "m.jsonl.gz", [{"path": "a.wav", "duration": 1}] * 5000, gzip.open)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    garbage = whole[:40] + b"\xff" * 40 + whole[80:]
    for content in (whole[:-20], bytes(flipped), garbage, b"no archive"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"m\.jsonl\.gz: .*line \d+"):
            list(read_manifest(path, []))


def test_a_missing_manifest_is_named(tmp_path):
    with pytest.raises(UserError, match=r"m\.jsonl: no such manifest"):
        list(read_manifest(tmp_path / "m.jsonl", []))


def test_paths_are_relative_to_the_manifest_and_do_not_leave_its_folder(tmp_path):
    path = tmp_path / "m.jsonl"
    assert resolve_path(path, "x/a.wav") == tmp_path / "x/a.wav"
    assert resolve_path(path, "/data/../a.wav") == Path("/data/../a.wav")
    assert resolve_path(path, "x..y/a..wav") == tmp_path / "x..y/a..wav"
    for value in ("../a.wav", "x/../a.wav", "..", "", ".", "/", "a\0.wav"):
        with pytest.raises(UserError):
            resolve_path(path, value)


@pytest.fixture
def sources(tmp_path):
    """a.jsonl and b.jsonl, and a folder with manifests of 10, 30 and 0 bytes."""
    sizes = {"a.jsonl": 5, "b.jsonl": 50, "folder/c.jsonl": 10, "folder/in/d.jsonl.gz": 30, "folder/e.jsonl": 0}
    for name, size in (sizes | {"folder/f.json": 10, "folder/g.jsonl.bak": 10}).items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x" * size)
    return tmp_path


def test_sources_have_weights_that_sum_to_one(sources):
    a, b, folder = sources / "a.jsonl", sources / "b.jsonl", sources / "folder"
    assert parse_sources(f"{a}") == [(a, 1.0)]
    assert parse_sources(f"{a},{b}") == [(a, 0.5), (b, 0.5)], "sizes of files do not matter"
    assert parse_sources(f" {a}:.75 , {b}:25e-2,") == [(a, 0.75), (b, 0.25)]
    assert parse_sources(f"{a}:3,{b}") == [(a, 0.75), (b, 0.25)]
    c, d, e = folder / "c.jsonl", folder / "in/d.jsonl.gz", folder / "e.jsonl"
    assert parse_sources(str(folder)) == [(c, 10 / 41), (e, 1 / 41), (d, 30 / 41)]
    assert [round(82 * weight) for _, weight in parse_sources(f"{a}:2,{folder}:2")] == [41, 10, 1, 30]


@pytest.mark.parametrize("value, words", [
    ("{}/a.jsonl:-1", "positive"), ("{}/a.jsonl:0", "positive"), ("{}/a.jsonl:1e999", "positive"),
    ("{}/a.jsonl:nan", "a.jsonl:nan"), ("C:/data.jsonl", "C:/data.jsonl"), (":0.5", ":0.5"), ("", "no manifest"),
    (" , ", "no manifest"), ("hf://data/x", "hf://data/x"), ("{}/none.jsonl", "make_manifest"),
    ("{}/none_precomputed.jsonl", "precompute_codes.py"), ("{}/empty", "empty"),
])  # fmt: skip
def test_bad_sources_are_refused(sources, value, words):
    (sources / "empty").mkdir()
    with pytest.raises(UserError) as error:
        parse_sources(value.format(sources))
    assert words in str(error.value)
