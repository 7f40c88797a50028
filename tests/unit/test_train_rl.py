"""Learning from rewards: answers that are drawn, what they are worth, and what is learned."""

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import BloomConfig, LlamaConfig, MistralConfig, PretrainedConfig

from hack.tiny_model import write_tiny_model
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraConfig, TrainableLora
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.batches import pack
from mizzen.runtime.train.config import TrainConfig, load_config
from mizzen.runtime.train.copies import pack_rows, unpack_rows
from mizzen.runtime.train.curve import read_history
from mizzen.runtime.train.errors import DatasetError, JobConfigError
from mizzen.runtime.train.generate import Drawing, _choose, draw_answers
from mizzen.runtime.train.methods.grpo import Grpo, judge_group
from mizzen.runtime.train.methods.policy import Rollout, importance
from mizzen.runtime.train.methods.ppo import Ppo, gae, token_rewards
from mizzen.runtime.train.methods.token_loss import hidden_states
from mizzen.runtime.train.options import Rule
from mizzen.runtime.train.rewards import RewardModel, rule_reward
from mizzen.runtime.train.samples import Prompt, Sample, joined
from mizzen.runtime.train.sources import load_source
from mizzen.runtime.train.stop import StopFlag, YieldRequested
from mizzen.runtime.train.surroundings import Surroundings
from tests.fixtures.tiny_models import TINY, make_model, save_tiny_tokenizer
from tests.fixtures.train_runs import Job, run, write_job, write_preferences, write_prompts

CPU = torch.device("cpu")
# A random model says each of them in about a third of its answers of eight letters.
LETTERS = [{"type": "regex", "pattern": f"[{span}]"} for span in ("a-m", "n-z", "A-M")]
RL = {"rewards": LETTERS, "max_new_tokens": 8, "group_size": 4, "kl_coef": 0.01}
WORTH = {"suites": [{"name": "worth", "type": "reward", "max_regression_ratio": 0.0}]}


def rl_job(
    root: Path,
    method: str,
    *,
    steps: int = 10,
    prompts: int = 4,
    adaptation: str = "lora",
    dropout: float = 0.0,
    **rl: Any,
) -> Job:
    return write_job(
        root,
        method=method,
        adaptation={"type": adaptation, "dropout": dropout},
        rl={**RL, **rl},
        datasets=[{"name": "questions", "path": str(write_prompts(root.parent / "q.jsonl"))}],
        hyperparameters={"max_steps": steps, "batch_size": prompts, "micro_batch": 32},
        evaluation=WORTH,
    )


@pytest.fixture
def decoder(tmp_path: Path) -> Decoder:
    return load_decoder(write_tiny_model(tmp_path / "tiny"), dtype=torch.float32)


def prompt(length: int, seed: int) -> Prompt:
    return Prompt(np.random.RandomState(seed).randint(0, 250, length).astype(np.int32))


BLOOM = BloomConfig(  # three heads are no power of two
    vocab_size=300,
    hidden_size=48,
    n_layer=2,
    n_head=3,
    initializer_range=0.2,
    bos_token_id=1,
    eos_token_id=2,
)
# What an answer's tokens see: all before them, that at a cost, or the last five alone.
SEEN: dict[str, PretrainedConfig] = {
    "all": LlamaConfig(**TINY),
    "ALiBi": BLOOM,
    "a window": MistralConfig(**TINY, sliding_window=5),
}


@pytest.mark.parametrize("model", SEEN.values(), ids=SEEN)
def test_answers_drawn_with_a_cache_are_those_of_whole_forward_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: PretrainedConfig
) -> None:
    make_model(model).save_pretrained(tmp_path)
    decoder = load_decoder(tmp_path, dtype=torch.float32)
    targets = ("q_proj", "k_proj", "v_proj", "down_proj")
    lora = TrainableLora(decoder, LoraConfig(rank=2, alpha=8.0, targets=targets))
    with torch.no_grad():
        for matrix in lora.b.values():
            matrix.normal_(std=0.2)
    prompts = [prompt(5, 0), prompt(11, 1), prompt(2, 2)]
    coldest = Drawing(max_new_tokens=6, temperature=1e-6, eos_ids=())
    score, scores = decoder.logits, list[Tensor]()

    def logits(hidden_BD: Tensor) -> Tensor:
        scores.append(score(hidden_BD))
        return scores[-1]

    with monkeypatch.context() as patched:
        patched.setattr(decoder, "logits", logits)
        drawn = draw_answers(decoder, prompts, lora, coldest, seed=0, stop=StopFlag())
    for row, (one, answer) in enumerate(zip(prompts, drawn, strict=True)):
        whole = joined(one, answer)
        with torch.no_grad():
            hidden_TD = hidden_states(decoder, pack([whole], CPU), lora)
        logits_NV = decoder.logits(hidden_TD[len(one) - 1 : -1])
        assert logits_NV.argmax(-1).tolist() == answer
        # A likeliest token may stay that even where distances cost nothing.
        found_NV = torch.stack([logits_BV[row] for logits_BV in scores])
        torch.testing.assert_close(found_NV, logits_NV, atol=1e-4, rtol=1e-4)


