"""All that Megatron-Core needs on a machine without CUDA, here and nowhere else.

Megatron's modules call `torch.zeros(..., device="cuda")` and `torch.cuda.current_device()` all
over. Here each of them gets, in place of its `torch`, a view of torch whose factories take "cuda"
to mean the CPU and whose `cuda` answers as a CPU can. The real torch keeps its functions, but for
two methods of `Tensor` that have no other seam. Three defects of the distributed optimizer that
appear with torch's own AdamW (no apex, no Transformer Engine) are mended as well.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

CPU = torch.device("cpu")
FACTORIES = (
    "tensor",
    "zeros",
    "ones",
    "empty",
    "full",
    "rand",
    "randn",
    "randint",
    "arange",
    "zeros_like",
    "ones_like",
    "empty_like",
    "eye",
)


def _on_cpu(device: Any) -> Any:
    """The CPU for anything that means a GPU; other devices as they are."""
    if isinstance(device, torch.device):
        return CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


class _Stream:
    """A stream that has nothing to wait for."""

    def wait_stream(self, stream: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


class _NoRanges(ModuleType):
    """`torch.cuda.nvtx` without a profiler."""

    def range_push(self, message: str) -> None:
        """Open no range."""

    def range_pop(self) -> None:
        """Close no range."""


class _CpuCuda(ModuleType):
    """What `torch.cuda` answers to Megatron's modules on a CPU."""

    FloatTensor, HalfTensor, BFloat16Tensor = torch.FloatTensor, torch.HalfTensor, torch.BFloat16Tensor
    IntTensor, LongTensor, DoubleTensor = torch.IntTensor, torch.LongTensor, torch.DoubleTensor
    nvtx = _NoRanges("nvtx")

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    def current_device(self) -> torch.device:
        """The CPU, which every factory takes for its `device`."""
        return CPU

    def current_stream(self, device: Any = None) -> _Stream:  # noqa: ARG002
        """A stream that is always ready."""
        return _Stream()

    def synchronize(self, device: Any = None) -> None:
        """Nothing runs ahead on a CPU."""

    def set_device(self, device: Any) -> None:
        """There is one device."""

    def manual_seed(self, seed: int) -> None:
        """Seed the CPU's generator, which stands for the GPU's."""
        torch.default_generator.manual_seed(seed)  # torch.manual_seed also writes down a traceback for each absent device

    def get_rng_state(self, device: Any = None) -> torch.Tensor:  # noqa: ARG002
        """State of the CPU's generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:  # noqa: ARG002
        """Set the state of the CPU's generator."""
        torch.set_rng_state(state)


class _CpuTorch(ModuleType):
    """`torch` as Megatron's modules see it: factories map "cuda" to the CPU, all else is torch's."""

    cuda = _CpuCuda("cuda")

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name in FACTORIES:
            value = _cpu_factory(value)
            setattr(self, name, value)
        return value


def _cpu_factory(make: Any) -> Any:
    @functools.wraps(make)
    def factory(*arguments: Any, **options: Any) -> Any:
        if "device" in options:
            options["device"] = _on_cpu(options["device"])
            options.pop("pin_memory", None)
        return make(*arguments, **options)

    return factory


_STAND_IN = _CpuTorch("torch")
_true_type = torch.Tensor.type


def _tensor_type(self: torch.Tensor, *arguments: Any, **options: Any) -> Any:
    """`Tensor.type()`: Megatron's gradient clipping compares the answer with 'torch.cuda.FloatTensor'."""
    answer = _true_type(self, *arguments, **options)
    return answer.replace("torch.", "torch.cuda.", 1) if isinstance(answer, str) and not answer.startswith("torch.cuda") else answer


def _tensor_cuda(self: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:  # noqa: ARG001
    """`Tensor.cuda()`: the tensor is where it can be."""
    return self


def activate() -> None:
    """Let Megatron-Core run without CUDA in this process. Safe to call again after further imports."""
    import megatron.core.tensor_parallel.random as random
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = _STAND_IN  # type: ignore[attr-defined]
    torch.Tensor.type = _tensor_type  # type: ignore[method-assign, assignment]
    torch.Tensor.cuda = _tensor_cuda  # type: ignore[method-assign, assignment]
    random._get_cuda_rng_state = _get_rng_state
    random._set_cuda_rng_state = _set_rng_state
    random._lazy_call = lambda call, **_: call()
    DistributedOptimizer._get_main_param_and_optimizer_states = _states_without_step(_true_get_states)
    DistributedOptimizer._set_main_param_and_optimizer_states = _set_states
    DistributedOptimizer.state_dict = _with_state(_true_state_dict)
    DistributedOptimizer.load_state_dict = _own_steps(_true_load_state_dict)


def _get_rng_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:  # noqa: ARG001
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:  # noqa: ARG001
    torch.set_rng_state(state)


def _import_distributed_optimizer() -> Any:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    return DistributedOptimizer


_true_get_states = _import_distributed_optimizer()._get_main_param_and_optimizer_states
_true_state_dict = _import_distributed_optimizer().state_dict
_true_load_state_dict = _import_distributed_optimizer().load_state_dict


def _with_state(state_dict: Any) -> Any:
    """Megatron reads the step count out of torch's AdamW before there is one: make the state first."""

    def with_state(self: Any) -> Any:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if not self.optimizer.state[parameter]:
                    moments = {name: torch.zeros_like(parameter.data) for name in ("exp_avg", "exp_avg_sq")}
                    self.optimizer.state[parameter] = {"step": torch.tensor(0.0), **moments}
        return state_dict(self)

    return with_state


def _states_without_step(get: Any) -> Any:
    """torch's AdamW keeps `step` per parameter; Megatron saves it once, in the group, and must not see it here."""

    def get_states(self: Any, model_param: Any) -> Any:
        return {key: value for key, value in get(self, model_param).items() if key != "step"}

    return get_states


@torch.no_grad()
def _set_states(self: Any, model_param: Any, tensors: Any) -> None:
    """Copy saved shards over the parameter and its moments; `step` is set by `load_state_dict`."""
    group, order = self.model_param_group_index_map[model_param]
    main_param = self.optimizer.param_groups[group]["params"][order]
    targets = {"param": main_param, **self.optimizer.state[main_param]}
    for key, value in tensors.items():
        if key in targets and key != "step":
            targets[key].copy_(value)


def _own_steps(load: Any) -> Any:
    """Give every parameter a step counter of its own.

    Megatron's load hands all of them one tensor, which AdamW would then count up once per parameter.
    """

    def load_state_dict(self: Any, state_dict: Any) -> None:
        load(self, state_dict)
        for state in self.optimizer.state.values():
            if "step" in state:
                state["step"] = state["step"].clone()

    return load_state_dict


@contextlib.contextmanager
def shared_steps() -> Iterator[None]:
    """The defect itself, for the test that must notice it: steps aliased as Megatron leaves them."""
    optimizer = _import_distributed_optimizer()
    mended = optimizer.load_state_dict
    optimizer.load_state_dict = _true_load_state_dict
    try:
        yield
    finally:
        optimizer.load_state_dict = mended
