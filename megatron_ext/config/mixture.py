"""Which share of a stage's tokens comes from which source, and what that means in epochs."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_ext.config.base import config
from megatron_ext.errors import ConfigError, DataError

SUM_TOLERANCE = 1e-6


@config
class Row:
    """One source's share of the tokens."""

    source: str
    weight: float


@config
class Mixture:
    """Sources and weights by tokens; the weights sum to 1."""

    rows: tuple[Row, ...]

    def __post_init__(self) -> None:
        if not self.rows:
            raise ConfigError("mixture: no rows; name at least one source")
        names = [row.source for row in self.rows]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"mixture: source '{name}' stands {names.count(name)} times; give it one row")
        for row in self.rows:
            if not row.weight > 0:
                raise ConfigError(f"mixture: source '{row.source}' has weight {row.weight}; leave it out or give it more than 0")
        total = sum(row.weight for row in self.rows)
        if abs(total - 1.0) > SUM_TOLERANCE:
            terms = " + ".join(f"{row.weight:g}" for row in self.rows)
            raise ConfigError(f"mixture: weights must sum to 1, but {terms} = {total:.6g}")

    @property
    def sources(self) -> tuple[str, ...]:
        """Names of the sources, in order."""
        return tuple(row.source for row in self.rows)


@dataclass(frozen=True)
class Draw:
    """What a budget takes from one source: `tokens` now, `epochs` counted from the source's start."""

    source: str
    weight: float
    tokens: int
    already_tokens: int
    available_tokens: int
    max_epochs: float

    @property
    def epochs(self) -> float:
        """Passes over the source at the end of the stage, earlier stages of the lineage included."""
        return (self.already_tokens + self.tokens) / self.available_tokens if self.available_tokens else float("inf")


def draws(
    mixture: Mixture,
    tokens: int,
    available_tokens: dict[str, int],
    max_epochs: dict[str, float],
    already_tokens: dict[str, int] | None = None,
) -> list[Draw]:
    """Tokens and epochs per source; `DataError` where a source is missing, empty or repeated too often."""
    table = []
    for row in mixture.rows:
        if row.source not in available_tokens:
            raise DataError(f"mixture: no source '{row.source}' in the corpus; it has: {', '.join(sorted(available_tokens))}")
        if available_tokens[row.source] <= 0:
            raise DataError(f"mixture: source '{row.source}' is empty (0 training tokens); remove its row or tokenize its text again")
        already = (already_tokens or {}).get(row.source, 0)
        draw = Draw(row.source, row.weight, round(row.weight * tokens), already, available_tokens[row.source], max_epochs[row.source])
        if draw.epochs > draw.max_epochs * (1 + 1e-9):
            before = f"{already:,} already drawn + " if already else ""
            allowed = draw.max_epochs * draw.available_tokens - already
            raise DataError(
                f"mixture: source '{row.source}' would be repeated {draw.epochs:.3f} times, more than its most epochs {draw.max_epochs:g}: "
                f"({before}{row.weight:g} x {tokens:,} = {draw.tokens:,}) / {draw.available_tokens:,} tokens. "
                f"Lower its weight to {max(allowed, 0) / tokens:.4f}, shorten the stage, add text, or raise the source's max_epochs"
            )
        table.append(draw)
    return table
