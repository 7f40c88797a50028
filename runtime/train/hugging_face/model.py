"""A causal language model as transformers knows it: found, loaded, adapted and written down.

No code of a model's own directory is ever run, and no pickle is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    __version__,
)
from transformers.pytorch_utils import Conv1D
from transformers.utils.logging import disable_progress_bar

from mizzen.runtime.errors import (
    NotAModelError,
    RemoteCodeRefusedError,
    UnknownArchitectureError,
    WeightsMissingError,
)
from mizzen.runtime.model.arch import read_json
from mizzen.runtime.train.config import TrainConfig
from mizzen.runtime.train.device import choose_dtype
from mizzen.runtime.train.errors import JobConfigError
from mizzen.runtime.train.export import copy_tokenizer
from mizzen.runtime.train.memory import Need, need_of

LanguageModel = PreTrainedModel | PeftModel


def read_config(checkpoint: Path) -> PreTrainedConfig:
    """Return what transformers makes of the model's config.json.

    Raises:
        BadModelError: it has no built-in code for it, or weights this backend does not train.
    """
    if checkpoint.is_file():
        raise NotAModelError(
            f"Backend Transformers reads directories with safetensors, and {checkpoint.name} is a "
            "GGUF file. Use the model's safetensors, or backend Mizzen."
        )
    document = read_json(checkpoint / "config.json")
    kind = document.get("model_type")
    if kind not in CONFIG_MAPPING:
        if "auto_map" in document:
            raise RemoteCodeRefusedError(
                f"Model type {kind!r} needs code from the model's directory (auto_map), which "
                "Mizzen never runs. Use a model that transformers has the code for."
            )
        raise UnknownArchitectureError(
            f"transformers {__version__} does not know model type {kind!r} either. "
            "Use a model that it has the code for."
        )
    if "quantization_config" in document:
        raise JobConfigError(
            "The base model's weights are quantized, and backend Transformers trains none of "
            "those. Use the model they were made from, or backend Mizzen."
        )
    config = AutoConfig.from_pretrained(checkpoint, local_files_only=True, trust_remote_code=False)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnknownArchitectureError(
            f"Models of type {kind} do not write text token by token. Use a causal language model."
        )
    return config


def max_len(config: PreTrainedConfig) -> int | None:
    """Return how many tokens the model can read, None where nothing limits it."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def plan_need(job: TrainConfig, config: PreTrainedConfig, device: torch.device) -> Need:
    """Return what the job needs on a device, from its model's shape alone.

    Raises:
        JobConfigError: adaptation.targets names linears there are not.
    """
    dtype = _frozen_dtype(job, device)
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        model = adapt(empty, job)
    moving = [weight for weight in model.parameters() if weight.requires_grad]
    return need_of((*model.parameters(), *model.buffers()), moving)


def load_model(job: TrainConfig, checkpoint: Path, device: torch.device) -> LanguageModel:
    """Return the model on its device, made ready to be trained as the job says.

    Raises:
        WeightsMissingError: files or tensors are missing or cut short.
    """
    disable_progress_bar()  # a pod's log is no terminal
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            dtype=_frozen_dtype(job, device),
            output_loading_info=True,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    except (OSError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise WeightsMissingError(
            f"The weights of {checkpoint} cannot be read: {reason} Copy the model again."
        ) from error
    if missing := sorted(found["missing_keys"]):
        # transformers would draw random numbers for them and go on.
        raise WeightsMissingError(
            f"{checkpoint} lacks {len(missing)} tensors, such as {missing[0]}. "
            "Copy the model again."
        )
    return adapt(model, job).to(device)


def adapt(model: PreTrainedModel, job: TrainConfig) -> LanguageModel:
    """Return the model with every weight moving, or with an adapter that alone moves.

    Raises:
        JobConfigError: adaptation.targets names linears there are not.
    """
    adaptation = job.adaptation
    if adaptation.type == "full":
        return model
    targets = adaptation.targets
    if targets != "all-linear":
        _check_targets(model, targets)
    torch.manual_seed(job.hyperparameters.seed)
    rules = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(job.base_model),
        r=adaptation.rank,
        lora_alpha=adaptation.alpha,
        lora_dropout=adaptation.dropout,
        target_modules=targets if targets == "all-linear" else list(targets),
    )
    return get_peft_model(model, rules)


@torch.no_grad()
def round_for_publishing(model: LanguageModel, *, checkpoint: Path) -> None:
    """Give the weights of a whole model the values that will be published."""
    if not isinstance(model, PeftModel):
        dtype = _published_dtype(checkpoint)
        for weight in model.parameters():
            weight.copy_(weight.to(dtype))


def write_model(model: LanguageModel, folder: Path, *, checkpoint: Path) -> None:
    """Write an adapter in PEFT's layout, or a whole model with all that its base's folder has."""
    if isinstance(model, PeftModel):
        for rules in model.peft_config.values():
            # PEFT keeps a set, and would write it in another order in each process.
            rules.target_modules = sorted(rules.target_modules)
        model.save_pretrained(folder)
        return
    dtype = _published_dtype(checkpoint)
    with _weights_as(model, dtype):
        model.save_pretrained(folder)
    copy_tokenizer(checkpoint, folder)
    # The model's own has the settings of training in it.
    said: dict[str, Any] = {**read_json(checkpoint / "config.json"), "dtype": _name_of(dtype)}
    said.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps(said, indent=2, sort_keys=True) + "\n")


@contextmanager
def _weights_as(model: PreTrainedModel, dtype: torch.dtype) -> Iterator[None]:
    """Keep a rounded model's weights in another type for a while; buffers stay exact."""
    for weight in model.parameters():
        weight.data = weight.data.to(dtype)
    try:
        yield
    finally:
        for weight in model.parameters():
            weight.data = weight.data.float()


def _check_targets(model: PreTrainedModel, targets: tuple[str, ...]) -> None:
    linears = (name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D))
    known = sorted({name.rpartition(".")[2] for name in linears})
    if unknown := sorted(set(targets) - set(known)):
        raise JobConfigError(
            f"adaptation.targets names {', '.join(unknown)}, and this model's linears are "
            f"{', '.join(known)}. Use all-linear."
        )


def _frozen_dtype(job: TrainConfig, device: torch.device) -> torch.dtype:
    """Return the type weights are kept in; those that move are always float32."""
    if job.adaptation.type == "full":
        return torch.float32
    return choose_dtype(job.hyperparameters.dtype, device)


def _published_dtype(checkpoint: Path) -> torch.dtype:
    """Return the type a whole model is published in: its base's, but never float16."""
    document = read_json(checkpoint / "config.json")
    name = document.get("dtype") or document.get("torch_dtype") or "float32"
    return torch.float32 if name == "float32" else torch.bfloat16


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
