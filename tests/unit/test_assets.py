"""The small files that travel with weights: read, carried by every checkpoint, exported."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.checkpoint import folder as folders
from megatron_ext.checkpoint.thin import thin
from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.stages import Branch, Scratch, Weights
from megatron_ext.conversion.assets import MOST_BYTES, carried, export_files, has_tokenizer, read_assets
from megatron_ext.errors import DamagedCheckpointError, DataError
from megatron_ext.provenance import file_sha256, read_manifest, write_manifest
from megatron_ext.runs import Run, mark_done, open_run
from megatron_ext.tokenizer import TOKENIZER_FILES, load_tokenizer
from tests import ranks
from tests.small_checkpoints import write_files
from tests.small_corpus import train_run, write_corpus
from tests.training_runs import stage
from tests.unit.small_tokenizers import BEGINNING, END, TEXTS, hugging_face, sentence_piece

MODEL = ModelConfig(
    name="toy", num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=1, num_query_groups=1, vocab_size=1024,
    max_positions=64,
)  # fmt: skip
IDENTITY = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
EXACT = {**IDENTITY, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True, "split_digits": True, "user_defined_symbols": ["\n"]}
CHAT = {"eos_token": END, "bos_token": BEGINNING, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 77}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


def pieces(folder: Path, **options: Any) -> Path:
    """A folder with a tokenizer.model trained with `options`."""
    from sentencepiece import SentencePieceTrainer

    folder.mkdir(parents=True, exist_ok=True)
    SentencePieceTrainer.train(
        sentence_iterator=(line for text in TEXTS for line in text.splitlines()), model_prefix=str(folder / "tokenizer"), minloglevel=2,
        hard_vocab_limit=False, **{"vocab_size": 340, "model_type": "bpe", "byte_fallback": True, **EXACT, **options},
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


def chat(folder: Path) -> Path:
    """A Hugging Face folder with more beside its tokenizer.json than its names."""
    hugging_face(folder, names=CHAT)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "special_tokens_map.json").write_text('{"pad_token": "<|end_of_text|>"}\r\n')
    return folder


def export(source: Path, target: Path, model: ModelConfig = MODEL, **more: bytes) -> Path:
    """The folder that a tokenizer's files are exported to."""
    target.mkdir(parents=True)
    for name, content in export_files({**read_assets(source), **more}, model, "bfloat16").items():
        (target / name).write_bytes(content)
    return target


def with_files(folder: Path, files: dict[str, bytes]) -> Path:
    """A checkpoint whose manifest lists `files` beside the usual ones."""
    path = write_files(folder, 1)
    for name, content in files.items():
        (path / name).write_bytes(content)
    listed = {name: (len(content), file_sha256(path / name)) for name, content in files.items()}
    manifest = read_manifest(path)
    write_manifest(path, replace(manifest, files={**manifest.files, **listed}))
    return path


# --- read ---------------------------------------------------------------------------------------------