def test_an_answer_ends_with_its_end_and_the_same_seed_draws_the_same(decoder: Decoder) -> None:
    prompts = [prompt(4, seed) for seed in range(6)]
    ends = tuple(range(0, 250, 4))
    rules = Drawing(max_new_tokens=12, temperature=1.0, eos_ids=ends)
    first, again = (
        draw_answers(decoder, prompts, None, rules, seed=7, stop=StopFlag()) for _ in range(2)
    )
    assert first == again
    assert draw_answers(decoder, prompts, None, rules, seed=8, stop=StopFlag()) != first
    assert len({len(answer) for answer in first}) > 1
    for answer in first:
        assert not set(answer[:-1]) & set(ends)
        assert answer[-1] in ends or len(answer) == 12


def test_a_wish_to_stop_is_seen_between_two_tokens(decoder: Decoder) -> None:
    class Impatient(StopFlag):
        looks = 0

        def check(self) -> None:
            self.looks += 1
            if self.looks == 3:
                raise YieldRequested

    stop = Impatient()
    rules = Drawing(max_new_tokens=50, temperature=1.0, eos_ids=())
    with pytest.raises(YieldRequested):
        draw_answers(decoder, [prompt(4, 0)], None, rules, seed=0, stop=stop)
    assert stop.looks == 3


def test_an_answer_does_not_depend_on_what_else_is_drawn_with_it(decoder: Decoder) -> None:
    prompts = [prompt(4, seed) for seed in range(6)]
    rules = Drawing(max_new_tokens=8, temperature=1.0, eos_ids=())
    whole = draw_answers(decoder, prompts, None, rules, seed=7, stop=StopFlag())
    part = draw_answers(decoder, prompts[2:4], None, rules, seed=9, stop=StopFlag())
    assert part == whole[2:4]


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    probabilities = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3])
    chances = torch.linspace(0, 1, 1001, dtype=torch.float64)
    drawn = _choose(probabilities.log().expand(1001, -1), 1.0, chances)
    shares = torch.bincount(drawn, minlength=5) / 1001
    assert shares.tolist() == pytest.approx(probabilities.tolist(), abs=2e-3)
    assert drawn.tolist() == sorted(drawn.tolist())


def test_copies_tell_each_other_all_that_they_found_out() -> None:
    told = [replace(rollout(reward), value_N=np.ones(3, np.float32)) for reward in (0.1, 1.0)]
    heard = [Rollout.of_row(row) for row in unpack_rows(pack_rows([r.to_row() for r in told]))]
    for ours, theirs in zip(heard, told, strict=True):
        assert ours.reward == theirs.reward
        for name in ("old_N", "reference_N", "value_N"):
            assert np.array_equal(getattr(ours, name), getattr(theirs, name))
        assert np.array_equal(ours.sample.token_ids_T, theirs.sample.token_ids_T)
        assert np.array_equal(ours.sample.is_label_T, theirs.sample.is_label_T)
        assert ours.weight_N is None
    # One that has nothing to do says that, and not that it was asked to stop.
    assert pack_rows([]) and unpack_rows(pack_rows([])) == []


