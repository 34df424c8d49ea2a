"""The folder of a model to convert: one on this machine as it is, or a repository of the Hugging Face hub, fetched at one commit.

Only files that a conversion reads are fetched, and never code: nothing of a repository is run. What is
fetched stays in the hub's own cache, where the next call finds it.
"""

from __future__ import annotations

import errno
import glob
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_token, snapshot_download
from huggingface_hub.errors import (
    CachedRepoTreeNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import tqdm

from megatron_ext.config.model_source import (
    COMMIT,
    CONFIG,
    PICKLES,
    SAFETENSORS,
    HubModel,
    absent_files,
    cached_snapshot,
    no_folder,
    read_source,
)
from megatron_ext.conversion.assets import ASSETS
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.progress import LINE_EVERY_SECONDS

SMALL_FILES = (*ASSETS, "*.model")  # a SentencePiece model may have any name
OTHER_COPIES = "consolidated*"  # Mistral's repositories hold all weights a second time, under names of its own
FULL = (errno.ENOSPC, errno.EDQUOT)
MOST_NAMED = 8


@dataclass(frozen=True)
class Found:
    """A folder with a model; `revision` is the commit (40 hex digits) that a hub's was fetched at, None for a folder."""

    folder: Path
    name: str
    revision: str | None


def find_source(name: str, revision: str | None, allow_pickle: bool = False, say: Callable[[str], None] = print) -> Found:
    """The folder that `name` stands for: itself, or `owner/name` (or `owner/name@revision`) of the hub, fetched if it must be.

    A repository's pickles are fetched where `allow_pickle` and it has no safetensors. With HF_HUB_OFFLINE=1 the cache
    must hold it. `ConfigError` where the name cannot be right, `DataError` where it cannot be had.
    """
    source = read_source(name, revision)
    if isinstance(source, Path):
        return Found(source, name, None)
    folder = _from_cache(source, allow_pickle, say) if constants.is_offline_mode() else _from_hub(source, allow_pickle, say)
    return Found(folder, source.name, folder.name)


def wanted_files(names: Sequence[str], allow_pickle: bool) -> list[str]:
    """Those of a repository's files that a conversion reads: at its top, configs, tokenizer and one copy of the weights."""
    top = [name for name in names if "/" not in name and not fnmatch(name, OTHER_COPIES)]
    weights = _weights(top, *SAFETENSORS) or (_weights(top, *PICKLES) if allow_pickle else [])
    return [*_matching(top, SMALL_FILES), *weights]


def _weights(top: Sequence[str], single: str, index: str) -> list[str]:
    if single in top:  # where a repository has both, transformers takes this one too
        return [single]
    stem, _, suffix = single.partition(".")
    return [index, *_matching(top, [f"{stem}*.{suffix}"])] if index in top else []


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


class _Bar(tqdm):  # type: ignore[misc]
    """The client's progress bar, drawn seldom where it goes into a log."""

    def __init__(self, *values: Any, **options: Any) -> None:
        super().__init__(*values, **({} if sys.stderr.isatty() else {"mininterval": LINE_EVERY_SECONDS}), **options)


# --- from the hub -------------------------------------------------------------------------------------


def _from_hub(model: HubModel, allow_pickle: bool, say: Callable[[str], None]) -> Path:
    _check_token()
    try:
        commit, names = _resolved(model)
    except HfHubHTTPError as answer:
        raise _refused(model, answer) from None
    except (HTTPError, OSError, ValueError) as cause:  # ValueError: some gateway's page in place of the hub's answer
        return _unreachable(model, allow_pickle, cause)
    _check_files(model, commit, names, allow_pickle)
    folder = _downloaded(model, commit, wanted_files(names, allow_pickle), say)
    try:
        _remember(model, folder)
    except OSError as cause:
        say(f"{model.name}: the cache could not note that '{_revision(model)}' is {commit} ({_words(cause)})")
    return folder


def _downloaded(model: HubModel, commit: str, wanted: Sequence[str], say: Callable[[str], None]) -> Path:
    """The cache's folder of a commit, with all the wanted files in it."""
    say(f"{model.name}: commit {commit} of the hub, into {constants.HF_HUB_CACHE}")
    try:
        patterns = [glob.escape(name) for name in wanted]
        folder = Path(snapshot_download(model.name, revision=commit, allow_patterns=patterns, tqdm_class=_Bar))
    except HfHubHTTPError as answer:
        raise _refused(model, answer) from None
    except (HTTPError, OSError, RuntimeError) as cause:  # RuntimeError: of the hub's transfer library
        raise _stopped(model, cause) from None
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:  # the client hands out what another program left there, where the hub does not list the files for it
        raise DataError(f"{model.name}: {constants.ENDPOINT} did not hand over {', '.join(missing)}. {_kept()}")
    return folder


def _resolved(model: HubModel) -> tuple[str, list[str]]:
    """The commit of a revision, and the names of its files."""
    info = HfApi().model_info(model.name, revision=model.revision)
    if not COMMIT.fullmatch(info.sha or ""):
        raise ValueError(f"'{info.sha}' for a commit")
    return str(info.sha), [one.rfilename for one in info.siblings or []]


def _check_token() -> None:
    token = get_token()
    if token and not (token.isascii() and token.isprintable()):  # the client's own message would show it
        raise ConfigError("the hub's token (HF_TOKEN, or of `hf auth login`) holds a character that no token has; set it anew")


def _check_files(model: HubModel, commit: str, names: Sequence[str], allow_pickle: bool) -> None:
    """`DataError` where a repository holds nothing that can be converted."""
    wanted = wanted_files(names, allow_pickle)
    where = f"{model.name} at {commit}"
    some = ", ".join(sorted(names)[:MOST_NAMED]) + (f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else "")
    if CONFIG not in wanted:
        raise DataError(f"{where} has no {CONFIG}, so it is no model in Hugging Face's format; it has {some or 'no files'}. Name another")
    if not _matching(wanted, (*SAFETENSORS, *PICKLES)):
        if pickles := _weights(names, *PICKLES):
            raise DataError(
                f"{where} has its weights as pickles only ({', '.join(pickles)}), which can run code when they are opened. Name a "
                f"repository with safetensors, or allow_pickle (--allow-pickle), which reads them as tensors alone"
            )
        raise DataError(
            f"{where} has neither {SAFETENSORS[0]} nor {SAFETENSORS[1]}; it has {some}. Name the repository of the original weights"
        )


def _remember(model: HubModel, folder: Path) -> None:
    """Note in the cache which commit a branch or tag stood for, now that all of it is there: offline, that is what it means."""
    if model.is_pinned:
        return
    ref = folder.parent.parent / "refs" / (model.revision or constants.DEFAULT_REVISION)
    ref.parent.mkdir(parents=True, exist_ok=True)
    aside = ref.with_name(f"{ref.name}.{os.getpid()}")
    aside.write_text(folder.name, encoding="utf-8")
    os.replace(aside, ref)


# --- from the cache -----------------------------------------------------------------------------------


def _from_cache(model: HubModel, allow_pickle: bool, say: Callable[[str], None]) -> Path:
    """With HF_HUB_OFFLINE=1: what the cache holds."""
    folder = cached_snapshot(model)
    if folder is None:
        raise DataError(f"{_at(model)}: HF_HUB_OFFLINE is set, and {constants.HF_HUB_CACHE} does not hold it. {_by_hand(model)}")
    if missing := _missing(model, folder, allow_pickle):
        raise DataError(
            f"{_at(model)}: HF_HUB_OFFLINE is set, and {folder} lacks {', '.join(missing)}. Fetch the rest with a network and without "
            f"HF_HUB_OFFLINE. {_by_hand(model)}"
        )
    say(f"{_at(model)}: offline, commit {folder.name} of the cache")
    return folder


def _missing(model: HubModel, folder: Path, allow_pickle: bool) -> list[str]:
    """Files that a cached folder lacks: of the hub's list where the cache has one, else of what no conversion can do without."""
    try:
        names = [file.path for file in get_cached_repo_tree(model.name, revision=folder.name)]
    except CachedRepoTreeNotFoundError:
        return absent_files(folder, allow_pickle)
    return [name for name in wanted_files(names, allow_pickle) if not (folder / name).is_file()]


def _unreachable(model: HubModel, allow_pickle: bool, cause: Exception) -> Path:
    """Without a connection: a pinned commit that the cache holds whole, which the hub could not change either."""
    folder = cached_snapshot(model)
    whole = folder is not None and not _missing(model, folder, allow_pickle)
    if folder and whole and model.is_pinned:
        return folder
    text = f"{_at(model)}: {constants.ENDPOINT} cannot be reached ({_words(cause)})"
    if folder and whole:
        raise DataError(
            f"{text}, so what '{_revision(model)}' stands for now is not known. The cache holds commit {folder.name}: "
            f"name it as the revision, or set HF_HUB_OFFLINE=1 to take it"
        )
    raise DataError(f"{text}. {_by_hand(model)}")


# --- in words -----------------------------------------------------------------------------------------


def _revision(model: HubModel) -> str:
    return model.revision or constants.DEFAULT_REVISION


def _at(model: HubModel) -> str:
    return f"{model.name} at {_revision(model)}"


def _by_hand(model: HubModel) -> str:
    """Which files to put where, on a machine that the hub's files must be carried to."""
    folder = f"assets/{model.name.split('/')[1]}"
    revision = f" --revision {model.revision}" if model.revision else ""
    return (
        f"({no_folder(model.name)}, so it is taken for the hub's.) "
        f"Where there is a network, run\n  hf download {model.name}{revision} --include '*.json' --include '*.safetensors' "
        f"--include 'tokenizer*' --include 'merges.txt' --include 'chat_template*' --local-dir {folder}\n"
        f"carry that folder here and name it ({folder}) instead of {model.name}, without a revision. It must hold {CONFIG}, "
        f"model.safetensors (or model.safetensors.index.json and every shard that it names), and tokenizer.json or tokenizer.model; "
        f"generation_config.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja where the repository has them"
    )


def _refused(model: HubModel, answer: HfHubHTTPError) -> DataError:
    """What an answer of the hub means. Its own text is left out: it may repeat what was sent."""
    name, page, status = model.name, f"{constants.ENDPOINT}/{model.name}", answer.response.status_code
    login = "log in with `hf auth login` or set HF_TOKEN"
    who = "the account of this token" if get_token() else "a visitor without a token"
    if isinstance(answer, GatedRepoError):
        return DataError(
            f"{name}: its owner lets in only those who accepted its licence, not {who} ({status}). Accept it at {page}, then {login} "
            f"to that of an account that did"
        )
    if isinstance(answer, RevisionNotFoundError):
        return DataError(f"{name}: it has no revision '{_revision(model)}'; {page}/commits/main lists its commits")
    if isinstance(answer, RepositoryNotFoundError) or (status == 401 and not get_token()):  # 401: it does not say whether there is one
        return DataError(
            f"{name}: {no_folder(name)}, and {constants.ENDPOINT} shows {who} no such model ({status}). "
            f"Correct the name; if the model is private, {login}"
        )
    if status in (401, 403):
        return DataError(f"{name}: {constants.ENDPOINT} refuses {who} ({status}); for one that may read it, {login}")
    return DataError(f"{name}: {constants.ENDPOINT} answered {status} {answer.response.reason_phrase}. {_kept()}")


def _stopped(model: HubModel, cause: Exception) -> DataError:
    if isinstance(cause, OSError) and cause.errno in FULL:
        return DataError(
            f"{model.name}: the disk of {constants.HF_HUB_CACHE} is full; make room, or set HF_HUB_CACHE to another. {_kept()}"
        )
    return DataError(f"{model.name}: the download stopped ({_words(cause)}). {_kept()}")


def _kept() -> str:
    return f"Files that have come whole are kept in {constants.HF_HUB_CACHE}: do the same again, and the others are fetched"


def _words(cause: BaseException) -> str:
    """The innermost cause in one line, without the token."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    token = get_token()
    return text.replace(token, "...") if token else text
