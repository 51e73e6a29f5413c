"""The small files that a checkpoint needs beside its tensors: configuration, tokenizer, adapter."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_NOT_CONTENT = ("config.json", "generation_config.json", "adapter_config.json", "tokenizer_config.json")
"""Files about the model, and one that also says from where and how the tokenizer was loaded."""


def attachments_of(trainer: Any) -> dict[str, bytes]:
    """File name -> content, as transformers and PEFT write them."""
    with tempfile.TemporaryDirectory(prefix="rollforward-") as folder:
        trainer.model.config.save_pretrained(folder)
        trainer.processing_class.save_pretrained(folder)
        adapters = getattr(trainer.model, "peft_config", {})
        if adapters:
            active = trainer.model.active_adapter
            adapters[active if isinstance(active, str) else active[0]].save_pretrained(folder)
        elif trainer.model.can_generate():
            trainer.model.generation_config.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}


def tokenizer_files(attachments: Mapping[str, bytes]) -> dict[str, bytes]:
    """Those of them that say how text becomes tokens, the chat template in a file of its own included."""
    return {name: content for name, content in attachments.items() if name not in _NOT_CONTENT}
