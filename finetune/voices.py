"""Voice prompts: where a name leads, and what the runtime would make of the file.

Three forms: a recording (wav, flac, ...), encoded as the runtime encodes it; a `.pt` as NVIDIA ships them; a shipped
name (`NATF2` or `NATF2.pt`), found in `prompt.voices_dir` or in the repository's `voices.tgz`.
"""

import hashlib
import json
import os
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel
from torch import Tensor

from finetune.cli import UserError, no_room
from finetune.data import audio, codec
from finetune.data.interleaver import MAIN_SPEAKER, Word, read_alignments
from finetune.data.manifest import sidecar
from finetune.personaplex import N_STREAMS, Voice

LOUDNESS = -24.0  # LUFS, integrated: what NVIDIA's runtime normalises voice recordings to
SAME_SPEAKER = "same_speaker"  # in place of a file: the agent's own words from elsewhere in the recording
STRETCH_SEC = 10.0  # longest `same_speaker` stretch
STRETCH_MIN_SEC = 1.0
STRETCH_SPEECH = 0.5  # share of a stretch that its words must fill
_RING = 4  # token columns that a .pt keeps


def cache_folder() -> Path:
    """Where encoded voices and unpacked archives are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "moshi-personaplex-finetune"


def codes_folder() -> Path:
    """Where encoded recordings are kept, made if needed. Raises UserError if it cannot be."""
    folder = cache_folder() / "codes"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{folder}: cannot be made ({error.strerror}); set XDG_CACHE_HOME to a folder that may be written"
        ) from None
    return folder


def unpack(archive: Path) -> Path:
    """The folder of an unpacked `voices.tgz`. Raises UserError if a member would land outside of it."""
    stat = archive.stat()
    key = hashlib.sha256(f"{archive.resolve()}/{stat.st_size}/{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    folder = cache_folder() / f"voices-{key}"
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.tmp{os.getpid()}")
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        os.replace(partial, folder)
    except (tarfile.TarError, OSError) as error:
        if folder.is_dir():  # another process was faster
            return folder
        raise UserError(f"{archive}: cannot be unpacked ({error})") from None
    return folder


class VoiceBook:
    """Finds voices by what a sample calls them.

    Args:
        folder: the settings' voices_dir.
        archive: gives the repository's voices.tgz, which is fetched and unpacked when a name is not in `folder`.
        setting: what the user calls the folder.
    """

    def __init__(
        self, folder: Path | None, archive: Callable[[], Path | None], setting: str = "prompt.voices_dir"
    ):
        self._folder, self._archive, self._setting = folder, archive, setting
        self._named: list[tuple[str, dict[str, Path]]] = []

    def find(self, name: str, beside: Path | None = None) -> Path:
        """The file of a voice: a path, absolute or in the folder `beside` (the recording's), or a name in the folders.

        Raises UserError saying what was looked for and where.
        """
        direct = [Path(name).expanduser()] if Path(name).expanduser().is_absolute() else []
        if beside is not None and ".." not in Path(name).parts:
            direct.append(beside / name)
        for path in direct:
            if path.is_file():
                return path
        looked = [str(path.parent) for path in direct]
        if Path(name).name == name:
            for where, files in self._places():
                looked.append(where)
                if name in files:
                    return files[name]
        places = " or ".join(looked) or "any folder"
        remedy = f"put the file there, or set {self._setting}"
        if Path(name).name != name:
            remedy = f"give an absolute path, or a bare name of a file in {self._setting}"
        raise UserError(f"no voice {name!r} in {places}; {remedy}")

    def _places(self) -> Iterator[tuple[str, dict[str, Path]]]:
        """(place, {name with and without suffix: file}), each listed when it is first needed."""
        yield from self._named
        if not self._named:
            self._named.append((self._setting, _listed(self._folder)))
            yield self._named[-1]
        if len(self._named) == 1:
            archive = self._archive()
            self._named.append(("the repository's voices.tgz", _listed(unpack(archive) if archive else None)))
            yield self._named[-1]


def _listed(folder: Path | None) -> dict[str, Path]:
    files = sorted(p for p in folder.rglob("*") if p.is_file()) if folder else []
    return {path.stem: path for path in files} | {path.name: path for path in files}


def load_recording(path: Path) -> np.ndarray:
    """A recording as the runtime hears it: first channel, 24 kHz, -24 LUFS; float32 [samples].

    Raises UserError if it is silent, or under the 0.4 s that loudness is defined on.
    """
    return normalise(audio.read(path, channel=0)[0], str(path))


def normalise(pcm: np.ndarray, name: str) -> np.ndarray:
    """Brings float32 [samples] at 24 kHz to -24 LUFS. Raises UserError where that is undefined."""
    if pcm.shape[0] < 0.4 * audio.SAMPLE_RATE:
        seconds = pcm.shape[0] / audio.SAMPLE_RATE
        raise UserError(f"{name}: a voice prompt needs at least 0.4 s, this has {seconds:.2f} s")
    import pyloudnorm  # half a second, for recordings only

    loudness = pyloudnorm.Meter(audio.SAMPLE_RATE).integrated_loudness(pcm.astype(np.float64))
    if not np.isfinite(loudness):
        raise UserError(f"{name}: is silent, so it cannot be a voice prompt")
    with warnings.catch_warnings():  # pyloudnorm warns of samples over 1, which Mimi takes as they are
        warnings.simplefilter("ignore")
        return pyloudnorm.normalize.loudness(pcm, loudness, LOUDNESS).astype(np.float32)


def load_embedded(path: Path, delays: list[int], embed: Callable[[Tensor], Tensor]) -> Voice:
    """A `.pt` voice as NVIDIA ships it: {"embeddings": [N-1, 1, 1, dim], "cache": [1, 17, 4]}.

    The cache is a ring of the last four delayed token columns N-3..N (column c at index c % 4); undelayed, they give
    the last three frames. The tokens of the last embedded column, N-2, are among them: embedded anew they must give
    what the file holds, or it was made with other tables than this model's.

    Args:
        delays: of the 17 streams, in frames.
        embed: [17] ids of a delayed column -> [dim] float32, with the model's own tables.
    Raises:
        UserError: not such a file, or one of another model.
    """
    try:
        raw = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # torch raises nearly anything on nearly a zip file
        raise UserError(
            f"{path}: not a voice file (it is damaged, or holds more than tensors); make it anew with "
            "`python -m finetune.voice make`, or use a recording"
        ) from None
    embeddings = raw.get("embeddings") if isinstance(raw, dict) else None
    cache = raw.get("cache") if isinstance(raw, dict) else None
    if not isinstance(embeddings, Tensor) or not isinstance(cache, Tensor):
        raise UserError(f'{path}: not a voice file: it needs the tensors "embeddings" and "cache"')
    if embeddings.dim() != 4 or embeddings.shape[1:3] != (1, 1) or cache.shape != (1, N_STREAMS, _RING):
        raise UserError(
            f"{path}: embeddings {list(embeddings.shape)} and cache {list(cache.shape)} are not [N-1, 1, 1, dim] and "
            f"[1, {N_STREAMS}, {_RING}]"
        )
    frames = embeddings.shape[0] + 1
    if frames < _RING:
        raise UserError(f"{path}: {frames} frames are too few for a voice prompt")
    cache = cache[0].long()
    column = frames - 2
    expected, got = embed(cache[:, column % _RING]), embeddings[column, 0, 0].float()
    if expected.shape != got.shape:
        raise UserError(f"{path}: made for a model of dimension {len(got)}; this one has {len(expected)}")
    # In bf16, a sum of 17 vectors differs by its rounding; that of other tables by its whole size.
    difference = float((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6))
    if not difference <= 0.05:
        raise UserError(
            f"{path}: made with other embedding tables than this model's (column {column} is off by {difference:.0%}), "
            "so the runtime would feed other inputs; use the recording itself, or make the voice anew for this model"
        )
    return Voice(path.name, embeddings=embeddings[:, 0, 0], tail=undelay_tail(cache, frames, delays))


def undelay_tail(cache: Tensor, frames: int, delays: list[int]) -> Tensor:
    """[17, 3] int64, frames N-3..N-1, out of the ring [17, 4] of delayed columns N-3..N."""
    tail = torch.empty(N_STREAMS, _RING - 1, dtype=torch.int64)
    for stream, delay in enumerate(delays):
        for i, frame in enumerate(range(frames - (_RING - 1), frames)):
            tail[stream, i] = cache[stream, (frame + delay) % _RING]
    return tail


def encode_recordings(
    paths: list[Path], mimi: Callable[[], MimiModel], fingerprint: str
) -> tuple[dict[Path, Tensor], list[str]]:
    """Codes [8, N] int64 of recordings, through a cache on disk that knows the codec (`fingerprint`) and the recording;
    and a sentence for each that cannot be had."""
    out: dict[Path, Tensor] = {}
    problems: list[str] = []
    fresh: list[tuple[Path, Path, Tensor]] = []
    cache = codes_folder() if paths else None

    def flush() -> None:
        for (path, cached, _), codes in zip(fresh, codec.encode(mimi(), [pcm for _, _, pcm in fresh])):
            out[path] = codes
            codec.save(cached, codes.to(torch.int16))
        fresh.clear()

    for path in paths:
        key = hashlib.sha256(f"{fingerprint}/{codec.audio_fingerprint(path)}".encode()).hexdigest()[:32]
        cached = cache / f"{key}.pt"
        try:  # what was torn by a crash is made anew
            out[path] = torch.load(cached, weights_only=True).long()
            continue
        except Exception:  # torch raises nearly anything on nearly a zip file
            pass
        try:
            fresh.append((path, cached, torch.from_numpy(load_recording(path))))
        except UserError as error:
            problems.append(str(error))
        if len(fresh) == 64:
            flush()
    if fresh:
        flush()
    return out, problems


def speech_stretches(words: list[tuple[str, float, float]], duration_sec: float) -> list[tuple[float, float]]:
    """Up to two stretches (start, end in seconds) of the agent's own speech, for `same_speaker`; the best first.

    Two that do not touch, each at most a third of the recording, so that most windows have one outside of them. They
    begin with a word and hold at least STRETCH_SPEECH of speech.
    """
    candidates = []
    for i, (_, start, _) in enumerate(words):
        end = min(start + min(STRETCH_SEC, duration_sec / 3), duration_sec)
        speech = sum(max(0.0, min(e, end) - s) for _, s, e in words[i : i + 200] if s < end)
        if end - start >= STRETCH_MIN_SEC and speech >= STRETCH_SPEECH * (end - start):
            candidates.append((speech, start, end))
    candidates.sort(key=lambda c: (-c[0], c[1]))
    chosen: list[tuple[float, float]] = []
    for _, start, end in candidates:
        if all(end <= s or start >= e for s, e in chosen):
            chosen.append((start, end))
            if len(chosen) == 2:
                break
    return chosen


def stretch_sound(path: Path, start: float, end: float) -> np.ndarray | None:
    """The agent's sound from `start` to `end` (seconds), normalised, float32 [samples] at 24 kHz; None where there is
    none to speak of: words do not always stand where the sound is. Raises UserError if it cannot be read."""
    pcm = audio.read(path, start, end - start, channel=0)[0]
    try:
        return normalise(pcm, str(path))
    except UserError:
        return None


def load_voices(
    files: list[Path],
    mimi: Callable[[], MimiModel],
    fingerprint: Callable[[], str],
    embed: Callable[[Tensor], Tensor],
    delays: list[int],
    trains_embeddings: bool,
) -> dict[Path, Voice]:
    """The voices of files: recordings encoded (or from the cache), `.pt` checked against the model.

    Args:
        mimi, fingerprint: give the codec and its name; called only if there is a recording, and the codec only if its
            codes are not in the cache.
        embed: see `load_embedded`.
        trains_embeddings: then a `.pt`, which holds the tables of before, is refused.
    Raises:
        UserError: lists every file that cannot be used.
    """
    recordings = [path for path in files if path.suffix != ".pt"]
    problems, voices = [], {}
    for path in files:
        if path.suffix == ".pt":
            try:
                if trains_embeddings:
                    raise UserError(
                        f"{path}: holds embeddings of the tables as they were, and this run trains the tables "
                        "(full_finetuning or lora.ft_embed); use the recording itself"
                    )
                voices[path] = load_embedded(path, delays, embed)
            except UserError as error:
                problems.append(str(error))
    if recordings:
        encoded, failed = encode_recordings(recordings, mimi, fingerprint())
        problems += failed
        voices |= {path: Voice(path.name, codes=codes) for path, codes in encoded.items()}
    if problems:
        raise UserError("; ".join(problems))
    return voices


def same_speaker_file(codes: Path) -> Path:
    """Where the `same_speaker` stretches of a file of codes are kept."""
    return codes.with_name(codes.name + ".voices")


def save_same_speaker(
    files: Sequence[tuple[Path, Path]],
    mimi: MimiModel,
    fingerprint: str,
    speakers: Sequence[str] = (MAIN_SPEAKER,),
    exact: bool = False,
) -> dict[Path, str]:
    """Encodes the `same_speaker` stretches of recordings beside their codes.

    Args:
        files: (recording, its file of codes) of each.
        fingerprint: of the codec.
        speakers: whose words show where the agent speaks.
        exact: see finetune.data.codec.
    Returns:
        {recording: why it has none} of those that could not be read. One without enough speech, or whose words stand
        where it is silent, has an empty list.
    """
    problems: dict[Path, str] = {}
    for i in range(0, len(files), 16):
        found: list[tuple[Path, str, list[tuple[float, float, np.ndarray]]]] = []
        for recording, codes in files[i : i + 16]:
            target = same_speaker_file(codes)
            try:
                words = _words(recording, speakers)
                spans = speech_stretches(words, audio.probe(recording).duration_sec)
                heard = [(*span, stretch_sound(recording, *span)) for span in spans]
                found.append((target, _digest(words), [stretch for stretch in heard if stretch[2] is not None]))
            except (UserError, OSError, ValueError, KeyError, TypeError) as error:
                if no_room(error):
                    raise
                problems[recording] = str(error)
        encoded = iter(codec.encode(mimi, [sound for *_, heard in found for *_, sound in heard], exact))
        for target, words, heard in found:
            stretches = [
                {"start": start, "end": end, "codes": next(encoded).to(torch.int16)} for start, end, _ in heard
            ]
            kept = {"mimi": fingerprint, "speakers": list(speakers), "words": words, "stretches": stretches,
                    "exact": exact}  # fmt: skip
            codec.save(target, kept)
    return problems


def _words(recording: Path, speakers: Sequence[str]) -> list[Word]:
    rows = json.loads(sidecar(recording).read_text(encoding="utf-8"))["alignments"]
    return read_alignments(rows, speakers)


def _digest(words: list[Word]) -> str:
    return hashlib.sha256(json.dumps(words).encode()).hexdigest()[:16]


def load_same_speaker(path: Path, fingerprint: str | None, speakers: Sequence[str]) -> list[dict]:
    """What `save_same_speaker` wrote: [{"start", "end" (sec), "codes": [8, N] int16}].

    Raises UserError if the file is missing or damaged, if another codec made it (unless `fingerprint` is None), or if
    it holds the speech of others than `speakers`.
    """
    again = "run precompute_codes.py with --same-speaker"
    try:
        raw = torch.load(path, weights_only=True)
        stretches, mimi, whose = raw["stretches"], raw["mimi"], raw["speakers"]
    except FileNotFoundError:
        raise UserError(f"{path}: missing; {again}") from None
    except Exception:  # torch raises nearly anything on nearly a zip file
        raise UserError(f"{path}: damaged; {again}") from None
    if fingerprint not in (None, mimi):
        raise UserError(f"{path}: made by another Mimi; {again} again")
    if set(whose) != set(speakers):
        raise UserError(
            f"{path}: holds the speech of {', '.join(whose)}, and data.speakers is {', '.join(speakers)}; "
            f"{again} --speakers {' '.join(speakers)}"
        )
    return stretches


def has_same_speaker(
    recording: Path, codes: Path, fingerprint: str, speakers: Sequence[str], exact: bool = False
) -> bool:
    """Whether the stretches of a file of codes are there (and exact, if so wanted), and of the words that stand beside
    the recording now."""
    path = same_speaker_file(codes)
    try:
        load_same_speaker(path, fingerprint, speakers)
        raw = torch.load(path, weights_only=True)
        return raw.get("words") == _digest(_words(recording, speakers)) and (bool(raw.get("exact")) or not exact)
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return False
