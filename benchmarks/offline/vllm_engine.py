"""vLLM's engine as a worker; runs in the peer's environment."""

from vllm import LLM, SamplingParams

from benchmarks.offline.protocol import Generate, Job, answer_batches


def load(job: Job) -> Generate:
    """Start the engine."""
    llm = LLM(
        job.model,
        dtype=job.dtype,
        max_model_len=job.max_model_len,
        max_num_seqs=job.max_num_seqs,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], output_tokens: int) -> list[int]:
        sampling = SamplingParams(
            temperature=0, max_tokens=output_tokens, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(asked, sampling, use_tqdm=False)
        return [len(output.outputs[0].token_ids) for output in outputs]

    return generate


if __name__ == "__main__":  # its processes import this module again
    answer_batches(load)
