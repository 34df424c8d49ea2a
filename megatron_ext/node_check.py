"""Whether nodes are fit for a job: matrix product, disk, all-reduce inside a node and between pairs of nodes. Names slow and broken ones.

    srun ... python -m megatron_ext.node_check RESULT.json --scratch /tmp          (one process a rank, MASTER_ADDR and MASTER_PORT set)

Ranks report through a store on rank 0's host, so a node that cannot join a collective is named rather than waited for. Between nodes
only pairs are tried, and every node in two: of a pair that fails, the node whose other pair fails too is the broken one.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from megatron_ext import device
from megatron_ext.errors import LaunchError
from megatron_ext.runs import write_json

EXIT_BROKEN, EXIT_UNREACHED = 1, 76  # a node is broken; this rank could not reach rank 0, or lost it
STORE_SECONDS = 180.0  # for every rank to have imported torch from a cold file system
PART_SECONDS = 90.0  # for one all-reduce, the making of its group included
DISK_BYTES = 64 << 20
SIZES = {"cpu": (512, 4 << 20), "gpu": (8192, 256 << 20)}  # of a matrix's side; bytes of an all-reduce
REPEATS = 5

Report = dict[str, Any]  # seconds by what was measured, and `broken`: what failed -> why


def pairings(num_nodes: int) -> list[list[tuple[int, int]]]:
    """Rounds of pairs of nodes, no node twice in a round: each node meets its two neighbours on a ring."""
    if num_nodes < 2:
        return []
    if num_nodes == 2:
        return [[(0, 1)]]
    even = [(i, i + 1) for i in range(0, num_nodes - 1, 2)]
    odd = [(i, i + 1) for i in range(1, num_nodes - 1, 2)]
    closing = (num_nodes - 1, 0)
    return [even, [*odd, closing]] if num_nodes % 2 == 0 else [even, odd, [closing]]


def judge(reports: Mapping[int, Report | None], nodes: Sequence[str], ranks_per_node: int, slow: float) -> dict[str, Any]:
    """What the reports of all ranks (None: none came) say of each node: `broken` and `slow` with the reason, the seconds, and words.

    Slow is what takes more than `slow` times the median of all nodes. Of its two pairs a node is judged by the better.
    """
    broken: dict[str, str] = {}
    seconds: dict[str, dict[str, float]] = {}
    for index, node in enumerate(nodes):
        own = [reports.get(rank) for rank in range(index * ranks_per_node, (index + 1) * ranks_per_node)]
        problem = _broken_words([report for report in own if report], missing=own.count(None))
        if problem:
            broken[node] = problem
        parts = {part for report in own if report for part in report["seconds"]}
        worst = {part: max(r["seconds"][part] for r in own if r and part in r["seconds"]) for part in sorted(parts)}
        pairs = [value for part, value in worst.items() if part.startswith("pair ")]
        seconds[node] = {part: value for part, value in worst.items() if not part.startswith("pair ")}
        if pairs:
            seconds[node]["all-reduce between nodes"] = min(pairs)
    slow_nodes = {node: why for node in nodes if node not in broken and (why := _slow_words(node, seconds, slow))}
    links = sorted({link for report in reports.values() if report for link in report["broken"] if link.startswith("pair ")})
    lines = [f"broken: {node}: {why}" for node, why in broken.items()] + [f"slow: {node}: {why}" for node, why in slow_nodes.items()]
    lines += [f"no all-reduce between {link.removeprefix('pair ')}" for link in links]
    return {
        "broken": broken,
        "slow": slow_nodes,
        "links": links,
        "seconds": seconds,
        "words": "; ".join(lines) or f"{len(nodes)} nodes are fit",
    }


def _broken_words(reports: Sequence[Report], missing: int) -> str:
    if missing:
        return f"{missing} of its ranks gave no answer"
    for report in reports:
        alone = {part: why for part, why in report["broken"].items() if not part.startswith("pair ")}
        if alone:
            part, why = next(iter(alone.items()))  # what came after the first is its consequence
            return f"{part}: {why}"
        pairs = [part for part in report["broken"] if part.startswith("pair ")]
        if len(pairs) > 1 and not any(part.startswith("pair ") for part in report["seconds"]):
            return "no all-reduce with either neighbour"
    return ""


def _slow_words(node: str, seconds: Mapping[str, Mapping[str, float]], slow: float) -> str:
    words = []
    for part, value in seconds[node].items():
        median = statistics.median(others[part] for others in seconds.values() if part in others)
        if value > slow * median > 0:
            words.append(f"{part} took {value:.3f} s, {value / median:.1f} x the median of {median:.3f} s")
    return "; ".join(words)


def measure(parts: Mapping[str, Callable[[], float]]) -> Report:
    """Seconds of each part; a part that raises is broken, and its message says why."""
    report: Report = {"seconds": {}, "broken": {}}
    for part, work in parts.items():
        try:
            report["seconds"][part] = work()
        except Exception as problem:  # noqa: BLE001 - whatever a broken node does is what is reported
            report["broken"][part] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:200]}"
    return report


def device_seconds(kind: Literal["cpu", "gpu"]) -> float:
    """To get hold of this rank's device; 0 for a CPU, which needs nothing."""
    begin = time.perf_counter()
    if kind == "gpu":
        device.activate(kind, threads=1)
    return time.perf_counter() - begin if kind == "gpu" else 0.0


