"""transformers' continuous batching as a worker."""

from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.offline.protocol import Generate, Job, answer_batches
from benchmarks.offline.transformers_generate import load_model

_PAGE_TOKENS = 256
_STEP_TOKENS = 512


def load(job: Job) -> Generate:
    """Load the model."""
    model = load_model(job)
    pages = -(-job.max_model_len // _PAGE_TOKENS)

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        # -1 is no token: answers never end early.
        config = GenerationConfig(
            max_new_tokens=output_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0
        )
        # Left to itself it writes zeros over most of the machine's memory at each call.
        cache = ContinuousBatchingConfig(
            page_size=_PAGE_TOKENS, num_blocks=len(prompts) * pages, max_batch_tokens=_STEP_TOKENS
        )
        outputs = model.generate_batch(
            inputs=prompts, generation_config=config, continuous_batching_config=cache
        )
        return [len(output.generated_tokens) for output in outputs.values()]

    return generate


if __name__ == "__main__":
    answer_batches(load)