RULES: dict[str, tuple[dict[str, Any], str, float]] = {
    "a pattern that is found": ({"type": "regex", "pattern": "^y"}, "yes", 1.0),
    "a pattern that is not": ({"type": "regex", "pattern": "^n"}, "yes", 0.0),
    "the expected answer, blanks aside": ({"type": "exactAnswer"}, " blue\n", 1.0),
    "another answer": ({"type": "exactAnswer"}, "blue!", 0.0),
    "the length that is wanted": ({"type": "length", "tokens": 4}, "", 1.0),
    "half of it": ({"type": "length", "tokens": 8}, "", 0.5),
    "far too much": ({"type": "length", "tokens": 1}, "", 0.0),
    "a weight below zero": ({"type": "exactAnswer", "weight": -2.0}, "blue", -2.0),
}


@pytest.mark.parametrize(("rule", "text", "expected"), RULES.values(), ids=RULES)
def test_rewards(rule: dict[str, Any], text: str, expected: float) -> None:
    found = rule_reward(Rule(**rule), text=text, tokens=4, answer="blue")
    assert found == pytest.approx(expected)


def test_a_row_without_an_answer_never_has_the_expected_one() -> None:
    assert rule_reward(Rule(type="exactAnswer"), text="", tokens=1, answer=None) == 0.0


def rollout(reward: float, *, tokens: int = 3, drift: float = 0.0) -> Rollout:
    old = np.full(tokens, -1.0, np.float32)
    sample = Sample(np.arange(2 + tokens, dtype=np.int32), np.arange(2 + tokens) >= 2)
    return Rollout(sample=sample, reward=reward, old_N=old, reference_N=old - np.float32(drift))


def test_a_group_is_judged_beside_itself() -> None:
    judged = judge_group([rollout(reward) for reward in (0.0, 1.0, 2.0, 1.0)])
    advantages = [r.advantage_N[0] for r in judged if r.advantage_N is not None]
    assert advantages == pytest.approx([-math.sqrt(2), 0.0, math.sqrt(2), 0.0])
    assert all(r.advantage_N is None for r in judge_group([rollout(0.1)] * 4))


def test_a_token_is_rewarded_for_staying_and_the_last_one_for_the_answer() -> None:
    rewards = token_rewards(rollout(2.0, drift=0.5), kl_coef=0.1)
    assert rewards.tolist() == pytest.approx([-0.05, -0.05, 1.95])


@pytest.mark.parametrize(("gamma", "gae_lambda"), [(1.0, 1.0), (1.0, 0.0), (0.9, 0.8)])
def test_advantages_are_the_sum_of_later_surprises(gamma: float, gae_lambda: float) -> None:
    random = np.random.RandomState(0)
    reward, value = random.rand(5).astype(np.float32), random.rand(5).astype(np.float32)
    following = np.append(value[1:], 0.0)
    surprise = reward + gamma * following - value
    wanted = [
        sum((gamma * gae_lambda) ** (k - t) * surprise[k] for k in range(t, 5)) for t in range(5)
    ]
    found = gae(reward, value, gamma=gamma, gae_lambda=gae_lambda)
    assert found.tolist() == pytest.approx(wanted, rel=1e-5)


def method_of(kind: type[Grpo] | type[Ppo], root: Path, **rl: Any) -> Any:
    config = load_config(rl_job(root / "job", kind.__name__.lower(), **rl).config_path)
    path = config.base_model
    around = Surroundings(
        config=config,
        spec=ArchSpec.from_dir(path),
        tokenizer=Tokenizer.load(path),
        device=CPU,
        stop=StopFlag(),
    )
    return kind(around)


CLIPS = {
    "a gain within reach counts": (1.1, 1.0, -1.1),
    "a gain beyond reach counts to its edge": (2.0, 1.0, -1.2),
    "a loss beyond reach counts whole": (2.0, -1.0, 2.0),
    "a loss that is already far less likely counts to its edge": (0.1, -1.0, 0.8),
}


@pytest.mark.parametrize(("ratio", "advantage", "expected"), CLIPS.values(), ids=CLIPS)
def test_the_ratio_is_clipped(
    tmp_path: Path, ratio: float, advantage: float, expected: float
) -> None:
    method = method_of(Grpo, tmp_path)
    loss = method.clipped(torch.tensor([ratio]), torch.tensor([advantage]))
    assert loss.item() == pytest.approx(expected)


