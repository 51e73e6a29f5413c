"""Make the golden adapters: random LoRA adapters of golden models, as PEFT writes and computes them.

    python -m venv /tmp/golden && /tmp/golden/bin/pip install torch==2.13.0 transformers==5.24.0 peft==0.21.2
    /tmp/golden/bin/python tests/golden/adapters/make.py

Each folder is what `save_pretrained` of PEFT wrote for a model of `tests/golden/models`:

    llama   rank 3, alpha 6, every matrix of a layer; the base has biases and a head of its own
    qwen2   rank 2, alpha 5, q_proj and v_proj, as PEFT chooses by itself; the base is bf16 and tied

`expected.npz` holds what PEFT computes in fp32 on the golden model's prompts, each alone: `logits` of every
prompt token with the adapter, and the `greedy` continuation; and the merged weight of one part, `merged`.
"""

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

HERE = Path(__file__).parent
MODELS = HERE.parent / "models"
EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS = {
    "llama": LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6, target_modules=EVERY),
    "qwen2": LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=5, target_modules=["q_proj", "v_proj"]),
}
SEEDS = {"llama": 1, "qwen2": 1}
PART = "model.layers.1.self_attn.v_proj"


def make_adapter(family: str) -> None:
    """Write one folder."""
    folder = HERE / family
    torch.manual_seed(SEEDS[family])
    base = AutoModelForCausalLM.from_pretrained(
        MODELS / family, dtype=torch.float32, attn_implementation="eager"
    )
    base.name_or_path = f"tests/golden/models/{family}"
    base.config._name_or_path = base.name_or_path
    model = get_peft_model(base, ADAPTERS[family]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    with np.load(MODELS / family / "expected.npz") as given:
        prompts, lengths, tokens = given["prompts"], given["lengths"], given["greedy"].shape[1]
    vocabulary = base.config.vocab_size
    logits = np.zeros((*prompts.shape, vocabulary), np.float32)
    greedy = np.zeros((len(prompts), tokens), np.int32)
    for row, length in enumerate(lengths):
        ids = torch.tensor(prompts[row : row + 1, :length], dtype=torch.int64)
        with torch.no_grad():
            logits[row, :length] = model(input_ids=ids).logits[0].numpy()
            out = model.generate(
                input_ids=ids,
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=0,
                output_logits=True,
                return_dict_in_generate=True,
            )
        greedy[row] = out.sequences[0, length:].numpy()
        best = torch.stack(out.logits)[:, 0].topk(2).values
        # A tie would be broken by rounding, which no golden file can pin: choose another seed then.
        assert (best[:, 0] - best[:, 1]).min() > 1e-3, (folder, row)
    merged = model.merge_and_unload().get_submodule(PART).weight.detach().numpy()
    np.savez(folder / "expected.npz", logits=logits, greedy=greedy, merged=merged)


if __name__ == "__main__":
    for each in ADAPTERS:
        make_adapter(each)
