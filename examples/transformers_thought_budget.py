"""NoWait and a thinking budget in `generate`: python examples/transformers_thought_budget.py"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, InternVLForConditionalGeneration

from r1v3.integrations.transformers import NoWait, ThoughtBudget

folder = Path(__file__).resolve().parent.parent / "assets" / "tiny-internvl"  # or your model
tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
prompt = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    "{}<|im_end|>\n<|im_start|>assistant\n<think>\n"
)
questions = ["What is three plus four?", "Which is larger?"]
inputs = tokenizer([prompt.format(question) for question in questions], return_tensors="pt",
                   padding=True, add_special_tokens=False)  # fmt: skip
length = inputs["input_ids"].shape[1]

torch.manual_seed(0)
tokens = model.generate(
    **inputs,
    do_sample=True,
    max_new_tokens=30,
    pad_token_id=tokenizer.pad_token_id,
    eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
    # No "Wait" and "Hmm", and the thought is closed after eight tokens.
    logits_processor=[NoWait(tokenizer), ThoughtBudget(tokenizer, 8, length)],
)
texts = tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)
for text in texts:
    print(repr(text))
