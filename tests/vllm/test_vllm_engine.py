"""The engine on vLLM: what it samples with is the running model, after every update, in one process with it and in its own."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

import tests.vllm.engine  # noqa: F401 - the environment that vLLM and torch read when they are imported
from megatron_ext.config.model import ModelConfig
from megatron_ext.config.plan import TrainPlan
from megatron_ext.config.rl import Sampling
from megatron_ext.conversion.assets import carried
from megatron_ext.errors import ConfigError, TrainingError
from megatron_ext.generation.canary import canary_requests, check_canary
from megatron_ext.generation.engine import Engine, Generation, Request, generate_all
from megatron_ext.generation.read_back import EMBEDDING, HEAD, check_held, drawn_names, fingerprint
from megatron_ext.generation.sampling import processed_logprobs
from megatron_ext.generation.shared_engine import hand_over
from megatron_ext.generation.vllm_engine import VllmEngine, VllmSettings
from megatron_ext.generation.vllm_process import vllm_process
from megatron_ext.model.bucket import Bucket
from megatron_ext.model.handover import hugging_face_buckets
from megatron_ext.rl.engines import LARGEST_GAPS
from megatron_ext.tokenizer import Tokenizer, tokenizer_of_files
from tests.unit import small_tokenizers

# Heads of 32 channels are the smallest that vLLM's CPU attention takes; large weights make unlike texts and large differences.
MODEL = ModelConfig(
    name="toy", num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=4, num_query_groups=2, head_dim=32,
    vocab_size=300, max_positions=256, tied_embeddings=True, init_std=0.2,
)  # fmt: skip
SETTINGS = VllmSettings(slots=4, longest_tokens=160, dtype="float32")
BUCKET_BYTES = 60_000
ROUNDING = 1e-4  # nats between engine and trainer in FP32; 1e-5 was seen
CHANGED = 0.5  # nats that an update changes at least; 9 were seen
SAMPLINGS = (Sampling(), Sampling(temperature=0.7), Sampling(temperature=0), Sampling(temperature=1.3, top_k=20), Sampling(top_p=0.8))


@dataclass
class Trainer:
    """A model that changes as in training, and its tokenizer's files."""

    groups: Any
    model: ModelConfig
    chunks: Any
    assets: dict[str, bytes]
    version: int = 0

    @property
    def tokenizer(self) -> Tokenizer:
        return tokenizer_of_files(self.assets)

    def update(self, size: float = 0.05) -> None:
        """Change every weight."""
        generator = torch.Generator().manual_seed(self.version)
        with torch.no_grad():
            for chunk in self.chunks:
                for weight in chunk.parameters():
                    weight.add_(size * torch.randn(weight.shape, generator=generator))

    def hand_over(self, engine: Engine) -> None:
        self.version += 1
        hand_over(engine, self.chunks, self.model, self.groups, self.version, BUCKET_BYTES, torch.float32)

    def logprobs(self, request: Request, generation: Generation) -> np.ndarray:
        """Of the sampled tokens, from one full forward pass, processed as the request asks."""
        from megatron_ext.model.logits import logits_BSV

        tokens = torch.tensor([*request.prompt, *generation.tokens.tolist()])
        logits = logits_BSV(self.chunks, tokens[None], self.groups, self.model.vocab_size)[0, len(request.prompt) - 1 : -1]
        found = processed_logprobs(logits, [request.sampling] * len(logits))
        return found.gather(-1, tokens[len(request.prompt) :, None])[:, 0].numpy()

    def gap(self, requests: Sequence[Request], generations: Sequence[Generation]) -> float:
        pairs = zip(requests, generations, strict=True)
        return max(float(np.abs(self.logprobs(request, one) - one.logprobs).max()) for request, one in pairs)

    def canary(self, engine: Engine, largest_gap: float = ROUNDING) -> float:
        requests = canary_requests(self.tokenizer)
        found = generate_all(engine, requests)
        return check_canary(found, [self.logprobs(*pair) for pair in zip(requests, found, strict=True)], largest_gap)


def prompt(number: int, tokens: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(number).integers(3, MODEL.vocab_size, tokens).tolist())


