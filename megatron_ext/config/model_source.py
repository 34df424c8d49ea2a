"""Where a model that is to be converted lies: in a folder, or in a repository of the Hugging Face hub. No torch, no network."""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_ext.errors import ConfigError, DataError

COMMIT = re.compile(r"[0-9a-f]{40}")
CONFIG = "config.json"
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")  # all weights in one file; or which of several files holds which
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")
TOKENIZERS = ("tokenizer.json", "*.model", "vocab.json", "vocab.txt")  # what a tokenizer can be read from


@dataclass(frozen=True)
class HubModel:
    """A repository of models on the hub; `revision` is a branch, a tag or a commit, None the default branch."""

    name: str  # owner/name
    revision: str | None

    @property
    def is_pinned(self) -> bool:
        """Whether the revision is a commit, whose content never changes."""
        return bool(self.revision and COMMIT.fullmatch(self.revision))


def read_source(name: str, revision: str | None) -> Path | HubModel:
    """What `name` stands for: a folder that exists, else `owner/name` or `owner/name@revision` of the hub. `ConfigError` if neither."""
    path = Path(name)
    if name and path.is_dir():
        if revision is not None:
            raise ConfigError(
                f"source {name}: it is a folder, which has no revision '{revision}'. Leave the revision out (revision=null; the "
                f"digests of its files are recorded); or, if the hub's model is meant, start where no folder of that name lies"
            )
        return path
    hub_name, _, at = name.partition("@")
    if not path.exists() and _is_hub_name(hub_name):
        if at and revision is not None and at != revision:
            raise ConfigError(f"source {name}: the revision beside it is '{revision}', another one; name one of them")
        return HubModel(hub_name, at or revision)
    as_hub = "a file" if path.is_file() else "no owner/name of the hub"
    raise ConfigError(f"source {name}: {no_folder(name)}, and it is {as_hub}. Name a folder with {CONFIG} and weights, or owner/name")


def _is_hub_name(name: str) -> bool:
    from huggingface_hub.errors import HFValidationError  # imported late: it takes time that other commands need not wait
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def no_folder(name: str) -> str:
    """That there is no such folder, and the nearest name that there is."""
    path = Path(name)
    beside = [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, beside, n=1)
    hint = f"; near: {path.parent / near[0]}" if near else ""
    return f"there is no folder {name} (from {Path.cwd()}{hint})"


def cached_snapshot(model: HubModel) -> Path | None:
    """The folder in the hub's local cache that holds the model at its revision, named by the commit; None without one."""
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(model.name, CONFIG, revision=model.revision)
    return Path(file).parent if isinstance(file, str) else None


def weight_files(folder: Path, allow_pickle: bool) -> dict[str, tuple[str, ...]]:
    """The files that hold a folder's weights, with the tensors that an index places in each (none without an index).

    Safetensors go before pickles. Empty where there are none; `DataError` where an index cannot be read, or leaves a single file out.
    """
    for single, index in (SAFETENSORS, PICKLES) if allow_pickle else (SAFETENSORS,):
        if (folder / index).is_file():
            placed = _weight_map(folder / index)
            if (folder / single).is_file() and single not in placed.values():
                raise DataError(f"{folder}: holds {single} and {index}, which does not name it: two sets of weights; delete one of them")
            return {file: tuple(name for name, where in placed.items() if where == file) for file in sorted(set(placed.values()))}
        if (folder / single).is_file():
            return {single: ()}
    return {}


def _weight_map(index: Path) -> dict[str, str]:
    try:
        placed = json.loads(index.read_bytes())["weight_map"]
    except (OSError, ValueError, KeyError, TypeError) as cause:
        raise DataError(f"{index}: no index of weights ({type(cause).__name__}: {cause}); fetch it again") from None
    if not isinstance(placed, dict) or not all(isinstance(file, str) and file == Path(file).name for file in placed.values()):
        raise DataError(f"{index}: its weight_map does not name a file beside it for each tensor; fetch it again")
    return placed


def absent_files(folder: Path, allow_pickle: bool) -> list[str]:
    """Names of files that a conversion needs and that the folder lacks. Raises as `weight_files` does."""
    weights = list(weight_files(folder, allow_pickle)) or [f"{SAFETENSORS[0]} (or {SAFETENSORS[1]} and what it names)"]
    tokenizer = [] if any(any(folder.glob(name)) for name in TOKENIZERS) else [f"{TOKENIZERS[0]} (or tokenizer.model)"]
    return [*(name for name in (CONFIG, *weights) if not (folder / name).is_file()), *tokenizer]
