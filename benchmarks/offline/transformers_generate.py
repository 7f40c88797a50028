"""transformers' generate as a worker: one padded batch."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.offline.protocol import Generate, Job, answer_batches


def load(job: Job) -> Generate:
    """Load the model."""
    model = load_model(job)

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        longest = max(len(prompt) for prompt in prompts)
        padded = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
        with torch.inference_mode():
            out = model.generate(
                padded,
                attention_mask=mask,
                max_new_tokens=output_tokens,
                min_new_tokens=output_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        return [out.shape[1] - longest] * len(prompts)

    return generate


def load_model(job: Job) -> Any:
    """Return the model as transformers runs it on a CPU."""
    torch.set_num_threads(job.threads)
    config = AutoConfig.from_pretrained(job.model)
    # A directory made from a GGUF file may still say so, and transformers would then wrap its plain
    # weights in slower layers: the peer would lose for the wrong reason.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    dtype = getattr(torch, job.dtype)
    return AutoModelForCausalLM.from_pretrained(job.model, config=config, dtype=dtype).eval()


if __name__ == "__main__":
    answer_batches(load)
