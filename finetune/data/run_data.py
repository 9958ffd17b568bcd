"""The data of a run: its windows, their prompts, and the codec that makes their codes."""

import contextlib
import functools
import gc
import itertools
import logging
import os
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from moshi.models import MimiModel

from finetune.args import DataArgs, TrainArgs
from finetune.audio.agreement import find_disagreements, measure_agreement
from finetune.audio.codes import audio_fingerprint, check_codes, load_codes
from finetune.audio.files import probe_audio, read_audio, to_frames
from finetune.audio.speech import frame_levels
from finetune.audio.words import parse_word, read_sidecar, read_words
from finetune.cli import UserError
from finetune.data.batch import Batch, Sample
from finetune.data.dataset import get_dataset_iterator, spread_samples
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer, Tokenizer
from finetune.data.manifest import Line, resolve_path
from finetune.data.prompter import Prompter, bullet_list, check_context
from finetune.data.voice_supply import VoiceSource, describe_shortage, find_shortage, group_speakers, voice_source
from finetune.data.windows import RankShare, Windows, count_windows, open_windows
from finetune.distributed import World
from finetune.model.pretrained import Pretrained
from finetune.progress import tracked
from finetune.prompts.embedded import embed_column
from finetune.prompts.hybrid import VoicePrompt
from finetune.prompts.recordings import warn_of_unserved
from finetune.prompts.same_speaker import SAME_SPEAKER
from finetune.prompts.voices import VoiceBook, load_voices

logger = logging.getLogger(__name__)


