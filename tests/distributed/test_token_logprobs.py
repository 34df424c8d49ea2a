"""Log-probabilities of chosen tokens: those of full logits, with their gradients, under every split of the head."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_ext.config.plan import TrainPlan
from tests import ranks

CPU = TrainPlan(device="cpu")
TWO = replace(CPU, ranks_per_node=2, tensor=2)
PLANS = {"one rank": CPU, "tensor 2": TWO, "sequence parallel": replace(TWO, sequence_parallel=True)}
S, R, H, PADDED, TEMPERATURE = 6, 3, 5, 16, 0.7
POSITIONS = torch.tensor([4, 0, 17, 9, 9, 13, 1])  # in no order, one of them twice
SIZES = {"padded": 11, "whole ranks of padding": 7, "no padding": 16}  # of the real vocabulary


def whole(vocab_size: int) -> tuple[torch.Tensor, ...]:
    """Hidden states, output matrix, targets and what comes back to the two results: FP64."""
    torch.manual_seed(3)
    hidden, weight, back = torch.randn(S, R, H).double() * 3, torch.randn(PADDED, H).double(), torch.randn(2, len(POSITIONS)).double()
    return hidden, weight, torch.randint(vocab_size, POSITIONS.shape), back


def plain(hidden, weight, vocab_size) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = (hidden.flatten(0, 1)[POSITIONS] @ weight[:vocab_size].t() / TEMPERATURE).log_softmax(-1)
    entropies = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, whole(vocab_size)[2][:, None]).squeeze(1), entropies


def compare(groups: Any, chunk_tokens: int, fault: str = "") -> dict[str, float]:
    """The largest differences from full logits, of values and of this rank's gradients, over all vocabularies."""
    from megatron_ext.model.token_logprobs import token_logprobs

    differences: dict[str, float] = {}
    plan, rank = groups.plan, groups.tensor_rank
    for vocab_size in SIZES.values():
        hidden, weight, targets, back = whole(vocab_size)
        expected_leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        expected = plain(*expected_leaves, vocab_size)
        expected_gradients = torch.autograd.grad(expected, expected_leaves, list(back))
        rows = slice(rank * S // 2, (rank + 1) * S // 2) if plan.sequence_parallel else slice(None)
        own = slice(rank * PADDED // plan.tensor, (rank + 1) * PADDED // plan.tensor)
        leaves = [hidden[rows].clone().requires_grad_(), weight[own].clone().requires_grad_()]
        positions = (POSITIONS + 1) % (S * R) if fault == "position off by one" else POSITIONS
        size = PADDED if fault == "padding in the softmax" else vocab_size
        temperature = 1.0 if fault == "no temperature" else TEMPERATURE
        found = token_logprobs(
            *leaves, positions, targets, vocab_size=size, temperature=temperature, chunk_tokens=chunk_tokens, groups=groups
        )
        gradients = torch.autograd.grad(found, leaves, list(back))
        pairs = {
            "logprobs": (found[0], expected[0]),
            "entropies": (found[1], expected[1]),
            "of hidden": (gradients[0], expected_gradients[0][rows]),
            "of weight": (gradients[1], expected_gradients[1][own]),
        }
        for name, (one, other) in pairs.items():
            differences[name] = max(differences.get(name, 0.0), float((one - other).abs().max().detach()))
    return differences


@pytest.mark.parametrize("name", PLANS)
def test_values_and_gradients_are_those_of_full_logits(name):
    for found in ranks.run(compare, PLANS[name], 3):
        assert max(found.values()) < 1e-12, found


def one_rank(groups: Any) -> dict[str, Any]:
    """What needs one rank alone: other chunks, faults, finite differences, FP32, and nothing to compute."""
    from megatron_ext.model.token_logprobs import token_logprobs

    hidden, weight, targets, _ = whole(11)
    call = functools.partial(token_logprobs, vocab_size=11, temperature=TEMPERATURE, chunk_tokens=3, groups=groups)
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    exact = call(*leaves, POSITIONS, targets)
    single = call(hidden.float(), weight.float(), POSITIONS, targets)
    half = call(hidden.bfloat16(), weight.bfloat16(), POSITIONS, targets)
    nothing = call(*leaves, POSITIONS[:0], targets[:0])
    return {
        "chunks": [max(compare(groups, chunk_tokens).values()) for chunk_tokens in (1, 7, 100)],
        "faults": [compare(groups, 3, fault) for fault in ("padding in the softmax", "position off by one", "no temperature")],
        "gradcheck": torch.autograd.gradcheck(lambda h, w: call(h, w, POSITIONS, targets), leaves, eps=1e-6, atol=1e-7),
        "single": max(float((one - other).abs().max().detach()) for one, other in zip(single, exact, strict=True)),
        "dtypes": [each[0].dtype for each in (single, half)],
        "nothing": [float(each.abs().sum()) for each in torch.autograd.grad(nothing[0].sum(), leaves)],
        "entropy alone": [each.isfinite().all() for each in torch.autograd.grad(call(*leaves, POSITIONS, targets)[1].sum(), leaves)],
    }


def test_one_rank():
    found = ranks.run(one_rank, CPU)[0]
    assert max(found["chunks"]) < 1e-12
    assert all(max(differences.values()) > 0.1 for differences in found["faults"])
    assert found["gradcheck"]
    assert found["single"] < 1e-5
    assert found["dtypes"] == [torch.float32, torch.float32]  # a model in BF16 has its sums in FP32 too
    assert found["nothing"] == [0.0, 0.0]
    assert all(found["entropy alone"])


def kept(groups: Any) -> int:
    """Numbers that stay in memory from forward to backward, beyond the inputs."""
    from megatron_ext.model.token_logprobs import token_logprobs

    positions, size = torch.arange(64), 512
    hidden, weight = torch.randn(64, 1, 8, requires_grad=True), torch.randn(size, 8, requires_grad=True)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        token_logprobs(hidden, weight, positions, positions, vocab_size=size, temperature=1.0, chunk_tokens=4, groups=groups)
    return sum(saved.values()) - hidden.numel() - weight.numel()


def test_no_logits_are_kept():
    assert ranks.run(kept, CPU)[0] < 64 * 512 / 8
