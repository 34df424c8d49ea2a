"""Curves that lie on one another: which stretches they share, so that their dashes and marks take turns and all are seen. Pure."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np

Curve = tuple[np.ndarray, np.ndarray]  # x and y of its points; y is nan where nothing was measured


@dataclass(frozen=True)
class Stretch:
    """Neighbouring points of a curve, the first and the last included, and the names of all curves that run there."""

    first: int
    last: int
    names: tuple[str, ...]


def stretches(curves: Mapping[str, Curve]) -> dict[str, list[Stretch]]:
    """Every curve cut where its company changes; one that runs alone is a single stretch."""
    edges = {name: list(pairwise(_points(curve))) for name, curve in curves.items()}
    company = _company(edges)
    found = {}
    for name, own in edges.items():
        runs = [[i for i, _ in group] for _, group in groupby(enumerate(own), key=lambda pair: company[pair[1]])]
        found[name] = [Stretch(run[0], run[-1] + 1, company[own[run[0]]]) for run in runs]
    return found


def marked(curves: Mapping[str, Curve], every: int) -> dict[str, list[int]]:
    """The points of each curve that carry its mark: every so many; of curves that share a point, one at a time."""
    points = {name: _points(curve) for name, curve in curves.items()}
    company = _company(points)
    return {
        name: [i for i in range(0, len(own), every) if (same := company[own[i]])[i // every % len(same)] == name]
        for name, own in points.items()
    }


def alike(curves: Mapping[str, Curve]) -> list[tuple[str, ...]]:
    """The names of curves that coincide from end to end, where there are several; curves without a measured point are none."""
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, (x, y) in curves.items():
        if not np.isnan(y).all():
            groups.setdefault((x.tobytes(), np.round(y, 12).tobytes()), []).append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def _points(curve: Curve) -> list[tuple[float, float | None]]:
    """Points that can be compared: nan, which equals nothing, becomes None."""
    return [(x, None if np.isnan(y) else round(y, 12)) for x, y in zip(*(axis.tolist() for axis in curve), strict=True)]


def _company(keys: Mapping[str, Sequence[Hashable]]) -> dict[Hashable, tuple[str, ...]]:
    """The names of all that have a key."""
    names: dict[Hashable, list[str]] = {}
    for name, own in keys.items():
        for key in own:
            names.setdefault(key, []).append(name)
    return {key: tuple(dict.fromkeys(found)) for key, found in names.items()}
