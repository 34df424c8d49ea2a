"""Our tokenizers against transformers' on an exported folder: the demo's text, and Unicode that breaks things.

Ours are checked as they train: plain text in, no special id out. transformers is asked for the same with
add_special_tokens=False; the names of special tokens inside a text it takes for those tokens unless told
split_special_tokens=True.
"""

from __future__ import annotations

import json
import unicodedata
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.config.model import Family, ModelConfig
from megatron_ext.conversion.assets import export_files, read_assets
from megatron_ext.conversion.sentencepiece_files import read_model, tokenizer_json
from megatron_ext.data import arithmetic, demo_text
from megatron_ext.data.train_tokenizer import sample_lines, train
from megatron_ext.tokenizer import Tokenizer, load_tokenizer

pytestmark = pytest.mark.slow

NUM_LINES = 10_000
MODEL = ModelConfig(
    name="toy", num_layers=1, hidden_size=8, ffn_hidden_size=16, num_attention_heads=1, num_query_groups=1, vocab_size=1536,
    max_positions=64,
)  # fmt: skip
# How Llama 3 cuts text before BPE, and its special tokens, as its tokenizer.json has them.
LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BEGIN, END, TURN = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
NAMED = (BEGIN, END, "<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", TURN, "<|python_tag|>")
SPECIAL = (*NAMED, *(f"<|reserved_special_token_{i}|>" for i in range(256 - len(NAMED))))
QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

HOSTILE = {
    "nothing": "",
    "a space": " ",
    "spaces": "   a  b ",
    "only line breaks": "\n\n\n",
    "lone combining mark": "\u0301",
    "marks without end": "a" + "\u0301\u0327" * 100,
    "composed and decomposed": "\u00e9 e\u0301 \ufb01 \u212b",
    "joined emoji": "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 \U0001f3f3\ufe0f\u200d\U0001f308 \U0001f1e9\U0001f1ea",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202b\u0645\u0631\u062d\u0628\u0627\u202c \u202e\u200f",
    "NUL": "\0a\0\0b\0",
    "controls": "".join(map(chr, range(32))) + "\x7f\x85",
    "replacement character": "\ufffd a\ufffd\ufffd",
    "byte order mark": "\ufeffa\ufeff",
    "unusual spaces": "\u00a0 \u2003\u3000\u200b\u2028\u2029",
    "beyond the first plane": "\U0001d518\U0001d52b\U0001d526 \U00020000 \U0010ffff",
    "4 KB of x": "x" * 4096,
    "4 KB of spaces": " " * 4096,
    "4 KB of line breaks": "\n" * 4096,
    "4 KB of one emoji": "\U0001f600" * 1024,
    "4 KB of digits": "7" * 4096,
    "all ends of line": "a\r\nb\rc\nd\r\r\n\n\r",
    "tabs": "\t\ta\t b\t\n\t",
    "every byte as Latin-1": bytes(range(256)).decode("latin-1"),
    "names of bytes": "<0x41><0x0A> <0xFF>",
    "surrogates as escapes": r"\ud83d\ude00 \u0000 &#xD800; %ED%A0%80",
    "scripts": "\u6f22\u5b57\u304b\u306a \u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u13a0\u13e3 \u16a0\u16b1",
}
NAMES = {
    "Llama's": f"a{END}b {TURN} {BEGIN}{SPECIAL[-1]}",
    "SentencePiece's": "a</s>b <s><unk> </s>",
    "Qwen's": "a<|endoftext|>b <|im_start|><|im_end|>",
}
SENTENCEPIECE_SPACE = {"SentencePiece's space": "\u2581", "inside of a word": "a\u2581b \u2581\u2581"}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """Lines of all kinds of the demo's text, whole and in its order, half of it prose."""
    _, general = demo_text.prose_files()
    documents = [
        *islice(demo_text.Prose(sorted(general)[:150]).documents(), 400),
        *demo_text.worked_problems("short_cot", arithmetic.short, 800, 1),
        *demo_text.worked_problems("long_cot", arithmetic.long, 400, 1),
        *demo_text.dialogues(500, 1),
    ]
    by_kind = [document.text.split("\n") for document in documents]
    taken = list(dict.fromkeys(line for text in by_kind for line in text))
    assert len(taken) >= NUM_LINES, len(taken)
    step = len(taken) / NUM_LINES
    return [taken[int(i * step)] for i in range(NUM_LINES)]


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory, lines) -> Path:
    """The demo's tokenizer as its tokenizer stage trains it."""
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(train(sample_lines(lines), 1024))
    return folder


def byte_level(lines: list[str], pattern: str, special: tuple[str, ...], **options: Any) -> Any:
    """A BPE over bytes of text that `pattern` cuts."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(**options))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(lines, trainers.BpeTrainer(vocab_size=1280, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture(scope="module")
def qwen(tmp_path_factory, lines) -> Path:
    """A tokenizer like Qwen2.5's, for which transformers has a class of its own."""
    from tokenizers import normalizers

    folder = tmp_path_factory.mktemp("qwen")
    tokenizer = byte_level(lines, LLAMA_3.replace("{1,3}", ""), QWEN_SPECIAL)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "tokenizer_class": "Qwen2Tokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def llama_3(tmp_path_factory, lines) -> Path:
    """A tokenizer like Llama 3's, with the files that lie beside it."""
    from tokenizers import processors

    folder = tmp_path_factory.mktemp("llama_3")
    tokenizer = byte_level(lines, LLAMA_3, SPECIAL, ignore_merges=True)
    template = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), template])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": BEGIN, "eos_token": TURN, "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": True,
        "model_input_names": ["input_ids", "attention_mask"], "model_max_length": 131072, "tokenizer_class": "PreTrainedTokenizerFast",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module", params=["sentence_piece", "llama_3", "qwen"])
