"""The paper's data: bodies of text with what is known of them, and its mixtures as rows of (source, weight).

Weights are shares of tokens. Tables and sections are the OctoThinker paper's (arXiv 2506.20512).
"""

from __future__ import annotations

from megatron_ext.config.mixture import Mixture, Row
from megatron_ext.config.stages import Source

DATA_ROOT = "data"  # relative to where the run is launched; data/<source>/*.jsonl with "id" and "text"
HELDOUT_FRACTION = 0.002  # ours, for validation losses; the paper holds nothing out
MAX_EPOCHS = 4.0  # repeating text up to 4 times costs next to nothing (Muennighoff et al. 2023)
BILLION = 10**9

MEGAMATH_LICENCE = "ODC-By 1.0, and Common Crawl's terms of use"


def mix(**weights: float) -> Mixture:
    """A mixture from source=weight, in the order given."""
    return Mixture(rows=tuple(Row(source=source, weight=weight) for source, weight in weights.items()))


def _source(name: str, provenance: str, licence: str, tokens: int = 0, max_epochs: float = MAX_EPOCHS) -> Source:
    return Source(
        name=name,
        paths=(f"{DATA_ROOT}/{name}/*.jsonl",),
        max_epochs=max_epochs,
        tokens=tokens,
        heldout_fraction=HELDOUT_FRACTION,
        licence=licence,
        provenance=provenance,
    )


# Web text and code. Token counts are those of the data sets' cards.
MEGAMATH_WEB_PRO_MAX = _source(
    "megamath_web_pro_max",
    "OctoThinker/MegaMath-Web-Pro-Max: MegaMath-Web, filtered by a fastText classifier at 0.4, rewritten by Llama-3.1-70B-Instruct",
    "ODC-By 1.0; rewritten by a Llama model, whose licence applies to its output",
    tokens=738 * BILLION // 10,
    max_epochs=2.5,  # the stable stage draws 152B of 73.8B: 2.1 epochs
)
MEGAMATH_WEB_PRO = _source(
    "megamath_web_pro",
    "LLM360/MegaMath, megamath-web-pro",
    MEGAMATH_LICENCE,
    tokens=151 * BILLION // 10,
    max_epochs=2.0,  # a 20B ablation draws 1.3 epochs, a decay 0.8
)
FINEMATH_4PLUS = _source(
    "finemath_4plus",
    "HuggingFaceTB/finemath, finemath-4plus",
    "ODC-By 1.0",
    tokens=96 * BILLION // 10,
    max_epochs=2.5,  # a 20B ablation draws 2.1 epochs
)
DCLM_BASELINE = _source(
    "dclm_baseline",
    "mlfoundations/dclm-baseline-1.0: a sample; stable and a decay draw 22B",
    "CC-BY-4.0",
    max_epochs=1.0,  # far larger than what is drawn
)
MEGAMATH_TEXT_CODE_BLOCK = _source(
    "megamath_text_code_block",
    "LLM360/MegaMath, megamath-text-code-block (synthetic)",
    MEGAMATH_LICENCE,
    tokens=503 * BILLION // 10,
    max_epochs=1.0,  # 0.42 epochs
)
MEGAMATH_CODE = _source(
    "megamath_code",
    "LLM360/MegaMath, megamath-code (ships references to files, not their text)",
    MEGAMATH_LICENCE + "; each file's own licence",
    tokens=281 * BILLION // 10,
    max_epochs=1.0,  # 0.09 epochs
)
MEGAMATH_TRANSLATED_CODE = _source(
    "megamath_translated_code",
    "LLM360/MegaMath, megamath-translated-code (synthetic)",
    MEGAMATH_LICENCE,
    tokens=72 * BILLION // 10,
    max_epochs=1.0,  # 0.36 epochs
)

# Questions and answers, each rendered as plain text, without a chat template, before tokenizing.
MEGAMATH_QA = _source(
    "megamath_qa",
    "LLM360/MegaMath, megamath-qa (synthetic, mined from web pages; short chains of thought)",
    MEGAMATH_LICENCE,
    tokens=7 * BILLION,
    max_epochs=2.0,  # stable draws 1.5 epochs, the Short decay brings it to 1.6
)
OPENR1_MATH_220K = _source(
    "openr1_math_220k",
    "open-r1/OpenR1-Math-220k: question and the text inside the think tags, joined by a line break (long chains of thought)",
    "Apache-2.0",
)
AM_DEEPSEEK_DISTILLED_40M = _source(
    "am_deepseek_distilled_40m",
    "a-m-team/AM-DeepSeek-Distilled-40M: mathematics answered by DeepSeek-R1 (long chains of thought)",
    "see the data set's card",
)
OPENMATHINSTRUCT_2 = _source(
    "openmathinstruct_2",
    "nvidia/OpenMathInstruct-2: from GSM8K and MATH seeds (short chains of thought)",
    "CC-BY-4.0",
)
NUMINAMATH_1_5 = _source(
    "numinamath_1_5",
    "AI-MO/NuminaMath-1.5: competition problems with solutions (short chains of thought)",
    "Apache-2.0",
    max_epochs=6.0,  # 0.9M problems: at some 500 tokens each, the 2.1B of a decay repeat them about 5 times
)
INSTRUCTION = _source(
    "instruction",
    "TULU3-sft-personas-instruction-following, WildChat and UltraChat-200K, high-quality conversations only, as User: and Assistant: turns",
    "ODC-By (TULU3 personas); see the cards of WildChat and UltraChat",
    tokens=8 * BILLION // 10,  # what the paper keeps after filtering
    max_epochs=3.0,  # a decay draws 10 % of 20.97B: 2.6 epochs
)

# Table 2. Nominal 200B tokens at a constant rate.
STABLE = mix(
    megamath_web_pro_max=0.725,
    dclm_baseline=0.10,
    megamath_text_code_block=0.10,
    megamath_qa=0.05,
    megamath_code=0.0125,
    megamath_translated_code=0.0125,
)

# Table 5. Nominal 20B tokens each; 55 % web, 5 % general web, 10 % instruction, 30 % questions and answers.
LONG = mix(
    megamath_web_pro=0.55,
    dclm_baseline=0.05,
    instruction=0.10,
    openr1_math_220k=0.15,
    am_deepseek_distilled_40m=0.15,
)
SHORT = mix(
    megamath_web_pro=0.55,
    dclm_baseline=0.05,
    instruction=0.10,
    megamath_qa=0.025,
    openmathinstruct_2=0.175,
    numinamath_1_5=0.10,
)
HYBRID = mix(
    megamath_web_pro=0.55,
    dclm_baseline=0.05,
    instruction=0.10,
    openr1_math_220k=0.10,
    openmathinstruct_2=0.10,
    numinamath_1_5=0.10,
)

# What the paper's own graph draws from, and what its ablations from Llama's weights draw from.
SOURCES = (
    MEGAMATH_WEB_PRO_MAX,
    DCLM_BASELINE,
    MEGAMATH_TEXT_CODE_BLOCK,
    MEGAMATH_QA,
    MEGAMATH_CODE,
    MEGAMATH_TRANSLATED_CODE,
    MEGAMATH_WEB_PRO,
    INSTRUCTION,
    OPENR1_MATH_220K,
    AM_DEEPSEEK_DISTILLED_40M,
    OPENMATHINSTRUCT_2,
    NUMINAMATH_1_5,
)
ABLATION_SOURCES = (FINEMATH_4PLUS, MEGAMATH_WEB_PRO, MEGAMATH_WEB_PRO_MAX, MEGAMATH_QA, OPENR1_MATH_220K, INSTRUCTION)
