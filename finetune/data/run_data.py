"""The data of a run: its windows, their prompts, and who makes their codes."""

import functools
import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from moshi.models import MimiModel

from finetune.args import TrainArgs
from finetune.audio.codes import check_codes, fingerprint_file, load_codes
from finetune.audio.files import FRAME_RATE, to_frames
from finetune.cli import UserError
from finetune.data.batch import Batch, Sample
from finetune.data.dataset import get_dataset_iterator, spread_samples
from finetune.data.interleaver import InterleavedTokenizer, Interleaver, PrecomputedTokenizer, Tokenizer
from finetune.data.manifest import Line, resolve_path
from finetune.data.prompter import Prompter
from finetune.data.windows import RankShare, Windows, open_windows
from finetune.distributed import World
from finetune.model.pretrained import Pretrained
from finetune.prompts.embedded import embed_column
from finetune.prompts.voices import VoiceBook, load_voices


class RunData:
    """What a run reads. Prompts are all checked, and their voices encoded, before a model is loaded.

    Mimi is loaded where codes have to be made: for windows without codes, and for voices that are not in the cache.

    Args:
        prompts: whether windows begin with a hybrid system prompt.
        lm_kwargs: of the model: its delays and depformer steps.
        read: rows of the model's embedding tables, `read(name, start, stop)`: `.pt` voices are checked against them.
        voices_archive: gives the archive of shipped voices; the checkpoint's if None.
    Raises:
        UserError: manifests, prompts or codec cannot be used.
    """

    def __init__(
        self, args: TrainArgs, prompts: bool, checkpoint: Pretrained, lm_kwargs: dict,
        read: Callable[[str, int, int], torch.Tensor], world: World,
        voices_archive: Callable[[], Path | None] | None = None,
    ):  # fmt: skip
        self.args, self.world = args, world
        self.delays, self.dep_q = lm_kwargs["delays"], lm_kwargs["dep_q"]
        self.window_frames = to_frames(args.duration_sec)
        self.train = open_windows(args.data.train_data, self.window_frames)
        self.held_out = open_windows(args.data.eval_data, self.window_frames) if args.do_eval else None
        self.text_tokenizer = checkpoint.tokenizer()
        self.mimi = functools.cache(lambda: checkpoint.mimi(world.device))
        self.prompter = None
        context = lm_kwargs.get("context")
        if prompts and context and self.window_frames + int(args.prompt.max_sec * FRAME_RATE) > context:
            raise UserError(
                f"duration_sec {args.duration_sec:g} and prompt.max_sec {args.prompt.max_sec:g} together exceed what "
                f"the model attends to ({context / FRAME_RATE:g} s), so that it would forget its prompt; shorten one"
            )
        if prompts:
            folder = Path(args.prompt.voices_dir) if args.prompt.voices_dir else None
            self.prompter = Prompter(
                args.prompt, self.text_tokenizer, VoiceBook(folder, voices_archive or checkpoint.voices_archive)
            )
            embed = lambda column: embed_column(read, column)
            fingerprint = functools.cache(lambda: fingerprint_file(checkpoint.mimi_weights()))
            load = lambda files: load_voices(files, self.mimi, fingerprint, embed, self.delays, args.trains_embeddings)
            sources = [windows for windows in (self.train, self.held_out) if windows is not None]
            files = itertools.chain.from_iterable(windows.prompts(world.rank, world.size) for windows in sources)
            wanted = self.prompter.check(world.gather(self.prompter.scan(files)))
            with world.main_first():  # whoever comes first fills the cache of encoded voices
                self.prompter.voices = load(wanted)
            if all(windows.precomputed for windows in sources):
                self.mimi.cache_clear()  # it was wanted for new voices only
                gc.collect()  # moshi's streaming modules refer to themselves
        self._streams: weakref.WeakSet[Iterator] = weakref.WeakSet()
        self._checkpoint = checkpoint
        self._tokenizers = {id(w): self._tokenizer(w) for w in (self.train, self.held_out) if w is not None}

    def _tokenizer(self, windows: Windows) -> Tokenizer:
        data = self.args.data
        interleaver = Interleaver(self.text_tokenizer, data.keep_and_shift)
        common = (interleaver, self.window_frames, data.speakers, self.prompter, data.cache_mb)
        if windows.precomputed:
            fingerprint = fingerprint_file(self._checkpoint.mimi_weights())
            for index in windows.indexes:
                _check_codec(index.line(0), fingerprint)
            return PrecomputedTokenizer(*common, mimi_fingerprint=fingerprint)
        return InterleavedTokenizer(*common, mimi=self.mimi())

    def _iterate(self, windows: Windows, position: int = 0, **settings) -> Iterator[Batch]:
        share = RankShare(self.args.batch_size, self.world.rank, self.world.size, position)
        stream = get_dataset_iterator(
            windows, self._tokenizers[id(windows)], share, self.delays, self.dep_q,
            workers=self.args.data.num_workers, pin=self.world.device.type == "cuda", **settings,
        )  # fmt: skip
        self._streams.add(stream)
        return stream

    def close(self) -> None:
        """Ends all streams and with them their workers, for which the end of the process would wait: who still refers
        to a stream (an exception that some library keeps is enough) does not matter."""
        for stream in list(self._streams):
            stream.close()

    def batches(self, position: int) -> Iterator[Batch]:
        """This rank's microbatches, from a position of the endless stream of windows on."""
        return self._iterate(self.train, position, seed=self.args.seed, shuffle=self.args.data.shuffle)

    def eval_batches(self) -> Iterator[Batch]:
        """This rank's held-out batches, the same at each call."""
        return self._iterate(self.held_out, evaluation=True, eval_samples=self.args.eval_max_samples)

    def decoder(self) -> MimiModel:
        """Mimi, to listen to codes; it stays in memory only where training needs it too."""
        return self.mimi() if not self.train.precomputed else self._checkpoint.mimi(self.world.device)

    def eval_samples(self, count: int) -> list[Sample]:
        """`count` held-out samples, evenly spread; those that cannot be read are left out."""
        return spread_samples(self.held_out, self._tokenizers[id(self.held_out)], count)


def what_to_do(problems: list[str]) -> str:
    """The end of a sentence that says that windows could not be read."""
    more = f"\n  - and {len(problems) - 20} more" if len(problems) > 20 else ""
    shown = "".join(f"\n  - {problem}" for problem in problems[:20])
    return f"`python -m finetune.tools.check_data` says of each file what to do:{shown}{more}"


def _check_codec(line: Line, fingerprint: str) -> None:
    """Raises UserError if a file's codes are another codec's. What else may be wrong with it is one window's matter."""
    path = resolve_path(line.manifest, str(line.fields["codes_path"]))
    try:
        entry = load_codes(path)
    except UserError:
        return
    check_codes(entry, path, fingerprint)
