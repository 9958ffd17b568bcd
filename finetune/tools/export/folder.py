"""The exported folder."""

import json
import shutil
from pathlib import Path

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

from finetune.cli import UserError
from finetune.model.pretrained import Pretrained
from finetune.model.stored import ADAPTERS_NAME, WEIGHTS_NAME, StoredModel, hub_address
from finetune.model.weights import fuse, write_safetensors
from finetune.streams import CODEBOOKS, DEP_Q
from finetune.tools.export.card import model_card


def export_model(source: StoredModel, out: Path, runtime: str, merge: bool, dtype: torch.dtype) -> dict:
    """Writes the folder `out`, under a temporary name until it is complete; returns its config.json.

    Args:
        runtime: "moshi" (Kyutai's) or "personaplex" (NVIDIA's: 16 codebooks, adapters always merged).
        merge: adapters are added to the weights; else they are all that is written.
    Raises:
        UserError: `out` is in use, the disk is full, or the source does not fit the runtime.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out}: exists already; name a new folder")
    if runtime == "personaplex" and source.kwargs["dep_q"] != DEP_Q:
        raise UserError(
            f"{source.name}: has {source.kwargs['dep_q']} codebooks, and NVIDIA's runtime needs {DEP_Q}; use "
            "--format moshi, or train with train_personaplex.py"
        )
    if source.adapters is None or merge or runtime == "personaplex":
        state = {key: torch.empty(shape, device="meta") for key, shape in source.shapes.items()}
        layout = {key: (dtype, tuple(t.shape)) for key, t in fuse(state, source.kwargs["dep_q"]).items()}
        tensors, name = source.fused(layout), WEIGHTS_NAME
        adapters = {"moshi_name": WEIGHTS_NAME}
    elif source.weights.origin.expanded:
        raise UserError(
            f"{source.name}: its adapters need a base of {DEP_Q} codebooks, and {source.weights.file.path} has "
            f"{CODEBOOKS}; write one with --expand and give it as --base, or use --merge"
        )
    else:
        layout = {key: (dtype, slot.shape) for key, slot in source.adapters.slots.items()}
        tensors, name = ((key, source.adapters.read(key)) for key in layout), ADAPTERS_NAME
        adapters = {"moshi_name": source.base, "lora_name": ADAPTERS_NAME, "lora": True}
        adapters |= {"lora_rank": source.rank, "lora_scaling": source.scaling}

    copies, names = _companions(source.checkpoint)
    origin = {"method": source.method, "trained_tables": source.trained_tables}
    origin |= {"step": source.training.step} if source.training else {}
    origin = source.lineage | {key: value for key, value in origin.items() if value is not None}
    config = source.kwargs | names | adapters | {"model_type": runtime, "model_id": origin}
    if "lm_gen_config" in source.checkpoint.raw_config:
        config["lm_gen_config"] = source.checkpoint.raw_config["lm_gen_config"]

    out = out.absolute()
    partial = out.with_name(f".{out.name}.tmp")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        need = sum(torch.Size(shape).numel() * dtype.itemsize for dtype, shape in layout.values())
        need += sum(path.stat().st_size for path in copies.values())
        free = shutil.disk_usage(partial).free
        if need > free:
            raise UserError(f"{out}: needs {need / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free")
        for copy, path in copies.items():
            shutil.copyfile(path, partial / copy)
        (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        (partial / "README.md").write_text(model_card(source, config, out.name))
        write_safetensors(partial / name, layout, tensors)
        partial.replace(out)
    except OSError as error:
        raise UserError(f"{out}: could not be written ({error.strerror or error}); name a folder elsewhere") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return config


def _companions(checkpoint: Pretrained) -> tuple[dict[str, Path], dict[str, str]]:
    """({name in the folder: file to copy}, entries of config.json) for Mimi and the tokenizer: what the hub has is
    referred to, what only this machine has is copied."""
    files = {
        "mimi_name": (checkpoint.mimi_weights(), "mimi", ".safetensors"),
        "tokenizer_name": (checkpoint.tokenizer_path(), "tokenizer", ".model"),
    }
    if "mimi_config_name" in checkpoint.raw_config:
        path = checkpoint.file("mimi_config", "mimi_config_name", checkpoint.raw_config["mimi_config_name"])
        files["mimi_config_name"] = (path, "mimi_config", ".json")
    copies, names = {}, {}
    for key, (path, stem, suffix) in files.items():
        names[key] = hub_address(checkpoint, key, path)
        if names[key] is None:
            names[key] = stem + (path.suffix or suffix)
            copies[names[key]] = path
    return copies, names


def push_to_hub(folder: Path, repository: str) -> str:
    """Uploads a folder to the hub, into a repository that is made private if it is new; returns its address.

    Raises UserError saying what to do with the folder instead.
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
