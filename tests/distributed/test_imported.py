"""A converted model loads like any checkpoint: exactly, under any layout, and into FP32 from narrower numbers too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_ext.checkpoint.verify import verify
from megatron_ext.config.base import from_json
from megatron_ext.config.model import ModelConfig
from megatron_ext.conversion.source import open_source
from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.model.weights import table
from tests import ranks
from tests.layouts import LAYOUTS, parts, toy_stage, whole
from tests.small_models import hugging_face_folder

FOUR = LAYOUTS["tensor 2 x pipeline 2"]


def weights(groups: Any, stage: Any, checkpoints: list[Path]) -> list[Any]:
    """A rank's weights after loading each checkpoint into a model that was made from another seed."""
    from megatron_ext.checkpoint.load import load_state
    from megatron_ext.training.state import build_state, load_model, sharded_model

    found = []
    for path in checkpoints:
        state = build_state(stage, groups, 1)
        load_model(state, load_state(sharded_model(state), path))
        found.append(parts(sharded_model(state)))
    return found


def expected(folder: Path, model: ModelConfig) -> dict[str, np.ndarray]:
    """The Megatron tensors of a Hugging Face folder, in FP32."""
    source, tensors = open_source(folder), {}
    for row in table(model):
        tensor = torch.cat(row.to_megatron([source.read(name).float() for name in row.names])).numpy()
        if row.layer is None:
            tensors[row.key] = tensor
        else:
            tensors.setdefault(row.key, np.empty((model.num_layers, *row.shape), np.float32))[row.layer] = tensor
    return tensors


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Folders of one model as FP32, BF16 and mixed numbers, and the checkpoints made of them."""
    folder = tmp_path_factory.mktemp("imported")
    made = {name: hugging_face_folder(folder / name, "qwen2", dtype, "60KB") for name, dtype in NUMBERS.items()}
    mix(made["mixed"])
    return [(source, hf_to_megatron(str(source), folder / f"{name} checkpoint")) for name, source in made.items()]


NUMBERS = {"fp32": torch.float32, "bf16": torch.bfloat16, "mixed": torch.bfloat16}


def mix(folder: Path) -> None:
    """Give the tensors of one file other numbers than those of the others."""
    from safetensors.torch import load_file, save_file

    path = sorted(folder.glob("*.safetensors"))[0]
    save_file({name: tensor.float() + 1e-5 for name, tensor in load_file(path).items()}, path, {"format": "pt"})


@pytest.mark.parametrize("plan", [replace(LAYOUTS["one rank"], micro_batch=4), FOUR], ids=["one rank", "tensor 2 x pipeline 2"])
def test_every_number_arrives(converted, plan):
    checkpoints = [checkpoint for _, checkpoint in converted]
    model = from_json(ModelConfig, verify(checkpoints[0]).model)
    loaded = [whole(list(pieces)) for pieces in zip(*ranks.run(weights, plan, toy_stage(plan, model=model), checkpoints), strict=True)]
    wanted = [expected(source, model) for source, _ in converted]
    assert [same(one, found) for one in wanted for found in loaded] == [True, False, False, False, True, False, False, False, True]
    assert len({array.dtype for array in loaded[1].values()}) == 1


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)