def test_answers_and_their_likelihood_know_no_dropout(tmp_path: Path, decoder: Decoder) -> None:
    method = method_of(Grpo, tmp_path)
    lora = TrainableLora(decoder, LoraConfig(rank=2, alpha=64.0, dropout=0.5))
    with torch.no_grad():
        for matrix in lora.b.values():
            matrix.normal_(std=0.2)
    prompts = [prompt(5, seed) for seed in range(4)]
    first, again = (method.roll_out(decoder, prompts, lora, seed=1) for _ in range(2))
    assert lora.training
    for one, other in zip(first, again, strict=True):
        assert one.sample.token_ids_T.tolist() == other.sample.token_ids_T.tolist()
        assert one.old_N.tolist() == other.old_N.tolist()


@pytest.mark.parametrize("kind", [Grpo, Ppo])
def test_the_first_update_starts_from_a_ratio_of_one_and_no_drift(
    tmp_path: Path, decoder: Decoder, kind: Any
) -> None:
    method = method_of(kind, tmp_path, epochs=2)
    lora = TrainableLora(decoder, LoraConfig(rank=2, alpha=8.0))
    first, second = method.updates(decoder, [prompt(5, s) for s in range(4)], lora, seed=1)
    assert first == second
    for item in first:
        new_N = method.new_log_probs(decoder, [item], lora)
        assert new_N.tolist() == pytest.approx(item.old_N.tolist(), abs=1e-4)
        assert item.reference_N.tolist() == pytest.approx(item.old_N.tolist(), abs=1e-4)
    assert method.measured()["kl"] == pytest.approx(0.0, abs=1e-6)
    assert all(item.labels == len(item.advantage_N) for item in first)


def test_values_learn_returns_within_their_clip(tmp_path: Path, decoder: Decoder) -> None:
    method = method_of(Ppo, tmp_path, value_coef=1.0, value_clip=0.2)
    (item,) = method.judge([replace(rollout(1.0), value_N=np.zeros(3, np.float32))])
    still = replace(item, advantage_N=np.zeros(3, np.float32), return_N=np.ones(3, np.float32))
    # The head is zero, so every value is zero and each of three tokens misses by one.
    assert method.loss_sum(decoder, [still], None).item() == pytest.approx(0.5 * 3)
    far = replace(still, value_N=np.full(3, -1.0, np.float32))
    assert method.loss_sum(decoder, [far], None).item() == pytest.approx(0.5 * 3 * 1.8**2)


def test_an_answer_that_does_not_end_pays_for_it(tmp_path: Path, decoder: Decoder) -> None:
    method = method_of(Grpo, tmp_path, missing_eos_penalty=5.0)
    (end,) = method._drawing.eos_ids
    prompts = [prompt(4, 0)] * 2
    ended, cut = method._roles.judge(decoder, prompts, [[1, end], [1, 1]])()
    assert ended - cut == pytest.approx(5.0)


# Without siblings to compare with, PPO needs more answers before their mean tells anything.
@pytest.mark.parametrize(
    ("method", "prompts", "adaptation"),
    [("grpo", 4, "lora"), ("grpo", 4, "qlora"), ("ppo", 32, "lora"), ("ppo", 32, "qlora")],
)
def test_rewards_rise_and_the_drift_stays_small(
    tmp_path: Path, method: str, prompts: int, adaptation: str
) -> None:
    job = rl_job(
        tmp_path / "job", method, steps=16, prompts=prompts, adaptation=adaptation, epochs=2
    )
    assert run(job) == 0
    records = read_history(job.checkpoints / "metrics.jsonl")
    rewards = [record.measured["reward"] for record in records]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.2
    assert 0 <= max(record.measured["kl"] for record in records) < 1.5
    word = job.last_word
    assert word["reward"] == rewards[-1]
    (suite,) = word["evaluation"]
    assert suite["candidate"] > suite["base"]
    assert suite["passed"] and suite["regressionRatio"] < 0
    assert word["evalLoss"] is None


