"""The paper's controlled experiments (its section 3), each arm a derivation of another. All from Llama-3.2-3B.

What an arm is worth shows in reinforcement learning from it: each has a stage `rl_ARM`, the same for all but for what an
experiment changes. Arms of 20B tokens from Llama's weights share one folder of runs, so an arm that two experiments
name is trained once; the decay pilots share the 3B graph's folder, and so its stable stage.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.budget import nearest_budget
from megatron_ext.config.mixture import Mixture
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, ReportStage, RLStage, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from recipes import mixtures, models, octothinker, rl
from recipes.mixtures import mix

BILLION = 10**9
BATCH = octothinker.BATCH
SEQUENCES, LENGTH = BATCH.sequences_per_batch, BATCH.sequence_length
ARM = nearest_budget(20 * BILLION, SEQUENCES, LENGTH)  # 4,768 steps
LONG_ARM = nearest_budget(100 * BILLION, SEQUENCES, LENGTH)  # 23,842 steps
PILOT = nearest_budget(10 * BILLION, SEQUENCES, LENGTH)  # 2,384 steps
# The pilots' names say 130B; a checkpoint stands at a whole step: 30,994 of them.
PILOT_START_TOKENS = octothinker.STABLE.tokens_before(octothinker.STABLE.nearest_step(130 * BILLION))

CORPUS = TokenizeStage(name="corpus", sources=mixtures.ABLATION_SOURCES, tokenizer=octothinker.TOKENIZER)
LLAMA = octothinker.llama_3b().stage("llama")

# Section 3.1: 20B tokens, cosine from 3e-5 to 3e-6, no warm-up.
WEB_PRO = TrainStage(
    name="web_pro",
    start=Weights(stage="llama"),
    corpus="corpus",
    model=models.llama_3_2_3b(),
    mixture=mix(megamath_web_pro=1.0),
    budget=ARM,
    schedule=Schedule(shape="cosine", peak=3e-5, floor_fraction=0.1),
    plan=octothinker.PLAN_3B,
)
WEB_PRO_MAX = replace(WEB_PRO, name="web_pro_max", mixture=mix(megamath_web_pro_max=1.0))
FINEMATH = replace(WEB_PRO, name="finemath", mixture=mix(finemath_4plus=1.0))
# Web to questions and answers 9 : 1.
SHORT_COT = replace(WEB_PRO, name="short_cot", mixture=mix(megamath_web_pro=0.9, megamath_qa=0.1))
LONG_COT = replace(WEB_PRO, name="long_cot", mixture=mix(megamath_web_pro=0.9, openr1_math_220k=0.1))
# Instruction to web to questions and answers 1 : 89 : 10.
SHORT_COT_INSTRUCTION = replace(
    SHORT_COT, name="short_cot_instruction", mixture=mix(instruction=0.01, megamath_web_pro=0.89, megamath_qa=0.10)
)
LONG_COT_INSTRUCTION = replace(
    LONG_COT, name="long_cot_instruction", mixture=mix(instruction=0.01, megamath_web_pro=0.89, openr1_math_220k=0.10)
)
WEB_PRO_MAX_100B = replace(WEB_PRO_MAX, name="web_pro_max_100b", budget=LONG_ARM)
LONG_CHAINS = (LONG_COT, LONG_COT_INSTRUCTION)


def web_quality() -> Graph:
    """Which web corpus: FineMath-4plus, MegaMath-Web-Pro, MegaMath-Web-Pro-Max."""
    return _with_learning("web_quality", "Quality of the web corpus", FINEMATH, WEB_PRO, WEB_PRO_MAX)


def qa_format() -> Graph:
    """Questions and answers beside the web: none, short chains of thought, long ones."""
    return _with_learning("qa_format", "Format of questions and answers", WEB_PRO, SHORT_COT, LONG_COT)


def instruction() -> Graph:
    """Short and long chains of thought, without and with 1 % of instructions."""
    arms = (SHORT_COT, SHORT_COT_INSTRUCTION, LONG_COT, LONG_COT_INSTRUCTION)
    return _with_learning("instruction", "Instruction data", *arms)


def token_budget() -> Graph:
    """One run of 100B tokens, and reinforcement learning from its points at 20B, 70B and 100B."""
    starts = {billions: LONG_ARM.tokens_before(LONG_ARM.nearest_step(billions * BILLION)) for billions in (20, 70, 100)}
    points = [
        replace(_learning(WEB_PRO_MAX_100B), name=f"rl_web_pro_max_{billions}b", start=Weights(stage="web_pro_max_100b", tokens=tokens))
        for billions, tokens in starts.items()
    ]
    return _experiment("token_budget", "Token budget", WEB_PRO_MAX_100B, *points)


def template() -> Graph:
    """The prompt's template, simple or complex, on the arm of long chains of thought with instructions, at 8,192 tokens."""
    return _experiment("template", "Template of the prompts", LONG_COT_INSTRUCTION, _learning(LONG_COT_INSTRUCTION), _complex())


