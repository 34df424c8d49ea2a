"""The paper's controlled experiments (its section 3), each arm a derivation of another. All from Llama-3.2-3B.

Arms of 20B tokens from Llama's weights share one folder of runs, so an arm that two experiments
name is trained once; the decay pilots share the 3B graph's folder, and so its stable stage.
"""

from __future__ import annotations

from dataclasses import replace

from megatron_ext.config.budget import nearest_budget
from megatron_ext.config.mixture import Mixture
from megatron_ext.config.schedule import Schedule
from megatron_ext.config.stages import Branch, ReportStage, TokenizeStage, TrainStage, Weights
from megatron_ext.launch.graph import Graph
from recipes import mixtures, models, octothinker
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
# One run; the plan pins a checkpoint every 10B tokens, and so at 20B, 70B and 100B, where RL starts from.
WEB_PRO_MAX_100B = replace(WEB_PRO_MAX, name="web_pro_max_100b", budget=LONG_ARM)


def web_quality() -> Graph:
    """Which web corpus: FineMath-4plus, MegaMath-Web-Pro, MegaMath-Web-Pro-Max."""
    return _experiment("web_quality", "Quality of the web corpus", FINEMATH, WEB_PRO, WEB_PRO_MAX)


def qa_format() -> Graph:
    """Questions and answers beside the web: none, short chains of thought, long ones."""
    return _experiment("qa_format", "Format of questions and answers", WEB_PRO, SHORT_COT, LONG_COT)


def instruction() -> Graph:
    """Short and long chains of thought, without and with 1 % of instructions."""
    arms = (SHORT_COT, SHORT_COT_INSTRUCTION, LONG_COT, LONG_COT_INSTRUCTION)
    return _experiment("instruction", "Instruction data", *arms)


def token_budget() -> Graph:
    """One run of 100B tokens; its points at 20B, 70B and 100B are what is compared."""
    return _experiment("token_budget", "Token budget", WEB_PRO_MAX_100B)


def decay_qa() -> Graph:
    """Pilots of 10B tokens from stable at 130B: which questions and answers, and how many."""
    singles = {"megamath_qa": "megamath_qa", "openr1": "openr1_math_220k", "omi2": "openmathinstruct_2"}
    pilots = [_pilot(f"pilot_{name}_{percent}", {source: percent}) for name, source in singles.items() for percent in (10, 20, 30, 40)]
    ratios = {"1_2": (10, 20), "1_1": (15, 15), "2_1": (20, 10)}  # OpenR1 to OpenMathInstruct-2, within 30 %
    pilots += [
        _pilot(f"pilot_openr1_omi2_{name}", {"openr1_math_220k": r1, "openmathinstruct_2": omi}) for name, (r1, omi) in ratios.items()
    ]
    return _from_stable("report_decay_qa", "Decay pilots: questions and answers", pilots)


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


def _experiment(name: str, title: str, *arms: TrainStage) -> Graph:
    report = ReportStage(name=f"report_{name}", stages=tuple(arm.name for arm in arms), title=title)
    return Graph(name="ablations_3b", stages=(CORPUS, LLAMA, *arms, report))


def _from_stable(report_name: str, title: str, arms: list[TrainStage]) -> Graph:
    graph = octothinker.llama_3b()
    shared = tuple(graph.stage(name) for name in ("corpus", "llama", "stable"))
    report = ReportStage(name=report_name, stages=("stable", *(arm.name for arm in arms)), title=title)
    return replace(graph, stages=(*shared, *arms, report))
