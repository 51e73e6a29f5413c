"""Make the golden tokenizers, and what transformers says about them.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install transformers==5.24.0 jinja2
    /tmp/golden/bin/python tests/golden/tokenizers/make.py

`folders/` has small tokenizers as a user would bring them, trained on the few lines below. Between them
they cover models (words, byte-level BPE, BPE with bytes to fall back on, unigrams, word pieces), what is put
around a text, flags of added tokens, and what the files beside tokenizer.json may say. `templates/` has chat
templates in the style of those that models come with, written for this test.

`expected.json` holds what transformers makes of them: of each folder its special tokens; of each plain text
its ids and what they decode to; of each chat under a template the text and ids, or the error. The date is
TODAY. Content in parts is given as it is to templates that know parts (PARTS); for the others it is joined
with blanks before, as transformers does when it serves a model.
"""

import datetime
import json
import shutil
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors, trainers
from tokenizers import pre_tokenizers as pre
from transformers import PreTrainedTokenizerFast
from transformers.utils import chat_template_utils

HERE = Path(__file__).parent
FOLDERS = HERE / "folders"
TODAY = datetime.datetime(2026, 7, 4)
PARTS = {"gemma3", "llama31", "parts_only"}
CHATS_EACH = 3
"""So many chats under each template with each tokenizer, in turn: each chat meets each template."""

CORPUS = [
    "What is 41 + 96? Think step by step, then answer with one number.",
    "The answer is 137. You're right, it isn't 136!",
    "user assistant system tool model think answer Today's date is 4 July 2026.",
    "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.",
    "def add(a, b):\n    return a + b\n",
    "0 1 2 3 4 5 6 7 8 9 10 11 12 20 30 40 50 60 70 80 90 100",
] * 4

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "zwölf <2>"}}}
CHATS = {
    "question": [{"role": "user", "content": "What is 41+96?"}],
    "told": [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "41+96=\n"}],
    "several": [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "  and 2+2?  "},
    ],
    "begun": [{"role": "user", "content": "41+96="}, {"role": "assistant", "content": "1"}],
    "begun_with_a_blank": [
        {"role": "user", "content": "41+96="},
        {"role": "assistant", "content": "The answer is "},
    ],
    "begun_with_a_line": [
        {"role": "system", "content": "Think."},
        {"role": "user", "content": "41+96="},
        {"role": "assistant", "content": "\n<think>\nLet me see.\n"},
    ],
    "begun_like_before": [
        {"role": "user", "content": "Say yes."},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "Say yes again."},
        {"role": "assistant", "content": "yes"},
    ],
    "begun_after_thinking": [
        {"role": "user", "content": "41+96="},
        {"role": "assistant", "content": "<think>40+90=130</think>\n\nIt is"},
    ],
    "begun_with_nothing": [{"role": "user", "content": "41+96="}, {"role": "assistant", "content": ""}],
    "begun_without_content": [{"role": "user", "content": "41+96="}, {"role": "assistant"}],
    "foreign": [{"role": "user", "content": "Zwölf & <b>百</b> 🙂 \u00a0 é e\u0301 'x' \"y\" \\ \t"}],
    "with_special_words": [{"role": "user", "content": "<s>a</s> <|im_end|> [INST] <pad> <|eot_id|>x"}],
    "tool": [
        {"role": "user", "content": "1+12="},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "name": "add", "content": "13"},
    ],
    "thought": [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "reasoning_content": "\nOne and one.\n", "content": "2"},
        {"role": "user", "content": "2+2="},
        {"role": "assistant", "thinking": "Two and two.", "content": "4"},
        {"role": "user", "content": "3+3="},
    ],
    "begun_thought": [
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "reasoning": "One and one.", "content": "2"},
    ],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": [{"type": "text", "text": "41+"}, {"type": "text", "text": " 96="}]},
    ],
    "begun_parts": [
        {"role": "user", "content": [{"type": "text", "text": "41+96="}]},
        {"role": "assistant", "content": [{"type": "text", "text": "It "}, {"type": "text", "text": "is "}]},
    ],
    "named": [{"role": "user", "name": "Ann", "content": "Hello", "weight": 0.5, "empty": None}],
    "system_last": [{"role": "user", "content": "Hello"}, {"role": "system", "content": "Answer now."}],
    "unknown_role": [{"role": "developer", "content": "Hello"}],
    "assistant_first": [{"role": "assistant", "content": "Hello, "}],
}
TEXTS = [
    "What is 41+96?",
    "  two  blanks \n\n a line\t and the end ",
    "Zwölf 百 🙂 é e\u0301 \u00a0.",
    "it isn't , you 're right ! He said ' yes ' .",
    "<s>",
    "<s>41",
    "<s><s>41",
    "<s> 41</s>",
    "41</s>",
    "a <mark> b<mark>c <left> d <right> e",
    "<|im_start|>user\n1+1=<|im_end|>",
    "[CLS] one [SEP]",
    "x",
]


