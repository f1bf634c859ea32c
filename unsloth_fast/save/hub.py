"""Repositories of the hub: created before a model is merged, so that a missing connection or token costs no time."""

from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

# Releases of huggingface_hub use different HTTP libraries; this error derives from the library's own.
_ERRORS: tuple[Any, ...] = (OSError, *HfHubHTTPError.__bases__)


def create_repository(repo_id: str, token: str | bool | None, private: bool | None, by_hand: str) -> tuple[HfApi, str]:
    """Create a repository if it does not exist.

    Args:
        repo_id: its name.
        token: for the hub.
        private: whether a new repository is private.
        by_hand: the method that writes the files to a folder, for the message.

    Returns:
        The hub, and the full name of the repository.

    Raises:
        ConnectionError: the hub cannot be reached.
    """
    api = HfApi(token=token)
    try:
        return api, api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    except (HfHubHTTPError, LocalTokenNotFoundError):  # what the hub answers, and no token
        raise
    except _ERRORS as error:
        raise ConnectionError(
            f"repo_id: got {repo_id!r}, and the hub cannot be reached ({error}); allowed: a repository that can be "
            f"reached. Or write the files with {by_hand}('folder', tokenizer) and upload them later: "
            f"hf upload {repo_id} folder"
        ) from error


def upload_folder(repository: tuple[HfApi, str], folder: str, **commit: object) -> str:
    """Upload the files of a folder; return the address of the commit."""
    api, repo_id = repository
    return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))  # type: ignore[arg-type]