def test_what_travels_is_read_and_nothing_else(tmp_path):
    folder = chat(tmp_path / "blobs")
    (folder / "model.safetensors").write_bytes(b"weights")
    (folder / "config.json").write_text("{}")
    (folder / "vocab.json").mkdir()  # a folder under such a name is none
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for path in folder.iterdir():  # Hugging Face's cache is made of links
        (cache / path.name).symlink_to(path)
    assets = read_assets(cache)
    assert set(assets) == {"config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}
    assert all(content == (folder / name).read_bytes() for name, content in assets.items())


def test_a_sentencepiece_model_of_any_name_is_read(tmp_path):
    folder = sentence_piece(tmp_path)
    (folder / "tokenizer.model").rename(folder / "spm.model")
    assert list(read_assets(folder)) == ["tokenizer.model"]
    shutil.copy(folder / "spm.model", folder / "other.model")
    with pytest.raises(DataError, match=r"holds no tokenizer"):
        read_assets(folder)


def test_without_a_tokenizer_it_is_said_what_was_looked_for(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"no tokenizer: looked for tokenizer\.json, tokenizer\.model.*found config\.json; put one there"):
        read_assets(tmp_path)
    assert list(carried(tmp_path)) == ["config.json"]
    with pytest.raises(DataError, match=r"found none of the files .*its stage's corpus has one"):
        read_assets(write_files(tmp_path, 1))


def test_what_is_too_large_to_be_a_tokenizer_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    with pytest.raises(DataError, match=r"209,715,201 bytes, at most 209,715,200 are taken: tokenizer\.json 209,715,201"):
        read_assets(tmp_path)


def test_of_a_checkpoint_only_what_its_manifest_says_is_read(tmp_path):
    files = read_assets(chat(tmp_path / "tokenizer"))
    path = with_files(tmp_path / "checkpoints", files)
    (path / "config.json").write_text('{"from": "elsewhere"}')
    assert read_assets(path) == files
    (path / "tokenizer.json").write_bytes(files["tokenizer.json"][:-1] + b" ")
    with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.json: its bytes do not hash"):
        read_assets(path)
    (path / "tokenizer.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"tokenizer\.json: cannot be read: .*No such file"):
        read_assets(path)


# --- carried ------------------------------------------------------------------------------------------


class Stopped(Exception):
    """Ends a training right behind its first checkpoint."""


def _train(groups: Any, path: str, stop: bool) -> None:
    from megatron_ext.attempts import begin_attempt
    from megatron_ext.training import trainer
    from megatron_ext.training.hooks import Hook

    class Stop(Hook):
        def checkpoint(self, context: Any, saved: Any) -> None:
            if stop:
                raise Stopped

    run = open_run(Path(path))
    try:
        trainer.train(run, groups, begin_attempt(run), [Stop()])
    except Stopped:
        return
    mark_done(run, {})


def train(run: Run, stop: bool = False) -> Path:
    """Train a run, to its first checkpoint or to its end; its newest checkpoint, whole."""
    ranks.run(_train, run.stage.plan, str(run.path), stop)
    path, _ = folders.find(run.checkpoints_path, None, run.name)
    verify(path)
    return path


def child(corpus: Run, name: str, start: Any, parent: Run | None, asynchronous: bool = False) -> Run:
    made = stage(steps=2, save_every_steps=1, name=name, start=start)
    return train_run(corpus, replace(made, plan=replace(made.plan, asynchronous_saves=asynchronous)), parent)


@pytest.mark.slow
@pytest.mark.parametrize("make", [sentence_piece, chat])
def test_every_checkpoint_carries_the_tokenizer(tmp_path, make):
    tokenizer = load_tokenizer(make(tmp_path / "original"))
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 30}, tokenizer_hash=tokenizer.identity_hash)
    tokenizer.copy_to(corpus.path / "tokenizer")
    files = read_assets(tmp_path / "original")

    def check(path: Path) -> None:
        assert read_assets(path) == files
        assert load_tokenizer(path).identity_hash == read_manifest(path).tokenizer_hash == tokenizer.identity_hash

    base = child(corpus, "base", Scratch(), None)
    check(train(base, stop=True))
    shutil.rmtree(corpus.path / "tokenizer")  # from here on the checkpoints alone have it
    check(train(base))
    path = train(child(corpus, "weights", Weights(stage="base"), base))
    check(path)
    check(train(child(corpus, "branch", Branch(stage="base"), base, asynchronous=True)))
    assert thin(path).optimizer_layout == "none"
    verify(path)
    check(path)


@pytest.mark.slow
def test_where_the_parent_has_no_tokenizer_the_corpus_gives_its_own(tmp_path):
    tokenizer = load_tokenizer(sentence_piece(tmp_path / "original"))
    corpus = write_corpus(tmp_path, {"web": 60, "qa": 30}, tokenizer_hash=tokenizer.identity_hash)
    base = child(corpus, "base", Scratch(), None)
    path = train(base)
    assert not has_tokenizer(carried(path))
    tokenizer.copy_to(corpus.path / "tokenizer")
    weights = child(corpus, "weights", Weights(stage="base"), base)
    assert load_tokenizer(train(weights)).identity_hash == tokenizer.identity_hash
    load_tokenizer(hugging_face(tmp_path / "other")).copy_to(corpus.path / "tokenizer")
    with pytest.raises(AssertionError, match=r"the corpus' shards were made with .*the copy was changed"):
        train(child(corpus, "again", Scratch(), None))


# --- exported -----------------------------------------------------------------------------------------


