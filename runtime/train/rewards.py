"""What an answer is worth: rules from a short list, or a reward model that an earlier job made."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import LoraSlots, load_adapter
from mizzen.runtime.model.lora.files import CONFIG_FILE
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.methods.reward import HEAD_FILE, HEAD_NAME, rewards_of
from mizzen.runtime.train.options import Rule
from mizzen.runtime.train.samples import Sample


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


class RewardModel:
    """A trained reward model: an adapter beside the policy's own base, or a model of its own."""

    def __init__(self, path: Path, *, base_model: Path, base: Decoder) -> None:
        head = path / HEAD_FILE
        if not head.exists():
            raise JobConfigError(
                f"{path} has no {HEAD_FILE}, so it is no reward model. Name the artifact of a job "
                "with method reward."
            )
        self._slots: LoraSlots | None = None
        if (path / CONFIG_FILE).exists():
            trained_on = json.loads((path / CONFIG_FILE).read_text())["base_model_name_or_path"]
            if trained_on != str(base_model):
                raise JobConfigError(
                    f"The reward model was trained beside {trained_on} and this job's base is "
                    f"{base_model}. Use one base for both, or a reward model with adaptation.type "
                    "full."
                )
            self._decoder = base
            self._slots = LoraSlots(base)
            self._slots.load(1, load_adapter(path))
        else:
            place = base.place
            self._decoder = load_decoder(path, dtype=place.dtype, device=place.device)
        self._head_1D = load_file(head)[HEAD_NAME].to(base.place.device)

    @torch.no_grad()
    def of(self, samples: Sequence[Sample]) -> Tensor:
        """Return each conversation's reward."""
        lora = None
        if self._slots is not None:
            lora = self._slots.batch([1] * len(samples), [len(sample) for sample in samples])
        return rewards_of(self._decoder, samples, lora, self._head_1D).cpu()
