"""AdamW's numbers and the bounds that stop a step."""

from __future__ import annotations

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError


@config
class Optimizer:
    """AdamW with decoupled weight decay and clipping of the global gradient norm.

    Weight decay 0.1 is the paper's (Table 4); betas, epsilon and clip are not stated there: these
    are the values of every example of its trainer, Nanotron.
    """

    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        for key in ("beta1", "beta2"):
            if not 0 <= getattr(self, key) < 1:
                raise ConfigError(f"optimizer: {key} is {getattr(self, key)}, must lie in [0, 1)")
        for key in ("weight_decay", "clip_norm"):
            if getattr(self, key) < 0:
                raise ConfigError(f"optimizer: {key} is {getattr(self, key)}, must not be negative")
        if not self.epsilon > 0:
            raise ConfigError(f"optimizer: epsilon is {self.epsilon}, must be positive")