def test_files_of_hugging_face_stay_as_they_are(tmp_path):
    source = chat(tmp_path / "source")
    config = {"model_type": "llama", "eos_token_id": [5, 7], "transformers_version": "4.45.0"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "generation_config.json").write_text('{"eos_token_id": [5, 7], "temperature": 0.6}')
    target = export(source, tmp_path / "target")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja", "generation_config.json"):
        assert (target / name).read_bytes() == (source / name).read_bytes(), name
    values = json.loads((target / "config.json").read_text())
    assert (values["eos_token_id"], values["bos_token_id"], values["transformers_version"]) == ([5, 7], 0, "4.45.0")
    assert (values["hidden_size"], values["torch_dtype"]) == (8, "bfloat16")
    assert load_tokenizer(target).identity_hash == load_tokenizer(source).identity_hash


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["tokenizer.json alone", "names without a class", "SentencePiece"])
def test_every_family_loads_the_tokenizer_that_it_was_trained_with(tmp_path, family, kind):
    from transformers import AutoTokenizer, GenerationConfig

    source = (
        pieces(tmp_path / "s") if kind == "SentencePiece" else hugging_face(tmp_path / "s", names=None if "alone" in kind else CHAT_NAMES)
    )
    target = export(source, tmp_path / "target", replace(MODEL, family=family))
    ours, theirs = load_tokenizer(source), AutoTokenizer.from_pretrained(str(target), local_files_only=True)
    assert type(theirs).__name__ == "TokenizersBackend"  # the family's own class would cut the text its own way
    texts = [*TEXTS, "a  b\n\n 1234 \u00e9\u0301 it's"]
    assert theirs(texts)["input_ids"] == ours.encode_batch(texts)
    assert theirs.batch_decode(ours.encode_batch(texts)) == texts
    assert (theirs.eos_token_id, theirs.bos_token_id) == (ours.eod_id, ours.bos_id)
    assert load_tokenizer(target).identity_hash == ours.identity_hash
    generation = GenerationConfig.from_pretrained(str(target))
    assert (generation.eos_token_id, generation.bos_token_id, generation.do_sample) == (ours.eod_id, ours.bos_id, False)


CHAT_NAMES = {"eos_token": END, "bos_token": BEGINNING}


def test_a_converted_tokenizer_is_the_model_until_one_of_the_two_is_changed(tmp_path):
    source = pieces(tmp_path / "source")
    target = export(source, tmp_path / "target")
    identity = load_tokenizer(source).identity_hash
    assert load_tokenizer(target).identity_hash == identity
    assert (target / "tokenizer.model").read_bytes() == (source / "tokenizer.model").read_bytes()
    again = export(target, tmp_path / "again")
    for path in target.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes() or path.name == "config.json"
    assert json.loads((again / "config.json").read_text()) == json.loads((target / "config.json").read_text())
    load_tokenizer(target).copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").identity_hash == identity
    text = (target / "tokenizer.json").read_text()
    (target / "tokenizer.json").write_text(text + "\n")
    assert load_tokenizer(target).identity_hash != identity
    (target / "tokenizer.json").write_text(text)
    shutil.copy(pieces(tmp_path / "other", vocab_size=330) / "tokenizer.model", target)
    assert load_tokenizer(target).identity_hash not in (identity, load_tokenizer(tmp_path / "other").identity_hash)


