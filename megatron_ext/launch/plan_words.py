"""A plan's rows in words: what `megatron-ext plan` prints. Numbers come from `launch.plan`."""

from __future__ import annotations

from megatron_ext.config.base import Json
from megatron_ext.config.cluster import Cluster
from megatron_ext.config.memory import HEADROOM

TOKEN_UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K"))
BYTE_UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "KB"))


def cluster_words(cluster: Cluster | None) -> str:
    """The cluster as the plan's first line names it."""
    if cluster is None:
        return "without a cluster (--cluster NAME adds GPU-hours and says whether it fits)"
    return (
        f"on {cluster.name}: {cluster.gpus_per_node} GPUs of {size(cluster.gpu_memory_bytes)} a node, dense peaks "
        f"{cluster.bf16_flops_per_second / 1e12:,.0f} TFLOP/s in BF16 and {cluster.fp8_flops_per_second / 1e12:,.0f} in FP8, "
        f"planned at {cluster.assumed_mfu:.0%} of them"
    )


def stage_lines(row: Json) -> list[str]:
    """One training stage: a line per fact, then a table of its sources."""
    facts = {
        "tokens": _token_words(row),
        "start": _start_words(row),
        "rate": f"{row['shape']}: first step {row['first_learning_rate']:.4g}, last step {row['last_learning_rate']:.4g}",
        "ranks": _parallel_words(row["parallel"], row["precision"]),
        "memory": _memory_words(row["memory"]),
        "compute": _compute_words(row),
        "disk": checkpoint_words(row["checkpoints"]),
    }
    return [row["stage"], *(f"  {name:<8} {text}" for name, text in facts.items()), *(f"  {line}" for line in _table(row["sources"]))]


def convert_lines(row: Json) -> list[str]:
    """One Convert stage: a line per fact."""
    revision = f" at {row['revision']}" if row["revision"] else ""
    padded = row["padded_vocab_size"] - row["vocab_size"]
    facts = {
        "source": row["source"] + revision,
        "model": f"{row['parameters']:,} parameters; {row['vocab_size']:,} ids, "
        + (f"{padded} rows of padding" if padded else "no padding"),
        "disk": f"{size(row['disk_bytes'])} in BF16, twice that in FP32",
    }
    return [row["stage"], *(f"  {name:<8} {text}" for name, text in facts.items())]


def _token_words(row: Json) -> str:
    return (
        f"{count(row['tokens'])} = {row['steps']:,} steps x {row['tokens_per_step']:,} "
        f"({row['sequences_per_step']} sequences x {row['sequence_length']:,}); lineage {count(row['lineage_tokens'])}"
    )


def _table(sources: list[Json]) -> list[str]:
    width = max(len(s["source"]) for s in sources)
    lines = [f"{'source':<{width}}  {'weight':>7}  {'tokens':>9}  {'drawn before':>12}  {'known':>9}  {'epochs':>7}  {'most':>5}"]
    for s in sources:
        before = count(s["already_tokens"]) if s["already_tokens"] else "-"
        known = count(s["available_tokens"]) if s["available_tokens"] else "unknown"
        epochs = f"{s['epochs']:.2f}" if s["epochs"] is not None else "unknown"
        drawn = f"{s['source']:<{width}}  {s['weight']:>7.4f}  {count(s['tokens']):>9}  {before:>12}"
        lines.append(f"{drawn}  {known:>9}  {epochs:>7}  {s['max_epochs']:>5g}")
    return lines


def _start_words(row: Json) -> str:
    start, joint = row["start"], row["joint"]
    if start["kind"] == "scratch":
        return "random weights"
    if joint is None:
        return f"weights of {start['stage']}, fresh optimizer"
    optimizer = "with its optimizer" if start["kind"] == "branch" else "fresh optimizer"
    change = "level" if joint["after"] == joint["before"] else f"x {joint['after'] / joint['before']:.3g}"
    peak = "the peak" if joint["after"] == joint["peak"] else f"the peak is {joint['peak']:.4g}"
    where = f"{start['kind']} of {start['stage']} at {count(start['tokens'])} tokens (step {start['step']:,}), {optimizer}"
    return f"{where}; rate before the joint {joint['before']:.4g}, at the first step {joint['after']:.4g} ({change}; {peak})"


def _parallel_words(p: Json, precision: str) -> str:
    unit = "GPU" if p["device"] == "gpu" else "CPU rank"
    return (
        f"{many(p['ranks'], unit)} on {many(p['nodes'], 'node')}, {precision}: tensor {p['tensor']} x pipeline {p['pipeline']} x "
        f"context {p['context']} x data {p['data']} (the batch feeds at most {p['largest_data']}); "
        f"{many(p['micro_batches'], 'micro-batch')} of {many(p['micro_batch'], 'sequence')} a step"
    )


def many(number: int, noun: str) -> str:
    """'1 step', '2 steps', '3 batches'."""
    return f"{number:,} {noun}" + ("" if number == 1 else "es" if noun.endswith("ch") else "s")


def _memory_words(m: Json) -> str:
    parts = ", ".join(f"{name} {size(m[f'{name}_bytes'])}" for name in ("weights", "gradients", "optimizer", "activations", "logits"))
    total = f"{size(m['total_bytes'])} a rank ({parts})"
    return total + fit_words(m)


def fit_words(m: Json) -> str:
    """Whether what a rank holds fits a GPU; '' where no GPU is named."""
    if m["fits"] is None:
        return ""
    return f"; fits in {size(m['gpu_memory_bytes'])} with {HEADROOM:.0%} to spare: {'yes' if m['fits'] else 'NO'}"


def _compute_words(row: Json) -> str:
    c = row["compute"]
    if c["gpu_hours"] is None:
        return f"{c['flops']:.3g} FLOPs"
    gpus = many(row["parallel"]["ranks"], "GPU")
    return f"{c['flops']:.3g} FLOPs, {c['gpu_hours']:,.0f} GPU-hours, {c['wall_seconds'] / 3600:,.1f} hours on {gpus}"


def checkpoint_words(c: Json) -> str:
    """Number and size of the checkpoints and exports that a stage leaves."""
    checkpoints = many(c["kept"], "checkpoint")
    exports = f" + {many(len(c['export_steps']), 'export')} x {size(c['bytes_each_export'])}" if c["export_steps"] else ""
    return f"{checkpoints} x {size(c['bytes_each'])}{exports} = {size(c['disk_bytes'])}, at most {c['files_each_at_most']} files each"


def count(tokens: int) -> str:
    """'209.72B' of a number of tokens."""
    for scale, unit in TOKEN_UNITS:
        if tokens >= scale:
            return f"{tokens / scale:.2f}{unit}"
    return str(tokens)


def size(number_bytes: int) -> str:
    """'45.0 GB' of a number of bytes; decimal units."""
    for scale, unit in BYTE_UNITS:
        if number_bytes >= scale:
            return f"{number_bytes / scale:.1f} {unit}"
    return f"{number_bytes} B"
