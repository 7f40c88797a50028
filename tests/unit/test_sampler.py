import numpy as np
import pytest
import torch

from mizzen.runtime.engine.api import SamplingParams
from mizzen.runtime.engine.sampler import Sampled, Sampler, _draw, _make_plan, uniform_numbers
from mizzen.runtime.engine.sequence import Sequence

VOCAB = 3000
EOS = (7,)


def make_seq(
    sampling: SamplingParams, *, seed: int = 1, prompt: list[int] | None = None, out: int | list = 0
) -> Sequence:
    seq = Sequence("r", 0, list(prompt or [1, 2, 3]), sampling, seed=seed)
    seq.token_ids += [0] * out if isinstance(out, int) else out
    return seq


def logits(rows: int = 1, *, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * scale


def sample(sampler: Sampler, scores: torch.Tensor, rows: list[Sequence]) -> Sampled:
    return sampler.choose(scores, rows, [row.output_tokens for row in rows]).read()


def draw_many(sampling: SamplingParams, logits_V: torch.Tensor, count: int = 400) -> list[int]:
    rows = [make_seq(sampling, seed=seed) for seed in range(count)]
    return sample(Sampler(eos_token_ids=EOS), logits_V.repeat(count, 1), rows).token_ids


def test_temperature_zero_is_the_true_argmax_and_the_first_of_equals() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, [5, 9]] = 4.0
    row = make_seq(SamplingParams(temperature=0, top_p=0.1, top_k=3))
    assert sample(Sampler(eos_token_ids=EOS), scores, [row]).token_ids == [5]


def test_greedy_rows_stay_greedy_beside_drawn_ones() -> None:
    scores = logits(3)
    rows = [make_seq(SamplingParams(temperature=t)) for t in (0.0, 1.0, 0.0)]
    got = sample(Sampler(eos_token_ids=EOS), scores.clone(), rows).token_ids
    best = scores.argmax(-1).tolist()
    assert (got[0], got[2]) == (best[0], best[2])


KINDS = {
    "plain": SamplingParams(),
    "hot": SamplingParams(temperature=1.7),
    "top-p": SamplingParams(top_p=0.8),
    "top-k": SamplingParams(top_k=20),
    "top-k and top-p": SamplingParams(top_k=20, top_p=0.7),
    "min-p": SamplingParams(min_p=0.05),
}


@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS)
def test_a_seed_draws_the_same_whoever_else_is_in_the_batch(sampling: SamplingParams) -> None:
    scores = logits(6)
    mixed = [make_seq(kind, seed=40 + i) for i, kind in enumerate(KINDS.values())]
    mixed[3] = make_seq(sampling, seed=9, out=5)
    together = sample(Sampler(eos_token_ids=EOS), scores.clone(), mixed).token_ids[3]
    alone = sample(Sampler(eos_token_ids=EOS), scores[3:4].clone(), [mixed[3]]).token_ids[0]
    assert together == alone


@pytest.mark.parametrize("sampling", KINDS.values(), ids=KINDS)
def test_rows_drawn_one_by_one_are_those_of_the_batch_for_gpus(sampling: SamplingParams) -> None:
    rows = [make_seq(sampling, seed=seed) for seed in range(300)]
    scores = logits(300, scale=2.0)
    plan = _make_plan(rows, scores.device)
    numbers = uniform_numbers(plan.seeds_N, np.zeros(300, dtype=np.uint64))
    batched = _draw(scores.clone(), plan, numbers).tolist()
    one_by_one = sample(Sampler(eos_token_ids=EOS), scores, rows).token_ids
    # A number at the very border between two tokens may fall to either.
    assert sum(a != b for a, b in zip(batched, one_by_one, strict=True)) <= 2


def test_each_position_and_seed_has_its_own_number() -> None:
    seeds, positions = np.meshgrid(np.arange(100, dtype=np.uint64), np.arange(100, dtype=np.uint64))
    numbers = uniform_numbers(seeds.ravel(), positions.ravel())
    assert len(set(numbers.tolist())) == 10_000
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.02
    deciles, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert deciles.min() > 850


def test_draws_follow_the_distribution() -> None:
    scores = torch.full((VOCAB,), -torch.inf)
    scores[:3] = torch.tensor([0.5, 0.3, 0.2]).log()
    drawn = np.bincount(draw_many(SamplingParams(), scores, 4000), minlength=3) / 4000
    assert np.abs(drawn - [0.5, 0.3, 0.2]).max() < 0.03


