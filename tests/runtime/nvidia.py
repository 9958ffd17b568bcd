"""Runs NVIDIA's runtime for test_nvidia.py, in a process whose module `moshi` is theirs (see PYTHONPATH there).

    python nvidia.py MODEL JOB RESULT

MODEL is a folder as finetune.tools.export writes it. Theirs builds only models of the published size, so the sizes in
its loaders are replaced by those of MODEL; nothing else of it is. JOB and RESULT are files of torch.save.
"""

import functools
import json
import sys
from pathlib import Path

import torch
from moshi import offline
from moshi.models import LMGen, loaders


class Recorder:
    """Collects what the runtime's transformer reads: delayed columns [17] and inputs [dim]."""

    def __init__(self, generator: LMGen):
        self.columns, self.inputs = [], []
        prepare = generator.prepare_step_input

        def noted(*args, **kwargs):
            prepared = prepare(*args, **kwargs)
            if prepared is not None:
                self.columns.append(prepared[0][0, :, 0].clone())
            return prepared

        generator.prepare_step_input = noted
        generator.lm_model.transformer.register_forward_pre_hook(
            lambda _, args: self.inputs.append(args[0][0, 0].clone())
        )

    def result(self) -> dict:
        return {"columns": torch.stack(self.columns, dim=1), "inputs": torch.stack(self.inputs)}


def set_sizes(model: Path) -> None:
    config, mimi = (json.loads((model / name).read_text()) for name in ("config.json", "mimi_config.json"))
    for part in ("seanet", "quantizer", "transformer"):
        sizes = getattr(loaders, f"_{part}_kwargs")
        sizes.clear()
        sizes.update(mimi[part])
    loaders._lm_kwargs.update({key: value for key, value in config.items() if key in loaders._lm_kwargs})


def load(model: Path, **settings) -> tuple:
    """Return (Mimi, LMGen) as moshi/offline.py makes them."""
    mimi = loaders.get_mimi(model / "mimi.safetensors", "cpu")
    lm = loaders.get_moshi_lm(model / "model.safetensors", device="cpu", dtype=torch.float32)
    generator = LMGen(
        lm, device="cpu", audio_silence_frame_cnt=int(0.5 * mimi.frame_rate), sample_rate=mimi.sample_rate,
        frame_rate=mimi.frame_rate, use_sampling=False, **settings,
    )  # fmt: skip
    mimi.streaming_forever(1)
    generator.streaming_forever(1)
    return mimi, generator


def encode(mimi, wav: str, channel: int) -> torch.Tensor:
    """Encode a channel of a file as moshi/offline.py encodes the user: [1, 8, T]."""
    mimi.reset_streaming()
    audio = offline.lm_load_audio(wav, mimi.sample_rate)[channel : channel + 1]
    frames = offline.lm_iterate_audio(audio, sample_interval_size=1920, pad=True)
    return torch.cat(list(offline.lm_encode_from_sphn(mimi, frames, max_batch=1)), dim=2)


def load_prompts(generator: LMGen, voice: str, text_ids: list[int]) -> None:
    if voice.endswith(".pt"):
        generator.load_voice_prompt_embeddings(voice)
    else:
        generator.load_voice_prompt(voice)
    generator.text_prompt_tokens = text_ids


def window(model: Path, wav: str, voice: str, text_ids: list[int], text: torch.Tensor) -> dict:
    """Step through the prompts and then a dialogue, agent (left) and text [T] included."""
    mimi, generator = load(model)
    recorder = Recorder(generator)
    load_prompts(generator, voice, text_ids)
    generator.step_system_prompts(mimi)
    prompt = len(recorder.inputs)
    agent, user = (encode(mimi, wav, channel) for channel in (0, 1))
    for i, token in enumerate(text.tolist()):
        generator.step(input_tokens=user[:, :, i : i + 1], moshi_tokens=agent[:, :, i : i + 1], text_token=token)
    return recorder.result() | {"codes": torch.cat([agent, user], dim=1)[0], "prompt": prompt}


def voices(model: Path, paths: list[str]) -> dict:
    """Load voice recordings; {path: {"audio", "codes"} or the error}."""
    mimi, generator = load(model)
    found = {}
    for path in paths:
        try:
            generator.load_voice_prompt(path)
        except Exception as error:
            found[path] = repr(error)
            continue
        mimi.reset_streaming()
        codes = torch.cat(list(generator._encode_voice_prompt_frames(mimi)), dim=2)[0]
        audio = torch.from_numpy(generator.voice_prompt_audio)[0]
        found[path] = {"audio": audio, "codes": codes}
    return found


def save_voice(model: Path, path: str) -> dict:
    """Make a .pt next to a recording."""
    mimi, generator = load(model, save_voice_prompt_embeddings=True)
    generator.load_voice_prompt(path)
    generator._step_voice_prompt(mimi)
    return {}


def losses(model: Path, codes: torch.Tensor) -> dict:
    """Return the logits and masks of the runtime's own training forward on codes [1, 17, T]."""
    lm = loaders.get_moshi_lm(model / "model.safetensors", device="cpu", dtype=torch.float32)
    return vars(lm.forward_train(codes))


def run_offline(model: Path, arguments: list[str]) -> dict:
    """Run moshi/offline.py; return the tokens [17, N] of its frames and what it writes as text."""
    tokens, decode = [], offline.decode_tokens_to_pcm
    offline.decode_tokens_to_pcm = lambda *args: tokens.append(args[-1][0].clone()) or decode(*args)
    offline.hf_hub_download = lambda *_: None  # it counts a download
    offline.loaders.get_moshi_lm = functools.partial(loaders.get_moshi_lm, dtype=torch.float32)
    sys.argv = ["offline.py", *arguments, "--device", "cpu", "--greedy"]
    for flag, name in (("moshi-weight", "model"), ("mimi-weight", "mimi")):
        sys.argv += [f"--{flag}", str(model / f"{name}.safetensors")]
    sys.argv += ["--tokenizer", str(model / "tokenizer.model")]
    offline.main()
    return {"tokens": torch.cat(tokens, dim=1)}


def main() -> None:
    model, job, result = map(Path, sys.argv[1:])
    set_sizes(model)
    torch.set_num_threads(1)
    tasks = {task.__name__: task for task in (window, voices, save_voice, losses, run_offline)}
    with torch.no_grad():
        task, *arguments = torch.load(job)
        torch.save(tasks[task](model, *arguments), result)


if __name__ == "__main__":
    main()