class RunData:
    """Training and held-out data. All prompts are checked, and their voices encoded, before a model is loaded.

    Mimi is loaded only if codes are made in training, or a voice is not in the cache of encoded voices.

    Args:
        prompts: whether windows begin with a hybrid system prompt.
        lm_kwargs: of the model: its delays, depformer steps and context.
        read: returns rows of the model's embedding tables, `read(name, start, stop)`, to check `.pt` voices against.
        voices_archive: returns the archive of shipped voices; None: take that of the checkpoint.
    Raises UserError if manifests, prompts or codec cannot be used.
    """

    def __init__(
        self, args: TrainArgs, prompts: bool, checkpoint: Pretrained, lm_kwargs: dict,
        read: Callable[[str, int, int], torch.Tensor], world: World,
        voices_archive: Callable[[], Path | None] | None = None,
    ):  # fmt: skip
        self.args, self.world, self._checkpoint = args, world, checkpoint
        self.delays, self.dep_q = lm_kwargs["delays"], lm_kwargs["dep_q"]
        self.window_frames = to_frames(args.duration_sec)
        self.train = open_windows(args.data.train_data, self.window_frames)
        self.held_out = open_windows(args.data.eval_data, self.window_frames) if args.do_eval else None
        check_speakers(self.train, args.data.speakers)
        if world.is_main:
            warn_of_words(self.train, args.data)
        self.text_tokenizer = checkpoint.tokenizer()
        self.mimi = functools.cache(lambda: checkpoint.mimi(world.device, self.dep_q))
        self._fingerprint = functools.cache(lambda: checkpoint.mimi_fingerprint(self.dep_q))
        self.prompter = None
        if prompts:
            check_context(args, lm_kwargs.get("context"))
            folder = Path(args.prompt.voices_dir) if args.prompt.voices_dir else None
            book = VoiceBook(folder, voices_archive or checkpoint.voices_archive)
            self.prompter = Prompter(args.prompt, self.text_tokenizer, book)
            self.prompter.voices = self._load_voices(functools.partial(embed_column, read))
        self._streams: weakref.WeakSet[Iterator] = weakref.WeakSet()
        self._tokenizers = {id(w): self._tokenizer(w) for w in (self.train, self.held_out) if w is not None}
        self.voiceless_share = 0.0  # of the training windows: those that have no voice prompt, before any is dropped
        if prompts:
            self.voiceless_share = self._survey_voices()

    def _load_voices(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> dict[Path, VoicePrompt]:
        """Load the voices of all prompts; each rank checks the prompts of a part of the files."""
        sources = [windows for windows in (self.train, self.held_out) if windows is not None]
        files = itertools.chain.from_iterable(w.prompts(self.world.rank, self.world.size) for w in sources)
        wanted = self.prompter.check(self.world.gather(self.prompter.scan(files)))
        with self.world.main_first():  # the first one fills the cache of encoded voices
            voices = load_voices(
                wanted, self.mimi, self._fingerprint, embed, self.delays, self.args.trains_embeddings,
                self.prompter.room([]),
            )  # fmt: skip
        if self.world.is_main:
            warn_of_unserved(voices)
        if all(windows.precomputed for windows in sources):
            self.mimi.cache_clear()  # it was needed for new voices only
            gc.collect()  # moshi's streaming modules are reference cycles
        return voices

    def _survey_voices(self) -> float:
        """Find the files that lend their voice to others; return the share of the training windows without a voice.

        Raises UserError if there are windows for which `same_speaker` finds none, unless prompt.allow_voiceless is set.
        """
        args, problems, textless = self.args, [], 0
        indexes = {}
        for windows in filter(None, (self.train, self.held_out)):
            parts = self.world.gather(self._survey(windows))
            sources = sorted((source for found, *_ in parts for source in found), key=lambda source: source[:2])
            unreadable = [problem for *_, found in parts for problem in found]
            if len(unreadable) == sum(index.files for index in windows.indexes):
                raise UserError(unreadable[0])
            textless += sum(count for _, _, count, _ in parts)
            missing = sum((found for _, found, *_ in parts), Counter())  # windows of each manifest
            lacking = find_shortage(sources, self.window_frames, args.prompt.reserve_sec)
            if lacking:
                name = "data.train_data" if windows is self.train else "data.eval_data"
                own = describe_shortage(sources, len(windows), args.duration_sec, args.prompt.reserve_sec)
                problems.append(f"{name}: {own}")
            missing.update(lacking)
            if windows is self.train:
                total = sum((Counter({index.path: len(index)}) for index in windows.indexes), Counter())
                weighted = zip(windows.indexes, windows.weights)
                share = sum(weight * missing[index.path] / total[index.path] for index, weight in weighted)
            self.prompter.speakers |= group_speakers(sources)  # in an order that does not depend on the ranks
            indexes |= {index.path: index for index in windows.indexes}
        self.prompter.line_of = lambda source: indexes[source.manifest].line(source.file)
        if problems and not args.prompt.allow_voiceless:
            raise UserError("; ".join(problems))
        if textless and self.world.is_main:
            logger.warning("WARNING: %d files have no text prompt, and no server starts without one: what the model "
                           "learns there has no use", textless)  # fmt: skip
        return share

    def _survey(self, windows: Windows) -> tuple[list[VoiceSource], Counter[Path], int, list[str]]:
        """Return, of this rank's part of the files: the sources of same_speaker voices; the number of windows of each
        manifest without a voice prompt; the number of files without a text prompt; why others cannot be read."""
        sources, unasked, textless, problems = [], Counter(), 0, []
        tokenizer = self._tokenizers[id(windows)]
        for file, line, extra in windows.lines(self.world.rank, self.world.size):
            text, voice = self.prompter.names(line, extra)
            textless += text is None
            if voice is None:
                unasked[line.manifest] += count_windows(line.duration, self.window_frames)
            elif voice == SAME_SPEAKER:
                try:
                    spans = [(segment["start"], segment["end"]) for segment in tokenizer.segments(line)]
                    sources.append(voice_source(line, file, spans))
                except UserError as error:  # its windows are skipped and reported when their turn comes
                    problems.append(str(error))
        return sources, unasked, textless, problems

    def _tokenizer(self, windows: Windows) -> Tokenizer:
        data = self.args.data
        interleaver = Interleaver(self.text_tokenizer, data.keep_and_shift)
        common = (interleaver, self.window_frames, data.speakers, self.prompter, data.cache_mb, data.drop_tags)
        if windows.precomputed:
            for index in windows.indexes:
                _check_codec(index.line(0), self._fingerprint())
            return PrecomputedTokenizer(*common, mimi_fingerprint=self._fingerprint())
        return InterleavedTokenizer(*common, mimi=self.mimi())

    def _iterate(self, windows: Windows, position: int = 0, **settings) -> Iterator[Batch]:
        share = RankShare(
            self.args.batch_size, self.world.rank, self.world.size, position,
            step_microbatches=self.args.num_microbatches,
        )  # fmt: skip
        stream = get_dataset_iterator(
            windows, self._tokenizers[id(windows)], share, self.delays, self.dep_q,
            workers=self.args.data.num_workers, pin=self.world.device.type == "cuda", **settings,
        )  # fmt: skip
        self._streams.add(stream)
        return stream

    def identity(self) -> dict[str, str]:
        """Return digests of the training data and voices by setting, wherever their files are (see `open_run`)."""
        parts = [f"{index.digest}:{weight:.6g}" for index, weight in zip(self.train.indexes, self.train.weights)]
        voices = sorted(self.prompter.voices) if self.prompter else []
        return {
            "data.train_data": ",".join(parts),
            "prompt.voices_dir": ",".join(f"{path.name}:{audio_fingerprint(path)}" for path in voices),
        }

    def close(self) -> None:
        """End all streams and their workers, even if something, such as an exception, still refers to a stream."""
        for stream in list(self._streams):
            stream.close()

    def batches(self, position: int) -> Iterator[Batch]:
        """Return this rank's microbatches, from a position of the endless stream of windows on."""
        data = self.args.data
        return self._iterate(self.train, position, seed=self.args.seed, shuffle=data.shuffle, skip=data.skip)

    def eval_batches(self) -> Iterator[Batch]:
        """Return this rank's held-out batches, the same in each call."""
        stream = self._iterate(self.held_out, evaluation=True, eval_samples=self.args.eval_max_samples)
        windows = min(self.args.eval_max_samples or len(self.held_out), len(self.held_out))
        size = lambda batch: len(batch.names) + len(batch.problems)
        return tracked(stream, "evaluating held-out windows", windows / self.world.size, size)

    def decoder(self) -> MimiModel:
        """Return Mimi, to decode codes. It stays in memory only if training needs it too."""
        return self.mimi() if not self.train.precomputed else self._checkpoint.mimi(self.world.device, self.dep_q)

    def eval_samples(self, count: int) -> list[Sample]:
        """Return `count` held-out samples, evenly spread; those that cannot be read are left out."""
        return spread_samples(self.held_out, self._tokenizers[id(self.held_out)], count)


def check_speakers(windows: Windows, speakers: list[str], files: int = 50) -> None:
    """Raise UserError if the words of some `files`, evenly spread, are all of other speakers."""
    found: Counter[str | None] = Counter()
    for index in windows.indexes:
        for file in range(0, index.files, max(1, len(windows.indexes) * index.files // files)):
            # Its windows are skipped and reported when their turn comes.
            with contextlib.suppress(UserError, TypeError, ValueError):
                for row in read_sidecar(index.line(file).words_path)["alignments"]:
                    parse_word(row)
                    found[str(row[2]) if len(row) > 2 else None] += 1
    if found and not found.keys() & {None, *speakers}:
        raise UserError(
            f"data.speakers is {', '.join(speakers)}, and the words of the data are of {', '.join(found)}; name the "
            "agent's label"
        )


def warn_of_words(windows: Windows, data: DataArgs, files: int = 16, limit_sec: float = 3.0) -> None:
    """Log a warning if the words of some `files`, evenly spread, are not where the agent speaks.

    It takes little more than `limit_sec`: a minute from the middle of each file is read. Files without audio are left
    out, and so are those that cannot be read: their windows are reported when their turn comes.
    """
    every = [(index, file) for index in windows.indexes for file in range(0, index.files, -(-index.files // files))]
    end = time.monotonic() + limit_sec
    compared, found = [], []
    for index, file in every[:: -(-len(every) // files)]:
        with contextlib.suppress(UserError):
            line = index.line(file)
            if time.monotonic() > end or not os.path.isfile(line.path):
                continue
            channels, rate, duration_sec = probe_audio(line.path)
            words, _ = read_words(line.words_path, data.speakers, data.drop_tags)
            if channels != 2 or not words:
                continue
            start, size = max(0, int(duration_sec) // 2 - 30), rate // 50
            levels = np.stack([frame_levels(pcm, size) for pcm in read_audio(line.path, start, 60.0, rate)])
            own = measure_agreement(levels, size / rate, [(text, s - start, e - start) for text, s, e in words])
            compared.append(own)
            for _, detail in find_disagreements(own):
                found.append(f"{line.path}, read from {start} s on: {detail}")
                break
    if found:
        speech = sum(own.speech_sec for own in compared), sum(own.covered * own.speech_sec for own in compared)
        said = sum(own.words for own in compared), sum(own.on_agent * own.words for own in compared)
        covered, on_agent = (100 * part / max(whole, 1e-9) for whole, part in (speech, said))
        numbers = f"{covered:.0f} % of the agent's speech has words, {on_agent:.0f} % of the words are on its speech"
        logger.warning("WARNING: words and sound disagree in %d of %d files that were compared: %s; %s", len(found),
                       len(compared), numbers, what_to_do(found))  # fmt: skip


def what_to_do(problems: list[str]) -> str:
    """Return the end of a sentence that says that windows could not be read."""
    return f"`python -m finetune.tools.check_data` says of each file what to do:{bullet_list(problems)}"


def _check_codec(line: Line, fingerprint: str) -> None:
    """Raise UserError if the codes of a file are of another codec. Other problems of the file cost only its windows."""
    path = resolve_path(line.manifest, str(line.fields["codes_path"]))
    try:
        entry = load_codes(path)
    except UserError:
        return
    check_codes(entry, path, fingerprint)