def matrix_seconds(kind: Literal["cpu", "gpu"], side: int = 0) -> float:
    """The fastest of some products of square matrices of this side (0: the check's own); AssertionError where one is not exact."""
    side = side or SIZES[kind][0]
    ones = torch.ones(side, side, device=device.current(kind), dtype=torch.float32 if kind == "cpu" else torch.bfloat16)
    best = float("inf")
    for _ in range(REPEATS):
        begin = time.perf_counter()
        product = ones @ ones
        device.synchronize(kind)
        best = min(best, time.perf_counter() - begin)
        assert bool((product == side).all()), f"a product of ones is not {side} everywhere: the device computes wrongly"
    return best


def disk_seconds(folder: str) -> float:
    """To write a file into a folder, down to the disk."""
    block = os.urandom(1 << 20)
    begin = time.perf_counter()
    with tempfile.NamedTemporaryFile(dir=folder, prefix="megatron_ext_check_") as file:
        for _ in range(DISK_BYTES >> 20):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    return time.perf_counter() - begin


def all_reduce_seconds(store: dist.Store, name: str, ranks: Sequence[int], rank: int, kind: Literal["cpu", "gpu"]) -> float:
    """The fastest of some all-reduces among a few ranks, in a process group of its own."""
    timeout = datetime.timedelta(seconds=PART_SECONDS)
    own_store = dist.PrefixStore(f"all-reduce {name}", store)
    dist.init_process_group(device.backend(kind), store=own_store, rank=ranks.index(rank), world_size=len(ranks), timeout=timeout)
    try:
        values, best = torch.ones(SIZES[kind][1] // 4, device=device.current(kind)), float("inf")
        for _ in range(REPEATS):
            values.fill_(1)
            device.synchronize(kind)
            begin = time.perf_counter()
            dist.all_reduce(values)
            device.synchronize(kind)
            best = min(best, time.perf_counter() - begin)
        assert bool((values == len(ranks)).all()), "the sum is wrong"
        return best
    finally:
        dist.destroy_process_group()


def check_rank(store: dist.Store, rank: int, nodes: Sequence[str], per_node: int, kind: Literal["cpu", "gpu"], scratch: str) -> Report:
    """All that this rank measures; each rank of a node meets the one in its own place on another node."""
    own, place = divmod(rank, per_node)
    parts: dict[str, Callable[[], float]] = {"device": lambda: device_seconds(kind), "matrix product": lambda: matrix_seconds(kind)}
    if place == 0:
        parts["disk write"] = lambda: disk_seconds(scratch)
    inside = range(own * per_node, (own + 1) * per_node)
    if per_node > 1:
        parts["all-reduce inside"] = lambda: all_reduce_seconds(store, nodes[own], inside, rank, kind)
    for pair in (pair for one_round in pairings(len(nodes)) for pair in one_round if own in pair):
        ranks, name = [node * per_node + place for node in pair], " and ".join(nodes[node] for node in pair)
        parts[f"pair {name}"] = lambda name=name, ranks=ranks: all_reduce_seconds(store, f"{name} {place}", ranks, rank, kind)  # type: ignore[misc]
    return measure(parts)


def collect(store: dist.Store, num_ranks: int, deadline: float) -> dict[int, Report | None]:
    """Every rank's report as far as it comes before the deadline (monotonic seconds)."""
    found: dict[int, Report | None] = {}
    while len(found) < num_ranks and time.monotonic() < deadline:
        waiting = [rank for rank in range(num_ranks) if rank not in found]
        found.update({rank: json.loads(store.get(f"report {rank}")) for rank in waiting if store.check([f"report {rank}"])})
        time.sleep(0.05)
    return {rank: found.get(rank) for rank in range(num_ranks)}


def check_nodes(result: Path, nodes: Sequence[str], kind: Literal["cpu", "gpu"], scratch: str, slow: float) -> int:
    """One rank of the check, of as many on each node; rank 0 writes the result. The exit code."""
    rank, num_ranks = int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    per_node = num_ranks // len(nodes)
    os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"  # a time-out raises here, rather than ending this process without a word
    try:
        address, port, waits = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), datetime.timedelta(seconds=STORE_SECONDS)
        store = dist.TCPStore(address, port, is_master=rank == 0, timeout=waits, wait_for_workers=False)
        store.set(f"report {rank}", json.dumps(check_rank(store, rank, nodes, per_node, kind, scratch)))
    except dist.DistError as problem:
        print(f"rank {rank} did not meet rank 0 on {nodes[0]}: {problem}", file=sys.stderr)
        return EXIT_UNREACHED if rank else EXIT_BROKEN
    if rank:
        return 0
    seconds = STORE_SECONDS + (1 + len(pairings(len(nodes)))) * PART_SECONDS  # its own part is done; others may still be trying
    found = judge(collect(store, num_ranks, time.monotonic() + seconds), nodes, per_node, slow)
    write_json(result, found)
    return EXIT_BROKEN if found["broken"] or found["links"] else 0


