"""CUDA tensors without memory or a device: shapes and dtypes of what surrounds the kernels."""

import contextlib
import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from r1v3.kernels import devices


@dataclass
class Watch(TorchDispatchMode):
    """The operations on fake tensors.

    Attributes:
        made: every tensor that an operation has given.
        operations: their names, and of which devices their tensors are.
        launches: names of the Triton kernels that were launched.
    """

    made: list["weakref.ref[Tensor]"] = field(default_factory=list)
    operations: list[tuple[str, set[str]]] = field(default_factory=list)
    launches: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __hash__(self) -> int:
        return id(self)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.made += map(weakref.ref, outputs)
        self.operations.append((str(func), {x.device.type for x in (*inputs, *outputs)}))
        return result

    @property
    def copies_from_the_host(self) -> list[str]:
        """Operations between the host's memory and the device's."""
        return [name for name, where in self.operations if where == {"cpu", "cuda"}]

    def alive(self) -> list[Tensor]:
        """The tensors that were made and are still held."""
        gc.collect()
        return [x for made in self.made if (x := made()) is not None]


def _item(tensor: Tensor, key: Any) -> Tensor:
    """tensor[key] by operations: indexing itself asks for the device's library."""
    out, dim = tensor, 0
    for part in key if isinstance(key, tuple) else (key,):
        if isinstance(part, int):
            out, dim = torch.select(out, dim, part), dim - 1
        elif isinstance(part, slice):
            out = torch.ops.aten.slice(out, dim, part.start, part.stop)
        elif part is None:
            out = out.unsqueeze(dim)
        else:
            out = torch.ops.aten.index(out, [*[None] * dim, part])
        dim += 1
    return out


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watch]:
    """Run the test on fake CUDA tensors: what it makes is on that device, kernels do nothing."""
    jit = pytest.importorskip("triton.runtime.jit")
    watch = Watch()

    def launch(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:
        watch.launches.append(kernel.__name__)

    monkeypatch.setattr(jit.JITFunction, "run", launch)
    monkeypatch.setattr(devices, "launching_on", lambda tensor: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "__getitem__", _item)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with FakeTensorMode(), watch, torch.device("cuda"):
        yield watch
