"""Fetches benchmarks and tokenizers from the Hugging Face hub, each at one commit, with its licence shown and recorded.

    python -m tools.fetch_assets                        # what there is; fetches nothing
    python -m tools.fetch_assets math500 gsm8k          # these, into assets/
    python -m tools.fetch_assets --all --into /data/assets

Beside each set lies a JSON file that says where it is from: repository, commit, licence, digests, number of problems, and the
problems that the grader cannot use. A set is read as a stage would read it before it is put in place. What is there already and
unchanged is left alone, and nothing is overwritten. Where this machine has no network, run it on one that has, and carry the folder.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, get_token, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from megatron_ext.config.model_source import COMMIT
from megatron_ext.errors import DataError, MegatronExtError
from megatron_ext.provenance import file_sha256
from megatron_ext.runs import atomic_write, read_json, write_json
from megatron_ext.tasks.problems import read_problems, unreadable
from megatron_ext.tokenizer import TOKENIZER_FILES, load_tokenizer
from tools.asset_table import ASSETS, Asset, Row


def describe(asset: Asset) -> str:
    """What would be fetched, and under which licence."""
    rows = f"{asset.rows:,} problems" if asset.rows else "problems" if asset.form else "tokenizer"
    lines = [f"{asset.name}: {rows}, to {asset.target}", f"from {asset.page} at {asset.revision}", f"licence: {asset.licence}"]
    return "\n  ".join([*lines, *([f"note: {asset.note}"] if asset.note else [])])


def fetch(asset: Asset, into: Path, say: Callable[[str], None] = print) -> None:
    """Fetch one asset into a folder, unless it is there. `DataError` where it cannot be had or is not what it should be."""
    say(describe(asset))
    target, record = into / asset.target, into / asset.record
    if record.is_file() and (known := read_json(record, "where an asset is from", DataError)) and _is_current(asset, target, known):
        say(f"  already there, unchanged: {target}, commit {known['commit']}\n")
        return
    if asset.file.endswith(".parquet"):
        _parquet_reader()  # before anything is fetched
    commit, names = _resolved(asset)
    wanted = [asset.file] if asset.form else [name for name in names if name in TOKENIZER_FILES]
    if missing := [name for name in wanted or ["tokenizer.json"] if name not in names]:
        raise DataError(f"{asset.name}: {asset.page} at {commit} has no {', '.join(missing)}; name another commit in tools/asset_table.py")
    files = {name: _downloaded(asset, commit, name) for name in wanted}
    digests = {name: file_sha256(path) for name, path in files.items()}
    _check_digest(asset, digests, files)
    into.mkdir(parents=True, exist_ok=True)
    values = _put_problems(asset, files[asset.file], target) if asset.form else _put_tokenizer(files, target)
    source = {"repository": asset.repository, "page": asset.page, "commit": commit, "licence": asset.licence, "note": asset.note}
    write_json(record, {"name": asset.name, **source, "files": digests, **values})
    for file, digest in digests.items():
        say(f"  {file}: sha256 {digest}" + ("" if asset.sha256 else " (recorded; none was known to compare with)"))
    say("  " + _summary(values, target) + "\n")


def _summary(values: Row, target: Path) -> str:
    if "rows" not in values:
        return f"tokenizer with {values['vocab_size']:,} ids, in {target}"
    lines = [f"{values['rows']:,} problems, in {target}"]
    if values["without_answer"]:
        lines.append(f"left out, for they hold no answer: {values['without_answer']}")
    if values["leave_out"]:
        lines.append(
            f"no grader can read the answers of {len(values['leave_out'])}; name them in leave_out: {', '.join(values['leave_out'])}"
        )
    return "\n  ".join(lines)


def _is_current(asset: Asset, target: Path, known: Row) -> bool:
    """Whether a recorded asset is what the table names, and as it was written. `DataError` where its files were changed."""
    paths = [target] if asset.form else [target / name for name in known["sha256"]]
    found = {path.name: file_sha256(path) if path.is_file() else None for path in paths}
    if all(found[path.name] is None for path in paths):
        return False
    if found != known["sha256"]:
        raise DataError(
            f"{target}: changed since it was fetched (its digests are not those of {asset.record}); move it away to fetch it again"
        )
    if known["repository"] != asset.repository or (COMMIT.fullmatch(asset.revision) and known["commit"] != asset.revision):
        raise DataError(f"{target}: fetched from {known['repository']} at {known['commit']}; move it away to fetch the one named above")
    return True


# --- the hub ------------------------------------------------------------------------------------------


def _resolved(asset: Asset) -> tuple[str, list[str]]:
    """The commit of the revision, and the names of its files."""
    if constants.is_offline_mode():
        raise DataError(
            f"{asset.name}: HF_HUB_OFFLINE is set; unset it where there is a network, or carry the assets here from such a machine"
        )
    try:
        ask = HfApi().dataset_info if asset.form else HfApi().model_info
        info = ask(asset.repository, revision=asset.revision)
    except HfHubHTTPError as answer:
        raise _refused(asset, answer) from None
    except (HTTPError, OSError, ValueError) as cause:  # ValueError: some gateway's page in place of the hub's answer
        raise _unreachable(asset, cause) from None
    commit = str(info.sha)
    if not COMMIT.fullmatch(commit) or (COMMIT.fullmatch(asset.revision) and commit != asset.revision):
        raise DataError(f"{asset.name}: {constants.ENDPOINT} says that '{asset.revision}' is '{commit}'; is it the hub?")
    return commit, [one.rfilename for one in info.siblings or []]


def _downloaded(asset: Asset, commit: str, name: str) -> Path:
    """A file of the repository, in the hub's cache, where an interrupted download goes on."""
    try:
        return Path(hf_hub_download(asset.repository, name, repo_type=asset.kind, revision=commit))
    except HfHubHTTPError as answer:
        raise _refused(asset, answer) from None
    except (HTTPError, OSError, RuntimeError, EntryNotFoundError) as cause:  # RuntimeError: of the hub's transfer library
        raise _unreachable(asset, cause) from None


