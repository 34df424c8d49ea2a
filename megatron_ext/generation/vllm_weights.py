"""What vLLM's model holds of a Hugging Face tensor: it lays some of them together, and on a CPU packs matrices for its kernels.

Shapes: K columns of a matrix, N its rows.
"""

from __future__ import annotations

import torch

from megatron_ext.config.model import ModelConfig
from megatron_ext.generation.read_back import EMBEDDING, HEAD

FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj"}


@torch.no_grad()
def held_tensor(vllm_model: torch.nn.Module, model: ModelConfig, name: str) -> torch.Tensor:
    """The part of vLLM's own weights that came from the tensor called `name`."""
    path, _, kind = name.rpartition(".")
    parent, _, last = path.rpartition(".")
    fused = FUSED.get(last)
    module = vllm_model.get_submodule(f"{parent}.{fused}" if fused else path)
    whole = _unpacked(module) if kind == "weight" and name != EMBEDDING else getattr(module, kind)
    return whole[_rows(model, name, last)]


def _rows(model: ModelConfig, name: str, last: str) -> slice:
    """Its rows in what vLLM laid together; of the vocabulary, those that are no padding."""
    queries, keys = model.num_attention_heads * model.channels_per_head, model.num_query_groups * model.channels_per_head
    ends = {
        "q_proj": (0, queries),
        "k_proj": (queries, queries + keys),
        "v_proj": (queries + keys, queries + 2 * keys),
        "gate_proj": (0, model.ffn_hidden_size),
        "up_proj": (model.ffn_hidden_size, 2 * model.ffn_hidden_size),
    }
    return slice(0, model.vocab_size) if name in (EMBEDDING, HEAD) else slice(*ends.get(last, (None,)))


def _unpacked(module: torch.nn.Module) -> torch.Tensor:
    """The weight; of one packed for a CPU, its product with the identity, which is exact: each sum has one term that is not 0."""
    product = getattr(module, "cpu_linear", None)
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    if product is None:
        return weight
    identity_KK = torch.eye(_columns(module), dtype=weight.dtype)
    product_KN: torch.Tensor = product(identity_KK, weight, None)
    return product_KN.t()


def _columns(module: torch.nn.Module) -> int:
    found = getattr(module, "input_size_per_partition", None) or module.embedding_dim  # of a linear layer, or of a head
    return int(found)  # type: ignore[arg-type]