def words() -> Tokenizer:
    seen = sorted({word for line in CORPUS for word in line.split()})
    vocab = ["<unk>", "<s>", "</s>", "<pad>", *seen, "41", "x", "+"]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(dict.fromkeys(vocab))}, unk_token="<unk>"))
    made.pre_tokenizer = pre.Whitespace()
    return made


def byte_level(*special: str, split: bool = False) -> Tokenizer:
    made = Tokenizer(models.BPE())
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s+"
    )
    made.pre_tokenizer = (
        pre.Sequence(
            [pre.Split(Regex(pattern), "isolated"), pre.ByteLevel(add_prefix_space=False, use_regex=False)]
        )
        if split
        else pre.ByteLevel(add_prefix_space=False)
    )
    made.decoder = decoders.ByteLevel()
    train = trainers.BpeTrainer(
        vocab_size=340,
        special_tokens=list(special),
        initial_alphabet=pre.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(CORPUS, train)
    return made


def fall_back(*special: str, prepend: bool) -> Tokenizer:
    """As SentencePiece models converted to BPE: blanks are written as a mark, unknown characters as bytes."""
    made = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace]) if prepend else replace
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    train = trainers.BpeTrainer(vocab_size=420, special_tokens=tokens, show_progress=False)
    made.train_from_iterator(CORPUS, train)
    # The trainer marks all of them as special; bytes are ordinary pieces.
    text = json.loads(made.to_str())
    text["added_tokens"] = [token for token in text["added_tokens"] if token["content"] in special]
    made = Tokenizer.from_str(json.dumps(text))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)] if prepend else parts)
    return made


def unigrams() -> Tokenizer:
    made = Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    made.pre_tokenizer = pre.Metaspace()
    made.decoder = decoders.Metaspace()
    train = trainers.UnigramTrainer(
        vocab_size=120, unk_token="<unk>", special_tokens=["<pad>", "</s>", "<unk>"], show_progress=False
    )
    made.train_from_iterator(CORPUS, train)
    return made


def pieces() -> Tokenizer:
    made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=180, special_tokens=special, show_progress=False)
    )
    return made


def around(made: Tokenizer, single: str) -> processors.TemplateProcessing:
    tokens = {word for word in single.split() if word != "$A"}
    return processors.TemplateProcessing(
        single=single, special_tokens=[(token, made.token_to_id(token)) for token in sorted(tokens)]
    )


def token(content: str, **flags: bool) -> dict[str, object]:
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    } | flags
    return {"content": content, **flags}


def made_folders() -> dict[str, tuple[Tokenizer, dict, dict]]:
    """Name -> tokenizer, tokenizer_config.json, special_tokens_map.json."""
    found: dict[str, tuple[Tokenizer, dict, dict]] = {}

    made = words()
    made.enable_truncation(4, stride=1)
    made.enable_padding(length=12, pad_id=3, pad_token="<pad>")
    found["words_cut_and_padded"] = made, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}, {}

    made = byte_level("<|endoftext|>", "<|im_start|>", "<|im_end|>", split=True)
    made.normalizer = normalizers.NFC()
    config = {
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": True,
        "errors": "replace",
        "added_tokens_decoder": {
            str(made.token_to_id(text)): token(text)
            for text in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
        },
    }
    found["bytes_like_qwen"] = made, config, {}

    special = ["<s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    made = byte_level(*special, split=True)
    made.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=True), around(made, "<s> $A")]
    )
    config = {"bos_token": "<s>", "eos_token": "<|eot_id|>", "clean_up_tokenization_spaces": True}
    found["bytes_with_a_first_token"] = made, config, {}

    made = fall_back("<unk>", "<s>", "</s>", prepend=True)
    made.post_processor = around(made, "<s> $A")
    found["fall_back_like_llama2"] = (
        made,
        {"add_eos_token": True, "legacy": False, "bos_token": "<unk>"},
        {"bos_token": token("<s>"), "eos_token": token("</s>", normalized=True), "unk_token": "<unk>"},
    )

    made = fall_back("<pad>", "</s>", "<s>", "<unk>", "<start_of_turn>", "<end_of_turn>", prepend=False)
    made.post_processor = around(made, "<s> $A")
    config = {
        "bos_token": "<s>",
        "eos_token": {"__type": "AddedToken", **token("</s>")},
        "pad_token": "<pad>",
        "extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"],
    }
    found["fall_back_like_gemma"] = made, config, {}

    made = fall_back("<unk>", "<s>", "</s>", "[INST]", "[/INST]", prepend=False)
    made.normalizer = None
    made.pre_tokenizer = pre.Metaspace(prepend_scheme="first", split=False)
    made.post_processor = around(made, "<s> $A </s>")
    found["metaspace_first_and_last_token"] = made, {"bos_token": "<s>", "eos_token": "</s>"}, {}

    made = unigrams()
    made.post_processor = around(made, "$A </s>")
    config = {"eos_token": "</s>", "pad_token": "<pad>", "clean_up_tokenization_spaces": True}
    found["unigrams_with_a_last_token"] = made, config, {}

    made = pieces()
    made.post_processor = around(made, "[CLS] $A [SEP]")
    config = {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "mask_token": "[MASK]",
        "unk_token": "[UNK]",
        "eos_token": "[SEP]",
        "clean_up_tokenization_spaces": True,
    }
    found["pieces_cleaned_up"] = made, config, {}

    made = byte_level("<s>", "</s>")
    made.add_tokens([AddedToken("<mark>", normalized=False), AddedToken("<left>", lstrip=True)])
    made.add_special_tokens([AddedToken("<right>", rstrip=True), AddedToken("41", single_word=True)])
    config = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "image_token": "<left>",
        "extra_special_tokens": {"audio_token": "<mark>"},
        "added_tokens_decoder": {
            "0": token("<s>"),
            "1": token("</s>", lstrip=True, rstrip=True),
            "340": token("<mark>", lstrip=True),
            "341": token("<left>", special=False, rstrip=True),
        },
    }
    found["added_with_flags"] = made, config, {}

    made = byte_level("<s>", "</s>", "<|im_start|>", "<|im_end|>")
    made.post_processor = around(made, "<s> $A")
    config = {"bos_token": "<s>", "eos_token": "</s>", "split_special_tokens": True}
    found["specials_split"] = made, config, {}

    text = json.loads(byte_level("<s>", "</s>", "<|im_end|>").to_str())
    text["added_tokens"] = []
    found["specials_named_by_the_config_alone"] = (
        Tokenizer.from_str(json.dumps(text)),
        {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<|im_end|>"]},
        {},
    )
    return found


def write_folder(name: str, made: Tokenizer, config: dict, special: dict) -> Path:
    folder = FOLDERS / name
    folder.mkdir(parents=True)
    made.save(str(folder / "tokenizer.json"), pretty=False)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **config}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1, ensure_ascii=False) + "\n")
    if special:
        (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=1) + "\n")
    return folder