def check_nodes_command(result: Path, nodes: str, device_kind: Literal["cpu", "gpu"], scratch: str, slow: float) -> None:
    """The verb `check-nodes`; `LaunchError` where a node is broken, or a rank could not be met."""
    if "SLURM_PROCID" not in os.environ:
        raise LaunchError("check-nodes: is one rank of a check; start it with srun on every node, with MASTER_ADDR and MASTER_PORT set")
    if check_nodes(result, nodes.split(","), device_kind, scratch, slow):
        raise LaunchError(f"the nodes are not all fit; {result} says which")


def main(words: Sequence[str] | None = None) -> int:
    """The same without the command line of the project."""
    parser = argparse.ArgumentParser(prog="python -m megatron_ext.node_check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("result", type=Path, metavar="RESULT", help="the JSON file to write")
    parser.add_argument("--nodes", required=True, metavar="A,B", help="names of the nodes, rank 0's first")
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="where the stage computes (default: cpu)")
    parser.add_argument("--scratch", default="/tmp", metavar="DIR", help="node-local folder that is written to (default: /tmp)")
    parser.add_argument("--slow", type=float, default=1.5, metavar="X", help="slow is more than X times the median (default: 1.5)")
    asked = parser.parse_args(words)
    return check_nodes(asked.result, asked.nodes.split(","), asked.device, asked.scratch, asked.slow)


if __name__ == "__main__":
    sys.exit(main())
