"""The prompts of a set of problems, as tokens: what is too long is left out and counted, what cannot work is refused at the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_ext.errors import ConfigError, DataError
from megatron_ext.tasks.problems import Problem
from megatron_ext.tasks.templates import Template
from megatron_ext.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompt:
    """A problem, and the ids of what a model is shown of it."""

    problem: Problem
    tokens: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Prompts:
    """The prompts of a set in the order of its problems; `left_out` are the ids of those whose prompts are too long."""

    rows: tuple[Prompt, ...]
    left_out: tuple[str, ...]


def prompts(
    problems: Sequence[Problem], template: Template, tokenizer: Tokenizer, max_prompt_tokens: int, where: str, *, bos: bool
) -> Prompts:
    """Put each problem into the template and tokenize it; a prompt of more than `max_prompt_tokens` (BOS counted) is left out.

    `bos`: whether the tokenizer's BOS comes first, which is right where the model's training documents began with it. `where`
    is the file of the problems, for messages. `DataError` where no prompt is left, and where the tokenizer has no BOS;
    `ConfigError` where it cannot write one of the template's stop strings, so that no response would ever end there.
    """
    if bos and tokenizer.bos_id is None:
        raise DataError(f"{where}: prompts with bos=true, but the tokenizer has no beginning-of-sequence id; set bos=false")
    check_stop_strings(tokenizer, template.stop_strings, f"template '{template.name}'")
    first = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
    encoded = tokenizer.encode_batch([template.prompt(problem.question) for problem in problems])
    rows = [Prompt(problem, (*first, *ids)) for problem, ids in zip(problems, encoded, strict=True)]
    kept = tuple(row for row in rows if len(row.tokens) <= max_prompt_tokens)
    if not kept:
        raise DataError(_none_left(rows, template, max_prompt_tokens, where))
    return Prompts(kept, tuple(row.problem.id for row in rows if len(row.tokens) > max_prompt_tokens))


def _none_left(rows: Sequence[Prompt], template: Template, max_prompt_tokens: int, where: str) -> str:
    if not rows:
        return f"{where}: no problem to make a prompt of; name a file with problems"
    shortest, longest = (pick(rows, key=lambda row: len(row.tokens)) for pick in (min, max))
    return (
        f"{where}: all {len(rows):,} prompts are longer than max_prompt_tokens={max_prompt_tokens:,} in template '{template.name}': the "
        f"shortest, '{shortest.problem.id}', has {len(shortest.tokens):,} tokens, the longest, '{longest.problem.id}', "
        f"{len(longest.tokens):,}; raise max_prompt_tokens, or use a shorter template"
    )


def check_stop_strings(tokenizer: Tokenizer, stop_strings: Sequence[str], where: str = "stop strings") -> None:
    """`ConfigError` for a stop string that no response can hold: an empty one, or one that the tokenizer does not give back."""
    for string in stop_strings:
        if not string:
            raise ConfigError(f"{where}: one is empty, and would end every response at once; leave it out")
        back = tokenizer.decode(tokenizer.encode(f"a{string}a"))  # between letters: SentencePiece drops spaces at the edges
        if string not in back:
            raise ConfigError(
                f"{where}: the tokenizer cannot produce {string!r} (between two letters it comes back as {back!r}), so that no response "
                f"would end there; use characters of the tokenizer's vocabulary, or the tokenizer of the text"
            )
