"""Lines of manifests, durations, paths and weighted sources."""

import gzip
from pathlib import Path

import pytest

from finetune.cli import UserError
from finetune.data.manifest import parse_sources, read_manifest, resolve_path
from tests.data.support import write_lines


@pytest.mark.parametrize("suffix, opener", [("", open), (".gz", gzip.open)])
def test_lines_have_numbers_offsets_and_paths(tmp_path, suffix, opener):
    """Also in files that an editor on Windows has written."""
    path, problems = tmp_path / f"m.jsonl{suffix}", []
    content = '\ufeff{"path": "ä/😀.wav", "note": [1]}\r\n \t\r\n{"path": "b.wav"}\n\n{"path": "/c.wav"}'.encode()
    with opener(path, "wb") as file:
        file.write(content)
    lines = list(read_manifest(path, problems))
    assert problems == [] and lines[0].fields == {"path": "ä/😀.wav", "note": [1]}
    found = [(line.number, line.path) for line in lines]
    assert found == [(1, tmp_path / "ä/😀.wav"), (3, tmp_path / "b.wav"), (5, Path("/c.wav"))]
    assert [line.offset for line in lines] == [0, content.index(b'{"path": "b'), content.index(b'{"path": "/c')]


@pytest.mark.parametrize("written, seconds", [("0", 0.0), ("63.25", 63.25), ("1000000", 1e6)])
def test_good_durations(tmp_path, written, seconds):
    path = write_lines(tmp_path / "m.jsonl", [f'{{"path": "a.wav", "duration": {written}}}'])
    (line,) = read_manifest(path, [], timed=True)
    assert line.duration == seconds and type(line.duration) is float


@pytest.mark.parametrize("written", ["true", '"3"', "-0.001", "1000000.01", "NaN", "1e400", "1" + 400 * "0", "[3]"],
                         ids=lambda written: written[:12])  # fmt: skip
def test_bad_durations_are_reported_by_file_and_line(tmp_path, written):
    path = write_lines(tmp_path / "m.jsonl", ["", f'{{"path": "a.wav", "duration": {written}}}'])
    problems = []
    assert list(read_manifest(path, problems, timed=True)) == []
    assert len(problems) == 1 and problems[0].startswith(f"{path}, line 2: ") and '"duration"' in problems[0]
    (line,) = read_manifest(path, untimed := [])
    assert line.duration is None and untimed == problems, "without `timed` the file is still read"


def test_a_missing_duration_is_a_problem_only_where_it_is_needed(tmp_path):
    lines = [{"path": "a.wav"}, {"path": "b.wav", "duration": None}, {"path": "c.wav", "duration": 1}]
    path, problems = write_lines(tmp_path / "m.jsonl", lines), []
    assert [line.duration for line in read_manifest(path, problems)] == [None, None, 1.0] and problems == []
    assert [line.number for line in read_manifest(path, problems, timed=True)] == [3]
    assert [problem.split(": ")[0] for problem in problems] == [f"{path}, line 1", f"{path}, line 2"]


BAD_LINES = [
    b"{broken", b"[1]", b"[" * 100_000, b'{"duration": 3}', b'{"path": 7, "duration": 3}', b'{"path": ""}',
    b'{"path": "../a.wav"}', b'{"path": "\xe4.wav"}', b'{"path": "a\\u0000.wav"}', b'{"path": "a\\ud83d.wav"}',
]  # fmt: skip


@pytest.mark.parametrize("raw", BAD_LINES, ids=lambda raw: str(raw[:20]))
def test_bad_lines_are_left_out_and_reported(tmp_path, raw):
    path = tmp_path / "m.jsonl"
    path.write_bytes(b'{"path": "a.wav", "duration": 1}\n' + raw + b'\n\n{"path": "b.wav", "duration": 1}\n')
    problems = []
    assert [line.number for line in read_manifest(path, problems)] == [1, 4]
    assert len(problems) == 1 and problems[0].startswith(f"{path}, line 2: ") and "\n" not in problems[0]


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


def test_paths_are_relative_to_the_manifest_and_do_not_leave_its_folder(tmp_path):
    path = tmp_path / "m.jsonl"
    assert resolve_path(path, "x..y/a..wav") == tmp_path / "x..y/a..wav"
    assert resolve_path(path, "/data/../a.wav") == Path("/data/../a.wav")
    for value in ("x/../a.wav", "..", ".", "/"):
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
    assert parse_sources(f"{a}") == parse_sources(f"{a}:0.5") == [(a, 1.0)]
    assert parse_sources(f"{a},{b}") == [(a, 0.5), (b, 0.5)], "sizes of files do not matter"
    assert parse_sources(f" {a}:.75 , {b}:25e-2,") == parse_sources(f"{a}:3,{b}") == [(a, 0.75), (b, 0.25)]
    c, d, e = folder / "c.jsonl", folder / "in/d.jsonl.gz", folder / "e.jsonl"
    assert parse_sources(str(folder)) == [(c, 10 / 41), (e, 1 / 41), (d, 30 / 41)]
    assert [round(82 * weight) for _, weight in parse_sources(f"{a}:2,{folder}:2")] == [41, 10, 1, 30]


@pytest.mark.parametrize("value, words", [
    ("{}/a.jsonl:-1", "positive"), ("{}/a.jsonl:0", "positive"), ("{}/a.jsonl:1e999", "positive"),
    ("C:/data.jsonl", "C:/data.jsonl"), (" , ", "no manifest"), ("hf://data/x", "hf://data/x"),
    ("{}/none.jsonl", "make_manifest"), ("{}/none_precomputed.jsonl", "precompute_codes.py"), ("{}/empty", "empty"),
])  # fmt: skip
def test_bad_sources_are_refused(sources, value, words):
    (sources / "empty").mkdir()
    with pytest.raises(UserError) as error:
        parse_sources(value.format(sources))
    assert words in str(error.value)
