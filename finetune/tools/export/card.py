"""The model card of an exported folder."""

from collections.abc import Iterator

from moshi.models import loaders

from finetune.cli import UserError
from finetune.data.manifest import parse_sources, read_manifest
from finetune.model.pretrained import PERSONAPLEX
from finetune.model.stored import ADAPTERS_NAME, WEIGHTS_NAME, StoredModel, TrainingRecord
from finetune.streams import CODEBOOKS, DEP_Q

# As the model cards of the publishers state them (huggingface.co, the repositories of these names).
_LICENCES = {
    "kyutai/moshi": ("cc-by-4.0", "CC-BY 4.0", "https://creativecommons.org/licenses/by/4.0/"),
    "nvidia/personaplex": (
        "other",
        "NVIDIA Open Model License",
        "https://www.nvidia.com/en-us/agreements/enterprise-software/nvidia-open-model-license/",
    ),
}
_MEASURES = {
    "loss": ("objective", "{:.4f}"),
    "text_loss": ("text, nats a token", "{:.4f}"),
    "text_perplexity": ("text, perplexity", "{:.2f}"),
    "text_word_accuracy": ("text, words right", "{:.1%}"),
    "agent_loss": ("agent's audio, nats a token", "{:.4f}"),
    "user_loss": ("user's audio, nats a token", "{:.4f}"),
    "semantic_loss": ("semantic codebooks, nats a token", "{:.4f}"),
    "acoustic_loss": ("acoustic codebooks, nats a token", "{:.4f}"),
    "free_silence": ("free-running: silence, of the time", "{:.1%}"),
    "free_words_per_minute": ("free-running: words a minute", "{:.0f}"),
    "free_repetition": ("free-running: one phrase, of the text", "{:.1%}"),
    "free_tor_turn": ("free-running: user's turns taken", "{:.1%}"),
    "free_tor_pause": ("free-running: user's pauses taken", "{:.1%}"),
    "free_latency": ("free-running: latency, s", "{:.2f}"),
    "free_overlap": ("free-running: both speak, of the time", "{:.1%}"),
}
_SETTINGS = {
    "duration_sec": "window of dialogue, s",
    "optim.lr": "learning rate",
    "optim.depformer_lr": "learning rate of the depformer",
    "first_codebook_weight_multiplier": "loss weight, semantic over acoustic",
    "text_padding_weight": "loss weight, padding over words",
    "user_audio_loss_weight": "loss weight, user's audio",
    "param_dtype": "dtype of computation",
    "seed": "seed",
}


def model_card(source: StoredModel, config: dict, title: str) -> str:
    """README.md of an exported folder: what it is, how it was trained, what it scored, how to run it, licences."""
    root, expanded = source.lineage.get("base"), source.weights.origin.expanded
    licence = next((found for prefix, found in _LICENCES.items() if root and root.startswith(prefix)), None)
    front = ["library_name: moshi", "tags: [speech-to-speech, full-duplex]"]
    if licence:
        front.append(f"license: {licence[0]}")
    if licence and licence[0] == "other":
        front += [f"license_name: {licence[1].lower().replace(' ', '-')}", f"license_link: {licence[2]}"]
    if root:
        front += [f"base_model: {root}", f"base_model_relation: {'adapter' if config.get('lora') else 'finetune'}"]

    origin = f"[{root}](https://huggingface.co/{root})" if root else "a local model"
    grown = f", expanded from {CODEBOOKS} to {DEP_Q} codebooks" if expanded else ""
    holds = f"{config['dep_q']} codebooks, " + ("adapters without their base" if config.get("lora") else "all weights")
    trained = f", fine-tuned by {source.method}" if source.method else ""
    about = [f"{origin[0].upper()}{origin[1:]}{grown}{trained}. {holds[0].upper()}{holds[1:]}."]
    if expanded and not source.method:
        about.append(
            "The depformer's steps for the user's audio start as copies of those for the agent's. Text and the agent's "
            "audio are exactly the original's: this is a base to train and to put adapters on, not a better model."
        )
    if config.get("lora"):
        about.append(f"The adapters need this base: `{config['moshi_name']}`.")
    if config["moshi_name"].startswith("file://"):
        about.append("It is on one machine only; elsewhere, write into config.json as `moshi_name` where it is.")

    parts = ["\n".join(["---", *front, "---"]), f"# {title}", *about]
    if source.training:
        parts += ["## Training", _table([("", ""), *_facts(source.training)])]
        if source.training.held_out:
            parts += ["## Held-out data", *_scores(source.training.held_out)]
    parts += ["## Run", *_how_to_run(source, config), "## Licence"]
    terms = f"under the [{licence[1]}]({licence[2]})" if licence else "whose licence holds for them too"
    parts.append(
        f"The weights derive from {origin}, {terms}; they were changed as said above. Mimi and the text tokenizer are "
        "Kyutai's (CC-BY 4.0), unless the model was given others."
    )
    return "\n\n".join(parts) + "\n"


