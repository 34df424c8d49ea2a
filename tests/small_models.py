"""Random tiny `transformers` models with a small tokenizer, saved as the folders that the hub holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron_ext.conversion.source import open_source
from tests.unit import small_tokenizers

VOCAB_SIZE = 300  # no multiple of anything; the tokenizer's too
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "tie_word_embeddings": False,
}  # fmt: skip


def hugging_face_folder(
    path: Path, family: str = "llama", dtype: torch.dtype = torch.float32, max_shard_size: str = "5GB", seed: int = 0, **config: Any
) -> Path:
    """Save a random model of a family (llama, mistral, qwen2, qwen3) with its tokenizer; `config` is transformers', over `SIZES`."""
    model = random_model(family, seed=seed, **config).to(dtype)
    model.save_pretrained(path, max_shard_size=max_shard_size)
    names = {"bos_token": small_tokenizers.BEGINNING, "eos_token": small_tokenizers.END, "tokenizer_class": "PreTrainedTokenizerFast"}
    small_tokenizers.hugging_face(path, VOCAB_SIZE, names=names)
    return path


def random_model(family: str = "llama", seed: int = 0, **config: Any) -> Any:
    """A `transformers` model in FP32 none of whose weights are all zeros or ones, so that a lost one shows."""
    from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    kinds = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}
    values = {**SIZES, **({"sliding_window": None} if family == "mistral" else {}), **config}
    model = AutoModelForCausalLM.from_config(kinds[family](bos_token_id=0, eos_token_id=1, **values))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            near = 1.0 if name.endswith("norm.weight") else 0.0
            weight.copy_(near + 0.1 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def change_tensor(folder: Path, name: str, how: Callable[[torch.Tensor], torch.Tensor | None], new: str | None = None) -> None:
    """Put `how(tensor)` in a tensor's place, under the name `new` if that is given; None takes it away. The index follows."""
    from safetensors.torch import load_file, save_file

    source = open_source(folder)
    path = next(path for path in source.files if name in source.names_in(path))
    held = {key: tensor.clone() for key, tensor in load_file(path).items()}
    changed = how(held[name])
    if new is None or changed is None:
        held.pop(name)
    if changed is not None:
        held[new or name] = changed
    save_file(held, path, {"format": "pt"})
    if (index := folder / "model.safetensors.index.json").is_file():
        placed = {key: file for key, file in json.loads(index.read_text())["weight_map"].items() if file != path.name}
        index.write_text(json.dumps({"weight_map": placed | dict.fromkeys(held, path.name)}))
