"""Uploads an export to a hub repository: only when asked, private at first, with the token of the hub's own login."""

from pathlib import Path

from huggingface_hub import HfApi, errors

from studio.core.errors import JobFailed
from studio.core.text import plain

_LOGIN = "log in with: hf auth login (or set HF_TOKEN) and push again; the export itself is whole"


def push_folder(out: Path, repository: str) -> str:
    """Upload a folder, or one file, and return the repository's address.

    A new repository is private: making it public is a decision of its own, taken on the hub.

    Raises:
        JobFailed: There is no token, the hub refuses, or it cannot be reached. The message holds no token.
    """
    hub = HfApi()
    message = "Upload an export of lora-studio"
    try:
        made = hub.create_repo(repository, private=True, exist_ok=True)
        if out.is_dir():
            hub.upload_folder(repo_id=made.repo_id, folder_path=out, commit_message=message)
        else:
            hub.upload_file(repo_id=made.repo_id, path_or_fileobj=out, path_in_repo=out.name, commit_message=message)
    except errors.LocalTokenNotFoundError:
        raise JobFailed("push_refused", "no token of the hub is known on this computer", _LOGIN) from None
    except errors.HFValidationError as error:
        why = plain(str(error), one_line=True, limit=200)
        raise JobFailed("push_refused", why, "name the repository as OWNER/NAME") from None
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        raise JobFailed("push_refused", f"the hub refused the upload (HTTP {status})", _LOGIN) from None
    except Exception as error:  # noqa: BLE001  the transport (requests, httpx, httpx2) differs between versions
        why = type(error).__name__  # its words may hold headers, and these the token
        raise JobFailed(
            "push_failed", f"the upload did not succeed ({why})", "try again later; the export itself is whole"
        ) from None
    return str(made)
