"""What a user can hand to reinforcement learning that teaches nothing, or the wrong thing: it is said, or refused with its cause.

Rewards that are all equal, a checkpoint whose tokenizer is not that of its weights, a template that the tokenizer cannot write.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megatron_ext.attempts import begin_attempt
from megatron_ext.config.rl import Objective
from megatron_ext.config.stages import ConvertStage
from megatron_ext.conversion.to_megatron import hf_to_megatron
from megatron_ext.errors import CheckpointError, ConfigError
from megatron_ext.provenance import read_manifest, write_manifest
from megatron_ext.rl.begin import carried_tokenizer, check_template
from megatron_ext.rl.measures import rollout_record, steps_told_little
from megatron_ext.rl.rollouts import judged
from megatron_ext.rl.stage import RLLogHook, RLMetricsHook
from megatron_ext.runs import Run, open_run, write_run
from megatron_ext.tasks.templates import TEMPLATES
from megatron_ext.tokenizer import load_tokenizer
from megatron_ext.training.hooks import Context, Hooks, LogHook
from megatron_ext.training.state import Progress
from tests import ranks, rl_runs
from tests.small_models import hugging_face_folder
from tests.unit import small_tokenizers
from tests.unit.test_prompts import without_colons
from tests.unit.test_rl_measures import BATCH, NO_BOX, RIGHT, WRONG, rollout

EQUAL = tuple(rollout(4, verdict, -1.0) for verdict in (WRONG, NO_BOX, WRONG, WRONG))
DIFFERENT = tuple(rollout(4, RIGHT, 1.0) if number == 0 else one for number, one in enumerate(EQUAL))


# --- all rewards equal ----------------------------------------------------------------------------------


@pytest.fixture(params=[4, 1], ids=["groups of four", "groups of one"])
def group(request) -> int:
    return request.param


def stage_run(folder: Path, group: int) -> Run:
    """A stage that could begin, with so many responses a prompt."""
    start = write_run(folder / "llama", "test", ConvertStage(name="llama", model_id="some/model", model=rl_runs.MODEL), {})
    made = rl_runs.stage(folder)
    return rl_runs.rl_run(start, replace(made, rollouts=replace(made.rollouts, responses_per_prompt=group)))


def warnings(run: Run, *attempts: tuple[int, int], differ: tuple[int, ...] = (), forgets: bool = False) -> list[str]:
    """What attempts, each from after a step to a step, say of their rewards, which differ in some steps."""
    return ranks.run(_warnings, rl_runs.CPU, str(run.path), attempts, differ, forgets)[0]


def _warnings(groups: Any, path: str, attempts: Any, differ: Any, forgets: bool) -> list[str]:
    run, found = open_run(Path(path)), []
    for first, last in attempts:
        attempt = begin_attempt(run)
        log = RLLogHook(found.append)
        if forgets:
            log.start = partial(LogHook.start, log)  # type: ignore[method-assign]
        hooks = Hooks([RLMetricsHook(None), log])
        began = Context(run, attempt, groups, None, Progress(first, 0, 0), "resume")  # no hook here looks at the weights
        hooks.call("start", began)
        for step in range(first + 1, last + 1):
            here = replace(began, progress=Progress(step, 0, 0))
            hooks.call("step", here, record(step in differ, run.stage.rollouts.responses_per_prompt))
        hooks.call("end", here)
        attempt.finish("killed")
    return found


def record(differ: bool, group: int) -> dict[str, Any]:
    """What the loop records of a step."""
    rollouts = DIFFERENT if differ else EQUAL
    share = judged(Objective(), "correct", rollouts, group).informative_share
    measured = {"informative_share": share, "loss": 0.0, "grad_norm": 0.0, "step_seconds": 1.0}
    return {**rollout_record(replace(BATCH, rollouts=rollouts), group), **measured}


def steps(found: list[str]) -> list[tuple[str, str]]:
    """(at step, for so many steps) of each warning."""
    return [match.groups() for one in found if (match := re.match(r"rl, step (\d+): WARNING: for (\d+) rollout steps fewer than 5%", one))]


def test_all_rewards_equal_for_many_steps_is_said_with_the_share_of_informative_groups(tmp_path, group):
    found = warnings(stage_run(tmp_path, group), (0, 45))
    assert steps(found) == [("10", "10"), ("20", "20"), ("40", "40")], "doubling: a log of nothing else helps nobody"
    assert all("of the groups earned different rewards (now 0.0%; rewards -1 to -1)" in one for one in found)
    what = "next to nothing is learnt. Look at the recorded rollouts" if group > 1 else "nothing to compare it with; raise rollouts."
    assert all(what in one for one in found)


def test_rewards_that_differ_begin_the_count_anew(tmp_path):
    assert steps(warnings(stage_run(tmp_path, 4), (0, 25), differ=(5,))) == [("15", "10"), ("25", "20")]


def test_groups_of_one_are_never_informative(tmp_path):
    """Their rewards differ from each other's, but within no group."""
    assert steps(warnings(stage_run(tmp_path, 1), (0, 10), differ=tuple(range(1, 11)))) == [("10", "10")]


