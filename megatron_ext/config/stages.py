"""The kinds of stage a graph is made of, each with a science part (hashed) and a plan part.

Everything outside `plan` is science: what the numbers mean. `plan` is how they are computed.
An edge is a stage's name, or a `Start` that names a stage and a point of it in tokens.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Union

from pydantic import Field

from megatron_ext.config.base import Json, config, to_json
from megatron_ext.config.budget import Budget
from megatron_ext.config.faults import Faults
from megatron_ext.config.mixture import Mixture
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.optimizer import Optimizer
from megatron_ext.config.plan import Precision, TrainPlan, at_least, check_plan
from megatron_ext.config.rl import Lengths, Objective, Rollouts, check_staleness
from megatron_ext.config.rl_plan import RLPlan, check_rl_plan
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.tasks import ProblemSet, RewardName, TemplateName, Validation
from megatron_ext.errors import ConfigError


@config
class Scratch:
    """Random weights from the stage's seed."""

    kind: Literal["scratch"] = "scratch"


@config
class Weights:
    """Weights only, from a stage's checkpoint: fresh optimizer, tokens counted from zero."""

    stage: str
    kind: Literal["weights"] = "weights"
    tokens: int | None = None  # None: the stage's last checkpoint


@config
class Branch:
    """Weights and optimizer state from a stage's checkpoint; new data, new schedule, same lineage."""

    stage: str
    kind: Literal["branch"] = "branch"
    tokens: int | None = None  # None: the stage's last checkpoint


Start = Annotated[Union[Scratch, Weights, Branch], Field(discriminator="kind")]


@config
class Documents:
    """The four words about document boundaries inside packed sequences; the paper is silent on them.

    attention: 'across' lets a token see earlier documents of its sequence, 'within' does not.
    positions: 'continue' counts through the sequence, 'restart' counts from 0 in each document.
    eod_loss: whether predicting the token after an end-of-document counts.
    bos: whether each document starts with the tokenizer's BOS (a property of the shards).
    """

    attention: Literal["across", "within"] = "across"
    positions: Literal["continue", "restart"] = "continue"
    eod_loss: bool = True
    bos: bool = False

    def __post_init__(self) -> None:
        if self.positions == "restart" and self.attention == "across":
            raise ConfigError(
                "documents: positions='restart' with attention='across' would give two tokens of one sequence the same position, "
                "and no Megatron kernel offers it; use attention='within' or positions='continue'"
            )


@config
class Source:
    """One body of text: where it lies, how it is read, how often it may be repeated."""

    name: str
    paths: tuple[str, ...]  # JSONL files or globs; relative ones are read from the text stage's folder
    max_epochs: float
    tokens: int = 0  # tokens it is known to hold (the plan's arithmetic before tokenising); 0: unknown
    heldout_fraction: float = 0.0  # documents whose id hashes below this are never trained on
    text_key: str = "text"
    id_key: str = "id"
    licence: str = ""
    provenance: str = ""

    def __post_init__(self) -> None:
        if not self.paths:
            raise ConfigError(f"source {self.name}: paths is empty; name its JSONL files")
        if not 0 <= self.heldout_fraction < 1:
            raise ConfigError(f"source {self.name}: heldout_fraction is {self.heldout_fraction}, must lie in [0, 1)")
        if not self.max_epochs > 0:
            raise ConfigError(f"source {self.name}: max_epochs is {self.max_epochs}, must be positive")


@config
class WorkersPlan:
    """How many processes a data stage uses."""

    workers: int = 1

    def __post_init__(self) -> None:
        at_least(self, 1, "workers")


@config
class TokenizePlan(WorkersPlan):
    """The same for a tokenize stage, whose slices several jobs can do side by side."""

    parts: int = 1  # on a cluster: jobs of an array, each with `workers`; the stage's own job comes after them and puts all together

    def __post_init__(self) -> None:
        at_least(self, 1, "workers", "parts")