@pytest.mark.parametrize("config", [{"add_bos_token": True, "tokenizer_class": "LlamaTokenizer", "chat_template": TEMPLATE}, None])
def test_a_sentencepiece_model_with_a_space_first(tmp_path, config):
    """Llama 2's and Mistral's kind: no symbols of the user's, a space before the text; `config` as it lies beside them."""
    from transformers import AutoTokenizer

    source = pieces(tmp_path / "source", add_dummy_prefix=True, user_defined_symbols=[])
    if config:
        (source / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(str(export(source, tmp_path / "target")), local_files_only=True)
    ours = load_tokenizer(source)
    texts = [*TEXTS, "", " ", " a", "  a", "\na\n", "\u00e9\u0301 \U0001f600", "\u2581a"]
    ids = ours.encode_batch(texts)
    assert theirs(texts, add_special_tokens=False)["input_ids"] == ids
    assert theirs.batch_decode(ids) == [ours.decode(one) for one in ids]
    assert theirs("a")["input_ids"] == ([ours.bos_id] if config else []) + ours.encode("a")
    assert theirs.chat_template == (TEMPLATE if config else None)


KINDS = {
    "the demo's": {},
    "many symbols": {"user_defined_symbols": ["\n", "\n\n", "<sep>", "the", "th", "a b", "\u2581\u2581"], "control_symbols": ["<ctl>"]},
    "pieces of several words": {"split_by_whitespace": False, "split_digits": False, "vocab_size": 500},
    "a space first": {"add_dummy_prefix": True, "user_defined_symbols": []},
    "without bytes": {"byte_fallback": False},
}
PARTS = (
    *(
        "the",
        "quick",
        "ing",
        "count",
        "def",
        "12",
        " ",
        "  ",
        "   ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "a b",
        "e\u0301",
        "\u00e9",
        "\u6c49",
        "\U0001f469\u200d",
    ),
    *("\u2581", "\0", "<sep>", "<ctl>", "<s>", "</s>", "<unk>", "<0x41>", *"abcdefghijklmnopqrstuvwxyz0123456789+=.,"),
)


@pytest.mark.parametrize("kind", KINDS)
def test_random_text_has_the_same_ids_after_conversion(tmp_path, kind):
    from tokenizers import Tokenizer

    source = pieces(tmp_path, **KINDS[kind])
    theirs = Tokenizer.from_str(export_files(read_assets(source), MODEL, "float32")["tokenizer.json"].decode())
    theirs.encode_special_tokens = True
    ours, draw = load_tokenizer(source), random.Random(0)
    texts = ["".join(draw.choices(PARTS, k=draw.randint(0, 40))) for _ in range(2000)]
    ids = ours.encode_batch(texts)
    assert [one.ids for one in theirs.encode_batch(texts, add_special_tokens=False)] == ids
    if kind == "without bytes":  # what no piece covers has a name in the one and a sign in the other
        assert [theirs.decode(one, skip_special_tokens=False).replace("<unk>", " \u2047 ") for one in ids] == list(map(ours.decode, ids))
    else:
        assert theirs.decode_batch(ids, skip_special_tokens=False) == list(map(ours.decode, ids))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, r"its algorithm is unigram, not bpe"),
        ({"normalization_rule_name": "nmt_nfkc"}, r"it normalises text"),
        ({"remove_extra_whitespaces": True}, r"it removes spaces"),
        ({"treat_whitespace_as_suffix": True}, r"it puts spaces behind words"),
        ({"add_dummy_prefix": True}, r"has user_defined_symbols"),
        ({"model_type": "unigram", "normalization_rule_name": "nfkc"}, r"normalises text.*; its algorithm is"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        export(pieces(tmp_path / "source", **options), tmp_path / "target")


def test_a_tokenizer_with_more_ids_than_rows_is_refused(tmp_path):
    source = hugging_face(tmp_path / "source")
    size = load_tokenizer(source).vocab_size
    export(source, tmp_path / "fits", replace(MODEL, vocab_size=size))
    with pytest.raises(DataError, match=rf"ids up to {size - 1}, the embeddings of model toy have {size - 1} rows"):
        export(source, tmp_path / "target", replace(MODEL, vocab_size=size - 1))


def test_files_that_cannot_be_read_are_named(tmp_path):
    source = hugging_face(tmp_path / "source")
    for bad, message in ((b"{", r"^tokenizer\.json: not a tokenizer"), (b"\xff", r"^tokenizer\.json: not UTF-8")):
        (source / "tokenizer.json").write_bytes(bad)
        with pytest.raises(DataError, match=message):
            export_files(read_assets(source), MODEL, "float32")
    with pytest.raises(DataError, match=r"the files beside the weights: no tokenizer"):
        export_files({}, MODEL, "float32")


def test_a_copy_keeps_what_lies_beside_a_tokenizer(tmp_path):
    source = chat(tmp_path / "source")
    (source / "config.json").write_text("{}")
    load_tokenizer(source).copy_to(tmp_path / "copy")
    assert {p.name for p in (tmp_path / "copy").iterdir()} == {p.name for p in source.iterdir()} & set(TOKENIZER_FILES)
    assert all(path.read_bytes() == (source / path.name).read_bytes() for path in (tmp_path / "copy").iterdir())
