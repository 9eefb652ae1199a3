"""Datasets of kaggle.com, fetched by kagglehub."""

import re

from neuroloop.core.errors import InvalidSource

_HANDLE = re.compile(r"[\w.-]+/[\w.-]+(/versions/\d+)?")


def download(handle: str) -> str:
    """Fetch the dataset `owner/name[/versions/n]` and return the folder that holds it.

    What kagglehub fetched before is not fetched again (`KAGGLEHUB_CACHE` names its folder). Connections that answer
    nothing end after seconds. Raises `InvalidSource` for a malformed or unknown handle, without a network, or where
    the dataset asks for credentials that are not there.
    """
    if not _HANDLE.fullmatch(handle):
        raise InvalidSource(
            f"kaggle://{handle} names no dataset", fix="use kaggle://owner/dataset, as in the dataset's web address"
        )
    import kagglehub
    import requests
    from kagglehub import exceptions

    login = "KAGGLE_USERNAME and KAGGLE_KEY, which kaggle.com/settings gives under API"
    try:
        return str(kagglehub.dataset_download(handle))
    except requests.HTTPError as error:  # Kaggle answered, with a refusal
        cause: Exception = error
        fix = f"check its name; a private one needs {login}"
    except (exceptions.CredentialError, exceptions.UnauthenticatedError) as error:
        cause = error
        fix = f"set {login}"
    except OSError as error:  # no network, or no room on the disk; requests' own errors are OSErrors
        cause = error
        fix = (
            "check that this machine reaches kaggle.com; or download the dataset elsewhere"
            " and set NEUROLOOP_DATA_URL to its folder"
        )
    except (exceptions.BackendError, exceptions.DataCorruptionError, exceptions.NotFoundError, ValueError) as error:
        cause = error
        fix = "check its name on kaggle.com, and try again"
    why = " ".join(str(cause).split())[:400]
    raise InvalidSource(f"the dataset kaggle://{handle} cannot be fetched", why=why, fix=fix) from cause