def pair(request, tmp_path_factory) -> tuple[Tokenizer, Any]:
    """Our tokenizer, and transformers' of the folder that it is exported to."""
    folder = request.getfixturevalue(request.param)
    family: Family = "qwen2" if request.param == "qwen" else "llama"
    theirs = exported(folder, tmp_path_factory.mktemp("exported"), family)
    assert type(theirs).__name__ == ("Qwen2Tokenizer" if family == "qwen2" else "TokenizersBackend")
    return load_tokenizer(folder), theirs


def exported(folder: Path, to: Path, family: Family = "llama") -> Any:
    """What transformers makes of a tokenizer's folder when it was exported with weights of a family."""
    from transformers import AutoTokenizer

    for name, content in export_files(read_assets(folder), replace(MODEL, family=family), "float32").items():
        (to / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(str(to), local_files_only=True)


def differing(ours: Tokenizer, theirs: Any, texts: list[str], **options: Any) -> list[str]:
    """The texts that the two encode to different ids."""
    found = theirs(texts, add_special_tokens=False, **options)["input_ids"]
    return [text for text, a, b in zip(texts, ours.encode_batch(texts), found, strict=True) if a != b]


def test_ids_and_text_of_the_demos_lines_are_equal(pair, lines):
    ours, theirs = pair
    assert len(set(lines)) == NUM_LINES
    assert differing(ours, theirs, lines) == []
    ids = ours.encode_batch(lines)
    assert [ours.decode(one) for one in ids] == theirs.batch_decode(ids) == lines


def test_whole_documents_are_equal(pair, lines):
    ours, theirs = pair
    documents = ["\n".join(lines[i : i + 100]) for i in range(0, NUM_LINES, 100)]
    assert differing(ours, theirs, documents) == []
    assert [ours.decode(one) for one in ours.encode_batch(documents)] == documents


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_text_is_equal_and_comes_back(pair, what):
    ours, theirs = pair
    text = HOSTILE[what]
    assert differing(ours, theirs, [text]) == []
    ids = ours.encode(text)
    assert ours.decode(ids) == theirs.decode(ids) == (unicodedata.normalize("NFC", text) if has_nfc(theirs) else text)


def has_nfc(theirs: Any) -> bool:
    """Qwen's tokenizers compose letters and marks before anything else."""
    return type(theirs).__name__ == "Qwen2Tokenizer"


def test_names_of_special_tokens_are_the_one_difference(pair):
    ours, theirs = pair
    known = [name for name in NAMES if any(token in NAMES[name] for token in theirs.all_special_tokens + list(theirs.get_added_vocab()))]
    texts = list(NAMES.values())
    apart = differing(ours, theirs, texts)
    assert apart == [NAMES[name] for name in known]
    assert len(apart) == 1  # each tokenizer knows its own names alone
    assert differing(ours, theirs, texts, split_special_tokens=True) == []
    assert [ours.decode(one) for one in ours.encode_batch(texts)] == texts


def test_sentence_pieces_space_is_a_space_to_both(sentence_piece, llama_3, tmp_path):
    texts = list(SENTENCEPIECE_SPACE.values())
    for number, folder in enumerate((sentence_piece, llama_3)):
        (tmp_path / str(number)).mkdir()
        ours, theirs = load_tokenizer(folder), exported(folder, tmp_path / str(number))
        assert differing(ours, theirs, texts) == []
        back = [ours.decode(one) for one in ours.encode_batch(texts)]
        assert back == theirs.batch_decode(ours.encode_batch(texts))
        assert back == ([text.replace("\u2581", " ") for text in texts] if folder == sentence_piece else texts)


def test_another_order_of_merges_is_seen(sentence_piece, lines):
    from tokenizers import Tokenizer

    values = tokenizer_json(read_model((sentence_piece / "tokenizer.model").read_bytes()))
    ours = load_tokenizer(sentence_piece)

    def apart() -> int:
        backend = Tokenizer.from_str(json.dumps(values))
        found = [encoding.ids for encoding in backend.encode_batch(lines, add_special_tokens=False)]
        return sum(a != b for a, b in zip(ours.encode_batch(lines), found, strict=True))

    assert apart() == 0
    values["model"]["merges"].reverse()
    assert apart() > NUM_LINES / 2


def test_special_tokens_chat_template_and_where_a_sequence_begins_are_the_originals(llama_3, tmp_path):
    from transformers import AutoTokenizer

    before, after = AutoTokenizer.from_pretrained(str(llama_3)), exported(llama_3, tmp_path)
    messages = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}, {"role": "user", "content": "sure?"}]
    for generate in (False, True):
        one, other = (t.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate) for t in (before, after))
        assert one == other
        assert one.count(TURN) == 3
    assert after("a b")["input_ids"] == before("a b")["input_ids"]
    assert after("a b")["input_ids"][0] == after.bos_token_id == load_tokenizer(llama_3).bos_id
    assert (after.eos_token, after.all_special_tokens, len(after)) == (before.eos_token, before.all_special_tokens, len(before))
    for token in SPECIAL:
        assert after.encode(token, add_special_tokens=False) == [after.convert_tokens_to_ids(token)]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (llama_3 / name).read_bytes()