def _refused(asset: Asset, answer: HfHubHTTPError) -> DataError:
    """What an answer of the hub means. Its own text is left out: it may repeat what was sent."""
    status = answer.response.status_code
    if isinstance(answer, GatedRepoError):
        return DataError(f"{asset.name}: gated ({status}); accept its licence at {asset.page}, and set HF_TOKEN to a token of that account")
    if isinstance(answer, RevisionNotFoundError):
        return DataError(
            f"{asset.name}: {asset.page} has no commit {asset.revision}; its history was rewritten: see {asset.page}/commits/main"
        )
    if isinstance(answer, RepositoryNotFoundError) or status in (401, 403):  # the hub does not say which of the two
        return DataError(f"{asset.name}: {asset.page} is not there any more, or not for this account ({status}); see whether it has moved")
    return DataError(f"{asset.name}: {asset.page} at {asset.revision} answered {status} {answer.response.reason_phrase}; try again later")


def _unreachable(asset: Asset, cause: BaseException) -> DataError:
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = f"{type(cause).__name__}: {' '.join(str(cause).split())}"
    text = text.replace(token, "...") if (token := get_token()) else text
    return DataError(
        f"{asset.name}: the download stopped ({text}). Run the same again: it goes on where it stopped. Without a network, run it "
        f"on a machine that has one, and carry the assets here"
    )


def _check_digest(asset: Asset, digests: dict[str, str], files: dict[str, Path]) -> None:
    if asset.sha256 and digests[asset.file] != asset.sha256:
        raise DataError(
            f"{asset.name}: {asset.file} has sha256 {digests[asset.file]}, not {asset.sha256}: not the file that is meant, or damaged on "
            f"its way; nothing was written. Delete {files[asset.file].resolve()} and run the same again"
        )


# --- writing ------------------------------------------------------------------------------------------


def _put_problems(asset: Asset, source: Path, target: Path) -> Row:
    """Write problems in our form, once they have been read as a stage reads them; what to record of them."""
    assert asset.form
    without_answer = 0
    if asset.convert:
        converted = list(_converted(asset, _rows(asset, source)))
        lines = [json.dumps(row, ensure_ascii=False) for row in converted if row is not None]
        text, without_answer = "".join(f"{line}\n" for line in lines), len(converted) - len(lines)
    else:
        text = source.read_bytes().decode()
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        tried = Path(aside) / target.name
        tried.write_text(text, encoding="utf-8")
        leave_out = unreadable(tried, asset.form)
        problems = read_problems(tried, asset.form, leave_out=frozenset(leave_out))
    rows = len(problems) + len(leave_out)
    if asset.rows and rows != asset.rows:
        raise DataError(f"{asset.name}: {rows:,} problems in {asset.file}, not {asset.rows:,}; nothing was written")
    _refuse_other(target, text.encode())
    atomic_write(target, text)
    return {
        "form": asset.form, "rows": rows, "without_answer": without_answer, "leave_out": leave_out,
        "sha256": {target.name: file_sha256(target)},
    }  # fmt: skip


