"""Let the base model converse with the users of held-out recordings, and write the conversations as training data.

    python -m finetune.tools.make_replay config.yaml replay --count 200
    python -m finetune.tools.make_replay config.yaml replay --users data_encoded/others_precomputed.jsonl
    torchrun train_personaplex.py config.yaml data.train_data=mine.jsonl:0.5,replay/replay.jsonl:0.5

Mixed into the training data, they keep what the base can do where one's own data do not show it.

Reads the config of the run to come: its base (moshi_paths), its prompts, and the users of its held-out data (--users:
of other pre-computed data). Writes OUT/replay.jsonl; and for each conversation a wav to listen to (agent left, user
right), its codes as the model made them, its words, and its prompts. The same command continues one that was stopped.
"""

import json
from collections.abc import Iterable
from pathlib import Path

import torch

from finetune.args import TrainArgs
from finetune.audio.codes import audio_fingerprint, save_codes
from finetune.audio.files import FRAME_RATE, to_int16, write_conversation, write_wav
from finetune.audio.words import MAIN_SPEAKER
from finetune.cli import UserError, run
from finetune.config import load_args
from finetune.data.batch import Sample
from finetune.data.run_data import RunData
from finetune.dialogue import spoken_words
from finetune.distributed import session
from finetune.evaluate import free_run
from finetune.files import expand, replacing
from finetune.generate import Reply, decode_codes
from finetune.jobs.bars import show_bars
from finetune.model.build import StoredWeights, build_lm
from finetune.model.pretrained import MOSHI, PERSONAPLEX, Pretrained, lm_kwargs
from finetune.model.training_lm import TrainingLM
from finetune.parser import Parser
from finetune.progress import tracked
from finetune.prompts.same_speaker import SAME_SPEAKER
from finetune.streams import CODEBOOKS, SILENCE_FRAMES

BATCH = 8  # conversations at once


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("config", type=Path, help="YAML file of the run to come")
    parser.add_argument("out", type=expand, metavar="OUT", help="folder to write; new, empty, or one to continue")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")
    parser.add_argument("--count", type=int, default=200, help="conversations, each as long as a window")
    parser.add_argument("--users", type=expand, metavar="MANIFEST", help="pre-computed data, instead of data.eval_data")
    parser.add_argument("--moshi", action="store_true", help="the config is for train.py: 8 codebooks and no prompts")
    given = parser.parse_args()
    if given.count < 1:
        raise UserError(f"--count {given.count}: must be at least 1")
    users = [f"data.eval_data={given.users}"] if given.users else []
    args = load_args(given.config, [*given.overrides, *users, "do_eval=true"])
    manifest = given.out / "replay.jsonl"
    if given.out.exists() and any(given.out.iterdir()) and not (given.out / "replay.json").is_file():
        raise UserError(f"{given.out}: holds other files; name a new folder")
    spec = MOSHI if given.moshi else PERSONAPLEX
    checkpoint = Pretrained(**vars(args.moshi_paths) | {"hf_repo_id": args.moshi_paths.hf_repo_id or spec.default_repo})
    kwargs = lm_kwargs(checkpoint, spec)
    weights = StoredWeights(checkpoint.moshi_weights(), kwargs["dep_q"])
    show_bars()
    with session(args.device) as world:
        if world.size > 1:
            raise UserError("make_replay runs in one process; start it without torchrun")
        data = RunData(args, spec.prompts, checkpoint, kwargs, weights.file.read, world)
        lm = build_lm(kwargs, getattr(torch, args.param_dtype)).to_empty(device=world.device)
        every, size = list(lm.named_parameters()), lambda named: named[1].numel()
        with torch.no_grad():
            for name, parameter in tracked(every, "loading weights", sum(map(size, every)), size):
                weights.read_into(name, 0, parameter.data)
        samples = data.eval_samples(given.count)
        if len(samples) < given.count:
            print(f"the data have {len(samples)} windows, so there will be as many conversations")
        given.out.mkdir(parents=True, exist_ok=True)
        fingerprint = checkpoint.mimi_fingerprint(kwargs["dep_q"])
        about = {"base": checkpoint.source, "mimi": fingerprint, "config": str(given.config), "seed": args.seed}
        _write(given.out / "replay.json", json.dumps(about, indent=1))
        writer = _Writer(given.out, data, fingerprint)
        training_lm = TrainingLM(lm, gradient_checkpointing=False)
        batches = range(0, len(samples), BATCH)
        for start in tracked(batches, "conversations", len(batches)):
            numbers = range(start, min(start + BATCH, len(samples)))
            if not all(map(writer.is_written, numbers)):
                # A batch is drawn as a whole, with a seed of its own: one that was stopped says the same when repeated.
                said = free_run(training_lm, samples[start : start + BATCH], args.duration_sec, args.seed + start)
                writer.write(numbers, samples[start : start + BATCH], said)
    lines = [(given.out / f"{i:05d}.line").read_text() for i in range(len(samples))]
    _write(manifest, "\n".join(lines) + "\n")
    print(f"{manifest}: {len(lines)} conversations; add it to the training data as {_mixture(args, manifest)}")


