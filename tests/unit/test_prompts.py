"""Prompts as tokens: what is too long is left out and named, what no response could end is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_ext.config.tasks import ProblemSet
from megatron_ext.errors import ConfigError, DataError
from megatron_ext.tasks import prompts as prompts_module
from megatron_ext.tasks.problems import Problem, stage_problems
from megatron_ext.tasks.prompts import prompts
from megatron_ext.tasks.templates import COMPLEX, PLAIN, SIMPLE
from megatron_ext.tokenizer import Tokenizer, load_tokenizer
from tests.unit.small_tokenizers import END, hugging_face, sentence_piece

PROBLEMS = [Problem(f"p{count}", " ".join(["1+1"] * count), ("2",), "some") for count in (1, 40, 2, 80)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(hugging_face(tmp_path_factory.mktemp("tokenizer")))


@pytest.mark.parametrize("bos", [False, True])
def test_prompts_are_the_templates_text_in_the_order_of_the_problems(tokenizer: Tokenizer, bos: bool) -> None:
    made = prompts(PROBLEMS, PLAIN, tokenizer, 10_000, "some.jsonl", bos=bos)
    assert [row.problem for row in made.rows] == PROBLEMS
    assert made.left_out == ()
    for row in made.rows:
        first = row.tokens[: 1 if bos else 0]
        assert first == ((tokenizer.bos_id,) if bos else ())
        assert tokenizer.decode(row.tokens[len(first) :]) == PLAIN.prompt(row.problem.question)


def test_long_prompts_are_left_out_and_named(tokenizer: Tokenizer) -> None:
    lengths = [len(row.tokens) for row in prompts(PROBLEMS, PLAIN, tokenizer, 10_000, "some.jsonl", bos=True).rows]
    limit = lengths[2]  # exactly as long as the third: that one is kept
    made = prompts(PROBLEMS, PLAIN, tokenizer, limit, "some.jsonl", bos=True)
    assert [row.problem.id for row in made.rows] == ["p1", "p2"]
    assert made.left_out == ("p40", "p80")
    assert prompts(PROBLEMS, PLAIN, tokenizer, limit - 1, "some.jsonl", bos=True).left_out == ("p40", "p2", "p80")
    assert prompts(PROBLEMS, PLAIN, tokenizer, limit - 1, "some.jsonl", bos=False).left_out == ("p40", "p80")  # BOS counts


def test_none_left_names_the_file_the_shortest_and_the_longest(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match=r"some.jsonl: all 4 prompts are longer than max_prompt_tokens=3 .*'complex'.*'p1'.*'p80'"):
        prompts(PROBLEMS, COMPLEX, tokenizer, 3, "some.jsonl", bos=False)
    with pytest.raises(DataError, match="no problem to make a prompt of"):
        prompts([], PLAIN, tokenizer, 3, "some.jsonl", bos=False)


def test_bos_needs_a_tokenizer_that_has_one(tmp_path: Path) -> None:
    without = load_tokenizer(hugging_face(tmp_path, special=(END,)))
    with pytest.raises(DataError, match=r"some.jsonl: .*no beginning-of-sequence id; set bos=false"):
        prompts(PROBLEMS, PLAIN, without, 100, "some.jsonl", bos=True)
    assert len(prompts(PROBLEMS, PLAIN, without, 1000, "some.jsonl", bos=False).rows) == 4


def without_colons(folder: Path) -> Tokenizer:
    """A tokenizer of words that turns each colon into its unknown word."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    words = {word: number for number, word in enumerate([END, "?", "1", "+", "Question", "Answer", "User"])}
    backend = Backend(models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    backend.decoder = decoders.Fuse()
    backend.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


def test_a_stop_string_that_the_tokenizer_cannot_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = without_colons(tmp_path)
    with pytest.raises(ConfigError, match=r"template 'simple': the tokenizer cannot produce 'Question:' \(.*comes back as '"):
        prompts(PROBLEMS, SIMPLE, tokenizer, 1000, "some.jsonl", bos=False)
    assert len(prompts(PROBLEMS, PLAIN, tokenizer, 1000, "some.jsonl", bos=False).rows) == 4
    monkeypatch.setattr(prompts_module, "check_stop_strings", lambda *_: None)
    prompts(PROBLEMS, SIMPLE, tokenizer, 1000, "some.jsonl", bos=False)  # nothing else would have seen it


def test_sentencepiece_writes_all_stop_strings(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentence_piece(tmp_path))
    for template in (SIMPLE, COMPLEX):
        assert len(prompts(PROBLEMS, template, tokenizer, 10_000, "some.jsonl", bos=True).rows) == 4


def test_a_stages_problems_lie_beside_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": name, "question": "1+1?", "answer": "2"} for name in "abc"]
    file = tmp_path / "text-run" / "evaluation" / "problems.jsonl"
    file.parent.mkdir(parents=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    relative = ProblemSet(name="sums", path="evaluation/problems.jsonl", form="arithmetic", leave_out=("b",))
    assert [problem.id for problem in stage_problems(relative, tmp_path / "text-run")] == ["a", "c"]
    absolute = ProblemSet(name="sums", path=str(file), form="arithmetic")
    assert len(stage_problems(absolute, tmp_path / "elsewhere")) == 3
    assert len(stage_problems(absolute, None)) == 3
    monkeypatch.chdir(tmp_path / "text-run")
    assert len(stage_problems(relative, None)) == 2
    with pytest.raises(DataError, match=r"elsewhere/evaluation/problems\.jsonl: cannot be read"):
        stage_problems(relative, tmp_path / "elsewhere")