@config
class TextStage:
    """Demo only: real prose read from this machine's Python packages, and generated problems."""

    name: str
    math_prose_bytes: int
    general_prose_bytes: int
    short_problems: int
    long_problems: int
    instruction_problems: int
    rl_problems: int  # what reinforcement learning asks; as trainable as the worked ones
    evaluation_problems: int  # of facts that no text and no RL problem states
    seed: int
    kind: Literal["text"] = "text"
    plan: WorkersPlan = WorkersPlan()


@config
class TokenizerStage:
    """Demo only: a SentencePiece tokenizer trained on the text stage's output, digits split."""

    name: str
    text: str
    vocab_size: int
    kind: Literal["tokenizer"] = "tokenizer"
    plan: WorkersPlan = WorkersPlan()


@config
class TokenizeStage:
    """Text to Megatron shards, every source of the graph."""

    name: str
    sources: tuple[Source, ...]
    tokenizer: str  # a tokenizer stage's name, or a folder with tokenizer.json or a .model file
    text: str | None = None  # a text stage's name; None: the sources' paths stand alone
    bos: bool = False
    on_bad_line: Literal["refuse", "skip"] = "refuse"
    documents_per_shard: int = 0  # 0: one shard per source and worker slice
    kind: Literal["tokenize"] = "tokenize"
    plan: TokenizePlan = TokenizePlan()

    def __post_init__(self) -> None:
        names = [s.name for s in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"stage {self.name}: source '{name}' stands {names.count(name)} times")


@config
class ConvertStage:
    """A Hugging Face model into a Megatron checkpoint."""

    name: str
    model_id: str  # a folder, or an id on the hub
    model: ModelConfig  # what its config.json must say
    revision: str | None = None  # of a hub id: a commit, or what moves, a branch or tag; the commit is recorded
    allow_pickle: bool = False  # read .bin files where there are no safetensors
    resize_vocabulary: bool = False  # give rows to ids that the tokenizer has and the embedding lacks
    kind: Literal["convert"] = "convert"
    plan: WorkersPlan = WorkersPlan()


@config
class TrainStage:
    """One stage of training: a start, data, a budget, a schedule."""

    name: str
    start: Start
    corpus: str
    model: ModelConfig
    mixture: Mixture
    budget: Budget
    schedule: Schedule
    optimizer: Optimizer = Optimizer()
    documents: Documents = Documents()
    faults: Faults = Faults()
    precision: Precision = "bf16"
    seed: int = 1234
    kind: Literal["train"] = "train"
    plan: TrainPlan = TrainPlan()

    def __post_init__(self) -> None:
        check_plan(self.model, self.budget, self.precision, self.plan)
        if self.documents.attention == "within" and self.plan.device == "gpu":
            raise ConfigError(
                f"stage {self.name}: documents.attention='within' is available with plan.device=cpu only: Transformer Engine's causal "
                f"attention ignores the mask that keeps documents apart; use attention='across', or plan.device=cpu with precision=fp32"
            )
        for key in ("pin_tokens", "export_tokens"):
            for tokens in getattr(self.plan, key):
                try:
                    self.budget.step_at(tokens)
                except ConfigError as error:
                    raise ConfigError(f"stage {self.name}: plan.{key}: {error}") from None
        if self.schedule.warmup_tokens > self.budget.tokens:
            raise ConfigError(
                f"stage {self.name}: warmup_tokens {self.schedule.warmup_tokens:,} exceed the stage's {self.budget.tokens:,} tokens"
            )

    @property
    def num_steps(self) -> int:
        """Steps of the whole stage."""
        return self.budget.steps

    @property
    def peak_learning_rate(self) -> float:
        """The highest rate of the stage."""
        return self.schedule.peak


