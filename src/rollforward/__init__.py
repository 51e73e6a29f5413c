"""Rollforward: GRPO post-training of language models that recovers like a database."""

__version__ = "0.1.0"
