"""What the check of the nodes makes of its ranks' reports, and that it measures what it says."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from megatron_ext import node_check
from megatron_ext.node_check import judge, measure, pairings

NODES = ["a", "b", "c"]


def report(broken: dict[str, str] | None = None, **seconds: float) -> dict[str, Any]:
    return {
        "seconds": {"matrix product": 1.0, **{part.replace("_", " "): value for part, value in seconds.items()}},
        "broken": broken or {},
    }


@pytest.mark.parametrize("num_nodes", [1, 2, 3, 4, 5, 8, 127, 128])
def test_every_node_meets_two_others_and_never_two_at_once(num_nodes: int) -> None:
    rounds = pairings(num_nodes)
    met = Counter(node for pairs in rounds for pair in pairs for node in pair)
    assert all(len(nodes := [node for pair in pairs for node in pair]) == len(set(nodes)) for pairs in rounds)
    assert met == {node: min(2, num_nodes - 1) for node in range(num_nodes) if num_nodes > 1}
    pairs = [frozenset(pair) for one_round in rounds for pair in one_round]
    assert len(pairs) == len(set(pairs))


def test_fit_nodes_are_fit() -> None:
    result = judge(dict.fromkeys(range(6), report()), NODES, 2, 1.5)
    assert (result["broken"], result["slow"], result["words"]) == ({}, {}, "3 nodes are fit")


def test_a_slow_node_is_named_by_its_slowest_rank() -> None:
    reports: dict[int, Any] = dict.fromkeys(range(6), report())
    reports[3] = {"seconds": {"matrix product": 1.6}, "broken": {}}
    assert judge(reports, NODES, 2, 1.5)["slow"] == {"b": "matrix product took 1.600 s, 1.6 x the median of 1.000 s"}
    assert judge(reports, NODES, 2, 1.7)["slow"] == {}


def test_of_a_slow_pair_the_node_whose_other_pair_is_slow_too_is_slow() -> None:
    slow, quick = 9.0, 1.0
    reports = {
        0: report(**{"pair a and b": slow, "pair c and a": quick}),
        1: report(**{"pair a and b": slow, "pair b and c": slow}),
        2: report(**{"pair b and c": slow, "pair c and a": quick}),
    }
    assert list(judge(reports, NODES, 1, 1.5)["slow"]) == ["b"]


def test_broken_nodes_are_named_and_their_neighbours_are_not() -> None:
    reports: dict[int, Any] = {
        0: report({"pair a and b": "timed out"}, **{"pair c and a": 1.0}),
        1: report({"pair a and b": "timed out", "pair b and c": "timed out"}),
        2: report({"pair b and c": "timed out"}, **{"pair c and a": 1.0}),
    }
    result = judge(reports, NODES, 1, 1.5)
    assert result["broken"] == {"b": "no all-reduce with either neighbour"}
    assert result["links"] == ["pair a and b", "pair b and c"]
    assert judge({**reports, 1: None}, NODES, 1, 1.5)["broken"] == {"b": "1 of its ranks gave no answer"}
    reports[2] = report({"disk write": "OSError: full", "matrix product": "later"})
    assert judge(reports, NODES, 1, 1.5)["broken"]["c"] == "disk write: OSError: full"


def test_of_two_nodes_that_do_not_meet_none_is_accused() -> None:
    reports = dict.fromkeys(range(2), report({"pair a and b": "timed out"}))
    result = judge(reports, ["a", "b"], 1, 1.5)
    assert (result["broken"], result["words"]) == ({}, "no all-reduce between a and b")


def test_a_device_that_computes_wrongly_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    good = measure({"matrix product": lambda: node_check.matrix_seconds("cpu")})
    assert good["seconds"]["matrix product"] > 0
    ones = node_check.torch.ones
    wrong = node_check.torch.tensor([3])
    monkeypatch.setattr(node_check.torch, "ones", lambda *size, **options: ones(*size, **options).index_fill_(0, wrong, 1.25))
    bad = measure({"matrix product": lambda: node_check.matrix_seconds("cpu")})
    assert "the device computes wrongly" in bad["broken"]["matrix product"]


def test_the_disk_is_measured_and_left_clean(tmp_path: Any) -> None:
    assert node_check.disk_seconds(str(tmp_path)) > 0
    assert list(tmp_path.iterdir()) == []
    assert "FileNotFoundError" in measure({"disk write": lambda: node_check.disk_seconds(str(tmp_path / "none"))})["broken"]["disk write"]
