"""A small corpus to break, and facts about files that do not exist."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from finetune.audio.codes import audio_fingerprint, save_codes
from finetune.audio.files import read_audio, to_frames, to_int16, write_wav
from finetune.config import load_args
from finetune.data.manifest import Line
from finetune.model.pretrained import Pretrained
from finetune.streams import DEP_Q
from finetune.tools.check_data.corpus import CheckResult, check_run
from finetune.tools.check_data.findings import FileFacts
from tests.support import write_config


def write_pcm(path: Path, pcm: np.ndarray, rate: int = 24_000) -> None:
    """Write float samples [channels, samples], clipped to full scale."""
    write_wav(path, to_int16(np.asarray(pcm)), rate)


def facts_of(path: str = "a.wav", held_out: bool = False, source: int = 0, windows: int = 1) -> FileFacts:
    line = Line(1, Path(path), {"path": path, "duration": 60.0}, Path("m.jsonl"))
    return FileFacts(held_out, source, line, [0] * windows)


def kinds_of(result: CheckResult | FileFacts) -> list[str]:
    return [problem.kind for problem in result.problems]


class Corpus:
    """Four training and two held-out dialogues; `line`, the second of the training data, is the one to break."""

    def __init__(self, folder: Path, world: Path):
        self.folder, self.world = folder, world
        self.lines = {
            name: [json.loads(row) for row in (world / f"data/{name}.jsonl").read_text().splitlines()[:count]]
            for name, count in (("train", 4), ("eval", 2))
        }
        for name in self.lines:
            shutil.copytree(world / "data" / name, folder / name)
        self.line = self.lines["train"][1]
        self.wav = folder / self.line["path"]
        self.json = self.wav.with_suffix(".json")
        self.mimi = Pretrained(str(world / "model")).mimi_fingerprint(DEP_Q)

    def all_lines(self) -> list[dict]:
        return [line for lines in self.lines.values() for line in lines]

    def sound(self) -> np.ndarray:
        return read_audio(self.wav)

    def record(self, pcm: np.ndarray) -> None:
        write_pcm(self.wav, pcm)

    def words(self) -> list:
        return json.loads(self.json.read_text())["alignments"]

    def change(self, **fields) -> None:
        """Change the .json; a field that is None is removed."""
        content = json.loads(self.json.read_text()) | fields
        self.json.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))

    def encode(self) -> None:
        """Give all lines codes, which are random."""
        for line in self.all_lines():
            path = self.folder / line["path"]
            line["codes_path"] = line["path"].replace(".wav", ".pt")
            codes = torch.randint(0, 2048, (2, 8, to_frames(line["duration"])))
            save_codes(path.with_suffix(".pt"), codes, line["duration"], self.mimi, audio_fingerprint(path))

    def config(self, **settings) -> Path:
        """Write the manifests and a config."""
        for name, lines in self.lines.items():
            rows = [row if isinstance(row, str) else json.dumps(row) for row in lines]
            (self.folder / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
        data = {f"data.{name}_data": str(self.folder / f"{name}.jsonl") for name in self.lines}
        return write_config(self.folder, self.world, **data | {"data.shuffle": False} | settings)

    def check(self, prompts: bool | None = None, **settings) -> CheckResult:
        return check_run(load_args(self.config(**settings)), prompts, workers=0)


@pytest.fixture
def corpus(tmp_path, world) -> Corpus:
    return Corpus(tmp_path, world)
