"""The real small model learns from real dialogues, and what it becomes can be served."""

from pathlib import Path

import pytest
import torch

from hack.datasets import write_chatterbot
from hack.models import cache_dir, fetch
from mizzen.runtime.attention.causal import CausalAttention
from mizzen.runtime.engine.tokenizer import Tokenizer
from mizzen.runtime.model.arch import ArchSpec
from mizzen.runtime.model.loader import load_decoder
from mizzen.runtime.train.curve import read_history
from mizzen.runtime.train.export import write_model
from mizzen.runtime.train.trainable import Trainable, full_views
from tests.fixtures.train_runs import run, write_job

pytestmark = [pytest.mark.model, pytest.mark.timeout(900)]

CHAT = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A pirate."}]


@pytest.fixture(scope="module")
def gguf() -> Path:
    return fetch(cache_dir())


def test_eight_steps_of_lora_lower_the_loss_on_the_holdout(tmp_path: Path, gguf: Path) -> None:
    write_chatterbot(tmp_path / "chat.jsonl", limit=80)
    job = write_job(
        tmp_path,
        adaptation={"type": "lora", "rank": 8, "alpha": 16.0},
        base_model=str(gguf),
        datasets=[{"name": "chat", "path": str(tmp_path / "chat.jsonl")}],
        processing={"max_seq_len": 64, "holdout_ratio": 0.1},
        hyperparameters={
            "max_steps": 8,
            "batch_size": 4,
            "micro_batch": 4,
            "dtype": "auto",
            "learning_rate": 2e-3,
        },
        checkpoint={"every_steps": 4},
    )
    assert run(job) == 0
    (suite,) = job.last_word["evaluation"]
    assert suite["candidate"] < 0.95 * suite["base"]
    assert len(read_history(job.checkpoints / "metrics.jsonl")) == 8


def test_a_model_written_from_gguf_computes_and_tokenizes_the_same(
    tmp_path: Path, gguf: Path
) -> None:
    before, tokenizer = load_decoder(gguf, dtype=torch.bfloat16), Tokenizer.load(gguf)
    write_model(
        tmp_path,
        Trainable(full_views(before), lora=None, weight_decay=0.0).weights(),
        spec=before.spec,
        base_model=gguf,
        tokenizer=tokenizer,
    )
    after, again = load_decoder(tmp_path, dtype=torch.bfloat16), Tokenizer.load(tmp_path)
    token_ids, mask = again.render_for_training(CHAT)
    assert (token_ids, mask) == tokenizer.render_for_training(CHAT)
    assert again.eos_token_ids == tokenizer.eos_token_ids
    assert ArchSpec.from_dir(tmp_path).eos_ids == before.spec.eos_ids
    ids_T = torch.tensor(token_ids)
    positions_T = torch.arange(len(token_ids))
    with torch.no_grad():
        was, now = (
            model.logits(model(ids_T, positions_T, CausalAttention([len(token_ids)])))
            for model in (before, after)
        )
    assert torch.equal(was, now)
