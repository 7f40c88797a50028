"""Backend Transformers: Hugging Face's Trainer and PEFT inside of our jobs' contract."""
