"""Answers drawn from the model that is being trained: in this process, on its own weights."""

# Shapes: T packed tokens, B sequences, C cached positions, H query heads, K KV heads, d head
# dimension, D model width, V vocabulary.
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mizzen.runtime.attention.base import NO_BIAS, AttentionBias
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.options import Rl
from mizzen.runtime.train.samples import Prompt
from mizzen.runtime.train.stop import Stop

AT_ONCE = 64  # sequences whose keys and values live together, as long as there is memory for them


def drawn_at_once(answers: int = AT_ONCE) -> AtOnce:
    """Return how many answers are drawn at once."""
    return AtOnce(answers, limit="drawn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float  # 0: the likeliest token
    eos_ids: tuple[int, ...]
    at_once: AtOnce = field(default_factory=drawn_at_once)


def drawing_of(rules: Rl, tokenizer: Tokenizer, *, at_most: int = AT_ONCE) -> Drawing:
    """Return how a policy's answers are drawn, at most so many of them at once."""
    return Drawing(
        max_new_tokens=rules.max_new_tokens,
        temperature=rules.temperature,
        eos_ids=tokenizer.eos_token_ids,
        at_once=drawn_at_once(at_most),
    )


@torch.no_grad()
def draw_answers(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    lora: LoraDelta | None,
    rules: Drawing,
    *,
    seed: int,
    stop: Stop,
) -> list[list[int]]:
    """Return an answer's token ids for each prompt, the token that ends it included.

    The random numbers of the n-th follow from `seed + n`, so that others may draw some of them.

    Raises:
        YieldRequested: somebody asked to stop; nothing of a step has happened yet.
        MemoryTooSmallError: not even one answer fits.
        FewerAtOnce: not as many fit as ranks of one model draw at once.
    """

    def draw(part: Sequence[Prompt], first: int) -> list[list[int]]:
        return _draw(decoder, part, lora, rules, seed + first, stop)

    return rules.at_once.in_parts(prompts, draw, ranks=decoder.group.size)


def _draw(
    decoder: Decoder,
    prompts: Sequence[Prompt],
    lora: LoraDelta | None,
    rules: Drawing,
    seed: int,
    stop: Stop,
) -> list[list[int]]:
    device, lens = decoder.place.device, [len(prompt) for prompt in prompts]
    cache = _Cache(lens, room=max(lens) + rules.max_new_tokens, device=device)
    token_ids_T = np.concatenate([prompt.token_ids_T for prompt in prompts]).astype(np.int64)
    positions_T = torch.from_numpy(np.concatenate([np.arange(length) for length in lens]))
    hidden_TD = decoder(
        torch.from_numpy(token_ids_T).to(device), positions_T.to(device), cache.read_prompts, lora
    )
    hidden_BD = hidden_TD[torch.tensor(lens, device=device).cumsum(0) - 1]
    answers: list[list[int]] = [[] for _ in prompts]
    is_open = [True] * len(prompts)
    for chance_B in _chances(seed, len(prompts), rules.max_new_tokens).unbind(1):
        stop.check()
        drawn_B = _choose(decoder.logits(hidden_BD), rules.temperature, chance_B)
        # Ranks of one model go on with one answer, whatever each of them rounds differently.
        decoder.group.broadcast(drawn_B)
        for index, token_id in enumerate(drawn_B.tolist()):
            if is_open[index]:
                answers[index].append(token_id)
                is_open[index] = token_id not in rules.eos_ids
        if not any(is_open):
            break
        cache.advance()
        hidden_BD = decoder(drawn_B, cache.positions_B, cache.read_one_more, lora)
    return answers


def _chances(seed: int, rows: int, count: int) -> Tensor:
    """Return `count` numbers below one for each row, which follow from the seed and its place."""
    generators = (torch.Generator().manual_seed(seed + row) for row in range(rows))
    return torch.stack([torch.rand(count, generator=g, dtype=torch.float64) for g in generators])


def _choose(logits_BV: Tensor, temperature: float, chance_B: Tensor) -> Tensor:
    """Return one token id for each row: the one whose share of all that is likely holds a chance.

    On the host and in float64, so that a seed means the same on every device.
    """
    if not temperature:
        return logits_BV.argmax(-1)
    likely_BV = (logits_BV / temperature).softmax(-1).cpu().double().cumsum(-1)
    wanted_B1 = chance_B[:, None] * likely_BV[:, -1:]
    drawn_B = torch.searchsorted(likely_BV, wanted_B1, right=True)[:, 0]
    # The product may be rounded up to the whole.
    return drawn_B.clamp_(max=logits_BV.shape[1] - 1).to(logits_BV.device)


class _Cache:
    """Keys and values of sequences of different lengths, side by side."""

    def __init__(self, lens: Sequence[int], *, room: int, device: torch.device) -> None:
        self._lens = list(lens)
        self._room = room
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.positions_B = torch.tensor(self._lens, device=device) - 1

    def read_prompts(
        self,
        layer: int,
        q_THd: Tensor,
        k_TKd: Tensor,
        v_TKd: Tensor,
        *,
        bias: AttentionBias = NO_BIAS,
    ) -> Tensor:
        """Keep the prompts' keys and values, and let each prompt attend to itself."""
        self._layers[layer] = (self._padded(k_TKd), self._padded(v_TKd))
        return CausalAttention(self._lens)(layer, q_THd, k_TKd, v_TKd, bias=bias)

    def advance(self) -> None:
        """Make room for one more token of each sequence."""
        self.positions_B = self.positions_B + 1

    def read_one_more(
        self,
        layer: int,
        q_BHd: Tensor,
        k_BKd: Tensor,
        v_BKd: Tensor,
        *,
        bias: AttentionBias = NO_BIAS,
    ) -> Tensor:
        """Add one token to each sequence and let it attend to those before it."""
        k_BCKd, v_BCKd = self._layers[layer]
        rows = torch.arange(len(self._lens), device=k_BKd.device)
        k_BCKd[rows, self.positions_B], v_BCKd[rows, self.positions_B] = k_BKd, v_BKd
        out = F.scaled_dot_product_attention(
            q_BHd[:, :, None],
            k_BCKd.transpose(1, 2),
            v_BCKd.transpose(1, 2),
            attn_mask=_mask(self.positions_B, self._room, bias, q_BHd.dtype),
            enable_gqa=q_BHd.shape[1] != k_BKd.shape[1],
        )
        return out[:, :, 0]

    def _padded(self, x_TKd: Tensor) -> Tensor:
        padded = x_TKd.new_zeros(len(self._lens), self._room, *x_TKd.shape[1:])
        for row, part in enumerate(x_TKd.split(self._lens)):
            padded[row, : len(part)] = part
        return padded


def _mask(positions_B: Tensor, room: int, bias: AttentionBias, dtype: torch.dtype) -> Tensor:
    """Return what each sequence's last token sees of a cache with so much room.

    Under ALiBi that is [B, H, 1, C], added to each head's scores, and otherwise a boolean
    [B, 1, 1, C].
    """
    distance_BC = torch.arange(room, device=positions_B.device) - positions_B[:, None]
    is_seen_BC = distance_BC <= 0
    if bias.window is not None:
        is_seen_BC &= distance_BC > -bias.window
    if bias.slopes_H is None:
        return is_seen_BC[:, None, None]
    cost_BHC = bias.slopes_H[:, None] * distance_BC[:, None]
    return cost_BHC.masked_fill_(~is_seen_BC[:, None], -torch.inf)[:, :, None].to(dtype)
