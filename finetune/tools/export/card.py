"""The model card of an exported folder: its origin, training, scores, how to run it, and licence."""

import json
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import ModelCardData
from jinja2 import Environment, StrictUndefined
from moshi.models import loaders

from finetune.cli import UserError
from finetune.data.manifest import parse_sources, read_manifest
from finetune.guard import best_checkpoint
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.stored import StoredModel
from finetune.run_dir import run_of
from finetune.streams import CODEBOOKS, DEP_Q

_NVIDIA_LICENCE = "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/"
_LICENCES = {  # {prefix of a repository: (name, address, metadata)}, from the publishers' model cards on huggingface.co
    "kyutai/moshi": ("CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/", {"license": "cc-by-4.0"}),
    "nvidia/personaplex": ("NVIDIA Open Model License", _NVIDIA_LICENCE, {
        "license": "other", "license_name": "nvidia-open-model-license", "license_link": _NVIDIA_LICENCE,
    }),
}  # fmt: skip
_MEASURES = {
    "loss": ("objective", "{:.4f}"),
    "text_loss": ("text, nats per token", "{:.4f}"),
    "text_perplexity": ("text, perplexity", "{:.2f}"),
    "text_word_accuracy": ("text, accuracy on words", "{:.1%}"),
    "agent_loss": ("agent's audio, nats per token", "{:.4f}"),
    "user_loss": ("user's audio, nats per token", "{:.4f}"),
    "semantic_loss": ("semantic codebooks, nats per token", "{:.4f}"),
    "acoustic_loss": ("acoustic codebooks, nats per token", "{:.4f}"),
    "free_silence": ("free-running: time in silence", "{:.1%}"),
    "free_words_per_minute": ("free-running: words per minute", "{:.0f}"),
    "free_repetition": ("free-running: text in one repeated phrase", "{:.1%}"),
    "free_tor_turn": ("free-running: user's turns taken over", "{:.1%}"),
    "free_tor_pause": ("free-running: user's pauses taken over", "{:.1%}"),
    "free_latency": ("free-running: latency, s", "{:.2f}"),
    "free_overlap": ("free-running: time in which both speak", "{:.1%}"),
}
_SETTINGS = {
    "duration_sec": "window of dialogue, s",
    "optim.lr": "learning rate",
    "optim.depformer_lr": "learning rate of the depformer",
    "first_codebook_weight_multiplier": "loss weight of semantic codebooks (acoustic: 1)",
    "text_padding_weight": "loss weight of text padding (words: 1)",
    "user_audio_loss_weight": "loss weight of the user's audio",
    "param_dtype": "dtype of computation",
    "seed": "seed",
}


def model_card(source: StoredModel, config: dict, title: str) -> str:
    """Return README.md of an exported folder (the template is card.md); commands have it as their working directory."""
    root, adapters = source.lineage.get("base"), config.get("lora")
    known = (licence for prefix, licence in _LICENCES.items() if root and root.startswith(prefix))
    licence, link, metadata = next(known, (None, None, {}))
    front = ModelCardData(
        library_name="moshi", tags=["speech-to-speech", "full-duplex"], base_model=root,
        base_model_relation=root and ("adapter" if adapters else "finetune"), **metadata,
    )  # fmt: skip
    scores, findings = _evaluation(source) if source.training else ({}, [])
    measures = [
        (label, ["–" if row.get(key) is None else form.format(row[key]) for row in scores.values()])
        for key, (label, form) in _MEASURES.items()
        if scores and isinstance(list(scores.values())[-1].get(key), float)
    ]
    runtime = config["model_type"]
    if runtime == "moshi":
        runtime = "kyutai" if config["dep_q"] == CODEBOOKS else "toolkit"
    flags = {"mimi_name": "--mimi-weight", "tokenizer_name": "--tokenizer"}
    published = loaders._lm_kwargs | {"dep_q": DEP_Q}
    template = (Path(__file__).parent / "card.md").read_text()
    environment = Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    return environment.from_string(template).render(
        front=front, title=title, config=config, adapters=adapters, runtime=runtime, licence=licence, link=link,
        origin=f"[{root}](https://huggingface.co/{root})" if root else "a local model",
        expanded=source.weights.expanded, method=source.method, training=source.training,
        facts=_facts(source) if source.training else [], scores=scores, measures=measures, findings=findings,
        local="".join(f" {flag} {config[key]}" for key, flag in flags.items() if not config[key].startswith("hf://")),
        published_size=all(config.get(key, value) == value for key, value in published.items()),
        voices_fit=root == PERSONAPLEX.default_repo and source.trained_tables is False,
    )  # fmt: skip


def _evaluation(source: StoredModel) -> tuple[dict[str, dict], list[str]]:
    """Return the held-out measures of the base, if they are known, and of the exported step, by the head of their
    column; and what `evaluate` found out about prompts and forgetting, in words.

    The measures are those of `evaluate` if it has evaluated this step, else those of the run at this step.
    """
    step, held_out = source.training.step, {row["step"]: row for row in source.training.held_out}
    try:
        path = _run_folder(source) / f"evaluation_{step:06d}.json"
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        stored = {}
    row, base = held_out.get(step), held_out.get(0)
    if stored.get("loss") is not None:
        row, base = (row or {}) | stored, stored.get("base", base)
    columns = {"base": base, f"step {step:,}": row} if step else {"base": row}
    found = [*(stored.get("conditioning") or {}).values(), stored.get("forgetting") or {}]
    sentences = [own["sentence"] for own in found if "sentence" in own]
    return {name: values for name, values in columns.items() if values} if row else {}, sentences


def _run_folder(source: StoredModel) -> Path:
    return run_of(Path(source.checkpoint.source).resolve())


def _facts(source: StoredModel) -> Iterator[tuple[str, object]]:
    training, settings = source.training, source.training.settings
    yield "steps", f"{training.step:,}"
    best = best_checkpoint(_run_folder(source))
    if best is not None and best[0] == training.step:
        yield "checkpoint", best[2]
    elif source.choice:
        yield "checkpoint", source.choice
    yield "windows seen", f"{training.windows:,} ({training.windows / max(training.step, 1):g} per step)"
    try:
        manifests = parse_sources(str(settings.get("data.train_data", "")))
        seconds = [line.duration for path, _ in manifests for line in read_manifest(path, [], timed=True)]
        yield "training data", f"{sum(seconds) / 3600:.2f} h in {len(seconds):,} files"
    except (UserError, OSError):
        yield "training data", "not available at the time of export"
    yield from ((label, settings[key]) for key, label in _SETTINGS.items() if settings.get(key) is not None)
