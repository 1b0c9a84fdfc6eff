"""The weight bridge: Hugging Face checkpoints in, Hugging Face checkpoints out."""