def request(number: int = 0, cap_tokens: int = 30, sampling: Sampling = SAMPLINGS[0], **changes: Any) -> Request:
    return Request(number, prompt(number, 5 + 9 * number % 60), cap_tokens, sampling, **{"seed": 3, **changes})


def mixed() -> list[Request]:
    """More requests than slots, of all kinds of sampling."""
    return [request(number, 10 + 3 * number, SAMPLINGS[number % len(SAMPLINGS)]) for number in range(10)]


def same(first: Sequence[Generation], second: Sequence[Generation]) -> bool:
    return [(one.tokens.tolist(), one.text, one.finish) for one in first] == [(one.tokens.tolist(), one.text, one.finish) for one in second]


def new_trainer(groups: Any, folder: Path, model: ModelConfig) -> Trainer:
    from megatron_ext.distributed import seed_step
    from megatron_ext.model.build import build_model

    seed_step(groups, 0, 0)
    return Trainer(
        groups, model, build_model(model, "fp32", groups, None), carried(small_tokenizers.hugging_face(folder, model.vocab_size))
    )


@pytest.fixture(scope="module")
def groups() -> Iterator[Any]:
    """The trainer's process group of one rank."""
    from megatron_ext import device
    from megatron_ext.distributed import process_groups

    device.activate("cpu", 1)
    with process_groups(TrainPlan(device="cpu")) as found:
        yield found


@pytest.fixture(scope="module")
def trainer(groups, tmp_path_factory) -> Trainer:
    return new_trainer(groups, tmp_path_factory.mktemp("tokenizer"), MODEL)


@pytest.fixture(scope="module")
def engine(trainer) -> Iterator[VllmEngine]:
    """With tied embeddings, and version 1 of the weights."""
    found = VllmEngine(trainer.assets, MODEL, SETTINGS)
    with pytest.raises(TrainingError, match="has no weights"):
        found.submit([request()])
    trainer.hand_over(found)
    yield found
    found.close()


@contextmanager
def undisturbed() -> Iterator[None]:
    """What belongs to the trainer is afterwards as it was."""
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(), environment())
    yield
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(), environment())
    assert after == before
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2  # on a CPU vLLM takes the function away
    torch.set_num_threads(1)


def tensors_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor for one in hugging_face_buckets(trainer.chunks, MODEL, trainer.groups, 1) for name, tensor in one.tensors}


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if not name.startswith("VLLM_") and name != "PYTEST_CURRENT_TEST"}


def check_updates(trainer: Trainer, engine: Engine, updates: int) -> list[Generation]:
    """Each update's weights are what is sampled with, in the prompt's pass and in decoding; its last generations."""
    found: list[Generation] = []
    for _ in range(updates):
        trainer.update()
        if found:
            assert trainer.gap(mixed(), found) > CHANGED, "the update changed nothing that shows"
        trainer.hand_over(engine)
        found = generate_all(engine, mixed())
        assert trainer.gap(mixed(), found) < ROUNDING
        assert trainer.canary(engine) < ROUNDING
        assert {int(version) for one in found for version in one.weight_versions} == {trainer.version}
    return found


def test_an_untied_head_is_renewed_and_closing_leaves_the_trainer_its_group(groups, tmp_path):
    trainer = new_trainer(groups, tmp_path, replace(MODEL, tied_embeddings=False))
    with undisturbed():
        engine = VllmEngine(trainer.assets, trainer.model, SETTINGS)
        check_updates(trainer, engine, updates=2)
        engine.close()
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones == 1


def test_after_every_update_it_samples_with_the_new_weights(trainer, engine):
    with undisturbed():
        check_updates(trainer, engine, updates=3)
    stats = engine.stats()
    assert stats.weight_version == trainer.version
    assert stats.longest_batch == SETTINGS.slots
    assert stats.response_tokens > stats.decode_steps > 0


# ---- faults that the checks must find


def forgets_nothing(engine: VllmEngine, patch: pytest.MonkeyPatch) -> None:
    """Prefixes that old weights computed stay in the cache."""
    patch.setattr(engine, "_forget_old_weights", lambda: None)


def keeps_everything(engine: VllmEngine, patch: pytest.MonkeyPatch) -> None:
    """New weights arrive and are not used."""
    call = engine._engine.collective_rpc

    def taken(method: str, **arguments: Any) -> Any:
        return list(arguments["kwargs"]["weights_iterator"]) if method == "reload_weights" else call(method, **arguments)

    patch.setattr(engine._engine, "collective_rpc", taken)