@config
class RLStage:
    """GRPO from a checkpoint: prompts, their template and reward, rollouts, lengths, objective.

    Without a word the numbers are the paper's (its section 4) and, where it is silent, its trainer's: AdamW with betas 0.9 and
    0.999 and weight decay 0.01, a constant rate without warm-up, gradients clipped at 1.
    """

    name: str
    start: Weights
    model: ModelConfig
    problems: ProblemSet
    validation: Validation
    lengths: Lengths
    steps: int  # rollout steps; each is `rollouts.updates_per_step` updates
    text: str | None = None  # a text stage's name; None: the paths of the problems stand alone
    template: TemplateName = "complex"
    bos: bool = False  # whether prompts open with the tokenizer's BOS; right where the documents of the training before did
    reward: RewardName = "correct"
    rollouts: Rollouts = Rollouts()
    objective: Objective = Objective()
    learning_rate: float = 1e-6
    warmup_steps: int = 0  # rollout steps of a linear rise
    optimizer: Optimizer = Optimizer(weight_decay=0.01, beta2=0.999)
    precision: Precision = "bf16"
    seed: int = 1
    kind: Literal["rl"] = "rl"
    plan: RLPlan = RLPlan()

    def __post_init__(self) -> None:
        for key, least in (("steps", 1), ("warmup_steps", 0)):
            if getattr(self, key) < least:
                raise ConfigError(f"stage {self.name}: {key} is {getattr(self, key)}, must be at least {least}")
        if not 0 < self.learning_rate < 1:
            raise ConfigError(f"stage {self.name}: learning_rate is {self.learning_rate}, must lie in (0, 1)")
        check_staleness(self.rollouts, self.objective)
        self._check_positions()
        check_rl_plan(self.model, self.longest_tokens, self.precision, self.plan)

    def _check_positions(self) -> None:
        """The context limit is the model's positions, not the length that it was trained with."""
        cap = self.lengths.largest_cap_tokens
        rows = [("rollouts", self.rollouts.max_prompt_tokens, cap)]
        if self.validation.sets:
            rows.append(("validation", self.validation.max_prompt_tokens, self.validation.cap_tokens or cap))
        for where, prompt, response in rows:
            if prompt + response > self.model.max_positions:
                raise ConfigError(
                    f"stage {self.name}: {where}: a prompt of {prompt:,} tokens and a response of {response:,} are {prompt + response:,}, "
                    f"but model {self.model.name} has {self.model.max_positions:,} positions; lower the cap or max_prompt_tokens"
                )

    @property
    def num_steps(self) -> int:
        """Rollout steps of the whole stage."""
        return self.steps

    @property
    def peak_learning_rate(self) -> float:
        """The highest rate of the stage."""
        return self.learning_rate

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest sequence that is trained on: prompt and response."""
        return self.rollouts.max_prompt_tokens + self.lengths.largest_cap_tokens

    @property
    def longest_context_tokens(self) -> int:
        """Tokens of the longest sequence that is sampled, in validation too."""
        cap = self.validation.cap_tokens or self.lengths.largest_cap_tokens
        return max(self.longest_tokens, self.validation.max_prompt_tokens + cap if self.validation.sets else 0)


@config
class ReportStage:
    """Figures and one page from the run folders of the stages it names."""

    name: str
    stages: tuple[str, ...]
    title: str
    kind: Literal["report"] = "report"
    plan: WorkersPlan = WorkersPlan()


Stage = Annotated[
    Union[TextStage, TokenizerStage, TokenizeStage, ConvertStage, TrainStage, RLStage, ReportStage],
    Field(discriminator="kind"),
]


def inputs(stage: Any) -> dict[str, str]:
    """What a stage reads: role -> name of another stage of the graph."""
    match stage:
        case TokenizerStage():
            return {"text": stage.text}
        case TokenizeStage():
            text = {"text": stage.text} if stage.text is not None else {}
            is_path = "/" in stage.tokenizer
            return text if is_path else {**text, "tokenizer": stage.tokenizer}
        case TrainStage():
            start = {} if isinstance(stage.start, Scratch) else {"start": stage.start.stage}
            return {**start, "corpus": stage.corpus}
        case RLStage():
            return {"start": stage.start.stage, **({"text": stage.text} if stage.text is not None else {})}
        case ReportStage():
            return {name: name for name in stage.stages}
    return {}


def science(stage: Any) -> Json:
    """The part of a stage that is hashed: everything but its plan."""
    values: Json = to_json(stage)
    del values["plan"]
    return values
