"""Repositories of the hub: a model's or a data set's files, by revision, or one line that says why not."""

import contextlib
import functools
import os

from huggingface_hub import constants, errors, snapshot_download
from huggingface_hub.utils import get_session

from configurator import UserError, explain, require
from hub.files import expand, what_lies_at


def find_model(source, revision="main", patterns=("*.json", "*.safetensors")):
    """A directory as it is; anything else is a hub id, or id@revision, whose files that fit `patterns` are fetched."""
    source = expand(source)
    if os.path.isdir(source):
        return source

    missing = f"{source!r}: no directory or file of that name"
    name, _, behind = source.partition("@")
    is_path = source.startswith(("/", ".")) or name.count("/") > 1
    if is_path or os.path.isdir(source.split("/")[0]):
        missing += f" (is that stage done? `make demo` makes out/toy); {what_lies_at(source)}"
    require(not is_path, missing)
    with explain(missing, UserError):
        return fetch(name, behind or revision, patterns)


def fetch(name, revision, patterns, kind="model"):
    """The directory of a hub repository's commit, by whose id it is called, with its files that fit `patterns`.

    Those in folders are left out: a model's are its checkpoints, or it in other formats. What the cache has of the
    revision serves if the hub is not to be reached.
    """
    trouble = None
    try:
        reach_hub()
    except Exception as error:
        trouble = error
    chosen = {"allow_patterns": list(patterns), "ignore_patterns": "*/*"}
    chosen["local_files_only"] = trouble is not None

    with explain_hub(name, revision, kind):
        try:
            return snapshot_download(name, repo_type=kind, revision=revision, **chosen)
        except errors.LocalEntryNotFoundError:
            if trouble is not None:
                raise trouble from None
            raise


@functools.cache
def reach_hub():
    """Raise what a request to the hub raises, within HF_HUB_ETAG_TIMEOUT (10 s). Its library's own waits for ever."""
    get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)


@contextlib.contextmanager
def explain_hub(name, revision, kind):
    """Turn trouble with the hub into a UserError that says which it is."""
    hub = constants.ENDPOINT
    page = f"{hub}/{name}" if kind == "model" else f"{hub}/datasets/{name}"
    none = f"{hub} has no {kind} {name}, or a private one; run `hf auth login`"
    with (
        explain(f"{hub} does not give it, and it is not in the cache", Exception),
        explain(none, errors.RepositoryNotFoundError),
        explain(f"{page} has no revision {revision!r}", errors.RevisionNotFoundError),
        explain(f"ask for access on {page}, and run `hf auth login`", errors.GatedRepoError),
    ):
        yield