def test_a_model_with_alibi_learns_from_rewards_and_answers_its_exam(tmp_path: Path) -> None:
    make_model(BLOOM).save_pretrained(tmp_path / "bloom")
    save_tiny_tokenizer(tmp_path / "bloom")
    questions = write_prompts(tmp_path / "q.jsonl")
    words = {"name": "words", "type": "exactMatch", "max_new_tokens": 4}
    job = write_job(
        tmp_path / "job",
        method="grpo",
        base_model=str(tmp_path / "bloom"),
        adaptation={"type": "full"},
        output={"kind": "model"},
        rl=RL,
        datasets=[{"name": "questions", "path": str(questions)}],
        hyperparameters={"max_steps": 8, "micro_batch": 32},
        evaluation={"suites": [*WORTH["suites"], words]},
    )
    assert run(job) == 0
    worth, words = job.last_word["evaluation"]
    assert worth["candidate"] > worth["base"] + 0.5
    assert (words["samples"], words["passed"]) == (worth["samples"], True)


def test_a_killed_run_draws_the_same_answers_again(tmp_path: Path) -> None:
    reference = rl_job(tmp_path / "reference", "ppo", steps=4, dropout=0.1)
    assert run(reference) == 0
    job = rl_job(tmp_path / "killed", "ppo", steps=4, dropout=0.1)
    assert run(job, kill_at_sync=9) == -signal.SIGKILL
    assert run(job) == 0
    assert job.curve == reference.curve
    assert job.weights_digest == reference.weights_digest


def test_a_reward_model_judges_beside_the_base_it_was_trained_on(tmp_path: Path) -> None:
    votes = {"name": "votes", "path": str(write_preferences(tmp_path / "votes.jsonl"))}
    suites = {"suites": [{"name": "votes", "type": "preferenceLoss"}]}
    judge = write_job(tmp_path / "r", method="reward", datasets=[votes], evaluation=suites)
    assert run(judge) == 0
    (artifact,), base_model = judge.artifacts, tmp_path / "r" / "model"
    base = load_decoder(base_model, dtype=torch.float32)
    beside = {"base": lambda: base, "dtype": torch.float32, "device": CPU,
              "group": RankGroup()}  # fmt: skip
    model = RewardModel(artifact, base_model=base_model, **beside)
    tokenizer = Tokenizer.load(base_model)
    told = []
    for answer in ("teal it is", "no green"):
        turns = [{"role": "user", "content": "9 teal?"}, {"role": "assistant", "content": answer}]
        token_ids, mask = tokenizer.render_for_training(turns)
        told.append(Sample(np.asarray(token_ids, np.int32), np.asarray(mask)))
    better, worse = model.of(told).tolist()
    assert better > worse
    with pytest.raises(JobConfigError, match="Use one base for both"):
        RewardModel(artifact, base_model=tmp_path / "other", **beside)
    with pytest.raises(JobConfigError, match="Name the artifact of a job with method reward"):
        RewardModel(base_model, base_model=base_model, **beside)


IMPOSSIBLE: dict[str, tuple[dict[str, Any], str]] = {
    "nothing is rewarded": ({"rewards": []}, "set rewards, reward_model or both"),
    "a pattern is none": (
        {"rewards": [{"type": "regex", "pattern": "("}]},
        "is not a regular expression",
    ),
    "a rule lacks its pattern": ({"rewards": [{"type": "regex"}]}, "needs a pattern"),
    "a length is missing": ({"rewards": [{"type": "length"}]}, "a length rule needs tokens"),
}


@pytest.mark.parametrize(("rl", "text"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_refuses_a_job_in_which(tmp_path: Path, rl: dict[str, Any], text: str) -> None:
    job = rl_job(tmp_path / "job", "grpo", **rl)
    with pytest.raises(JobConfigError) as caught:
        load_config(job.config_path)
    assert text in str(caught.value)


def test_a_prompt_row_without_a_prompt_is_refused(tmp_path: Path) -> None:
    job = rl_job(tmp_path / "job", "grpo")
    (tmp_path / "q.jsonl").write_text(json.dumps({"question": "hi"}))
    config: TrainConfig = load_config(job.config_path)
    with pytest.raises(DatasetError, match='neither "prompt" nor "messages"'):
        load_source(config.datasets[0], default_format="auto", shape="prompt")


def test_a_token_counts_by_how_much_likelier_the_policy_finds_it_up_to_twice() -> None:
    old = [np.log(np.array([0.1, 0.2, 0.9], np.float32))]
    drawn = [np.log(np.array([0.2, 0.2, 0.1], np.float32))]
    (weight_N,) = importance(old, drawn)
    np.testing.assert_allclose(weight_N, [0.5, 1.0, 2.0], rtol=1e-5)
    assert importance(old, None) == [None]
