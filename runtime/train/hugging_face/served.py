"""The model as it would be served: our decoder, with the files that are to be published."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from mizzen.runtime.model.decoder import Decoder
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.model.lora import Adapter, TrainableLora, load_adapter
from mizzen.runtime.train.checkpoint import PARTIAL_PREFIX
from mizzen.runtime.train.hugging_face.model import LanguageModel, write_model
from mizzen.runtime.train.suites.exam import Subject
from mizzen.runtime.train.surroundings import Surroundings


def serve_base(around: Surroundings) -> Subject:
    """Return the base model."""
    with around.stop.nothing_to_lose():
        return Subject(decoder=load_decoder(around.config.base_model, device=around.device))


def serve_candidate(around: Surroundings, model: LanguageModel, *, checkpoint: Path) -> Subject:
    """Return the model as it is now.

    Raises:
        BadAdapterError: a replica could not load the adapter.
    """
    directory = around.config.checkpoint.directory
    # What a kill leaves there is removed with the half-written checkpoints.
    partial = TemporaryDirectory(dir=directory, prefix=PARTIAL_PREFIX)
    with around.stop.nothing_to_lose(), partial as name:
        folder = Path(name)
        write_model(model, folder, checkpoint=checkpoint)
        if around.config.output.kind == "model":
            return Subject(decoder=load_decoder(folder, device=around.device))
        decoder = load_decoder(around.config.base_model, device=around.device)
        return Subject(decoder=decoder, lora=_lora_of(load_adapter(folder), decoder))


@torch.no_grad()
def _lora_of(adapter: Adapter, decoder: Decoder) -> TrainableLora:
    lora = TrainableLora(decoder, adapter.config)
    for site, pair in lora.pairs():
        for held, read in zip(pair, adapter.pairs[site], strict=True):
            held.copy_(read)
    return lora.eval()