def _table(rows: list[tuple]) -> str:
    head, *rest = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def _facts(training: TrainingRecord) -> Iterator[tuple[str, object]]:
    settings = training.settings
    yield "steps", f"{training.step:,}"
    yield "windows seen", f"{training.windows:,} ({training.windows / max(training.step, 1):g} a step)"
    hours = _hours(str(settings.get("data.train_data", "")))
    yield "training data", f"{hours[0]:.2f} h in {hours[1]:,} files" if hours else "not at hand when this was exported"
    for key, label in _SETTINGS.items():
        if settings.get(key) is not None:
            yield label, settings[key]


def _hours(train_data: str) -> tuple[float, int] | None:
    """(hours, files) of a run's manifests; None if they are gone."""
    try:
        lines = [line for path, _ in parse_sources(train_data) for line in read_manifest(path, [])]
        return sum(float(line.fields["duration"]) for line in lines) / 3600, len(lines)
    except (UserError, OSError, KeyError, TypeError, ValueError):
        return None


def _scores(held_out: list[dict]) -> list[str]:
    """The first and the last evaluation beside each other."""
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
    """Paragraphs; the commands have this folder as their working directory."""
    files = {"mimi_name": "--mimi-weight", "tokenizer_name": "--tokenizer"}
    local = "".join(f" {flag} {config[key]}" for key, flag in files.items() if not config[key].startswith("hf://"))
    command = lambda text: f"```\n{text}\n```"
    if config["model_type"] == "moshi" and config["dep_q"] == CODEBOOKS:
        weights = f"--lora-weight {ADAPTERS_NAME}" if config.get("lora") else f"--moshi-weight {WEIGHTS_NAME}"
        here = ["Or from this folder:", command(f"python -m moshi.server {weights} --config-path config.json{local}")]
        if "mimi_config_name" in config:
            here = ["Not from this folder: it takes a mimi_config.json from the hub alone."]
        return [
            "With Kyutai's server (`pip install moshi`), from the hub:",
            command("python -m moshi.server --hf-repo OWNER/NAME"),
            *here,
        ]
    if config["model_type"] == "moshi":
        return [
            f"Stock `moshi` loads these weights, but Kyutai's server cannot run {DEP_Q} codebooks: it would make up "
            "what the user says. With the toolkit that trained them:",
            command(
                "python -m finetune.tools.generate . --user-wav in.wav --voice me.wav "
                "--text-prompt 'You are ...' --out out.wav"
            ),
        ]
    parts = [
        "With NVIDIA's runtime (github.com/NVIDIA/personaplex, `pip install moshi/.` in it):",
        command(
            f'SSL_DIR=$(mktemp -d); python -m moshi.server --ssl "$SSL_DIR" --moshi-weight {WEIGHTS_NAME}{local}\n'
            f"python -m moshi.offline --moshi-weight {WEIGHTS_NAME}{local} --voice-prompt-dir . --voice-prompt me.wav "
            "--text-prompt 'You are ...' --input-wav in.wav --output-wav out.wav --output-text out.json"
        ),
    ]
    if any(config.get(key, value) != value for key, value in (loaders._lm_kwargs | {"dep_q": DEP_Q}).items()):
        parts.append("It builds models of the published size alone, and this one is of another.")
    if source.lineage.get("base") == PERSONAPLEX.default_repo and source.trained_tables is False:
        parts.append("The embedding tables are PersonaPlex's own, so the voices shipped with it (NATF2.pt, ...) fit.")
        return parts
    return [
        *parts,
        "The voices shipped with PersonaPlex (NATF2.pt, ...) hold embeddings of its own tables, and this model has "
        "others: they do not fit. Recordings do, and so do voices made for this model:",
        command("python -m finetune.tools.make_voice me.wav me.pt --weights ."),
    ]
