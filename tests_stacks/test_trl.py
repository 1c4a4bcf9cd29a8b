"""TRL's own GRPOTrainer, with its head and with r1v3's: the same losses, gradients and weights."""

import copy
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

trl = pytest.importorskip("trl")

from datasets import Dataset  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import (  # noqa: E402
    InternVLForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.trainer_callback import PrinterCallback  # noqa: E402
from trl import GRPOConfig, GRPOTrainer  # noqa: E402

from r1v3.integrations.trl import answer_reward, use_head  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
VOCABULARY = 1000
CHARACTERS = ["<pad>", "<eos>", "<unk>", *"0123456789+= ?abcdefghijklmnopqrstuvwxyz<>/"]
# Every loss of this version of TRL, with clips that act, temperatures, several iterations, a
# reference and an entropy bonus among them.
CASES: dict[str, dict[str, Any]] = {
    "grpo": {"loss_type": "grpo", "epsilon": 0.01, "num_iterations": 2, "temperature": 0.7},
    "bnpo-kl": {"loss_type": "bnpo", "beta": 0.04, "use_bias_correction_kl": False},
    "bnpo-weighted-kl": {"loss_type": "bnpo", "beta": 0.04, "num_iterations": 2},
    "dr_grpo-delta": {
        "loss_type": "dr_grpo", "epsilon_high": 0.28, "delta": 1.5, "num_iterations": 2,
    },
    "dapo": {"loss_type": "dapo"},
    "dapo-entropy": {"loss_type": "dapo", "entropy_coef": 0.01},
    "dapo-top-entropy": {"loss_type": "dapo", "top_entropy_quantile": 0.4},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "cispo": {"loss_type": "cispo", "epsilon_high": 5.0, "num_iterations": 2},
    "sapo": {"loss_type": "sapo", "num_iterations": 2},
    "vespo": {"loss_type": "vespo", "num_iterations": 2},
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "num_generations": 4,
    "max_completion_length": 12,
    "max_steps": 3,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "logging_steps": 1,
    "save_strategy": "no",
    "disable_tqdm": True,
    "seed": 1,
    "learning_rate": 1.0,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character."""
    inner = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Qwen2ForCausalLM:
    """Two layers, read from a folder: with beta > 0, TRL loads the reference by its path."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=64, vocab_size=VOCABULARY, pad_token_id=0, eos_token_id=1,
        bos_token_id=None, tie_word_embeddings=False,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("base")
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def count_sevens(completion_ids: list[list[int]], **_: object) -> list[float]:
    """Any reward that differs within a group."""
    return [float(sum(i % 7 == 0 for i in ids)) for ids in completion_ids]


def trainer(model: torch.nn.Module, folder: Path, **settings: Any) -> GRPOTrainer:
    """A trainer of a copy of the model on eight sums."""
    made = GRPOTrainer(
        model=copy.deepcopy(model),
        reward_funcs=count_sevens,
        args=GRPOConfig(output_dir=str(folder), **{**SETTINGS, **settings}),
        train_dataset=Dataset.from_dict({"prompt": [f"{i}+{i}=" for i in range(8)]}),
        processing_class=tokenizer(),
    )
    made.remove_callback(PrinterCallback)
    return made


def trained(made: GRPOTrainer) -> tuple[list[dict[str, float]], torch.Tensor]:
    """The log of three steps and all weights after them."""
    made.train()
    log = [entry for entry in made.state.log_history if "loss" in entry]
    return log, torch.cat([p.detach().flatten() for p in made.model.parameters()])


def assert_same_training(
    stock: tuple[list[dict[str, float]], torch.Tensor],
    ours: tuple[list[dict[str, float]], torch.Tensor],
    start: torch.Tensor,
) -> None:
    """Equal losses, entropies and gradient norms, and weights within float32 rounding."""
    (log, weights), (our_log, our_weights) = stock, ours
    assert len(log) == len(our_log) == 3
    for a, b in zip(log, our_log, strict=True):
        for key in ("loss", "entropy", "grad_norm"):
            assert b[key] == pytest.approx(a[key], rel=2e-5, abs=1e-6), key
    moved = (weights - start).abs().max().item()
    assert moved > 1e-3, "the steps must matter"
    assert (weights - our_weights).abs().max().item() < 1e-4 * moved


@pytest.mark.parametrize("case", CASES)
def test_three_steps_equal_stock(case: str, base: Qwen2ForCausalLM, tmp_path: Path) -> None:
    """Fails if a loss of TRL trains otherwise with r1v3's head than with TRL's own."""
    start = torch.cat([p.detach().flatten() for p in base.parameters()])
    stock = trained(trainer(base, tmp_path, **CASES[case]))
    with use_head() as rebound:
        assert "trl.trainer.utils._ChunkedLogProbFunction" in rebound.names
        ours = trained(trainer(base, tmp_path, **CASES[case]))
    assert_same_training(stock, ours, start)


def test_every_loss_type_of_this_trl_is_tried() -> None:
    """Fails if TRL has a loss that no case above tries."""
    text = GRPOConfig.__dataclass_fields__["loss_type"].metadata["help"]
    known = set(re.findall(r"'(\w+)'", text.partition(". ")[2].partition(". ")[0]))
    assert "sapo" in known
    assert known == {settings["loss_type"] for settings in CASES.values()}


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_the_head_alone(compact: bool, autocast: bool, softcap: float | None) -> None:
    """Fails if the head is wrong in bfloat16, with a bias, scale, cap or where all is masked."""
    from trl.trainer import utils

    torch.manual_seed(3)
    hidden = torch.randn(3, 7, 16)
    weight, bias = torch.randn(50, 16), torch.randn(50)
    labels = torch.randint(0, 50, (3, 7))
    labels[0, :4] = -100
    targets = [labels, torch.full_like(labels, -100)]

    class Head(torch.nn.Module):
        """A model that TRL can give a fused head."""

        def __init__(self) -> None:
            super().__init__()
            self.base_model = Backbone()
            self.head = torch.nn.Linear(16, 50)
            self.head.weight.data, self.head.bias.data = weight.clone(), bias.clone()
            self.config = Config()

        def get_output_embeddings(self) -> torch.nn.Linear:
            return self.head

        def forward(self, input_ids: torch.Tensor) -> None: ...

    class Config:
        logit_scale = 0.5
        final_logit_softcapping = softcap

        def get_text_config(self) -> "Config":
            return self

    class Backbone(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.states = torch.nn.Parameter(hidden.clone())

        def forward(self, input_ids: torch.Tensor, **_: object) -> object:
            return type("Output", (), {"last_hidden_state": self.states, "get": lambda *a: None})()

    def run(labels: torch.Tensor) -> list[torch.Tensor]:
        model = Head()
        utils.add_fused_lm_head(model, temperature=0.8, outputs=("log_probs", "entropy"))
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(labels, fused_lm_head=True, labels=labels)
        (out.log_probs.sum() + out.entropy.square().sum()).backward()
        return [out.log_probs, out.entropy, model.base_model.states.grad, model.head.weight.grad]

    for each in targets:
        stock = run(each)
        with use_head(compact=compact):
            ours = run(each)
        for a, b in zip(stock, ours, strict=True):
            tolerance = 4e-2 if autocast else 1e-5
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
        assert each is not targets[1] or not ours[0].any()


def test_a_second_call_changes_nothing_and_undo_restores_stock() -> None:
    """Fails if a cell that is run twice loses TRL's own head for good."""
    from trl.trainer import utils

    stock = utils._ChunkedLogProbFunction, utils._use_triton
    first = use_head()
    assert use_head().names == ()
    first.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == stock
    first.undo()
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == stock


def test_what_the_head_does_not_do_goes_to_stock() -> None:
    """Fails if an output that r1v3 does not compute is ignored."""
    from trl.trainer import utils

    torch.manual_seed(4)
    hidden, weight, targets = torch.randn(5, 8), torch.randn(30, 8), torch.randint(0, 30, (5,))
    requests = [
        (3.0, 1.0, ("log_probs", "is_top1")),
        (None, 1.0, ("log_probs", "is_top1")),
        (None, 1.0, ("log_probs", "log_sum_sq_probs")),
        (None, 2.0, ("log_probs", "mean_logits")),
    ]
    for request in requests:
        arguments = (hidden, weight, None, targets, 0.9, 16, *request)
        stock = utils._ChunkedLogProbFunction.apply(*arguments)
        with use_head():
            ours = utils._ChunkedLogProbFunction.apply(*arguments)
        for a, b in zip(stock, ours, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def test_rewards_of_the_report() -> None:
    """Fails if TRL cannot call the reward, on texts or on conversations."""
    texts = ["3+4=7</think>\n\n\\boxed{7}", "\\boxed{7}", "3+4=8</think>\n\n\\boxed{8}"]
    turns = [[{"role": "assistant", "content": text}] for text in texts]
    for completions in (texts, turns):
        given = answer_reward(
            completions=completions, solution=["7"] * 3, prompts=[""] * 3, completion_ids=[[1]] * 3
        )
        assert given == pytest.approx([1.0, 0.8, 0.2])


def internvl_processor(folder: Path, model: InternVLForConditionalGeneration) -> Any:
    """A processor of pictures without torchvision: no video, and attributes TRL looks for."""
    from transformers import AutoTokenizer, InternVLProcessor
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    words = AutoTokenizer.from_pretrained(folder, padding_side="left")
    names = {
        "start_image_token": "<img>", "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>", "video_token": "<quad>",
    }  # fmt: skip
    for name, text in names.items():
        setattr(words, name, text)
        setattr(words, f"{name}_id", words.convert_tokens_to_ids(text))
    template = (
        "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{%- if m.content is string -%}{{ m.content }}{%- else -%}{%- for c in m.content -%}"
        "{{ '<IMG_CONTEXT>' if c.type == 'image' else c.text }}{%- endfor -%}{%- endif -%}"
        "{{ '<|im_end|>\\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"
    )
    words.chat_template = template
    side = model.config.vision_config.image_size[0]
    images = GotOcr2ImageProcessorPil(
        size={"height": side, "width": side}, crop_to_patches=True, max_patches=4
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InternVLProcessor, "check_argument_for_proper_class", lambda *_: None)
        return InternVLProcessor(
            images, words, None, image_seq_length=model.config.image_seq_length,
            chat_template=template,
        )  # fmt: skip


def test_three_steps_of_internvl_with_pictures_equal_stock(tmp_path: Path) -> None:
    """Fails if the tiles of pictures do not reach the model, or the head, as TRL gives them."""
    from PIL import Image

    folder = ROOT / "assets" / "tiny-internvl"
    model = InternVLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    processor = internvl_processor(folder, model)
    rows = [
        {
            "prompt": [{"role": "user", "content": "Compute the result."}],
            "image": Image.new("RGB", (96, 48), (i * 20, 50, 90)),
        }
        for i in range(8)
    ]

    def run() -> tuple[list[dict[str, float]], torch.Tensor]:
        settings = {"learning_rate": 0.05, "num_iterations": 2, "loss_type": "grpo"}
        made = GRPOTrainer(
            model=copy.deepcopy(model),
            reward_funcs=lambda completion_ids, **_: [float(len(set(i))) for i in completion_ids],
            args=GRPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **settings}),
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
        )
        made.remove_callback(PrinterCallback)
        return trained(made)

    start = torch.cat([p.detach().flatten() for p in model.parameters()])
    stock = run()
    with use_head():
        ours = run()
    assert_same_training(stock, ours, start)
