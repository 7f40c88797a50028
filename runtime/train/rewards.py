"""What an answer is worth: rules from a short list, or a reward model that an earlier job made."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraSlots, load_adapter
from mizzen.runtime.model.lora.files import CONFIG_FILE
from mizzen.runtime.parallel.group import RankGroup
from mizzen.runtime.train.adaptation import load_dtype
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.halving import AtOnce
from mizzen.runtime.train.methods.reward import HEAD_FILE, HEAD_NAME, rewards_of
from mizzen.runtime.train.options import Rule
from mizzen.runtime.train.samples import Prompt, Sample, joined


def rule_reward(rule: Rule, *, text: str, tokens: int, answer: str | None) -> float:
    """Return what one rule gives: between 0 and 1, times its weight."""
    if rule.type == "regex":
        found = float(re.search(rule.pattern or "", text) is not None)
    elif rule.type == "exactAnswer":
        found = float(answer is not None and text.strip() == answer.strip())
    else:
        wanted = rule.tokens or 1
        found = 1.0 - min(1.0, abs(tokens - wanted) / wanted)
    return rule.weight * found


class RuleRewards:
    """The sum of a job's rules."""

    def __init__(self, rules: Sequence[Rule], tokenizer: Tokenizer) -> None:
        self._rules = rules
        self._tokenizer = tokenizer

    def of(self, token_ids: Sequence[int], answer: str | None) -> float:
        """Return what an answer is worth; `answer` is what its dataset expects."""
        text = self._tokenizer.decode(token_ids)
        return sum(
            rule_reward(rule, text=text, tokens=len(token_ids), answer=answer)
            for rule in self._rules
        )


def is_reward_adapter(path: Path, base_model: Path) -> bool:
    """Return whether a reward model is an adapter of this base; if not, it is a model of its own.

    Raises:
        JobConfigError: it is no reward model, or an adapter of another base.
    """
    if not (path / HEAD_FILE).exists():
        raise JobConfigError(
            f"{path} has no {HEAD_FILE}, so it is no reward model. Name the artifact of a job "
            "with method reward."
        )
    if not (path / CONFIG_FILE).exists():
        return False
    trained_on = json.loads((path / CONFIG_FILE).read_text())["base_model_name_or_path"]
    if trained_on != str(base_model):
        raise JobConfigError(
            f"The reward model was trained beside {trained_on} and this job's base is "
            f"{base_model}. Use one base for both, or a reward model with adaptation.type "
            "full."
        )
    return True


class RewardModel:
    """A trained reward model: an adapter beside the policy's own base, or a model of its own.

    Only an adapter needs the base, so only then it is asked for.
    """

    def __init__(
        self,
        path: Path,
        *,
        base_model: Path,
        base: Callable[[], Decoder],
        dtype: torch.dtype,
        device: torch.device,
        group: RankGroup,
    ) -> None:
        self._slots: LoraSlots | None = None
        if is_reward_adapter(path, base_model):
            self._decoder = base()
            self._slots = LoraSlots(self._decoder)
            self._slots.load(1, load_adapter(path))
        else:
            self._decoder = load_decoder(path, dtype=dtype, device=device, group=group)
        self._head_1D = load_file(path / HEAD_FILE)[HEAD_NAME].to(device)

    @torch.no_grad()
    def of(self, samples: Sequence[Sample]) -> Tensor:
        """Return each conversation's reward."""
        lora = None
        if self._slots is not None:
            lora = self._slots.batch([1] * len(samples), [len(sample) for sample in samples])
        return rewards_of(self._decoder, samples, lora, self._head_1D).cpu()


class Rewards:
    """What a job pays for answers: by rules, by a reward model, less what a missing end costs.

    The reward model is read when the first answer is judged.
    """

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, device: torch.device) -> None:
        assert config.rl is not None, "checked by the job's configuration"
        self._config = config
        self._device = device
        self._rules = config.rl
        self._ends = tokenizer.eos_token_ids
        self._by_rules = RuleRewards(self._rules.rewards, tokenizer)
        self._model: RewardModel | None = None
        self._at_once = AtOnce(config.hyperparameters.micro_batch)

    def of(
        self,
        prompts: Sequence[Prompt],
        answers: Sequence[list[int]],
        *,
        base: Callable[[], Decoder],
        group: RankGroup,
    ) -> list[float]:
        """Return what each answer is worth, the same on all ranks of the group.

        `base` gives the model that the policy started from.
        """
        pairs = list(zip(prompts, answers, strict=True))
        rewards = [self._by_rules.of(answer, prompt.answer) for prompt, answer in pairs]
        if self._rules.reward_model is not None:
            if self._model is None:
                self._model = RewardModel(
                    self._rules.reward_model,
                    base_model=self._config.base_model,
                    base=base,
                    dtype=load_dtype(self._config, self._device),
                    device=self._device,
                    group=group,
                )
            model = self._model
            found = self._at_once.in_parts(
                [joined(*pair) for pair in pairs],
                lambda part, _: model.of(part).tolist(),
                ranks=group.size,
            )
            rewards = [r + m for r, m in zip(rewards, found, strict=True)]
        penalty = self._rules.missing_eos_penalty
        worth = [
            reward - penalty * (answer[-1] not in self._ends)
            for reward, answer in zip(rewards, answers, strict=True)
        ]
        # What is learned hangs on which answers are worth the same: no rank may see that otherwise.
        told = torch.tensor(worth, dtype=torch.float64, device=self._device)
        return list(group.broadcast(told).tolist())
