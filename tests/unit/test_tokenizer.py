"""Tokenizers: ids against the libraries themselves, special tokens, identity, copies, what is refused."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_ext.errors import DataError
from megatron_ext.tokenizer import load_tokenizer, tokenizer_of_files
from tests.unit.small_tokenizers import BEGINNING, END, TEXTS, hugging_face, sentence_piece


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("tokenizers")
    return {"hugging_face": hugging_face(root / "hf"), "sentence_piece": sentence_piece(root / "sp")}


@pytest.fixture(params=["hugging_face", "sentence_piece"])
def folder(request, folders):
    return folders[request.param]


def test_hugging_face_ids_equal_the_librarys(folders):
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folders["hugging_face"] / "tokenizer.json"))
    ours = load_tokenizer(folders["hugging_face"])
    assert ours.encode_batch(TEXTS) == [theirs.encode(text, add_special_tokens=False) for text in TEXTS]
    assert ours.vocab_size == len(theirs) == max(theirs.get_vocab().values()) + 1
    assert (ours.bos_id, ours.eod_id) == (theirs.convert_tokens_to_ids(BEGINNING), theirs.convert_tokens_to_ids(END))


def test_sentence_piece_ids_equal_the_librarys(folders):
    from sentencepiece import SentencePieceProcessor

    theirs = SentencePieceProcessor(model_file=str(folders["sentence_piece"] / "tokenizer.model"))
    ours = load_tokenizer(folders["sentence_piece"])
    assert ours.encode_batch(TEXTS) == [theirs.encode(text) for text in TEXTS]
    assert (ours.vocab_size, ours.bos_id, ours.eod_id) == (theirs.vocab_size(), 1, 2)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.lists(st.sampled_from([END, BEGINNING, "</s>", "<s>", "a", " ", "7", "é", "\n", "the"]), max_size=12).map("".join))
def test_no_special_id_ever_comes_from_text(folders, text):
    for folder in folders.values():
        tokenizer = load_tokenizer(folder)
        ids = tokenizer.encode(text)
        assert not {tokenizer.eod_id, tokenizer.bos_id} & set(ids)
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_special_names_in_text_survive_a_round_trip(folders):
    tokenizer = load_tokenizer(folders["hugging_face"])
    text = f"before {END} after {BEGINNING}"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode([tokenizer.eod_id]) == END


def test_a_token_that_the_file_does_not_mark_special_stays_text_too(tmp_path):
    folder = hugging_face(tmp_path / "hf")
    values = json.loads((folder / "tokenizer.json").read_text())
    for token in values["added_tokens"]:
        token["special"] = False
    (folder / "tokenizer.json").write_text(json.dumps(values))
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eod_id not in tokenizer.encode(f"a{END}b")


def test_truncation_and_padding_of_the_file_are_ignored(tmp_path):
    from tokenizers import Tokenizer

    folder = hugging_face(tmp_path / "hf")
    plain = load_tokenizer(folder)
    limited = Tokenizer.from_file(str(folder / "tokenizer.json"))
    limited.enable_truncation(4)
    limited.enable_padding(length=64)
    limited.save(str(folder / "tokenizer.json"))
    assert load_tokenizer(folder).encode_batch(TEXTS) == plain.encode_batch(TEXTS)
    assert load_tokenizer(folder).identity_hash == plain.identity_hash


def test_a_copy_is_the_same_tokenizer(folder, tmp_path):
    original = load_tokenizer(folder)
    original.copy_to(tmp_path / "copy")
    original.copy_to(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    assert copy.identity_hash == original.identity_hash
    assert (copy.vocab_size, copy.eod_id, copy.bos_id) == (original.vocab_size, original.eod_id, original.bos_id)
    assert copy.encode_batch(TEXTS) == original.encode_batch(TEXTS)
    copy.copy_to(tmp_path / "copy")  # onto itself
    assert load_tokenizer(tmp_path / "copy").identity_hash == original.identity_hash


def test_a_file_can_be_named_instead_of_its_folder(folders):
    model = folders["sentence_piece"] / "tokenizer.model"
    assert load_tokenizer(model).identity_hash == load_tokenizer(model.parent).identity_hash
    model = folders["hugging_face"] / "tokenizer.json"
    assert load_tokenizer(model).identity_hash == load_tokenizer(model.parent).identity_hash


def test_identity_changes_with_one_merge_and_with_the_end_token(tmp_path):
    special = (BEGINNING, "<a>", "<b>")
    hashes = {
        load_tokenizer(hugging_face(tmp_path / "1", special=special, names={"eos_token": "<a>"})).identity_hash,
        load_tokenizer(hugging_face(tmp_path / "2", special=special, names={"eos_token": "<b>"})).identity_hash,
        load_tokenizer(hugging_face(tmp_path / "3", 300, special, names={"eos_token": "<a>"})).identity_hash,
    }
    assert len(hashes) == 3
    again = load_tokenizer(hugging_face(tmp_path / "4", special=special, names={"eos_token": {"content": "<a>"}, "bos_token": None}))
    assert again.identity_hash in hashes


@pytest.mark.parametrize(
    ("special", "names", "eod", "bos"),
    [
        ((BEGINNING, END, "<|eot_id|>"), {"eos_token": "<|eot_id|>", "bos_token": BEGINNING}, END, BEGINNING),  # a Llama 3 chat model
        (("<|endoftext|>", "<|im_end|>"), {"eos_token": "<|im_end|>", "bos_token": None}, "<|endoftext|>", None),  # a Qwen chat model
        (("<s>", "</s>"), None, "</s>", "<s>"),
        (("<s>", "<stop>"), {"eos_token": "<stop>"}, "<stop>", None),
    ],
)
def test_which_tokens_begin_and_end_documents(tmp_path, special, names, eod, bos):
    tokenizer = load_tokenizer(hugging_face(tmp_path / "hf", special=special, names=names))
    assert tokenizer.eod_id == special.index(eod)
    assert tokenizer.bos_id == (None if bos is None else special.index(bos))


@pytest.mark.slow
def test_an_older_folder_goes_through_transformers(tmp_path, folders):
    values = json.loads((folders["hugging_face"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(values["vocab"]))
    merges = [" ".join(pair) for pair in values["merges"]]
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": END, "bos_token": BEGINNING, "unk_token": END}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode_batch(TEXTS) == load_tokenizer(folders["hugging_face"]).encode_batch(TEXTS)
    assert tokenizer.eod_id == values["vocab"][END]
    tokenizer.copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").identity_hash == tokenizer.identity_hash
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.slow
def test_a_copy_says_what_only_transformers_knew(tmp_path, folders):
    values = json.loads((folders["hugging_face"] / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps({token.replace(END, "<|endoftext|>"): i for token, i in values["vocab"].items()}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in values["merges"]) + "\n")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ 1 }}"}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.bos_id == tokenizer.eod_id == values["vocab"][END]  # GPT-2's, which no file names
    tokenizer.copy_to(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").identity_hash == tokenizer.identity_hash
    config = json.loads((tmp_path / "copy" / "tokenizer_config.json").read_text())
    assert (config["bos_token"], config["chat_template"]) == ("<|endoftext|>", "{{ 1 }}")


def test_a_copy_of_a_sentencepiece_model_leaves_another_tokenizer_behind(tmp_path, folders):
    for folder in folders.values():
        for path in folder.iterdir():
            shutil.copy(path, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    named = load_tokenizer(tmp_path / "tokenizer.model")
    assert named.identity_hash != load_tokenizer(tmp_path).identity_hash  # of a folder with both it is tokenizer.json
    named.copy_to(tmp_path / "copy")
    assert {path.name for path in (tmp_path / "copy").iterdir()} == {"tokenizer.model", "tokenizer_config.json"}
    assert load_tokenizer(tmp_path / "copy").identity_hash == named.identity_hash


def test_files_in_memory_are_a_tokenizer_too(folder):
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert tokenizer_of_files(files).identity_hash == load_tokenizer(folder).identity_hash
    with pytest.raises(DataError, match=r"^the files beside the weights: no tokenizer in this folder: looked for .* found readme\.txt$"):
        tokenizer_of_files({"readme.txt": b""})
    with pytest.raises(DataError, match=r"^tokenizer_config\.json: holds no JSON object"):
        tokenizer_of_files({**files, "tokenizer.json": b"{}", "tokenizer_config.json": b"[]"})


def test_refusals_name_the_file_and_the_way_out(tmp_path):
    with pytest.raises(DataError, match=r"none: no such file or folder; .*tokenizer\.json, tokenizer\.model"):
        load_tokenizer(tmp_path / "none")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(DataError, match=r"no tokenizer in this folder: looked for tokenizer\.json.*found readme\.txt"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\n")
    with pytest.raises(DataError, match=r"not a SentencePiece model.*Llama 3"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(DataError, match=r"tokenizer\.json: not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match=r"tokenizer\.json: not UTF-8"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"no end-of-document token.*tokenizer_config\.json beside it, as {\"eos_token\""):
        load_tokenizer(hugging_face(tmp_path / "hf", special=("<x>",)))
    with pytest.raises(DataError, match=r"no end-of-sentence piece"):
        load_tokenizer(sentence_piece(tmp_path / "sp", eos_id=-1))


def test_two_models_in_one_folder_are_refused(tmp_path, folders):
    for name in ("a.model", "b.model"):
        shutil.copy(folders["sentence_piece"] / "tokenizer.model", tmp_path / name)
    with pytest.raises(DataError, match=r"2 \.model files: name one of them"):
        load_tokenizer(tmp_path)
    assert load_tokenizer(tmp_path / "a.model").eod_id == 2


def test_loading_needs_no_torch(folder):
    code = "import sys; sys.modules['torch'] = None; from pathlib import Path; from megatron_ext.tokenizer import load_tokenizer; "
    result = subprocess.run(
        [sys.executable, "-c", code + f"print(load_tokenizer(Path({str(folder)!r})).encode('the fox'))"], capture_output=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == load_tokenizer(folder).encode("the fox")


def test_errors_cross_processes():
    error = pickle.loads(pickle.dumps(DataError("message")))
    assert isinstance(error, DataError)
    assert str(error) == "message"
