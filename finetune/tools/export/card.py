"""The model card of an exported folder."""

from collections.abc import Iterator

from huggingface_hub import ModelCardData
from moshi.models import loaders

from finetune.cli import UserError
from finetune.data.manifest import parse_sources, read_manifest
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.stored import ADAPTERS_NAME, WEIGHTS_NAME, StoredModel, TrainingRecord
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
    """Return README.md of an exported folder: its origin, training, scores, how to run it, and licence."""
    root, expanded, adapters = source.lineage.get("base"), source.weights.origin.expanded, config.get("lora")
    found = (licence for prefix, licence in _LICENCES.items() if root and root.startswith(prefix))
    licence, link, metadata = next(found, (None, None, {}))
    front = ModelCardData(
        library_name="moshi", tags=["speech-to-speech", "full-duplex"], base_model=root,
        base_model_relation=root and ("adapter" if adapters else "finetune"), **metadata,
    )  # fmt: skip
    origin = f"[{root}](https://huggingface.co/{root})" if root else "a local model"
    expansion = f", expanded from {CODEBOOKS} to {DEP_Q} codebooks" if expanded else ""
    trained = f", fine-tuned by {source.method}" if source.method else ""
    holds = "only adapters, without their base" if adapters else "all weights"
    parts = [f"---\n{front}\n---", f"# {title}"]
    parts.append(f"Made from {origin}{expansion}{trained}. {config['dep_q']} codebooks, {holds}.")
    if expanded and not source.method:
        parts.append(
            "The depformer steps for the user's audio start as copies of those for the agent's. Text and the agent's "
            "audio are the same as the original's: this is a base to train and to load adapters on, not a better model."
        )
    if adapters:
        parts.append(f"The adapters need this base: `{config['moshi_name']}`.")
    if config["moshi_name"].startswith("file://"):
        parts.append("It is on one machine only; on another, set `moshi_name` in config.json to its place there.")
    if source.training:
        parts += ["## Training", _table([("", ""), *_facts(source.training)])]
        if source.training.held_out:
            parts += ["## Held-out data", *_scores(source.training.held_out)]
    terms = f"under the [{licence}]({link})" if licence else "whose licence applies to them too"
    rights = (
        f"The weights derive from {origin}, {terms}, and were changed as described above. Mimi and the text tokenizer "
        "are Kyutai's (CC-BY 4.0), unless the model was given others."
    )
    return "\n\n".join([*parts, "## Run", *_how_to_run(source, config), "## Licence", rights]) + "\n"


def _table(rows: list[tuple]) -> str:
    head, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _facts(training: TrainingRecord) -> Iterator[tuple[str, object]]:
    settings = training.settings
    yield "steps", f"{training.step:,}"
    yield "windows seen", f"{training.windows:,} ({training.windows / max(training.step, 1):g} per step)"
    try:
        manifests = parse_sources(str(settings.get("data.train_data", "")))
        seconds = [line.duration for path, _ in manifests for line in read_manifest(path, [], timed=True)]
        yield "training data", f"{sum(seconds) / 3600:.2f} h in {len(seconds):,} files"
    except (UserError, OSError):
        yield "training data", "not available at the time of export"
    yield from ((label, settings[key]) for key, label in _SETTINGS.items() if settings.get(key) is not None)


def _scores(held_out: list[dict]) -> list[str]:
    """Return the first and the last evaluation, side by side."""
    columns = [held_out[0], held_out[-1]][-len(held_out) :]
    about = f"Over {columns[-1].get('samples', 'all')} windows, teacher-forced"
    replies = columns[-1].get("free_replies")
    about += f"; free-running: {replies} replies to held-out users." if replies else "."
    about += " Step 0 is the base model." * (columns[0]["step"] == 0)
    rows = [("", *(f"step {row['step']}" for row in columns))]
    for key, (label, form) in _MEASURES.items():
        if all(isinstance(row.get(key), float) for row in columns):
            rows.append((label, *(form.format(row[key]) for row in columns)))
    return [about, _table(rows)]


def _how_to_run(source: StoredModel, config: dict) -> list[str]:
    """Return paragraphs; their commands have the exported folder as their working directory."""
    files = {"mimi_name": "--mimi-weight", "tokenizer_name": "--tokenizer"}
    local = "".join(f" {flag} {config[key]}" for key, flag in files.items() if not config[key].startswith("hf://"))
    block = lambda command: f"```\n{command}\n```"
    if config["model_type"] == "moshi" and config["dep_q"] == CODEBOOKS:
        weights = f"--lora-weight {ADAPTERS_NAME}" if config.get("lora") else f"--moshi-weight {WEIGHTS_NAME}"
        here = ["Or from this folder:", block(f"python -m moshi.server {weights} --config-path config.json{local}")]
        if "mimi_config_name" in config:
            here = ["It cannot run from this folder, because it takes a mimi_config.json only from the hub."]
        from_hub = "Use Kyutai's server (`pip install moshi`), from the hub:"
        return [from_hub, block("python -m moshi.server --hf-repo OWNER/NAME"), *here]
    if config["model_type"] == "moshi":
        command = "python -m finetune.tools.generate . --user-wav in.wav --voice me.wav --text-prompt 'You are ...'"
        return [
            f"Stock `moshi` loads these weights, but Kyutai's server cannot run {DEP_Q} codebooks: it would invent "
            "what the user says. Use the toolkit that trained them:",
            block(f"{command} --out out.wav"),
        ]
    parts = [
        "Use NVIDIA's runtime (github.com/NVIDIA/personaplex, `pip install moshi/.` in it):",
        block(
            f'SSL_DIR=$(mktemp -d); python -m moshi.server --ssl "$SSL_DIR" --moshi-weight {WEIGHTS_NAME}{local}\n'
            f"python -m moshi.offline --moshi-weight {WEIGHTS_NAME}{local} --voice-prompt-dir . --voice-prompt me.wav "
            "--text-prompt 'You are ...' --input-wav in.wav --output-wav out.wav --output-text out.json"
        ),
    ]
    if any(config.get(key, value) != value for key, value in (loaders._lm_kwargs | {"dep_q": DEP_Q}).items()):
        parts.append("The runtime builds only models of the published size, and this one has another.")
    if source.lineage.get("base") == PERSONAPLEX.default_repo and source.trained_tables is False:
        parts.append("The embedding tables are PersonaPlex's own, so the voices shipped with it (NATF2.pt, ...) fit.")
        return parts
    return [
        *parts,
        "The voices shipped with PersonaPlex (NATF2.pt, ...) hold outputs of its own embedding tables, and this model "
        "has others: they do not fit. Recordings do, and so do voices made for this model:",
        block("python -m finetune.tools.make_voice me.wav me.pt --weights ."),
    ]
