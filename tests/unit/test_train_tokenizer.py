"""The demo's tokenizer: exact both ways, deterministic, digits one by one."""

import io
import json
import random
import re

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_ext import runs
from megatron_ext.config.stages import TextStage, TokenizerStage
from megatron_ext.data import arithmetic, train_tokenizer
from megatron_ext.data.train_tokenizer import read_texts, run_tokenizer, sample_lines, train
from megatron_ext.errors import DataError, RunError
from megatron_ext.tokenizer import load_tokenizer

VOCAB = 420
HARD_TEXTS = (
    "", "\n", "\n\n  x\n", " leading", "trailing ", "a  b", "\ttab\r\n", "½ ﬁ é e\u0301", "中文 😀", "\x00\x7f", "a\u2028b\u00a0c",
    "</s><s><unk>", "<0x0A>", "12+35=47", "User: x\nAssistant: \\boxed{7}.",
)  # fmt: skip


def problem_texts(count=250):
    rng = random.Random(5)
    problems = [arithmetic.training_problem(rng) for _ in range(count)]
    return {
        "short_cot": [arithmetic.short(p) for p in problems],
        "long_cot": [arithmetic.long(p) for p in problems],
        "instruction": [arithmetic.instruction(p) for p in problems],
    }


def text_run(folder, sources, done=True):
    stage = TextStage(
        name="text", math_prose_bytes=1, general_prose_bytes=1, short_problems=1, long_problems=1, instruction_problems=1,
        rl_problems=1, evaluation_problems=1, seed=1,
    )  # fmt: skip
    run = runs.write_run(folder / "text", "g", stage, {})
    (run.path / "text").mkdir()
    for source, texts in sources.items():
        lines = [json.dumps({"id": f"{source}/{i}", "text": text}) + "\n" for i, text in enumerate(texts)]
        (run.path / "text" / f"{source}.jsonl").write_text("".join(lines), encoding="utf-8")
    if done:
        runs.mark_done(run, {})
    return run


def tokenizer_run(folder, parent, name="tokenizer", vocab_size=VOCAB):
    return runs.write_run(folder / name, "g", TokenizerStage(name=name, text="text", vocab_size=vocab_size), {"text": parent.path})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    run_tokenizer(tokenizer_run(folder, text_run(folder, problem_texts())))
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder / "tokenizer" / "tokenizer")


@pytest.fixture(scope="module")
def pieces(folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/tokenizer/tokenizer.model"))
    return [processor.id_to_piece(i) for i in range(processor.vocab_size())]


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_hard_texts_come_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.characters(blacklist_categories=["Cs"], blacklist_characters="\u2581")))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < VOCAB for i in ids)


def test_a_tokenizer_that_normalises_would_be_found():
    model = io.BytesIO()
    lines = [line for text in problem_texts(100)["long_cot"] for line in text.split("\n")]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=VOCAB, byte_fallback=True, minloglevel=2
    )
    loose = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    assert [text for text in HARD_TEXTS if loose.decode(loose.encode(text)) != text]


def test_special_ids(tokenizer, pieces):
    assert tokenizer.vocab_size == VOCAB == len(pieces)
    assert pieces[:4] == ["<unk>", "<s>", "</s>", "\n"]
    assert (tokenizer.bos_id, tokenizer.eod_id) == (1, 2)
    assert not {1, 2} & set(tokenizer.encode("<s>end</s>"))
    assert tokenizer.encode("a\n\nb").count(3) == 2


def test_digits_stand_alone(tokenizer, pieces):
    assert not [piece for piece in pieces if re.search(r"\d", piece) and len(piece) > 1 and not piece.startswith("<0x")]
    assert len(tokenizer.encode("12+35=47")) == 8
    assert len(tokenizer.encode("The answer is")) < 6  # while words do grow together


def test_turn_markers_are_ordinary_text(folder):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer/tokenizer/tokenizer.model"))
    assert [p for p in processor.encode("User: Assistant: \\boxed{", out_type=str) if p in ("User:", "Assistant:", "\\boxed{")] == []


def test_two_trainings_give_the_same_bytes(folder):
    run = tokenizer_run(folder, runs.open_run(folder / "text"), "again")
    run_tokenizer(run)
    first, second = ((folder / name / "tokenizer" / "tokenizer.model").read_bytes() for name in ("tokenizer", "again"))
    assert first == second
    other = train(iter([line.swapcase() for line in sample_lines(problem_texts()["long_cot"])]), 330)
    assert other != first


def test_the_mark_and_the_provenance(folder):
    run = runs.open_run(folder / "tokenizer")
    done = runs.read_done(run)
    assert done["vocab_size"] == VOCAB
    assert done["characters_per_token"].keys() == {"short_cot", "long_cot", "instruction"}
    assert all(1.2 < rate < 4 for rate in done["characters_per_token"].values())
    found = json.loads((run.path / "provenance.json").read_text())
    assert found["tokenizer"] == train_tokenizer.file_sha256(run.path / "tokenizer" / "tokenizer.model")
    assert found["text"].keys() == {"short_cot.jsonl", "long_cot.jsonl", "instruction.jsonl"}
    assert sorted(p.name for p in (run.path / "tokenizer").iterdir()) == ["tokenizer.model"]


@pytest.mark.parametrize(("vocab_size", "reason"), [(100_000, r"too high .*value <= \d+"), (200, "smaller than required")])
def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path, vocab_size, reason):
    run = tokenizer_run(tmp_path, text_run(tmp_path, problem_texts(20)), vocab_size=vocab_size)
    with pytest.raises(DataError, match=rf"vocab_size={vocab_size:,} does not fit the text: .*{reason}.*choose vocab_size between"):
        run_tokenizer(run)
    assert not run.is_done()


def test_an_unfinished_text_run_is_refused(tmp_path):
    run = tokenizer_run(tmp_path, text_run(tmp_path, problem_texts(5), done=False))
    with pytest.raises(RunError, match="stage 'text' is not finished"):
        run_tokenizer(run)


def test_a_text_run_without_documents_is_refused(tmp_path):
    run = tokenizer_run(tmp_path, text_run(tmp_path, {"short_cot": []}))
    with pytest.raises(DataError, match="no documents"):
        run_tokenizer(run)


@pytest.mark.parametrize("line", ["no json", "[1]", '{"id": 3, "text": "x"}', '{"text": "x"}'])
def test_a_bad_line_is_named(tmp_path, line):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": "1", "text": "x"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: not a JSON object with 'id' and 'text'"):
        read_texts(path)


def test_the_sample_is_bounded_and_spread(tmp_path):
    assert list(sample_lines(["ab\n\ncd", "efgh", "ij"], 7)) == ["ab", "cd", "efg"]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"id": str(i), "text": str(i)}) + "\n" for i in range(50)))
    assert sorted(read_texts(path), key=int) == [str(i) for i in range(50)]
    assert read_texts(path) != [str(i) for i in range(50)]
