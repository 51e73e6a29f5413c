"""A small real tokenizer in a Hugging Face folder, for the tests that need one."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from tokenizers.decoders import Fuse

VOCAB = ["<unk>", "<pad>", "<s>", "</s>", "<|im_end|>", *"0123456789+=", "u", "m", ":", "\n", "<", ">", "é"]


def write_tokenizer(folder: Path, *, adds_first_token: bool = False, **config: Any) -> Path:
    """One token a character; `config` goes into tokenizer_config.json beside the usual tokens."""
    tokenizer = Tokenizer(
        models.WordLevel({token: index for index, token in enumerate(VOCAB)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in VOCAB[:5]])
    if adds_first_token:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 2)])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    tokens = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "pad_token": "<pad>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens | config))
    return folder
