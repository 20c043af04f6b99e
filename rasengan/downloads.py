"""Download from the Hugging Face hub, with its errors in words for the user."""

import json
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from rasengan import UserError, first_line


def from_hub(
    repository: str, what: str, patterns: list[str], cache_dir: str | None, revision: str | None = None
) -> Path:
    """Return the local folder of a hub repository, with its files of some patterns downloaded.

    Args:
        repository: a valid name of one.
        what: "unet" or "adapter", say, for messages.
        patterns: as fnmatch takes them; * fits a / too.
        cache_dir: where downloads go.
        revision: a branch, a tag or a commit.

    Raises:
        UserError: the hub does not give it, or there is no room for it.
    """
    try:
        return Path(snapshot_download(repository, revision=revision, cache_dir=cache_dir, allow_patterns=patterns))
    # What answers may be a gateway's page, or JSON of another kind.
    except (HfHubHTTPError, LocalEntryNotFoundError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise not_given(repository, f"{what} at --revision {revision}" if revision else what, error) from error
    except UnicodeEncodeError as error:  # of the request's header
        raise UserError(
            "The token of HF_TOKEN or `hf auth login` holds a letter that no token does (it is not shown here). Copy "
            "it again."
        ) from error
    except OSError as error:
        raise UserError(
            f"The {what} of {repository} cannot be downloaded: {error.strerror or first_line(error)}. Make room, or "
            "give another --cache_dir."
        ) from error


def not_given(repository: str, what: str, error: Exception) -> UserError:
    """Return the error for what the hub did not give: it has no such thing, or keeps it, or does not answer."""
    return UserError(
        f"{repository} is no path here, and the hub did not give its {what}: {first_line(error).rstrip('.')}. Correct "
        "the name, log in with `hf auth login` if it is private, or give a local path."
    )
