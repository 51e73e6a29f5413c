"""Datasets and tokenizers: from files to prompts as token ids."""
