"""The rows of reinforcement learning in words: what `megatron-ext plan` prints of them. Numbers come from `launch.plan_rl`."""

from __future__ import annotations

from megatron_ext.config.base import Json
from megatron_ext.config.rl_memory import ROLLOUT_BYTES_PER_TOKEN
from megatron_ext.launch.plan_words import checkpoint_words, count, fit_words, many, size

HOLDERS = ("weights", "gradients", "optimizer", "reference", "activations", "logits")


def rl_lines(row: Json) -> list[str]:
    """One stage: a line per fact."""
    facts = {
        "start": _start_words(row),
        "steps": _step_words(row),
        "samples": _sample_words(row),
        "caps": _cap_words(row),
        "task": _task_words(row),
        "held out": _validation_words(row["validation"]),
        "rate": _rate_words(row),
        "ranks": _parallel_words(row["parallel"], row["precision"]),
        "memory": _memory_words(row),
        "compute": _compute_words(row),
        "disk": _disk_words(row),
    }
    return [row["stage"], *(f"  {name:<8} {text}" for name, text in facts.items())]


def _start_words(row: Json) -> str:
    start = row["start"]
    at = "" if start["step"] is None else f" at step {start['step']:,}"
    tokens = f" ({count(start['tokens'])} tokens)" if start["tokens"] is not None else ""
    lineage = f"; {count(row['lineage_tokens'])} tokens of training before it" if row["lineage_tokens"] else ""
    return f"weights of {start['stage']}{at}{tokens}, fresh optimizer{lineage}"


def _step_words(row: Json) -> str:
    product = f"{many(row['steps'], 'rollout step')} x {many(row['updates_per_step'], 'update')} = {many(row['updates'], 'update')}"
    return product + ("; the paper's plots count updates, everything here counts rollout steps" if row["updates_per_step"] > 1 else "")


def _sample_words(row: Json) -> str:
    draws = f", drawn up to {row['draws_at_most']} times" if row["draws_at_most"] > 1 else ""
    return (
        f"{many(row['prompts_per_step'], 'prompt')} x {many(row['responses_per_prompt'], 'response')} a step{draws}, "
        f"{many(row['prompts_per_update'], 'prompt')} an update; {row['prompts']:,} prompts and {row['responses']:,} responses in all"
    )


def _cap_words(row: Json) -> str:
    lengths = row["lengths"]
    longest = f"; with a prompt of {row['max_prompt_tokens']:,}, {row['longest_tokens']:,} tokens at most{_unreached_words(row)}"
    if lengths["kind"] == "truncation":
        caps = ", ".join(f"{cap:,}" for cap in lengths["caps_tokens"])
        return f"{caps} tokens, the next one when more than {lengths['share']:.0%} are cut off {lengths['steps']} steps in a row{longest}"
    by_step = lengths["unit"] == "rollout_steps"
    first, *others = lengths["caps"]
    words = [f"{first['cap_tokens']:,} tokens"]
    for one in others:
        after = f"step {one['after']:,} (update {one['after'] * row['updates_per_step']:,})" if by_step else f"{count(one['after'])} tokens"
        words.append(f"{one['cap_tokens']:,} from {after}")
    return ", ".join(words) + longest


def _unreached_words(row: Json) -> str:
    late = " or ".join(f"{cap:,}" for cap in row["unreached_caps_tokens"])
    return f"; WARNING: no step is sampled under {late} tokens, for step {row['steps']:,} is the last" if late else ""


def _task_words(row: Json) -> str:
    problems = row["problems"]
    left_out = f" without {many(problems['left_out'], 'problem')}" if problems["left_out"] else ""
    return f"{problems['name']} ({problems['path']}{left_out}), template {row['template']}, reward {row['reward']}, " + (
        f"temperature {row['temperature']:g}"
    )


def _validation_words(validation: Json) -> str:
    if not validation["sets"]:
        return "nothing: no set of problems is held out"
    cap = "the cap in force" if validation["cap_tokens"] is None else f"{validation['cap_tokens']:,} tokens"
    return (
        f"{', '.join(validation['sets'])}; greedy at {cap}, before the first step and every {many(validation['every_steps'], 'step')}: "
        f"{many(validation['times'], 'time')}"
    )


def _rate_words(row: Json) -> str:
    warmup = f", after a linear rise over {many(row['warmup_steps'], 'rollout step')}" if row["warmup_steps"] else ""
    return f"constant {row['learning_rate']:.4g}{warmup}"


def _parallel_words(p: Json, precision: str) -> str:
    unit = "GPU" if p["device"] == "gpu" else "CPU rank"
    return (
        f"{many(p['ranks'], unit)} on {many(p['nodes'], 'node')}, {precision}: tensor {p['tensor']} x pipeline {p['pipeline']} x "
        f"data {p['data']}; micro-batches of {p['tokens_per_micro_batch']:,} tokens; engine {p['engine']}, "
        f"{many(p['engine_slots'], 'response')} at a time on each copy{_turns_words(p)}; "
        f"{many(p['grading_workers'], 'grading worker')}"
    )


def _turns_words(p: Json) -> str:
    """What else is to be known of the engines."""
    turns = f", its {p['pipeline']} pipeline stages by turns for every token" if p["engine"] == "megatron" and p["pipeline"] > 1 else ""
    return turns + ("; validated by a vLLM of its own beside the next step" if p["validation_engine"] != "same" else "")


def _memory_words(row: Json) -> str:
    m = row["memory"]
    holders = [name for name in HOLDERS if name != "reference" or m["reference_bytes"]]
    parts = [f"{name} {size(m[f'{name}_bytes'])}" for name in holders]
    if m["cache_bytes"]:
        parts.append(f"cached keys and values {size(m['cache_bytes'])} in turn with the two before")
    if m["vllm_bytes"] != 0:
        parts.append("vLLM its share of an unknown GPU" if m["vllm_bytes"] is None else f"vLLM {size(m['vllm_bytes'])}")
    return f"{size(m['total_bytes'])} a rank ({', '.join(parts)}){fit_words(m)}"


def _compute_words(row: Json) -> str:
    flops, hours = row["compute"]["update_flops_at_most"], row["compute"]["update_gpu_hours_at_most"]
    at_most = f"at most {flops:.3g} FLOPs" + ("" if hours is None else f", {hours:,.0f} GPU-hours")
    return f"updates: {at_most}, were every response as long as its cap; sampling is not in it: lengths and the engine decide"


def _disk_words(row: Json) -> str:
    rollouts = f"recorded rollouts {size(row['rollouts_bytes_at_most'])} at most, at {ROLLOUT_BYTES_PER_TOKEN} bytes a token, compressed"
    return f"{checkpoint_words(row['checkpoints'])}; {rollouts}"
