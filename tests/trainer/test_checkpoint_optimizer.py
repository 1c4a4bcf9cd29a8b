from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import r1v3
from r1v3.engine.hf.optimizer_state import load_optimizer_tensors, optimizer_tensors
from r1v3.trainer.checkpoint import load_checkpoint, start_checkpoint

REPOSITORY = Path(r1v3.__path__[0]).parent


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(8, 16)
        self.second = torch.nn.Linear(16, 4)
        self.frozen = torch.nn.Parameter(torch.ones(3))
        self.scale = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale.float()


def build(seed: int) -> tuple[Model, torch.optim.AdamW]:
    torch.manual_seed(seed)
    model = Model()
    groups = [
        {"params": model.first.parameters(), "lr": 1e-2},
        {"params": [*model.second.parameters(), model.frozen, model.scale], "weight_decay": 0.1},
    ]
    return model, torch.optim.AdamW(groups, lr=3e-3, betas=(0.9, 0.95))


def train(model: Model, optimizer: torch.optim.AdamW, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(5, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_adamw_resumed_from_a_checkpoint_takes_the_same_steps_to_the_bit(tmp_path: Path) -> None:
    whole, optimizer = build(seed=0)
    train(whole, optimizer, range(10))

    first, optimizer = build(seed=0)
    train(first, optimizer, range(4))
    path = start_checkpoint(
        tmp_path,
        4,
        tensors=optimizer_tensors(optimizer, first.named_parameters()),
        state={},
        write_model=lambda d: save_file(first.state_dict(), d / "model.safetensors"),
    ).finish()
    train(first, optimizer, range(4, 6))  # must not reach what was saved

    second, optimizer = build(seed=1)
    train(second, optimizer, range(2))
    loaded = load_checkpoint(path)
    second.load_state_dict(load_file(path / "model.safetensors"))
    load_optimizer_tensors(optimizer, dict(second.named_parameters()), loaded.tensors)
    untouched = {name: tensor.clone() for name, tensor in loaded.tensors.items()}
    assert second.frozen not in optimizer.state
    train(second, optimizer, range(4, 10))
    for (name, a), b in zip(whole.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert all(torch.equal(loaded.tensors[name], untouched[name]) for name in untouched)


def trained_tensors() -> dict[str, Tensor]:
    model, optimizer = build(seed=0)
    train(model, optimizer, range(2))
    return optimizer_tensors(optimizer, model.named_parameters())


def test_optimizer_tensors_are_named_after_their_parameters() -> None:
    tensors = trained_tensors()
    assert len(tensors) == 5 * 3 + 1
    assert tensors["optimizer.exp_avg_sq.first.weight"].shape == (16, 8)
    assert tensors["optimizer.exp_avg.scale"].dtype == torch.bfloat16
    assert float(tensors["optimizer.step.second.bias"]) == 2
    assert tensors["optimizer.unused.frozen"].numel() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer.exp_avg.gone": torch.ones(1)}, "optimizer state for gone, which"),
        (
            {"optimizer.exp_avg.first.bias": torch.ones(15)},
            r"first\.bias has shape \(15,\), ",
        ),
        ({"optimizer.unused.frozen": None}, "no saved optimizer state for frozen"),
    ],
)
def test_a_mismatch_is_an_error_and_leaves_the_optimizer_alone(
    change: dict[str, Tensor | None], message: str
) -> None:
    merged = {**trained_tensors(), **change}
    tensors = {name: tensor for name, tensor in merged.items() if tensor is not None}
    model, optimizer = build(seed=1)
    train(model, optimizer, range(3))
    before = optimizer_tensors(optimizer, model.named_parameters())
    with pytest.raises(ValueError, match=message):
        load_optimizer_tensors(optimizer, model.named_parameters(), tensors)
    after = optimizer_tensors(optimizer, model.named_parameters())
    assert all(after[name] is before[name] for name in before if "unused" not in name)


def test_a_parameter_without_a_name_is_an_error() -> None:
    model, optimizer = build(seed=0)
    with pytest.raises(ValueError, match=r"shape \(16, 8\) that is not in named_parameters"):
        optimizer_tensors(optimizer, model.second.named_parameters())
