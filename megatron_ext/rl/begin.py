"""What a stage of reinforcement learning works with: weights, tokenizer, prompts, engine, graders - all checked before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron.core.models.gpt import GPTModel

from megatron_ext.attempts import Attempt
from megatron_ext.checkpoint.weights import load_chunks
from megatron_ext.config.stages import RLStage
from megatron_ext.config.tasks import ProblemSet
from megatron_ext.conversion.assets import carried, has_tokenizer
from megatron_ext.distributed import Groups, from_rank_0
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.provenance import Manifest
from megatron_ext.rl.actor import Actor
from megatron_ext.rl.engines import HandOver, make_engine
from megatron_ext.rl.grading import grading_pool
from megatron_ext.rl.progress import RLProgress, progress_from_json
from megatron_ext.rl.source import RolloutSource
from megatron_ext.rl.validation import HeldOutSet
from megatron_ext.runs import Run
from megatron_ext.tasks.problems import stage_problems
from megatron_ext.tasks.prompts import Prompts, prompts
from megatron_ext.tasks.templates import Template, template
from megatron_ext.tokenizer import Tokenizer, tokenizer_of_files
from megatron_ext.training.hooks import say
from megatron_ext.training.start import Began, begin, parent_checkpoint


@dataclass
class Begun:
    """A stage that is ready to learn."""

    began: Began
    progress: RLProgress
    actor: Actor
    source: RolloutSource
    heldout: list[HeldOutSet]
    template: Template
    files: dict[str, bytes]  # what every checkpoint carries
    tokenizer_hash: str
    hand_over: HandOver
    validator: Actor  # the actor itself, or with an engine of its own
    validator_hand_over: HandOver

    def close(self) -> None:
        """End engine and grading workers."""
        engines = {id(actor.engine): actor.engine for actor in (self.actor, self.validator)}
        for engine in engines.values():
            if engine is not None:
                engine.close()
        if self.source.pool is not None:
            self.source.pool.close()


def begin_learning(run: Run, groups: Groups, attempt: Attempt) -> Begun:
    """Load the stage's newest checkpoint, or its parent's; every rank calls it.

    Raises `CheckpointError` where that cannot be, or carries no tokenizer, `DataError` for problems that cannot be used,
    `ConfigError` for a template that the tokenizer cannot write.
    """
    stage: RLStage = run.stage
    began = begin(run, groups, attempt, None)
    manifest = began.manifest
    assert began.path is not None, "reinforcement learning starts from weights"
    assert manifest is not None, "a checkpoint has a manifest"
    files, tokenizer = carried_tokenizer(began.path, manifest)
    chosen = template(stage.template)
    check_template(chosen, tokenizer, began.path)
    engine, hand_over = make_engine(stage, began.state, groups, tokenizer, files, attempt.path / f"engine.rank{groups.rank}.txt")
    actor = Actor(stage, groups, began.state, engine, frozen_reference(run, groups))
    validator, validator_hand_over = actor, hand_over
    if stage.plan.validation_engine == "vllm_process":
        beside = replace(stage, plan=replace(stage.plan, engine="vllm_process"))
        log = attempt.path / f"validation_engine.rank{groups.rank}.txt"
        second, validator_hand_over = make_engine(beside, began.state, groups, tokenizer, files, log)
        validator = replace(actor, engine=second)
    pool = grading_pool(stage.plan, tell=say) if groups.rank == 0 else None
    made = _prompts_on_rank_0(run, groups, chosen, tokenizer)
    source = RolloutSource(run, actor, made[0], chosen.stop_strings, pool)
    heldout = [HeldOutSet(one.name, found) for one, found in zip(stage.validation.sets, made[1:], strict=True)]
    if groups.rank == 0:
        _say_prompts(stage, source, heldout)
    progress = _progress(stage, began, manifest)
    return Begun(began, progress, actor, source, heldout, chosen, files, manifest.tokenizer_hash, hand_over, validator, validator_hand_over)


def _say_prompts(stage: RLStage, source: RolloutSource, heldout: Sequence[HeldOutSet]) -> None:
    """What is asked, what is left out, and what a user may not have meant, into the log."""
    for name, made in ((stage.problems.name, source.prompts), *((one.name, one.prompts) for one in heldout)):
        left_out = f"; {len(made.left_out):,} with longer prompts are left out" if made.left_out else ""
        print(f"problems '{name}': {len(made.rows):,}{left_out}", flush=True)
    learnt = {row.problem.question.strip() for row in source.prompts.rows}
    for one in heldout:
        shared = sum(row.problem.question.strip() in learnt for row in one.prompts.rows)
        if shared:
            print(f"WARNING: {shared:,} questions of the held-out set '{one.name}' are among those that are learnt from", flush=True)
    if stage.rollouts.responses_per_prompt == 1:
        print("WARNING: one response a prompt has nothing to be compared with: its reward itself is the advantage", flush=True)


def carried_tokenizer(path: Path, manifest: Manifest) -> tuple[dict[str, bytes], Tokenizer]:
    """The files that a checkpoint carries, and the tokenizer among them, which must be the one that its weights were trained with."""
    files = carried(path)
    if not has_tokenizer(files):
        raise CheckpointError(
            f"{path}: carries no tokenizer, so there is nothing to make prompts with; "
            f"start from a checkpoint that does (every one that this version writes)"
        )
    tokenizer = tokenizer_of_files(files)
    if tokenizer.identity_hash != manifest.tokenizer_hash:
        raise CheckpointError(
            f"{path}: carries tokenizer {tokenizer.identity_hash[:12]}, its weights were trained with {manifest.tokenizer_hash[:12]}: "
            f"its files were changed; use another checkpoint of the run"
        )
    return files, tokenizer


def check_template(chosen: Template, tokenizer: Tokenizer, path: Path) -> None:
    """`ConfigError` where the tokenizer cannot write the template: the model would be shown another text."""
    shown = tokenizer.decode(tokenizer.encode(chosen.text))
    if shown.strip() != chosen.text.strip():
        raise ConfigError(
            f"template '{chosen.name}' and the tokenizer of {path} do not fit: the text comes back as {shown!r}; "
            f"use another template, or another tokenizer"
        )


def _prompts_on_rank_0(run: Run, groups: Groups, chosen: Template, tokenizer: Tokenizer) -> list[Prompts]:
    """The prompts of the stage's problems, then of each validation set, read once for all ranks."""
    stage: RLStage = run.stage
    folder = run.inputs.get("text")

    def made(of: ProblemSet, longest_tokens: int) -> Prompts:
        return prompts(stage_problems(of, folder), chosen, tokenizer, longest_tokens, of.path, bos=stage.bos)

    def read() -> list[Prompts]:
        held_out = [made(one, stage.validation.max_prompt_tokens) for one in stage.validation.sets]
        return [made(stage.problems, stage.rollouts.max_prompt_tokens), *held_out]

    return from_rank_0(groups, "reading problems", read)


def frozen_reference(run: Run, groups: Groups) -> list[GPTModel] | None:
    """The weights that the stage started from, frozen, where a KL penalty wants them."""
    stage: RLStage = run.stage
    if not stage.objective.kl_coefficient:
        return None
    path, _ = parent_checkpoint(run)
    chunks = load_chunks(path, stage.model, stage.precision, groups)
    for chunk in chunks:
        chunk.requires_grad_(False)
        chunk.eval()
    return chunks


def _progress(stage: RLStage, began: Began, manifest: Manifest) -> RLProgress:
    if began.how != "resume":
        return RLProgress(lineage_tokens=began.progress.lineage_tokens)
    return progress_from_json(stage.lengths, manifest.reinforcement, f"{began.path}: manifest.json: reinforcement")
