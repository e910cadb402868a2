"""The Hub: fetching models, creating repositories, pushing in one commit, and explaining its errors."""

import glob
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .files import CARD, INDEX, read_text

Choose = Callable[[Path, list[str]], list[str]]


def download(name: str, given: dict[str, Any], choose: Choose) -> tuple[Path, list[str]]:
    """(folder, files) of the Hub's model `name`, all of one commit; from the cache if the Hub is offline.

    `choose(folder, names)` says which of the model's file `names` to fetch, according to the folder's index.
    `given` are from_pretrained's keywords. Raises an OSError that says what to do. Files that have arrived by
    then are kept, and a folder does not count as complete until all have arrived.
    """
    from huggingface_hub import get_cached_repo_tree, resolve_revision, snapshot_download

    keys = ("token", "cache_dir", "local_files_only", "force_download")
    options = {key: given[key] for key in keys if given.get(key) is not None}
    asked = {key: value for key, value in options.items() if key != "force_download"}
    revision = given.get("revision")
    with hub_errors(explain, name, revision):
        options["revision"] = resolve_revision(name, revision=revision, **asked)
        folder = Path(snapshot_download(name, allow_patterns=[INDEX, CARD], **options))
        tree = get_cached_repo_tree(name, revision=options["revision"], cache_dir=given.get("cache_dir"))
        names = [file.path for file in tree]
    if INDEX not in names:
        raise OSError(f"{name} on the Hub is no model of diffusers' kind: it has no {INDEX}")
    files = choose(folder, names)
    with hub_errors(explain, name, revision):
        patterns = [glob.escape(file) for file in files]
        return Path(snapshot_download(name, allow_patterns=patterns, **options)), files


@contextmanager
def hub_errors(explained: Callable[..., str], *about: Any) -> Iterator[None]:
    """Turn what the Hub or the network answers into an OSError that says what to do."""
    try:
        yield
    except Exception as error:
        raise OSError(explained(error, *about)) from error


def status_of(error: Exception) -> int | None:
    """The HTTP status that the Hub answered with."""
    return getattr(getattr(error, "response", None), "status_code", None)


def explain(error: Exception, name: str, revision: str | None) -> str:
    from huggingface_hub import errors

    answers: list[tuple[type[Exception] | tuple[type[Exception], ...], str]] = [
        (errors.HFValidationError, "{name!r} is neither a folder nor a name that the Hub could have"),
        (errors.RevisionNotFoundError, "{name} on the Hub has no revision {revision!r}"),
        (errors.GatedRepoError, "{name} on the Hub is gated: ask for access on its page, then `hf auth "
         "login` or pass `token`"),
        (errors.RepositoryNotFoundError, "{name} is neither a folder here nor a model that the Hub shows "
         "you. If it is private, `hf auth login` or pass a `token` that may read it"),
        ((errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError, errors.RevisionResolutionError),
         "{name} is no folder here; as a name on the Hub it is not, or not wholly, in the cache, and the Hub "
         "is out of reach: {error}"),
    ]  # fmt: skip
    for kind, answer in answers:
        if isinstance(error, kind):
            return answer.format(name=name, revision=revision, error=error)
    if (status := status_of(error)) in (401, 403):
        again = "`hf auth login` again or pass another `token`"
        return f"The Hub refused the token for {name} ({status}): {again}"
    return (
        f"The download of {name} broke off ({type(error).__name__}: {error}). What has arrived is kept: the "
        "same call goes on from there"
    )


def explain_push(error: Exception, repo_id: str) -> str:
    from huggingface_hub.errors import HFValidationError

    if isinstance(error, HFValidationError):  # a ValueError that says what a name may be
        raise error
    reason = f"{type(error).__name__}: {error}"
    if (status := status_of(error)) in (401, 403):
        reason = f"it asks for a token that may write there ({status}): `hf auth login`, or pass `token`"
    why = "A push is one commit: all of it is there, or nothing"
    return f"Could not push to {repo_id} on the Hub: {reason}. {why}"


def create_repository(repo_id: str, private: bool | None, token: str | bool | None) -> str:
    """The full name of the repository, created if necessary; its owner defaults to the token's.

    Raises ValueError if `private` is set but the repository already exists and is public.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with hub_errors(explain_push, repo_id):
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        public = private and not api.repo_info(name).private
    if public:
        raise ValueError(
            f"`private` must not be True for {name}, which is there already and public; nothing was pushed. "
            f"HfApi().update_repo_settings({name!r}, private=True) makes it private"
        )
    return name


def fetch_card(repo_id: str, token: str | bool | None) -> str | None:
    """A repository's README.md, or None if it has none."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    with hub_errors(explain_push, repo_id), tempfile.TemporaryDirectory() as temporary:
        try:
            return read_text(Path(hf_hub_download(repo_id, CARD, token=token, local_dir=temporary)))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # the Hub did not answer
                raise
            return None


def upload(
    folder: Path, repo_id: str, token: str | bool | None, commit_message: str, stale: list[str],
    create_pr: bool = False, subfolder: str | None = None,
) -> Any:  # fmt: skip
    """Pushes the folder in one commit, which deletes files that match `stale` patterns and are not in it."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    start = f"{subfolder}/" if subfolder else ""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    added = {start + place: path for place, path in sorted(files.items()) if "/." not in "/" + place}
    api = HfApi(token=token)
    with hub_errors(explain_push, repo_id):
        there = set(api.list_repo_files(repo_id)) - set(added)
        old = [file for file in there if any(fnmatch(file, start + pattern) for pattern in stale)]
        changes = [CommitOperationAdd(*file) for file in added.items()] + [*map(CommitOperationDelete, old)]
        return api.create_commit(repo_id, changes, commit_message=commit_message, create_pr=create_pr)
