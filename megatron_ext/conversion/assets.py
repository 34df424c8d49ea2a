"""The small files that travel with weights: configs and tokenizer, from a Hugging Face folder through every checkpoint and out again.

In a checkpoint they lie flat beside the tensors' files and are listed in its manifest like these. Nothing here
needs torch or transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from megatron_ext.config.base import Json
from megatron_ext.config.hugging_face import config_from_model
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.sentencepiece_files import converted
from megatron_ext.errors import DamagedCheckpointError, DataError
from megatron_ext.provenance import MANIFEST, read_manifest
from megatron_ext.tokenizer import (
    HUGGING_FACE,
    OLDER_FILES,
    SENTENCEPIECE,
    SPECIAL_FILES,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
    Tokenizer,
    tokenizer_of_files,
)

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
ASSETS = (CONFIG, GENERATION_CONFIG, *TOKENIZER_FILES)
ANY_CLASS = "PreTrainedTokenizerFast"
ANOTHER = "use another checkpoint of the run"
MOST_BYTES = 200 << 20  # of all together: the largest real tokenizers have 35 MB; what is larger is something else under such a name


def carried(folder: Path) -> dict[str, bytes]:
    """The assets that a Hugging Face folder or a checkpoint has, by name; may be none.

    Of a checkpoint only what its manifest lists, checked against its digests (`DamagedCheckpointError`).
    Links are followed: Hugging Face's own cache is made of them. `DataError` above 200 MiB in all.
    """
    listed = read_manifest(folder).files if (folder / MANIFEST).is_file() else None
    files = _there(folder) if listed is None else {name: folder / name for name in ASSETS if name in listed}
    try:
        sizes = {name: path.stat().st_size for name, path in files.items()}
        if sum(sizes.values()) > MOST_BYTES:
            found = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
            raise DataError(
                f"{folder}: configs and tokenizer have {sum(sizes.values()):,} bytes, at most {MOST_BYTES:,} are taken: {found}"
            )
        assets = {name: path.read_bytes() for name, path in files.items()}
    except OSError as error:
        kind, way_out = (DataError, "fetch it again") if listed is None else (DamagedCheckpointError, ANOTHER)
        raise kind(f"{error.filename}: cannot be read: {error.strerror}; {way_out}") from None
    for name, data in assets.items():
        if listed is not None and hashlib.sha256(data).hexdigest() != listed[name][1]:
            raise DamagedCheckpointError(f"{files[name]}: its bytes do not hash to what the manifest says; {ANOTHER}")
    return assets


def read_assets(folder: Path) -> dict[str, bytes]:
    """The assets of a Hugging Face folder or a checkpoint as `carried`; `DataError` where no tokenizer is among them."""
    assets = carried(folder)
    if not has_tokenizer(assets):
        found = ", ".join(assets) or "none of the files that travel with weights"
        is_checkpoint = (folder / MANIFEST).is_file()
        way_out = "its stage's corpus has one: the folder tokenizer/ of the tokenize stage" if is_checkpoint else "put one there"
        raise DataError(f"{folder}: holds no tokenizer: looked for {', '.join(_FORMS)}, found {found}; {way_out}")
    return assets


_FORMS = (HUGGING_FACE, SENTENCEPIECE, *OLDER_FILES)


def has_tokenizer(assets: Mapping[str, bytes]) -> bool:
    """Whether a tokenizer in any form that `load_tokenizer` takes is among them."""
    return any(name in assets for name in _FORMS)


def _there(folder: Path) -> dict[str, Path]:
    files = {name: folder / name for name in ASSETS if (folder / name).is_file()}
    models = sorted(path for path in folder.glob("*.model") if path.is_file())
    if not has_tokenizer(dict.fromkeys(files, b"")) and len(models) == 1:  # `load_tokenizer` takes it under any name
        files[SENTENCEPIECE] = models[0]
    return files


# --- out again ----------------------------------------------------------------------------------------


def export_files(assets: Mapping[str, bytes], model: ModelConfig, dtype: str) -> dict[str, bytes]:
    """What stands beside the weights of an exported folder: name -> bytes.

    Files that came from Hugging Face stay as they are, but for what the config must say of the weights. What a
    checkpoint of our own lacks is made: configs with the ids that begin and end documents, and for a bare
    SentencePiece model a tokenizer.json with the same ids. `DataError` where there is no tokenizer, where it has
    ids that the model has no rows for, or where its SentencePiece model cannot be converted exactly.
    """
    tokenizer = tokenizer_of_files(assets)
    if tokenizer.vocab_size > model.vocab_size:
        raise DataError(
            f"the tokenizer has ids up to {tokenizer.vocab_size - 1:,}, the embeddings of model {model.name} have "
            f"{model.vocab_size:,} rows: it is not this model's tokenizer, or the embeddings were not resized for it"
        )
    ids = _special_ids(tokenizer)
    config = _config(assets, model, dtype, ids)
    generation = assets.get(GENERATION_CONFIG) or _text({key: config[key] for key in ids} | {"do_sample": False})
    return {CONFIG: _text(config), GENERATION_CONFIG: generation, **_tokenizer_files(assets, tokenizer, model.family)}


def _special_ids(tokenizer: Tokenizer) -> Json:
    ids: Json = {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eod_id}
    return {key: value for key, value in ids.items() if value is not None}


def _config(assets: Mapping[str, bytes], model: ModelConfig, dtype: str, ids: Json) -> Json:
    original = json.loads(assets[CONFIG]) if CONFIG in assets else None
    config = config_from_model(model, dtype, original)
    known = original or {}
    return {**config, **{key: known.get(key, value) for key, value in ids.items()}}


def _tokenizer_files(assets: Mapping[str, bytes], tokenizer: Tokenizer, family: str) -> dict[str, bytes]:
    kept = {name: assets[name] for name in TOKENIZER_FILES if name in assets}
    values: Json = json.loads(assets.get(TOKENIZER_CONFIG, b"{}"))
    if HUGGING_FACE in assets:
        if "tokenizer_class" in values or "tokenizer_class" in json.loads(assets.get(CONFIG, b"{}")):
            return kept
        values = values if any(name in assets for name in SPECIAL_FILES) else _names(tokenizer)
    elif SENTENCEPIECE in assets:
        kept[HUGGING_FACE], values = converted(assets[SENTENCEPIECE], values)
    else:
        return kept  # an older form, which transformers turns into a tokenizer.json as it turned the original
    return {**kept, TOKENIZER_CONFIG: _text({**values, **_class(family)})}


def _names(tokenizer: Tokenizer) -> Json:
    """What a tokenizer.json without any file beside it leaves unsaid: the tokens that we take for a document's end and beginning."""
    ids = {"eos_token": tokenizer.eod_id, "bos_token": tokenizer.bos_id}
    return {key: tokenizer.decode([i]) for key, i in ids.items() if i is not None}


def _class(family: str) -> Json:
    """Have transformers take tokenizer.json as it is.

    Without a name it takes the class of the model's family, which builds another tokenizer from the vocabulary alone; for Qwen2
    even with one, as hub repositories name wrong ones, unless the tokenizer has code of its own; and that is not loaded unasked.
    """
    own_code = {"auto_map": {"AutoTokenizer": ["", ""]}} if family == "qwen2" else {}
    return {"tokenizer_class": ANY_CLASS, **own_code}


def _text(values: Json) -> bytes:
    return (json.dumps(values, indent=2, ensure_ascii=False) + "\n").encode()