def test_the_count_survives_a_resume(tmp_path):
    """The second attempt begins at step 25: it has 20 steps behind it, and does steps 26 to 33 again."""
    cut_off = ((0, 33), (25, 46))
    assert steps(warnings(stage_run(tmp_path / "right", 4), *cut_off, differ=(5,))) == [("15", "10"), ("25", "20"), ("45", "40")]
    wrong = warnings(stage_run(tmp_path / "wrong", 4), *cut_off, differ=(5,), forgets=True)
    assert steps(wrong) == [("15", "10"), ("25", "20"), ("35", "10"), ("45", "20")], "a count that is lost is seen"


def test_the_count_of_records_at_intervals():
    shares = {10: 0.5, 20: 0.0, 30: 0.04, 40: 0.0}
    records = [{"step": step, "informative_share": share} for step, share in shares.items()]
    assert steps_told_little(records, 35) == 16, "from step 20, and as far as the checkpoint"
    assert steps_told_little(records, 10) == 0
    assert steps_told_little([], 7) == 0


# --- a tokenizer that is not the weights', or not the template's ------------------------------------------


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A model with its tokenizer."""
    path = tmp_path_factory.mktemp("converted")
    hf_to_megatron(str(hugging_face_folder(path / "hugging_face", "llama", num_hidden_layers=2)), path / "checkpoint")
    return path / "checkpoint"


@pytest.fixture
def checkpoint(converted, tmp_path) -> Path:
    """One that may be altered."""
    return shutil.copytree(converted, tmp_path / "checkpoint")


def test_a_checkpoint_whose_tokenizer_is_not_that_of_its_weights_is_refused(checkpoint, tmp_path):
    manifest = read_manifest(checkpoint)
    assert carried_tokenizer(checkpoint, manifest)[1].identity_hash == manifest.tokenizer_hash
    other = small_tokenizers.hugging_face(tmp_path / "other", vocab_size=270) / "tokenizer.json"
    (checkpoint / "tokenizer.json").write_bytes(other.read_bytes())
    digest = (len(other.read_bytes()), hashlib.sha256(other.read_bytes()).hexdigest())
    changed = replace(manifest, files={**manifest.files, "tokenizer.json": digest})  # whoever put it there made its digests fit
    write_manifest(checkpoint, changed)
    with pytest.raises(CheckpointError, match=f"carries tokenizer .*, its weights were trained with {manifest.tokenizer_hash[:12]}"):
        carried_tokenizer(checkpoint, changed)


def test_a_checkpoint_without_a_tokenizer_is_refused(checkpoint):
    manifest = read_manifest(checkpoint)
    bare = replace(manifest, files={name: value for name, value in manifest.files.items() if "tokenizer" not in name})
    write_manifest(checkpoint, bare)
    with pytest.raises(CheckpointError, match="carries no tokenizer, so there is nothing to make prompts with"):
        carried_tokenizer(checkpoint, bare)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_the_tokenizer_cannot_write_is_refused(tmp_path, name):
    chosen = TEMPLATES[name]
    check_template(chosen, load_tokenizer(small_tokenizers.hugging_face(tmp_path / "bytes")), tmp_path)
    with pytest.raises(ConfigError, match=f"template '{name}' and the tokenizer of .* do not fit: the text comes back as "):
        check_template(chosen, without_colons(tmp_path), tmp_path)
