"""Errors of the hub's libraries as one line that says what to do. No message contains an access token."""

from __future__ import annotations

import ast
import errno
import re
from collections.abc import Iterator

from mupsweep.data.config import DataConfig
from mupsweep.errors import DataError
from mupsweep.formatting import nearest

TIMEOUT_SECONDS = 10.0  # of a request for the hub's meta data
PARQUET = "refs/convert/parquet"  # the branch in which the hub keeps data sets converted to parquet
DISK_ERRORS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR)
UNREACHABLE = ("ConnectionError", "TransportError", "TimeoutError", "LocalEntryNotFoundError", "Timeout")


def resolve_commit(config: DataConfig, revision: str) -> str:
    """The commit that a revision of `data.hub_id` names on the hub, in bounded time.

    Raises:
        DataError: the hub cannot be reached, or the data set or revision does not exist.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise DataError(f"data sets of the hub need the package datasets ({error}): pip install datasets") from error
    try:
        return str(HfApi().dataset_info(str(config.hub_id), revision=revision, timeout=TIMEOUT_SECONDS).sha)
    except Exception as error:
        raise hub_error(error, config) from error


def hub_error(error: BaseException, config: DataConfig) -> DataError:
    """The DataError for an exception of `datasets` or `huggingface_hub`."""
    text = " ".join(" ".join(str(e).split()) for e in _chain(error))
    names = {cls.__name__ for e in _chain(error) for cls in type(e).__mro__}
    return DataError(
        _access(names, text, config)
        or _contents(names, text, config)
        or _transport(names, error, config)
        or f"{config.hub_id} cannot be read: {type(error).__name__}: {_first_line(error)}"
    )


def _access(names: set[str], text: str, config: DataConfig) -> str | None:
    """The message for an error of access or of a name that does not exist; None for other errors."""
    page = f"{_endpoint()}/datasets/{config.hub_id}"
    if "OfflineModeIsEnabled" in names or "OfflineModeIsEnabled" in text:
        return (
            f"{config.hub_id} is not prepared and HF_HUB_OFFLINE is set: unset it, or prepare it on a machine with a "
            "network and point data.cache to that folder"
        )
    if "GatedRepoError" in names or "gated dataset" in text:
        return (
            f"{config.hub_id} is gated: accept its terms on {page}, then give a token (HF_TOKEN, or hf auth login) and "
            "run the same command again"
        )
    if re.search("Invalid (credentials|username or password|user token)", text):
        return "the hub refuses the token: give a valid one (HF_TOKEN, or hf auth login), or none"
    if "RevisionNotFoundError" in names:
        return f"data.revision={config.revision} is no commit of {config.hub_id}: see {page}/commits/main"
    if names & {"RepositoryNotFoundError", "DatasetNotFoundError"}:
        return (
            f"data.hub_id={config.hub_id}: no such data set on {_endpoint()}, or a private one; check the name, or "
            "give a token (HF_TOKEN, or hf auth login)"
        )
    if "HFValidationError" in names:
        return f"data.hub_id={config.hub_id}: expected ORGANISATION/NAME"
    return None


def _contents(names: set[str], text: str, config: DataConfig) -> str | None:
    """The message for an error in the contents of the data set; None for other errors."""
    if "scripts are no longer supported" in text:
        return (
            f"{config.hub_id} is a loading script at this commit, which datasets refuses since version 4: "
            f"{_converted(config)} (which may hold only a part), or another data.hub_id"
        )
    match = re.search(r"BuilderConfig .* not found\. Available: (\[.*?\])", text)
    if match:
        return f"data.hub_config={config.hub_config}: {nearest(str(config.hub_config), _items(match[1]))}"
    match = re.search(r"Config name is missing\. .*?available configs: (\[.*?\])", text)
    if match:
        return f"data.hub_config={config.hub_config}: {config.hub_id} has several; valid: {', '.join(_items(match[1]))}"
    match = re.search(r"Bad split: (.*?)\. Available splits: (\[.*?\])", text)
    if match:
        key = "validation_split" if match[1] == config.validation_split else "split"
        return f"data.{key}={match[1]}: {nearest(match[1], _items(match[2]))}"
    if names & {"DataFilesNotFoundError", "EmptyDatasetError"} or "Couldn't find any data file" in text:
        asked_for = f"data.data_files={list(config.data_files)}: " if config.data_files else ""
        return (
            f"{asked_for}{config.hub_id} has no {'such ' if asked_for else ''}file that datasets reads (parquet, json, "
            f"csv, text); see {_endpoint()}/datasets/{config.hub_id}/tree/{config.revision}"
        )
    return None


def _transport(names: set[str], error: BaseException, config: DataConfig) -> str | None:
    """The message for an error of the network, the hub's server or the local disk; None for other errors."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            where = f": {cause.filename}" if cause.filename else ""
            return (
                f"the libraries that read {config.hub_id} cannot write ({cause.strerror}{where}): set HF_HOME to a "
                "writable folder with free space"
            )
    if "HfHubHTTPError" in names:
        return f"the hub {_endpoint()} fails ({_first_line(error)}): run the same command again later, it goes on"
    if names & set(UNREACHABLE):
        return (
            f"the hub {_endpoint()} cannot be reached ({_first_line(error)}): check the network, the proxy and "
            "HF_ENDPOINT, and run the same command again: it goes on where it stopped"
        )
    return None


def _converted(config: DataConfig) -> str:
    """How to read the hub's parquet form of a data set, with its commit where the hub has one."""
    from huggingface_hub import HfApi

    try:
        commit = HfApi().dataset_info(str(config.hub_id), revision=PARQUET, timeout=TIMEOUT_SECONDS).sha
    except Exception:
        return f"set data.revision to a commit of its branch {PARQUET}"
    return f"set data.revision={commit}, its branch {PARQUET}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, then its causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _items(listed: str) -> list[str]:
    """The items of a list that was printed as Python text."""
    try:
        return [str(word) for word in ast.literal_eval(listed)]
    except (ValueError, SyntaxError):
        return [listed]


def _first_line(error: BaseException) -> str:
    """The first line of an error's text, with access tokens replaced by ***."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"hf_\w{8,}|(?<=[Bb]earer )\S+|(?<=//)[^/@\s]+@", "***", line)[:200]


def _endpoint() -> str:
    """The address of the hub, without credentials."""
    from huggingface_hub import constants

    return re.sub(r"(?<=//)[^/@\s]+@", "", constants.ENDPOINT)
