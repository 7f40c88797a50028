"""The mathematics of a step: its loss, its gradients, its optimizer and its rate."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hack.tiny_model import write_tiny_model
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraConfig, TrainableLora
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.batches import PackedBatch, pack
from mizzen.runtime.train.clip import clip_gradients
from mizzen.runtime.train.config import Suite
from mizzen.runtime.train.device import read_cpu_quota
from mizzen.runtime.train.evaluate import Tally, decide_verdict
from mizzen.runtime.train.measures import PERPLEXITY, REWARD
from mizzen.runtime.train.methods import token_loss
from mizzen.runtime.train.methods.token_loss import token_losses_sum
from mizzen.runtime.train.samples import Sample
from mizzen.runtime.train.schedule import learning_rate
from mizzen.runtime.train.trainable import NamedView, Trainable, full_views

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def decoder(model_path: Path) -> Decoder:
    return load_decoder(model_path, dtype=torch.float32)


def samples(*lengths: int) -> list[Sample]:
    """Random tokens; about half of them labels, the first of a sample never."""
    random = np.random.RandomState(0)
    return [
        Sample(
            random.randint(0, 250, length).astype(np.int32),
            np.concatenate([[False], random.rand(length - 1) < 0.5, [True]])[:length],
        )
        for length in lengths
    ]


def plain_loss(decoder: Decoder, sample: Sample, lora: TrainableLora | None = None) -> Tensor:
    """The textbook: all logits of one sample, shifted by one."""
    batch = pack([sample], CPU)
    attend = token_loss.CausalAttention(batch.lengths)
    hidden_TD = decoder(batch.token_ids_T, batch.positions_T, attend, lora)
    losses_T = F.cross_entropy(
        decoder.logits(hidden_TD[:-1]), batch.token_ids_T[1:], reduction="none"
    )
    return losses_T[torch.from_numpy(sample.is_label_T[1:])].sum()


def gradients(decoder: Decoder, loss: Tensor) -> dict[str, Tensor]:
    decoder.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def assert_close(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("logit_rows", [3, 256])
def test_packed_loss_and_gradients_equal_the_samples_own(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch, logit_rows: int
) -> None:
    monkeypatch.setattr(token_loss, "LOGIT_ROWS", logit_rows)
    decoder.requires_grad_(True)
    data = samples(9, 2, 17, 30)
    plain = sum((plain_loss(decoder, sample) for sample in data), torch.zeros(()))
    packed = token_losses_sum(decoder, pack(data, CPU), None)
    torch.testing.assert_close(packed, plain)
    assert_close(gradients(decoder, packed), gradients(decoder, plain))


def test_a_packed_neighbour_changes_nothing(decoder: Decoder) -> None:
    first, second, other = samples(9, 12, 12)
    alone = token_losses_sum(decoder, pack([first], CPU), None)
    for neighbour in (second, other):
        both = token_losses_sum(decoder, pack([neighbour, first], CPU), None)
        own = token_losses_sum(decoder, pack([neighbour], CPU), None)
        torch.testing.assert_close(both - own, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_a_step_does_not_depend_on_how_it_is_split(decoder: Decoder, micro_batch: int) -> None:
    decoder.requires_grad_(True)
    # Very uneven, so that a mean of means would be far off.
    data = samples(40, 3, 3, 25, 2, 4)
    labels = sum(sample.labels for sample in data)

    def step(size: int) -> tuple[float, dict[str, Tensor]]:
        micros = [pack(data[at : at + size], CPU) for at in range(0, len(data), size)]
        losses = [token_losses_sum(decoder, batch, None) / labels for batch in micros]
        total = torch.stack(losses).sum()
        return total.item(), gradients(decoder, total)

    loss, grads = step(micro_batch)
    whole_loss, whole_grads = step(len(data))
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    assert_close(grads, whole_grads)


def test_only_the_adapter_gets_gradients_in_lora(decoder: Decoder) -> None:
    lora = TrainableLora(decoder, LoraConfig(rank=2, alpha=4.0))
    with torch.no_grad():
        for matrix in lora.b.values():
            matrix.normal_()
    (sample,) = samples(20)
    packed = token_losses_sum(decoder, pack([sample], CPU), lora)
    packed.backward()
    assert all(p.grad is None for p in decoder.parameters())
    found = {name: p.grad.clone() for name, p in lora.named_parameters()}
    lora.zero_grad(set_to_none=True)
    plain_loss(decoder, sample, lora).backward()
    assert_close(found, {name: p.grad.clone() for name, p in lora.named_parameters()})


def test_evaluation_keeps_no_graph(decoder: Decoder) -> None:
    decoder.requires_grad_(True)
    with torch.no_grad():
        loss = token_losses_sum(decoder, pack(samples(9), CPU), None)
    assert not loss.requires_grad


def test_a_base_in_bfloat16_learns_almost_as_one_in_float32(model_path: Path) -> None:
    batch = pack(samples(30, 20), CPU)
    curves: dict[torch.dtype, list[float]] = {torch.float32: [], torch.bfloat16: []}
    for dtype, curve in curves.items():
        decoder = load_decoder(model_path, dtype=dtype)
        lora = TrainableLora(decoder, LoraConfig(rank=4, alpha=8.0))
        trainable = lora_trainable(lora)
        for _ in range(10):
            loss = token_losses_sum(decoder, batch, lora) / batch.labels
            loss.backward()
            trainable.step(learning_rate=0.02)
            curve.append(loss.item())
    # Where a curve ends hangs on the last digits, which differ by processor; its fall does not.
    falls = {dtype: curve[0] - curve[-1] for dtype, curve in curves.items()}
    assert falls[torch.bfloat16] == pytest.approx(falls[torch.float32], rel=0.05)


def lora_trainable(lora: TrainableLora, *, weight_decay: float = 0.0) -> Trainable:
    views = [
        NamedView(site.tensor_name(side), matrix, matrix)
        for site, pair in lora.pairs()
        for side, matrix in zip("AB", pair, strict=True)
    ]
    return Trainable(views, lora=lora, weight_decay=weight_decay)


def losses_of(
    decoder: Decoder, trainable: Trainable, batch: PackedBatch, steps: int
) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = token_losses_sum(decoder, batch, None) / batch.labels
        loss.backward()
        trainable.step(learning_rate=0.01)
        losses.append(loss.item())
    return losses


def test_the_optimizer_is_torchs_adamw_with_norms_spared_from_decay(model_path: Path) -> None:
    batch = pack(samples(30, 20), CPU)
    ours, theirs = load_decoder(model_path), load_decoder(model_path)
    trainable = Trainable(full_views(ours), lora=None, weight_decay=0.1)
    theirs.requires_grad_(True)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    vectors = [p for p in theirs.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": 0.1},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=0.01,
    )
    losses_of(ours, trainable, batch, 3)
    for _ in range(3):
        (token_losses_sum(theirs, batch, None) / batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    for (name, found), wanted in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(found, wanted), name


def test_restored_weights_and_moments_go_on_bit_by_bit(model_path: Path) -> None:
    batch = pack(samples(30, 20), CPU)
    decoder = load_decoder(model_path)
    trainable = Trainable(full_views(decoder), lora=None, weight_decay=0.1)
    losses_of(decoder, trainable, batch, 3)
    saved = {
        group: {name: tensor.clone() for name, tensor in tensors.items()}
        for group, tensors in trainable.state_tensors().items()
    }
    went_on = losses_of(decoder, trainable, batch, 3)
    fresh = load_decoder(model_path)
    resumed = Trainable(full_views(fresh), lora=None, weight_decay=0.1)
    resumed.restore(saved, steps=3)
    assert losses_of(fresh, resumed, batch, 3) == went_on


def test_states_are_named_like_the_checkpoint_the_model_came_from(model_path: Path) -> None:
    decoder = load_decoder(model_path)
    groups = Trainable(full_views(decoder), lora=None, weight_decay=0.0).state_tensors()
    names = set(groups["weights"])
    assert {"model.embed_tokens.weight", "model.layers.1.self_attn.k_proj.weight"} <= names
    shapes = {group: {n: t.shape for n, t in tensors.items()} for group, tensors in groups.items()}
    assert shapes["weights"] == shapes["exp_avg"] == shapes["exp_avg_sq"]


def test_a_view_shows_the_same_part_of_every_tensor_like_its_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(6, 4))
    view = NamedView("k", parameter, parameter[2:5])
    moment = torch.arange(24.0).view(6, 4)
    assert torch.equal(view.of(moment), moment[2:5])


RATES = {
    "rises in a line": ("cosine", 1, 0.5),
    "is whole after the rise": ("cosine", 2, 1.0),
    "cosine is half way in the middle": ("linear", 11, 0.5),
    "linear ends above nothing": ("linear", 19, 1 / 18),
    "constant stays": ("constant", 19, 1.0),
}


@pytest.mark.parametrize(("shape", "step", "expected"), RATES.values(), ids=RATES)
def test_the_learning_rate(shape, step: int, expected: float) -> None:
    rate = learning_rate(step, total=19, peak=1.0, warmup_ratio=0.1, shape=shape)
    assert rate == pytest.approx(expected)


@pytest.mark.parametrize("shape", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.03, 0.5, 1.0])
@pytest.mark.parametrize("total", [1, 2, 7, 100])
def test_a_rate_rises_then_falls_and_is_never_nothing(
    shape, warmup_ratio: float, total: int
) -> None:
    rates = [
        learning_rate(step, total=total, peak=0.5, warmup_ratio=warmup_ratio, shape=shape)
        for step in range(1, total + 1)
    ]
    top = rates.index(max(rates))
    assert max(rates) == 0.5
    assert min(rates) > 0
    assert all(a <= b for a, b in pairwise(rates[: top + 1]))
    assert all(a >= b for a, b in pairwise(rates[top:]))


VERDICTS = {
    "better passes": (2.0, 1.9, 0.0, True),
    "equal passes without any allowance": (2.0, 2.0, 0.0, True),
    "worse within the allowance passes": (2.0, 2.015, 0.02, True),
    "worse than the allowance fails": (2.0, 2.05, 0.02, False),
    "better than the base, but less than demanded, fails": (2.0, 1.99, -0.02, False),
    "a candidate that is no number any more fails": (2.0, float("inf"), 0.02, False),
    "one that has no numbers at all fails": (2.0, float("nan"), 0.02, False),
    "also where its base had none": (float("nan"), float("nan"), 0.02, False),
    "a candidate is better than a base without numbers": (float("nan"), 2.0, 0.0, True),
}


@pytest.mark.parametrize(
    ("base", "candidate", "allowed", "passed"), VERDICTS.values(), ids=VERDICTS
)
def test_verdict(base: float, candidate: float, allowed: float, passed: bool) -> None:
    verdict = decide_verdict(
        Suite(name="s", max_regression_ratio=allowed),
        PERPLEXITY,
        base=Tally(samples=1, weight=10, total=10 * base),
        candidate=Tally(samples=1, weight=10, total=10 * candidate),
    )
    assert verdict.passed is passed
    assert verdict.regression_ratio == verdict.candidate / verdict.base - 1
    assert json.loads(json.dumps(verdict.candidate, allow_nan=False)) > 0


def test_no_reward_at_all_is_the_worst_there_is() -> None:
    assert REWARD.value(float("nan"), 3.0) < -100


@pytest.mark.parametrize(("limit", "expected"), [(1.0, 1.0), (0.0, 5.0), (9.0, 5.0)])
def test_gradients_are_cut_to_the_limit_where_there_is_one(limit: float, expected: float) -> None:
    parameter = nn.Parameter(torch.zeros(2))
    parameter.grad = torch.tensor([3.0, 4.0])
    trainable = Trainable([NamedView("w", parameter, parameter)], lora=None, weight_decay=0.0)
    assert clip_gradients(trainable, RankGroup(), limit=limit) == 5.0
    assert parameter.grad.norm().item() == pytest.approx(expected, rel=1e-5)


QUOTAS = {"max 100000": None, "150000 100000": 1.5, "nonsense": None}


@pytest.mark.parametrize(("text", "expected"), QUOTAS.items())
def test_a_cgroups_limit_is_read(tmp_path: Path, text: str, expected: float | None) -> None:
    (tmp_path / "cpu.max").write_text(text)
    assert read_cpu_quota(tmp_path / "cpu.max") == expected
    assert read_cpu_quota(tmp_path / "none") is None
