"""A data set on the hub as a folder of recordings."""

from pathlib import Path

from huggingface_hub import errors, snapshot_download

from finetune.cli import UserError

PREFIX = "hf://datasets/"  # as huggingface_hub's file system names data sets


def fetch_dataset(address: str) -> Path:
    """Return the folder of a data set in the hub cache. What the cache lacks is downloaded; without a network, nothing.

    Args:
        address: hf://datasets/OWNER/NAME, or hf://datasets/OWNER/NAME/FOLDER for a part of it.

    Raises UserError if there is no such data set or folder, or if it can be neither fetched nor found in the cache.
    """
    owner, name, *inside = address.removeprefix(PREFIX).strip("/").split("/", 2) + [""] * 2
    repo, part = f"{owner}/{name}", inside[0]
    try:
        found = snapshot_download(repo, repo_type="dataset", allow_patterns=f"{part}/*" if part else None)
    except errors.LocalEntryNotFoundError:
        raise UserError(
            f"{address}: is not in the local hub cache, and the hub cannot be reached; connect once, or give a folder"
        ) from None
    except errors.GatedRepoError:
        raise UserError(
            f"{address}: access is gated; accept its terms on huggingface.co, and run `huggingface-cli login`"
        ) from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise UserError(f"{address}: no such data set on the hub; write {PREFIX}OWNER/NAME") from None
    except OSError as error:
        raise UserError(
            f"{address}: could not be fetched ({error}); the same command goes on where it stopped"
        ) from None
    folder = Path(found, part)
    if not folder.is_dir():
        raise UserError(f"{address}: the data set has no folder {part}")
    return folder
