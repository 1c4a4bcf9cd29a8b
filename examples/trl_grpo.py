"""GRPO of a tiny model in TRL, with r1v3's fused head and reward: python examples/trl_grpo.py"""

import tempfile

from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from r1v3.integrations.trl import answer_reward, use_head

rebound = use_head()  # the one line; `rebound.undo()` gives TRL's own head back
print("replaced:", *rebound.names)

# A model and a tokenizer of single characters: in place of yours.
characters = ["<pad>", "<eos>", "<unk>", *"0123456789+= \\{}<>/boxedthink"]
words = Tokenizer(models.WordLevel({c: i for i, c in enumerate(characters)}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Split("", "isolated")
tokenizer = PreTrainedTokenizerFast(
    tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
)
tokenizer.padding_side = "left"
model = Qwen2ForCausalLM(
    Qwen2Config(
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=len(characters),
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
)
with tempfile.TemporaryDirectory() as folder:
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=answer_reward,  # grades completions by the column `solution`
        args=GRPOConfig(
            folder,
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=12,
            max_steps=2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            bf16=False,
        ),
        train_dataset=Dataset.from_dict(
            {"prompt": [f"{i}+{i}=" for i in range(8)], "solution": [str(2 * i) for i in range(8)]}
        ),
        processing_class=tokenizer,
    )
    trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
print("losses:", losses)
