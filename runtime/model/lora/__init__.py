"""LoRA adapters: an adapter adds `scale * B A x` to a linear's output.

The decoder knows only `LoraDelta`; `TrainableLora` is one, and so is the `LoraBatch` in which each
sequence of a step has its own adapter.

Source: LoRA (Hu et al., 2021); file layout: PEFT 0.21, `LoraConfig` and `save_pretrained`.
"""

from mizzen.runtime.model.lora.adapter import PATHS, Adapter, LoraConfig, Pair, Site
from mizzen.runtime.model.lora.files import load_adapter, save_adapter
from mizzen.runtime.model.lora.serving import LoraBatch, LoraSlots
from mizzen.runtime.model.lora.sites import SiteShape, site_shapes
from mizzen.runtime.model.lora.training import TrainableLora

__all__ = [
    "PATHS",
    "Adapter",
    "LoraBatch",
    "LoraConfig",
    "LoraSlots",
    "Pair",
    "Site",
    "SiteShape",
    "TrainableLora",
    "load_adapter",
    "save_adapter",
    "site_shapes",
]
