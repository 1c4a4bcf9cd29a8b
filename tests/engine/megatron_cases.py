"""Work of the ranks: one function per case, each returning JSON values for the tests to judge."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import save_file
from torch import Tensor

from r1v3.config import Parallel, PolicyLoss, Stage
from r1v3.data.encoding import collate
from r1v3.engine.megatron.engine import MegatronEngine
from r1v3.engine.megatron.ranks import connect
from r1v3.model.megatron.hf_saving import own_shards
from r1v3.model.parts import PARTS
from tests import ranks_case, tiny
from tests.engine import recorded
from tests.engine.layouts import LAYOUTS, OTHER_LAYOUTS, PATTERNS, SPLIT, only
from tests.engine.replicas import everywhere

Result = dict[str, Any]
ALL = dict.fromkeys(PARTS, True)


def an_engine(
    folder: Path, parallel: Parallel, *, model: str = "model", dtype: str = "float32", **kw: Any
) -> MegatronEngine:
    """An engine in this layout on the world that the worker has made."""
    ranks = connect(parallel)
    stage = Stage(run=folder, engine="megatron", parallel=parallel, dtype=dtype)
    settings = {"modules": ALL, **recorded.TRAINING, **kw}
    return MegatronEngine(folder / model, tiny.tokenizer(), stage, ranks, **settings)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of all bits."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        hashed.update(name.encode())
        hashed.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def keep(engine: MegatronEngine, file: Path, tensors: dict[str, Tensor]) -> str:
    """Store tensors once, for the tests; their digest on this rank."""
    if engine.ranks.is_main:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return digest(tensors)


def parity(folder: Path, name: str, parallel: Parallel) -> Result:
    """All that an engine finds on the recorded batch, for the comparison with HFEngine."""
    engine = an_engine(folder, parallel)
    seen = recorded.record(engine, folder / "rollout.safetensors")
    return {
        "metrics": seen.metrics,
        "digest": keep(engine, folder / f"{name}.safetensors", seen.tensors),
    }


def save_state(engine: MegatronEngine, folder: Path, name: str) -> Any:
    """Start to save below `folder`."""
    engine.ranks.on_main((folder / name).mkdir)
    return engine.save_state(folder / name)


def saving(folder: Path, name: str) -> Result:
    """Save between two steps, train on while it is written; load into another engine and repeat."""
    rollout = folder / "rollout.safetensors"
    engine = an_engine(folder, SPLIT)
    save_state(engine, folder, "earlier").wait()
    recorded.step(engine, rollout, 0)
    writing = save_state(engine, folder, "state")
    engine.ranks.on_main((folder / "divided").mkdir)
    parts = own_shards(
        engine.model, folder / "divided", engine.tokenizer, ranks=engine.ranks, least=1
    ).write(folder / "divided")
    wanted = recorded.step(engine, rollout, 1)
    after = keep(engine, folder / f"{name}.safetensors", recorded.weights(engine))
    writing.wait()
    again = an_engine(folder, SPLIT)
    again.load_state(folder / "state", {})
    return {
        "done": writing.done(),
        "written": writing.digests,
        "held": engine.optimizer.state_bytes(),
        "parts": list(parts),
        "metrics": [wanted, recorded.step(again, rollout, 1)],
        "digests": [after, digest(recorded.weights(again))],
    }


def loading(folder: Path, name: str, parallel: Parallel) -> Result:
    """Go on in another layout from what `saving` saved."""
    engine = an_engine(folder, parallel)
    engine.load_state(folder / "state", {})
    metrics = recorded.step(engine, folder / "rollout.safetensors", 1)
    keep(engine, folder / f"{name}.safetensors", recorded.weights(engine))
    return {"metrics": [metrics]}


def before_blocks(folder: Path, name: str) -> Result:
    """Go on from a checkpoint of the version that gathered optimizer states, as it saved them."""
    rollout, saved = folder / "rollout.safetensors", folder / name
    engine = an_engine(folder, Parallel())
    recorded.step(engine, rollout, 0)
    engine.ranks.on_main(lambda: (saved / "megatron").mkdir(parents=True))
    engine.save(saved)
    weights = engine.model.sharded_state_dict(prefix="")
    moments = engine.optimizer.optimizer.sharded_state_dict(
        weights, metadata={"distrib_optim_sharding_type": "fully_reshardable"}
    )
    dist_checkpointing.save({"model": weights, "optimizer": moments}, str(saved / "megatron"))
    again = an_engine(folder, Parallel())
    again.load_state(saved, {})
    metrics = [recorded.step(one, rollout, 1) for one in (engine, again)]
    return {
        "metrics": metrics,
        "digests": [digest(recorded.weights(one)) for one in (engine, again)],
    }


def resumed_bits(folder: Path, name: str, parallel: Parallel, **settings: Any) -> Result:
    """Save and load after a step, then take the next step in both engines."""
    rollout = folder / "rollout.safetensors"
    engine = an_engine(folder, parallel, **settings)
    before = recorded.weights(engine)
    first = recorded.step(engine, rollout, 0)
    after = recorded.weights(engine)
    save_state(engine, folder, f"state-{name}").wait()
    again = an_engine(folder, parallel, **settings)
    again.load_state(folder / f"state-{name}", {})
    loaded = digest(recorded.weights(again)) == digest(after)
    seconds = [recorded.step(one, rollout, 1) for one in (engine, again)]
    main = {
        str(tensor.dtype)
        for one in engine.optimizer.optimizer.chained_optimizers
        if one.optimizer is not None
        for group in one.optimizer.param_groups
        for parameter in group["params"]
        for tensor in (parameter, *one.optimizer.state[parameter].values())
    }
    trained = [p for p in engine.model.parameters() if p.requires_grad]
    return {
        "moved": [n for n, t in after.items() if not torch.equal(t, before[n])],
        "first": first,
        "seconds": seconds,
        "loaded": loaded,
        "same": digest(recorded.weights(engine)) == digest(recorded.weights(again)),
        "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()),
        "optimizer_dtypes": sorted(main),
        "gradient_dtypes": sorted({str(p.main_grad.dtype) for p in trained}),
        "dtypes": sorted({str(p.dtype) for p in engine.model.parameters()}),
    }


def divided(folder: Path, name: str, parallel: Parallel) -> Result:
    """The step of the recorded batch, every completion a micro-batch with its prompt."""
    engine = an_engine(folder, parallel)
    packs = [
        collate([prompt], 0, responses=[response]).slice(0, 1)
        for prompt, response in recorded.pairs()
    ]
    targets = recorded.row_targets(folder / "rollout.safetensors")
    metrics, outputs = recorded.train(engine, 0, packs, targets)
    found = {f"{i}.logprobs": output["token_logprobs"] for i, output in enumerate(outputs)}
    keep(engine, folder / f"{name}.safetensors", found | recorded.weights(engine))
    return {"metrics": metrics}


def flat(folder: Path, name: str) -> Result:
    """A step with a micro-batch whose advantages are zero, and the step without it."""
    config = PolicyLoss(old_logprobs="rollout", dual_clip=3.0)
    targets = recorded.all_targets(folder / "rollout.safetensors")
    targets = [replace(one, ref_logprobs=None) for one in targets]
    targets[1] = replace(targets[1], advantages=torch.zeros_like(targets[1].advantages))
    batches, left = recorded.micro_batches(), []
    for taken in ([0, 1, 2], [0, 2]):
        engine = an_engine(folder, SPLIT)
        loss = recorded.losses(config, [targets[i] for i in taken])
        metrics, _ = engine.train_step([batches[i] for i in taken], loss, learning_rate=1e-2)
        left.append({"metrics": metrics, "digest": digest(recorded.weights(engine))})
    return {"left": left}


def text_alone(folder: Path, name: str) -> Result:
    """A step of the connector without any picture."""
    engine = an_engine(folder, SPLIT, modules=only(("connector",)), weight_decay=0.0)
    before = digest(recorded.weights(engine))
    batch = recorded.micro_batches()[1]
    metrics, outputs = engine.train_step(
        [batch, batch],
        lambda head, index: (head.logprobs_and_entropy()[0].sum(), {"index": torch.tensor(index)}),
        learning_rate=1e-2,
    )
    return {
        "metrics": metrics,
        "outputs": [int(output["index"]) for output in everywhere(engine, [0, 1], outputs)],
        "same": digest(recorded.weights(engine)) == before,
    }


def refused(folder: Path, name: str) -> Result:
    """A step whose gradient is not finite, and the next."""
    engine = an_engine(folder, SPLIT)
    before = digest(recorded.weights(engine))
    [batch] = recorded.micro_batches()[:1]
    skipped, _ = engine.train_step(
        [batch],
        lambda head, index: (head.logprobs_and_entropy()[0].sum() * float("nan"), {}),
        learning_rate=1e-2,
    )
    unchanged = digest(recorded.weights(engine)) == before
    metrics = recorded.step(engine, folder / "rollout.safetensors", 0)
    return {"norm": str(skipped["grad_norm"]), "same": unchanged, "next": metrics}


def exported(folder: Path, name: str, model: str) -> Result:
    """Load a layout of names, train a step, save, and say what the saved weights should give."""
    engine = an_engine(folder, SPLIT, model=model)
    recorded.step(engine, folder / "rollout.safetensors", 0)
    engine.ranks.on_main((folder / f"saved-{model}").mkdir)
    engine.save(folder / f"saved-{model}")
    prompts = recorded.examples()
    batch = collate(prompts, 0, responses=[()] * len(prompts))
    found = {"logits": engine.decoder().prefill(batch, 1, 1)}
    for index, (logprobs, entropy) in enumerate(recorded.evaluated(engine)):
        found |= {f"{index}.logprobs": logprobs, f"{index}.entropy": entropy}
    keep(engine, folder / f"{name}.safetensors", found)
    # The folder can be gone back to.
    saved = digest(recorded.weights(engine))
    recorded.step(engine, folder / "rollout.safetensors", 1)
    moved = digest(recorded.weights(engine))
    engine.load_weights(folder / f"saved-{model}")
    return {
        "moved": moved != saved,
        "back": digest(recorded.weights(engine)) == saved,
    }


Case = tuple[int, Callable[[Path, str], Result]]
CASES: dict[str, Case] = {
    "ranks": (3, ranks_case.run),
    **{n: (world, partial(parity, parallel=at)) for n, (world, at) in LAYOUTS.items()},
    "saving": (4, saving),
    **{
        f"loading_{n}": (world, partial(loading, parallel=at))
        for n, (world, at) in OTHER_LAYOUTS.items()
    },
    **{
        f"train_{name}": (4, partial(resumed_bits, parallel=SPLIT, modules=only(parts)))
        for name, parts in PATTERNS.items()
    },
    "train_connector_dp4": (
        4,
        partial(resumed_bits, parallel=Parallel(), modules=only(("connector",))),
    ),
    "train_cp2": (2, partial(resumed_bits, parallel=Parallel(context=2), dtype="bfloat16")),
    "bfloat16": (4, partial(resumed_bits, parallel=SPLIT, dtype="bfloat16")),
    "whole_optimizer": (
        4,
        partial(resumed_bits, parallel=Parallel(tensor=2, pipeline=2, distributed_optimizer=False)),
    ),
    "whole_optimizer_connector": (
        4,
        partial(
            resumed_bits,
            parallel=Parallel(tensor=2, pipeline=2, distributed_optimizer=False),
            modules=only(("connector",)),
        ),
    ),
    "divided_tp2_pp2": (4, partial(divided, parallel=SPLIT)),
    "divided_dp4": (4, partial(divided, parallel=Parallel())),
    "divided_cp2_tp2": (4, partial(divided, parallel=Parallel(context=2, tensor=2))),
    "before_blocks": (2, before_blocks),
    "flat": (4, flat),
    "text_alone": (4, text_alone),
    "refused": (4, refused),
    "native": (4, partial(exported, model="native")),
    "original": (4, partial(exported, model="original")),
}