def keeps(name: str, trainer: Trainer, engine: VllmEngine, patch: pytest.MonkeyPatch) -> None:
    """One tensor stays what it is now; the head a copy of the embedding that is not renewed."""
    counted, old = engine._counted, tensors_of(trainer)

    def sent(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for key, new in counted(*arguments):
            if key != name:
                yield key, new
            elif key in old:
                yield key, old[key]

    patch.setattr(engine, "_counted", sent)


def test_the_canary_finds_keys_and_values_of_old_weights(trainer, engine, monkeypatch):
    trainer.hand_over(engine)
    assert trainer.canary(engine) < ROUNDING
    with monkeypatch.context() as patch:
        forgets_nothing(engine, patch)
        trainer.update()
        trainer.hand_over(engine)
        with pytest.raises(TrainingError, match=rf"weights version {trainer.version} is not what the engine samples with"):
            trainer.canary(engine)
    trainer.hand_over(engine)
    assert trainer.canary(engine) < ROUNDING


FIRST = "model.layers.0.{}.weight".format  # of the layer that the next versions read back


KEPT = [*map(FIRST, ("self_attn.k_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")), "model.norm.weight", HEAD]


@pytest.mark.parametrize("kept", ["everything", *KEPT])
def test_weights_of_one_small_update_before_are_named_where_the_canary_sees_nothing(kept, trainer, engine, monkeypatch):
    while FIRST("mlp.up_proj") not in drawn_names(MODEL, trainer.version + 2):
        trainer.version += 1
    trainer.hand_over(engine)
    with monkeypatch.context() as patch:
        if kept == "everything":
            keeps_everything(engine, patch)
        else:
            keeps(kept, trainer, engine, patch)
        trainer.update(size=1e-6)
        names = f"{EMBEDDING}, .*, {HEAD}" if kept == "everything" else kept
        with pytest.raises(TrainingError, match=rf"version {trainer.version + 1} is not what the engine samples with: {names} read back"):
            trainer.hand_over(engine)
    trainer.canary(engine, LARGEST_GAPS["float32"])
    trainer.hand_over(engine)


def test_every_tensor_can_be_read_back(trainer, engine):
    trainer.hand_over(engine)
    whole = tensors_of(trainer)
    sent = {name: fingerprint(tensor, torch.float32) for name, tensor in {**whole, HEAD: whole[EMBEDDING]}.items()}
    check_held(engine.held(list(sent)), sent, trainer.version)


def test_weights_that_come_in_part_are_not_sampled_with(trainer, engine):
    def parts(left_out: str) -> Iterator[Bucket]:
        for bucket in hugging_face_buckets(trainer.chunks, MODEL, trainer.groups, 1):  # a tensor each
            if bucket.tensors[0][0] != left_out:
                yield bucket

    with pytest.raises(TrainingError, match=r"did not come whole: model\.norm\.weight \(missing\)"):
        engine.update_weights(100, parts("model.norm.weight"))
    with pytest.raises(TrainingError, match="a part of a version"):
        engine.submit([request()])
    with pytest.raises(ConfigError, match="must bring all of them"):
        engine.update_weights(101, None)
    trainer.hand_over(engine)
    assert trainer.canary(engine) < ROUNDING


# ---- requests


def test_a_request_draws_the_same_tokens_whatever_runs_beside_it(trainer, engine):
    together = generate_all(engine, mixed())
    assert same(generate_all(engine, mixed()), together)
    alone = [generate_all(engine, [one])[0] for one in mixed()]
    assert same(alone, together)
    other_seed = generate_all(engine, [replace(one, seed=4) for one in mixed()])
    drawn = [place for place, one in enumerate(mixed()) if one.sampling.temperature > 0]
    assert all(together[place].tokens.tolist() != other_seed[place].tokens.tolist() for place in drawn)


def test_responses_end_at_the_end_token_or_at_the_cap(trainer, engine):
    requests = [request(number, 40, Sampling(temperature=2.0)) for number in range(48)]
    found = generate_all(engine, requests)
    ended = [one for one in found if one.finish == "end"]
    assert ended, "none of some 1,900 draws was the end"
    for one in found:
        end = [place for place, token in enumerate(one.tokens) if token == trainer.tokenizer.eod_id]
        assert end == ([len(one.tokens) - 1] if one.finish == "end" else [])
        assert one.finish == "end" or len(one.tokens) == 40
        assert one.text == trainer.tokenizer.decode(one.tokens[: -1 if one.finish == "end" else None].tolist())
    assert trainer.gap(requests[:8], found[:8]) < ROUNDING


def test_a_stop_string_is_cut_from_the_text_and_its_tokens_stay(trainer, engine):
    decode = trainer.tokenizer.decode
    tried = 0
    for number in range(12):
        whole = generate_all(engine, [request(number)])[0]
        texts = [decode(whole.tokens[:length].tolist()) for length in range(len(whole.tokens) + 1)]
        # a piece over the border of two tokens, both of whole characters
        for place in range(3, len(texts) - 1):
            piece = texts[place][-1:] + texts[place + 1][len(texts[place]) :][:1]
            if len(piece) == 2 and "\ufffd" not in texts[place + 1][len(texts[place - 1]) :]:
                found = generate_all(engine, [replace(request(number), stop_strings=("never in there", piece))])[0]
                length = next(length for length, text in enumerate(texts) if piece in text)
                assert found.tokens.tolist() == whole.tokens[:length].tolist()
                assert (found.finish, found.text) == ("stop", texts[length][: texts[length].find(piece)])
                tried += 1
                break
    assert tried >= 5


def test_a_running_request_goes_on_over_a_hand_over(trainer, engine):
    one = request(cap_tokens=40)
    straight = generate_all(engine, [one])[0]
    engine.submit([one])
    for _ in range(10):
        assert engine.step() == []
    trainer.hand_over(engine)  # the same weights under another version
    found = engine.poll()
    assert same(found, [straight])
    versions = found[0].weight_versions.tolist()
    assert versions == sorted(versions)
    assert set(versions) == {trainer.version - 1, trainer.version}


def test_what_cannot_be_answered_is_refused_before_anything_is_taken_on(trainer, engine):
    with pytest.raises(ConfigError, match=r"100 tokens of prompt \+ a cap of 61 = 161, but vLLM was started for 160"):
        engine.submit([request(), replace(request(), prompt=prompt(0, 100), cap_tokens=61)])
    with pytest.raises(ConfigError, match="empty"):
        engine.submit([request(), replace(request(), prompt=())])
    with pytest.raises(ConfigError, match="stop strings"):
        engine.submit([replace(request(), stop_strings=("",))])
    for temperature, words in ((2.5, "vLLM refuses"), (0.001, "would sample at temperature 0.01, not 0.001")):
        with pytest.raises(ConfigError, match=words):
            engine.submit([request(), request(sampling=Sampling(temperature=temperature))])
    assert not engine.is_busy
    assert engine.poll() == []


def test_a_model_that_vllm_does_not_take_is_refused(trainer):
    with pytest.raises(ConfigError, match=r"heads of 16 channels, vLLM on a CPU takes 32, .*plan\.engine=megatron"):
        VllmEngine(trainer.assets, replace(MODEL, head_dim=16), SETTINGS)


# ---- in a process of its own


def test_in_its_own_process_it_is_the_same_engine_and_its_death_has_a_name(trainer, engine, tmp_path):
    apart = vllm_process(trainer.assets, MODEL, SETTINGS, tmp_path / "engine.log")
    check_updates(trainer, apart, updates=2)
    trainer.hand_over(engine)
    trainer.version -= 1
    trainer.hand_over(apart)
    assert same(generate_all(apart, mixed()), generate_all(engine, mixed()))
    with pytest.raises(ConfigError, match="vLLM was started for 160"):
        apart.submit([request(cap_tokens=200)])

    apart.submit([request(number, 150 - 5 - 9 * number % 60) for number in range(64)])
    os.kill(apart.pid, signal.SIGKILL)  # with 16 rounds of its 4 slots ahead
    with pytest.raises(TrainingError, match=r"engine's process \d+ ended with signal SIGKILL(.|\n)*from its last checkpoint"):
        apart.poll()
    apart.close()
