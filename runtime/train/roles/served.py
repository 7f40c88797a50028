"""Answers drawn by the replicas of a deployment, with the policy as it is at each step.

Each asks a replica for the answers of one version, by its digest. A replica that does not know it,
because it missed a push, is new or was restarted, says so and is given it. So no answer is ever of
another version than the one that learns from it, and no replica has to be kept track of.
"""

from __future__ import annotations

import io
import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.layers import LoraDelta
from mizzen.runtime.model.lora import Adapter, Pair, TrainableLora, save_adapter
from mizzen.runtime.train.digest import mark_weights, policy_name
from mizzen.runtime.train.options import Replicas
from mizzen.runtime.train.roles.fleet import Fleet, Policy
from mizzen.runtime.train.roles.roles import Drawn, OwnRoles
from mizzen.runtime.train.samples import Prompt
from mizzen.runtime.train.surroundings import Surroundings

_SEEDS = 2**63


class ServedRoles(OwnRoles):
    """Replicas draw; the trainer judges and compares."""

    def __init__(self, around: Surroundings, replicas: Replicas) -> None:
        super().__init__(around)
        self._fleet = Fleet(replicas.url, token=around.admin_token, stop=around.stop)
        self._origin = {
            "job": around.config.job,
            "weights": mark_weights(around.config.base_model),
            "vocabulary": around.tokenizer.vocabulary_digest,
        }

    def draw(
        self, decoder: Decoder, prompts: Sequence[Prompt], lora: LoraDelta | None, *, seed: int
    ) -> Drawn:
        """Return the answers of the replicas; each has a seed of its own, whoever draws it.

        Raises:
            RolloutRefusedError: they will not answer with this policy.
            RolloutUnavailableError: none has answered for a long time.
        """
        assert isinstance(lora, TrainableLora), "checked by the job's configuration"
        policy = pack_policy(lora, self._origin)
        questions = [
            {"prompt": prompt.token_ids_T.tolist(), "seed": (seed + place) % _SEEDS}
            for place, prompt in enumerate(prompts)
        ]
        rules = {
            "max_tokens": self._drawing.max_new_tokens,
            "temperature": self._drawing.temperature,
        }
        answers = self._fleet.draw(policy, questions, rules)
        return Drawn(
            [answer["token_ids"] for answer in answers],
            [np.asarray(answer["log_probs"], np.float32) for answer in answers],
        )

    def close(self) -> None:
        """Have the replicas give the policy's place to others."""
        self._fleet.close(self._origin["job"])


def pack_policy(lora: TrainableLora, origin: dict[str, str]) -> Policy:
    """Return the adapter as replicas take it: PEFT's files in a zip, and what it belongs to."""
    content = io.BytesIO()
    pairs = {site: Pair(*matrices) for site, matrices in lora.pairs()}
    # Dropout is for training alone.
    adapter = Adapter(replace(lora.config, dropout=0.0), pairs)
    with tempfile.TemporaryDirectory(prefix="policy-") as folder:
        save_adapter(Path(folder), adapter, base_model=origin["weights"])
        with zipfile.ZipFile(content, "w") as archive:
            for path in sorted(Path(folder).iterdir()):
                archive.write(path, path.name)
            archive.writestr("policy.json", json.dumps(origin))
    body = content.getvalue()
    return Policy(policy_name(body), body)
