"""A model that is small enough to be written down, with grouped queries and biases. Loads no framework."""

QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
"""A parsed `config.json`."""
