"""Decoder families without a framework: configuration, rotary positions, Hugging Face weights, shapes."""