def _converted(asset: Asset, rows: Iterable[Row]) -> Iterable[Row | None]:
    assert asset.convert
    for number, row in enumerate(rows):
        try:
            yield asset.convert(row, number)
        except KeyError as cause:
            raise DataError(
                f"{asset.name}: row {number} of {asset.file} has no {cause} (but {', '.join(row)}); its form has changed"
            ) from None


def _rows(asset: Asset, source: Path) -> list[Row]:
    try:
        rows: list[Row] = _parquet_reader()(source).to_pylist()
    except (OSError, ValueError) as cause:  # pyarrow's errors are of these families
        raise DataError(
            f"{asset.name}: {asset.file} is no parquet file ({cause}); delete {source.resolve()} and run the same again"
        ) from None
    return rows


def _parquet_reader() -> Callable[[Path], Any]:
    try:
        from pyarrow.parquet import read_table
    except ImportError:
        raise DataError("this set comes as a parquet file, which pyarrow reads, and it is not installed: pip install pyarrow") from None
    reader: Callable[[Path], Any] = read_table
    return reader


def _put_tokenizer(files: dict[str, Path], target: Path) -> Row:
    """Put a tokenizer's folder in place in one move, once it has been loaded; what to record of it."""
    with tempfile.TemporaryDirectory(dir=target.parent) as aside:
        folder = Path(aside) / target.name
        folder.mkdir()
        for name, path in files.items():
            shutil.copyfile(path, folder / name)
        tokenizer = load_tokenizer(folder)
        for name in files:
            _refuse_other(target / name, (folder / name).read_bytes())
        if not target.exists():
            os.rename(folder, target)
        tokenizer.copy_to(target)  # where the folder was there, it may lack some
    values = {"vocab_size": tokenizer.vocab_size, "identity_hash": tokenizer.identity_hash}
    return {**values, "sha256": {name: file_sha256(target / name) for name in files}}


def _refuse_other(path: Path, content: bytes) -> None:
    """What a killed fetch left is the same; anything else is somebody's."""
    if path.exists() and path.read_bytes() != content:
        raise DataError(f"{path}: there is another file of this name, which this tool did not write; move it away, or name another --into")


def overlap(into: Path) -> str:
    """How many problems the training set shares with MATH500; '' where one of them is not there."""
    questions: list[set[str]] = []
    for name in ("math8k", "math500"):
        asset = ASSETS[name]
        if not (into / asset.target).is_file():
            return ""
        assert asset.form
        skipped = frozenset(unreadable(into / asset.target, asset.form))
        questions.append({" ".join(one.question.split()) for one in read_problems(into / asset.target, asset.form, leave_out=skipped)})
    return f"{len(questions[0] & questions[1])} of {len(questions[1])} MATH500 problems stand word for word in math8k"


def main() -> int:
    """Parse; list, or fetch what is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"what to fetch: {', '.join(ASSETS)}")
    parser.add_argument("--all", action="store_true", help="fetch all of them")
    parser.add_argument("--list", action="store_true", help="show what there is, and fetch nothing (also without any NAME)")
    parser.add_argument("--into", type=Path, default=Path("assets"), help="the folder (default: assets)")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.names if name not in ASSETS]:
        parser.error(f"no asset is named {', '.join(unknown)}; there are {', '.join(ASSETS)}")
    names = list(ASSETS) if arguments.all or not arguments.names else arguments.names
    if arguments.list or not (arguments.all or arguments.names):
        print("\n\n".join(describe(ASSETS[name]) for name in names))
        return 0
    failed = []
    for name in names:
        try:
            fetch(ASSETS[name], arguments.into)
        except MegatronExtError as error:
            print(f"  not fetched: {error}\n", file=sys.stderr)
            failed.append(name)
    if shared := overlap(arguments.into):
        print(shared)
    if failed:
        print(f"not fetched: {', '.join(failed)}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
