"""The exported folder."""

import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError
from torch import Tensor

from finetune.claim import claimed
from finetune.cli import UserError
from finetune.files import sync, sync_tree
from finetune.model.adapters import ADAPTERS_NAME
from finetune.model.layout import fuse
from finetune.model.stored import WEIGHTS_NAME, StoredModel
from finetune.model.weights import write_safetensors
from finetune.streams import CODEBOOKS, DEP_Q
from finetune.tools.export.card import model_card


def export_model(source: StoredModel, out: Path, runtime: str, merge: bool, dtype: torch.dtype) -> dict:
    """Write the folder `out`, under a temporary name until it is complete, and return its config.json.

    Args:
        runtime: "moshi" (Kyutai's) or "personaplex" (NVIDIA's: 16 codebooks, adapters always merged).
        merge: add adapters to the weights; otherwise only the adapters are written.
        dtype: of the tensors written.
    Raises:
        UserError: `out` is in use, the disk is full, or the source does not fit the runtime.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    dep_q = source.kwargs["dep_q"]
    if runtime == "personaplex" and dep_q != DEP_Q:
        remedy = "use --format moshi, or train with train_personaplex.py"
        raise UserError(f"{source.name}: has {dep_q} codebooks, and NVIDIA's runtime needs {DEP_Q}; {remedy}")
    if source.adapters is None or merge or runtime == "personaplex":
        state = {key: torch.empty(shape, device="meta") for key, shape in source.shapes.items()}
        layout = {key: (dtype, tuple(t.shape)) for key, t in fuse(state, dep_q).items()}
        tensors, name, entries = source.fused(layout), WEIGHTS_NAME, {"moshi_name": WEIGHTS_NAME}
    elif source.weights.expanded:
        raise UserError(
            f"{source.name}: its adapters need a base of {DEP_Q} codebooks, and {source.weights.file.path} has "
            f"{CODEBOOKS}; write one with --expand and give it as --base, or use --merge"
        )
    else:
        layout = {key: (dtype, slot.shape) for key, slot in source.adapters.slots.items()}
        tensors, name = ((key, source.adapters.read(key)) for key in layout), ADAPTERS_NAME
        entries = {"moshi_name": source.base, "lora_name": ADAPTERS_NAME, "lora": True}
        entries |= {"lora_rank": source.rank, "lora_scaling": source.scaling}

    # Mimi and the tokenizer: files from the hub are named by their address, those only on this machine are copied.
    copies: dict[str, Path] = {}
    names: dict[str, str] = {}
    suffixes = {"mimi_name": ".safetensors", "tokenizer_name": ".model", "mimi_config_name": ".json"}
    for key, path in source.checkpoint.companions().items():
        names[key] = source.checkpoint.hub_address(key, path)
        if names[key] is None:
            names[key] = key.removesuffix("_name") + (path.suffix or suffixes[key])
            copies[names[key]] = path
    step = source.training.step if source.training else None
    training = {"method": source.method, "trained_tables": source.trained_tables, "step": step}
    model_id = source.lineage | {key: value for key, value in training.items() if value is not None}
    config = source.kwargs | names | entries | {"model_type": runtime, "model_id": model_id}
    if "lm_gen_config" in source.checkpoint.raw_config:
        config["lm_gen_config"] = source.checkpoint.raw_config["lm_gen_config"]

    out = out.absolute()
    partial = out.with_name(f".{out.name}.tmp")
    if partial.exists() and not (partial / ".claim").exists():
        raise UserError(f"{partial}: is in the way, and no export has made it; move it, or name another folder")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        with claimed(partial):
            try:
                texts = {
                    "config.json": json.dumps(config, indent=2) + "\n",
                    "README.md": model_card(source, config, out.name),
                }
                _write(partial, out, layout, tensors, name, copies, texts)
            except BaseException:
                shutil.rmtree(partial)
                raise
        partial.replace(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror or error}); name a folder elsewhere") from None
    return config


def _write(
    folder: Path, out: Path, layout: dict, tensors: Iterable[tuple[str, Tensor]], name: str, copies: dict[str, Path],
    texts: dict[str, str],
) -> None:  # fmt: skip
    """Write the files of an export to the folder that becomes `out`, in place of what a dead export has left there."""
    for path in folder.iterdir():
        if path.name != ".claim":
            path.unlink()
    need = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
    need += sum(path.stat().st_size for path in copies.values())
    free = shutil.disk_usage(folder).free
    if need > free:
        space = f"needs {need / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
        raise UserError(f"{out}: {space}; free some, or name a folder elsewhere")
    for copy, path in copies.items():
        shutil.copyfile(path, folder / copy)
    for text, content in texts.items():
        (folder / text).write_text(content)
    write_safetensors(folder / name, layout, tensors)
    sync_tree(folder)


def push_to_hub(folder: Path, repository: str) -> str:
    """Upload a folder to the hub, to a repository that is created private if it is new, and return its address.

    Raises UserError with the commands that upload the folder later.
    """
    api = HfApi()
    try:
        name = api.create_repo(repository, private=True, exist_ok=True).repo_id
        api.upload_folder(folder_path=folder, repo_id=name)
        return f"https://huggingface.co/{name}"
    except (HfHubHTTPError, LocalTokenNotFoundError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{folder} is written, but could not be uploaded ({reason}); run `huggingface-cli login`, then "
            f"`huggingface-cli upload {repository} {folder}`"
        ) from None