def joined(chat: list[dict]) -> list[dict]:
    return [
        {**m, "content": " ".join(part["text"] for part in m["content"])}
        if isinstance(m.get("content"), list)
        else m
        for m in chat
    ]


def chat_case(tokenizer: PreTrainedTokenizerFast, template: str, chat: list[dict]) -> dict:
    text = (HERE / "templates" / f"{template}.jinja").read_text()
    begun = chat[-1]["role"] == "assistant"
    given = {
        "conversation": chat if template in PARTS else joined(chat),
        "chat_template": text,
        "add_generation_prompt": not begun,
        "continue_final_message": begun,
    }
    try:
        rendered = tokenizer.apply_chat_template(**given, tokenize=False)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".partition("\n")[0][:120]}
    ids = tokenizer.apply_chat_template(**given, tokenize=True)["input_ids"]
    return {"text": rendered, "ids": ids}


def text_case(tokenizer: PreTrainedTokenizerFast, text: str) -> dict:
    ids = tokenizer(text)["input_ids"]
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {
        "text": text,
        "ids": ids,
        "plain": plain,
        "decoded": tokenizer.decode(ids, skip_special_tokens=True),
    }


class Today(datetime.datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime.datetime:  # noqa: ARG003
        return TODAY


def main() -> None:
    chat_template_utils.datetime = Today
    shutil.rmtree(FOLDERS, ignore_errors=True)
    templates = sorted(path.stem for path in (HERE / "templates").glob("*.jinja"))
    names = list(CHATS)
    folders, cases, turn = {}, [], 0
    for name, (made, config, special) in made_folders().items():
        tokenizer = PreTrainedTokenizerFast.from_pretrained(write_folder(name, made, config, special))
        folders[name] = {
            "special_tokens": tokenizer.special_tokens_map,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "texts": [text_case(tokenizer, text) for text in TEXTS],
        }
        for place, template in enumerate(templates):
            for number in range(CHATS_EACH):
                chat = names[(turn + place + number) % len(names)]
                case = chat_case(tokenizer, template, CHATS[chat])
                cases.append({"folder": name, "template": template, "chat": chat, **case})
        turn += CHATS_EACH
    expected = {"today": TODAY.date().isoformat(), "chats": CHATS, "folders": folders, "cases": cases}
    lines = ",\n".join(json.dumps(case, ensure_ascii=False) for case in cases)
    head = json.dumps({**expected, "cases": []}, ensure_ascii=False, indent=0)
    (HERE / "expected.json").write_text(head.replace('"cases": []', f'"cases": [\n{lines}\n]') + "\n")
    met = {(case["template"], case["chat"]) for case in cases}
    errors = sum("error" in case for case in cases)
    print(
        f"{len(cases)} cases, {errors} of them errors; {len(met)} of {len(templates) * len(names)} pairs met"
    )


if __name__ == "__main__":
    main()