def kept_by(sampling: SamplingParams, scores: torch.Tensor) -> set[int]:
    """What may be drawn, worked out in the plainest way."""
    probs = (scores / sampling.temperature).softmax(-1)
    probs = torch.where(probs < sampling.min_p * probs.max(), 0.0, probs)
    order = probs.argsort(descending=True)
    if sampling.top_k:
        order = order[: sampling.top_k]
    share = probs[order] / probs[order].sum()
    before = share.cumsum(-1) - share
    return set(order[(before < sampling.top_p) & (share > 0)].tolist())


CUTS = {
    "top-p": SamplingParams(top_p=0.6),
    "a top-p that needs more than the candidates": SamplingParams(top_p=0.95, temperature=4.0),
    "top-k": SamplingParams(top_k=5),
    "top-k beyond the candidates": SamplingParams(top_k=2000, temperature=3.0),
    "top-k and top-p": SamplingParams(top_k=50, top_p=0.5),
    "min-p": SamplingParams(min_p=0.1),
    "min-p and top-p": SamplingParams(min_p=0.02, top_p=0.7),
    "a tiny top-p": SamplingParams(top_p=1e-6),
}


@pytest.mark.parametrize("sampling", CUTS.values(), ids=CUTS)
def test_only_kept_tokens_are_drawn(sampling: SamplingParams) -> None:
    scores = logits(seed=3)[0]
    drawn = set(draw_many(sampling, scores))
    allowed = kept_by(sampling, scores)
    assert drawn <= allowed
    assert len(drawn) >= min(2, len(allowed))


def test_repetition_counts_the_prompt_and_the_other_penalties_the_output_only() -> None:
    scores = torch.zeros(1, VOCAB)
    scores[0, :6] = torch.tensor([4.0, -4.0, 4.0, 4.0, 4.0, 3.5])
    seq = make_seq(SamplingParams(temperature=0, repetition_penalty=2.0), prompt=[0, 1], out=[2])
    copy = scores.clone()
    sample(Sampler(eos_token_ids=EOS), copy, [seq])
    assert copy[0, :6].tolist() == [2.0, -8.0, 2.0, 4.0, 4.0, 3.5]
    params = SamplingParams(temperature=0, presence_penalty=0.5, frequency_penalty=0.25)
    copy = scores.clone()
    sample(Sampler(eos_token_ids=EOS), copy, [make_seq(params, prompt=[0, 1], out=[2, 2, 3])])
    assert copy[0, :6].tolist() == [4.0, -4.0, 3.0, 3.25, 4.0, 3.5]


def test_logit_bias_decides_and_min_tokens_forbids_every_end() -> None:
    scores = logits(2)
    scores[:, EOS[0]] = 100.0
    scores[:, 11] = 90.0
    rows = [
        make_seq(SamplingParams(temperature=0, logit_bias={42: 200.0})),
        make_seq(SamplingParams(temperature=0, min_tokens=2, stop_token_ids=(11,)), out=1),
    ]
    first, second = sample(Sampler(eos_token_ids=EOS), scores, rows).token_ids
    assert first == 42
    assert second not in (EOS[0], 11)
    rows[1].token_ids.append(0)
    scores[:, EOS[0]] = 100.0
    assert sample(Sampler(eos_token_ids=EOS), scores, rows).token_ids[1] == EOS[0]


def test_logprobs_are_of_the_model_not_of_what_the_request_made_of_it() -> None:
    scores = logits(2)
    expected = scores.log_softmax(-1)
    rows = [
        make_seq(SamplingParams(temperature=0, logit_bias={42: 200.0}, logprobs=3)),
        make_seq(SamplingParams(temperature=0)),
    ]
    sampled = sample(Sampler(eos_token_ids=EOS), scores.clone(), rows)
    chosen, nothing = sampled.logprobs
    assert nothing is None and chosen is not None
    assert chosen.token_id == 42
    assert chosen.logprob == pytest.approx(float(expected[0, 42]))
    best = expected[0].topk(3)
    assert [token for token, _ in chosen.top] == best.indices.tolist()
    assert [value for _, value in chosen.top] == pytest.approx(best.values.tolist())


def test_a_changed_batch_gets_a_new_plan() -> None:
    sampler, scores = Sampler(eos_token_ids=EOS), logits(1)
    greedy, biased = (
        make_seq(SamplingParams(temperature=0, logit_bias=bias)) for bias in ({}, {3: 99.0})
    )
    assert sample(sampler, scores.clone(), [greedy]).token_ids == [int(scores.argmax())]
    assert sample(sampler, scores.clone(), [biased]).token_ids == [3]
