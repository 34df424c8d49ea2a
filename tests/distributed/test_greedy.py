"""Greedy text of a converted model is the text that transformers generates, for every family."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests import ranks
from tests.family_models import Case, base, convert, llama3, loaded, random_tokens, sharp_model, transformers_text
from tests.layouts import CPU

PROMPTS, PROMPT_LENGTH, NEW_TOKENS = 4, 5, 64
ROUNDING = 1e-4  # two logits that are closer may change places
MOST_TIES = 3  # of the 4 x 64 tokens of a family
LIVELY = 3.0  # times all projections: smaller layers hardly change the embedding, and a text is soon one repeated token
LEAST_DISTINCT = 10  # tokens of each text
LONG = {"max_position_embeddings": 131_072}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**LONG, "rope_parameters": llama3(32.0), "tie_word_embeddings": True},
    "mistral": {"rope_parameters": base(1e6)},
    "qwen2": {"rope_parameters": base(1e6), "rms_norm_eps": 1e-6},
    "qwen3": {"head_dim": 16, "rms_norm_eps": 1e-6},
}


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> dict[str, Case]:
    """Of each family a case whose tokens are prompts with what transformers generates behind them."""
    found = {}
    for family, config in FAMILIES.items():
        model = sharp_model(family, LIVELY, LIVELY, **config)
        prompts = random_tokens(PROMPTS, PROMPT_LENGTH, model.config.vocab_size)
        written = transformers_text(model, prompts, NEW_TOKENS)
        assert min(len(set(row.tolist())) for row in written[:, PROMPT_LENGTH:]) >= LEAST_DISTINCT
        found[family] = Case(convert(model, tmp_path_factory.mktemp(family)), written.tolist())
    return found


def disagreements(cases: dict[str, Case]) -> dict[str, list[float]]:
    """Of each case how far transformers' token is below the likeliest one, wherever Megatron would write another."""
    found: list[list[float]] = ranks.run(_disagreements, CPU, list(cases.values()))[0]
    return dict(zip(cases, found, strict=True))


def _disagreements(groups: Any, cases: list[Case]) -> list[list[float]]:
    """Write token by token, each from a full forward pass; where the two differ, go on from transformers' text."""
    from megatron_ext.model.logits import logits_BSV

    found = []
    for case in cases:
        chunks, model = loaded(groups, case)
        theirs, gaps = torch.tensor(case.tokens), []
        text = theirs[:, :PROMPT_LENGTH]
        while text.shape[1] < theirs.shape[1]:
            last = logits_BSV(chunks, text, groups, model.vocab_size)[:, -1]
            own, other = last.argmax(dim=-1), theirs[:, text.shape[1]]
            gaps += [float(row[a] - row[b]) for row, a, b in zip(last, own, other, strict=True) if a != b]
            text = torch.cat([text, other[:, None]], dim=1)
        found.append(gaps)
    return found


def test_greedy_text_is_that_of_transformers(texts):
    found = disagreements(texts)
    assert all(gap < ROUNDING for gaps in found.values() for gap in gaps), found
    assert max(len(gaps) for gaps in found.values()) <= MOST_TIES, found


def test_another_model_writes_another_text(texts):
    changes = {
        "llama": ("rope_scaling_factor", 1.0),
        "mistral": ("rope_base", 1.1e6),
        "qwen2": ("rope_base", 1.1e6),
        "qwen3": ("norm_epsilon", 1e-2),
    }
    found = disagreements({family: replace(case, change=(changes[family],)) for family, case in texts.items()})
    assert all(max(gaps, default=0.0) > 100 * ROUNDING for gaps in found.values()), found
