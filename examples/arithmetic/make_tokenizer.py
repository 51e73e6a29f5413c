"""Write the tokenizer of the base model: one token a character, 16 tokens, in Hugging Face form.

`tokenizers` and `transformers` (AutoTokenizer) both read it. Run again it writes the same bytes.
"""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split

HERE = Path(__file__).resolve().parent
PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"
VOCABULARY = (PAD, EOS, UNKNOWN, *"0123456789", "+", "-", "=")


def make_tokenizer() -> Tokenizer:
    """Each character is a token; what is not in the vocabulary is `<unk>`."""
    tokenizer = Tokenizer(
        WordLevel({token: index for index, token in enumerate(VOCABULARY)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = Split(pattern="", behavior="isolated")
    tokenizer.decoder = Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, EOS, UNKNOWN)])
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer().save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": PAD,
        "eos_token": EOS,
        "unk_token": UNKNOWN,
        "model_max_length": 64,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_tokenizer(HERE / "model")
    print(f"{HERE / 'model'}: {len(VOCABULARY)} tokens")