class _Writer:
    """Writes conversations to a folder."""

    def __init__(self, folder: Path, data: RunData, fingerprint: str):
        self.folder, self.data, self.fingerprint, self.mimi = folder, data, fingerprint, data.decoder()

    def is_written(self, number: int) -> bool:
        return (self.folder / f"{number:05d}.line").is_file()

    def write(self, numbers: Iterable[int], samples: list[Sample], said: list[tuple[torch.Tensor, Reply]]) -> None:
        """Write some conversations; the manifest line, which marks one as written, comes last."""
        users = decode_codes(self.mimi, [user for user, _ in said])
        agents = decode_codes(self.mimi, [reply.codes for _, reply in said])
        for number, sample, (codes, reply), agent, user in zip(numbers, samples, said, agents, users):
            wav, words = self.folder / f"{number:05d}.wav", spoken_words(reply.text, self.data.text_tokenizer)
            write_conversation(wav, agent, user)
            content = {"alignments": [[word, [start, end], MAIN_SPEAKER] for word, start, end in words]}
            _write(wav.with_suffix(".json"), json.dumps(content | self._prompts(number, sample), ensure_ascii=False))
            duration = codes.shape[1] / FRAME_RATE
            both = torch.stack([reply.codes, codes])
            save_codes(wav.with_suffix(".pt"), both, duration, self.fingerprint, audio_fingerprint(wav))
            line = {"path": wav.name, "duration": duration, "codes_path": f"{number:05d}.pt"}
            _write(wav.with_suffix(".line"), json.dumps(line))

    def _prompts(self, number: int, sample: Sample) -> dict[str, str]:
        """The prompts that a sample had, as fields of a .json."""
        if self.data.prompter is None:
            return {}
        out = {"text_prompt": self.data.text_tokenizer.decode(sample.prompt_ids), "voice_prompt": ""}
        frames = int((~sample.loss_mask).sum()) - len(sample.prompt_ids) - 2 * SILENCE_FRAMES
        if sample.voice == SAME_SPEAKER:
            # Its first frame is not part of a sample.
            (sound,) = decode_codes(self.mimi, [sample.codes[1 : 1 + CODEBOOKS, :frames]])
            path = self.folder / f"voice_{number:05d}.wav"
            write_wav(path, to_int16(sound[None]))
            out["voice_prompt"] = path.name
        elif sample.voice:
            paths = (path for path, voice in self.data.prompter.voices.items() if voice.name == sample.voice)
            out["voice_prompt"] = str(next(paths).absolute())
        return out


def _write(path: Path, content: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(content)


def _mixture(args: TrainArgs, manifest: Path) -> str:
    own = args.data.train_data
    return f"{own}:0.5,{manifest}:0.5" if own and not {":", ","} & set(own) else f"{manifest}:0.5"


if __name__ == "__main__":
    run(main)
