"""Weights of the Hugging Face hub, downloaded only for sources of the form `hub:ORG/NAME`."""

import re
from pathlib import Path

from sfv_jax.weights.components import COMPONENTS
from sfv_jax.weights.diffusers import find_weights
from sfv_jax.weights.folders import SUMS, WeightsError

PREFIX = "hub:"
SMALL = ("model_index.json", "scheduler/scheduler_config.json", "feature_extractor/preprocessor_config.json")


def download(source: str, variant: str | None = None) -> Path:
    """Downloads a repository or a file of the hub into the hub's cache.

    From a pipeline only the files of one precision that a conversion reads are downloaded.

    Args:
      source: `hub:ORG/NAME` or `hub:ORG/NAME/FILE`.
      variant: as for `diffusers.find_weights`.
    Returns:
      The local folder of the repository, or the local file.
    Raises:
      WeightsError: if the connection fails, access is not granted, or no repository or file has that name.
    """
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w./-]+))?", source)
    if not match:
        raise WeightsError(f"{source}: write hub:ORG/NAME or hub:ORG/NAME/FILE")
    repo, file = match.groups()
    import huggingface_hub
    from huggingface_hub import errors

    try:
        if file:
            return Path(huggingface_hub.hf_hub_download(repo, file))
        wanted = needed(huggingface_hub.HfApi().list_repo_files(repo), repo, variant)
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=wanted))
    except errors.GatedRepoError as error:
        page = f"https://huggingface.co/{repo}"
        raise WeightsError(f"{source} is gated: accept the license on {page}, then run: hf auth login") from error
    except (errors.RepositoryNotFoundError, errors.RemoteEntryNotFoundError) as error:
        raise WeightsError(f"{source} is not on the hub, or private and you are not logged in") from error
    except errors.HFValidationError as error:
        raise WeightsError(f"{source} is not a name of the hub: {error}") from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, *_connection_errors()) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise WeightsError(
            f"{source} cannot be downloaded ({reason}): download it elsewhere and pass the folder"
        ) from error


def _connection_errors() -> tuple[type[Exception], ...]:
    from huggingface_hub import errors

    return tuple(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def needed(files: list[str], repo: str, variant: str | None = None) -> list[str]:
    """Selects the files that a conversion reads from a pipeline or from a repository of a UNet alone.

    Args:
      files: all files of the repository.
      repo: ORG/NAME, for error messages.
      variant: as for `diffusers.find_weights`.
    Raises:
      WeightsError: if `files` form neither, or lack the variant.
    """
    if "model_index.json" not in files and "config.json" in files:
        places, small = {"": COMPONENTS["unet"].weights}, ["config.json"]
    elif "model_index.json" in files:
        places = {f"{name}/": component.weights for name, component in COMPONENTS.items()}
        small = [*SMALL, *(f"{name}config.json" for name in places)]
    else:
        raise WeightsError(f"hub:{repo} is no diffusers pipeline: name one of its files as hub:{repo}/FILE")
    weights = []
    for place, stem in places.items():
        inside = [file.removeprefix(place) for file in files if file.startswith(place)]
        found = find_weights([name for name in inside if "/" not in name], stem, variant)
        if not found:
            raise WeightsError(f"hub:{repo} has no {place}{stem}{f'.{variant}' if variant else ''}.safetensors")
        weights += [place + name for name in found]
    return [*small, *weights, *(name for name in files if name == SUMS)]