def lengths() -> Graph:
    """The cap of responses on the same arm, under the complex template: 8,192 throughout, or 2,048, then 4,096, then 8,192."""
    growing = replace(_complex(), name="rl_long_cot_instruction_growing", lengths=rl.GROWING)
    return _experiment("lengths", "Cap of the responses", LONG_COT_INSTRUCTION, _complex(), growing)


def decay_qa() -> Graph:
    """Pilots of 10B tokens from stable at 130B: which questions and answers, and how many."""
    singles = {"megamath_qa": "megamath_qa", "openr1": "openr1_math_220k", "omi2": "openmathinstruct_2"}
    pilots = [_pilot(f"pilot_{name}_{percent}", {source: percent}) for name, source in singles.items() for percent in (10, 20, 30, 40)]
    ratios = {"1_2": (10, 20), "1_1": (15, 15), "2_1": (20, 10)}  # OpenR1 to OpenMathInstruct-2, within 30 %
    pilots += [
        _pilot(f"pilot_openr1_omi2_{name}", {"openr1_math_220k": r1, "openmathinstruct_2": omi}) for name, (r1, omi) in ratios.items()
    ]
    learnt = [_learning_from_pilot(pilot) for pilot in pilots]
    return _from_stable("report_decay_qa", "Decay pilots: questions and answers", [*pilots, *learnt])


def decay_shape() -> Graph:
    """Both shapes of the decay: cosine to 10 % of the stable rate (the default), and constant at 10 %."""
    graph = octothinker.llama_3b()
    cosines = [stage for stage in graph.stages if isinstance(stage, TrainStage) and isinstance(stage.start, Branch)]
    tenth = Schedule(shape="constant", peak=graph.stage("stable").schedule.peak / 10)
    constants = [replace(stage, name=stage.name.replace("decay", "constant"), schedule=tenth) for stage in cosines]
    return _from_stable("report_decay_shape", "Shape of the decay", [*cosines, *constants])


def _pilot(name: str, percent_by_source: dict[str, int]) -> TrainStage:
    """5 % general web, 10 % instruction, the questions and answers, and MegaMath-Web-Pro for the rest."""
    web = 85 - sum(percent_by_source.values())
    percents = {"megamath_web_pro": web, "dclm_baseline": 5, "instruction": 10, **percent_by_source}
    mixture: Mixture = mix(**{source: percent / 100 for source, percent in percents.items()})
    start = Branch(stage="stable", tokens=PILOT_START_TOKENS)
    decay: TrainStage = octothinker.llama_3b().stage("decay_long")
    return replace(decay, name=name, start=start, mixture=mixture, budget=PILOT)


def _learning(arm: TrainStage) -> RLStage:
    """Reinforcement learning from an arm: 8,192 tokens from long chains of thought, 4,096 from all others (section 3).

    The template is simple: run names mark another one in the template and length experiments and in some pilots alone.
    """
    caps = rl.FIXED_8K if arm in LONG_CHAINS else rl.FIXED
    base: RLStage = octothinker.llama_3b().stage("rl_base")
    return replace(base, name=f"rl_{arm.name}", start=Weights(stage=arm.name), lengths=caps)


def _complex() -> RLStage:
    return replace(_learning(LONG_COT_INSTRUCTION), name="rl_long_cot_instruction_complex", template="complex")


def _learning_from_pilot(pilot: TrainStage) -> RLStage:
    """The pilots with OpenR1, which has long chains of thought, took the complex template, as their run names say."""
    learnt = _learning(pilot)
    return replace(learnt, template="complex", lengths=rl.FIXED_8K) if "openr1_math_220k" in pilot.mixture.sources else learnt


def _with_learning(name: str, title: str, *arms: TrainStage) -> Graph:
    return _experiment(name, title, *arms, *(_learning(arm) for arm in arms))


def _experiment(name: str, title: str, *arms: TrainStage | RLStage) -> Graph:
    report = ReportStage(name=f"report_{name}", stages=tuple(arm.name for arm in arms), title=title)
    return Graph(name="ablations_3b", stages=(CORPUS, LLAMA, *arms, report))


def _from_stable(report_name: str, title: str, arms: list[TrainStage | RLStage]) -> Graph:
    graph = octothinker.llama_3b()
    shared = tuple(graph.stage(name) for name in ("corpus", "llama", "stable"))
    report = ReportStage(name=report_name, stages=("stable", *(arm.name for arm in arms)), title=title)
    return replace(graph, stages=(*shared, *arms, report))
