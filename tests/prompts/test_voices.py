"""Voices by name: where their files are looked for, unpacked from, and how they are loaded."""

import io
import os
import random
import tarfile
from pathlib import Path

import pytest
import torch

from finetune.cli import UserError
from finetune.prompts.voices import VoiceBook, load_voices, unpack_voices
from tests.engine import DELAYS, embedder, random_voice, save_voice, tiny_lm


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache/moshi-personaplex-finetune"


def make_archive(path, members):
    """A voices.tgz with {name: content} in this order."""
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


# --- names -----------------------------------------------------------------------------------------------------


def test_a_bare_name_is_looked_for_next_to_the_recording_then_in_the_folder_then_in_the_archive(tmp_path):
    for folder in ("mine/sub", "calls"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "mine/sub/NATF2.pt").write_bytes(b"mine")
    (tmp_path / "calls/NATF1.pt").write_bytes(b"near")
    archive = make_archive(tmp_path / "v.tgz", {f"voices/{name}.pt": b"own" for name in ("NATF1", "NATF2", "NATM1")})
    opened = []
    book = VoiceBook(tmp_path / "mine", lambda: opened.append(1) or archive)
    read = lambda name: book.find(name, tmp_path / "calls").read_bytes()
    assert read("NATF1.pt") == b"near"
    assert read("NATF2") == read("NATF2.pt") == b"mine" and not opened
    assert read("NATF1") == read("NATM1.pt") == read("NATM1") == b"own" and len(opened) == 1
    with pytest.raises(UserError, match=r"'NATX9' in .*calls or prompt\.voices_dir or .*voices\.tgz; .*set prompt"):
        read("NATX9")
    with pytest.raises(UserError, match=r"'NATX9' .*set --voices-dir"):
        VoiceBook(None, lambda: None, setting="--voices-dir").find("NATX9", tmp_path)


def test_paths_are_absolute_or_relative_to_the_recording(tmp_path, monkeypatch):
    (tmp_path / "calls/voices").mkdir(parents=True)
    for name in ("calls/voices/a.wav", "b.wav"):
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    find = lambda name: VoiceBook(tmp_path, lambda: None).find(name, tmp_path / "calls")
    assert find("voices/a.wav") == tmp_path / "calls/voices/a.wav"
    assert find(str(tmp_path / "b.wav")) == find("~/b.wav") == find("b.wav") == tmp_path / "b.wav"
    for name in ("../b.wav", "voices/b.wav", str(tmp_path / "c.wav"), "voices"):
        with pytest.raises(UserError, match=name):
            find(name)
    book = VoiceBook(None, lambda: None)
    assert book.find("b.wav", tmp_path / "calls", tmp_path) == tmp_path / "b.wav", "or to the manifest"


# --- archives --------------------------------------------------------------------------------------------------


def test_an_archive_is_unpacked_once_until_it_changes(cache, tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "v.tgz", {"voices/A.pt": b"one"})
    folder = unpack_voices(archive)
    assert folder.parent == cache and (folder / "voices/A.pt").read_bytes() == b"one"
    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "open", lambda *_: pytest.fail("unpacked again"))
        assert unpack_voices(archive) == folder
    make_archive(archive, {"voices/A.pt": b"another"})
    assert (unpack_voices(archive) / "voices/A.pt").read_bytes() == b"another"
    os.utime(archive, ns=(0, archive.stat().st_mtime_ns + 1))  # of the same size
    assert unpack_voices(archive) != folder and len(list(cache.iterdir())) == 3


def test_an_archive_that_is_damaged_or_writes_outside_its_folder_is_refused(cache, tmp_path):
    escaping = make_archive(tmp_path / "escaping.tgz", {"A.pt": b"good", "../escaped.pt": b"bad"})
    (tmp_path / "damaged.tgz").write_bytes(b"not an archive")
    for archive in (escaping, tmp_path / "damaged.tgz"):
        with pytest.raises(UserError, match=rf"{archive.name}: cannot be unpacked"):
            unpack_voices(archive)
    assert not list(cache.iterdir()), "neither the member outside nor a part of the folder is left"


def test_two_processes_may_unpack_the_same_archive(tmp_path, monkeypatch):
    archive = make_archive(tmp_path / "v.tgz", {"A.pt": b"one"})
    replace = os.replace

    def other_was_faster(source, target):
        Path(target).mkdir()
        (Path(target) / "A.pt").write_bytes(b"one")
        replace(source, target)  # fails: the folder is not empty

    monkeypatch.setattr(os, "replace", other_was_faster)
    assert (unpack_voices(archive) / "A.pt").read_bytes() == b"one"


# --- loading ---------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two .pt voices and a recording, whose codes are fixed and come with the problems of bad recordings."""
    for name in ("A.pt", "B.pt"):
        save_voice(tmp_path / name, tiny_lm(16), random_voice(random.Random(0), 9))

    def encode(paths, mimi, fingerprint, frames):
        assert (mimi(), fingerprint) == ("mimi", "codec")
        good = [path for path in paths if "bad" not in path.name]
        return {path: torch.ones(8, 5) for path in good}, [f"{path}: bad" for path in paths if path not in good]

    monkeypatch.setattr("finetune.prompts.voices.encode_recordings", encode)
    return [tmp_path / name for name in ("A.pt", "c.wav", "B.pt")]


def load(files, trains_embeddings=False, fingerprint=lambda: "codec"):
    return load_voices(files, lambda: "mimi", fingerprint, embedder(tiny_lm(16)), DELAYS, trains_embeddings)


def test_recordings_and_embedded_voices_are_loaded(files):
    voices = load(files)
    assert voices.keys() == set(files)
    assert [(voices[path].name, voices[path].frames) for path in files] == [("A.pt", 9), ("c.wav", 5), ("B.pt", 9)]
    assert voices[files[1]].embeddings is None and voices[files[0]].codes is None
    assert load([files[0]], fingerprint=lambda: pytest.fail("the codec is not needed"))


def test_all_files_that_cannot_be_used_are_listed(files, tmp_path):
    files[2].write_bytes(b"")
    with pytest.raises(UserError) as error:
        load([*files, tmp_path / "bad.wav"])
    assert "B.pt: " in str(error.value) and "bad.wav: " in str(error.value) and "A.pt" not in str(error.value)


def test_a_run_that_trains_the_tables_refuses_every_embedded_voice(files):
    with pytest.raises(UserError, match=r"A\.pt: .*lora\.ft_embed.*B\.pt: ") as error:
        load(files, trains_embeddings=True)
    assert "c.wav" not in str(error.value) and load([files[1]], trains_embeddings=True)
