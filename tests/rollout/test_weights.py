"""Weights on their way: buckets, and folders that a reader never sees half written."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from r1v3.data.tokenizer import load_tokenizer, render_prompt
from r1v3.engine.hf.engine import HFEngine
from r1v3.model.internvl import load_model
from r1v3.rollout.weights import buckets, publish
from tests import tiny


def exported(seed: int) -> list[tuple[str, torch.Tensor]]:
    return list(HFEngine(tiny.model(seed), tiny.tokenizer(), modules={}).export_hf())


def test_buckets_keep_order_and_stay_below_their_size() -> None:
    sizes = [4, 4, 40, 4, 2, 2]
    tensors = [(str(i), torch.zeros(n, dtype=torch.int8)) for i, n in enumerate(sizes)]
    names = [[name for name, _ in bucket] for bucket in buckets(iter(tensors), 8)]
    assert names == [["0", "1"], ["2"], ["3", "4", "5"]]
    assert list(buckets(iter(()), 8)) == []
    with pytest.raises(ValueError, match="max_bytes 0"):
        list(buckets(iter(tensors), 0))


def test_a_published_folder_is_a_model_and_the_one_before_stays(tmp_path: Path) -> None:
    """Fails if a server that is still loading the last step would lose its files."""
    base, folder = tiny.save(tmp_path / "base"), tmp_path / "weights"
    assert not folder.exists()
    for step in (1, 2, 3):
        current = publish(folder, base, exported(step), step, shard_bytes=30_000)
    assert current == folder / "current" and current.readlink() == Path("step-00000003")
    names = {path.name for path in folder.iterdir()}
    assert names == {"current", "step-00000002", "step-00000003"}
    assert len(list(current.glob("*.safetensors"))) > 2
    stored = dict(load_model(current).named_parameters())
    assert all(torch.equal(stored[name], tensor) for name, tensor in exported(3))
    assert (current / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    publish(folder, base, exported(4), 3, dtype=torch.bfloat16)
    values = [t for f in current.glob("*.safetensors") for t in load_file(f).values()]
    assert current.readlink() == Path("step-00000003")
    assert {t.dtype for t in values} == {torch.bfloat16}


def test_servers_render_prompts_as_the_trainer_does(tmp_path: Path) -> None:
    """Fails if a folder whose own template ignores `enable_thinking` is published with it: every
    prompt of the servers would then be refused."""
    base = tiny.save(tmp_path / "base")
    template = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    template += "{{ '<|im_end|>\n' }}{% endfor %}<|im_start|>assistant\n\n"
    (base / "chat_template.jinja").write_text(template)
    current = publish(tmp_path / "weights", base, exported(1), 1)
    served = PreTrainedTokenizerFast.from_pretrained(str(current))
    messages = [{"role": "user", "content": "How many?"}]
    for thinking in (True, False):
        text = served.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking
        )
        wanted = render_prompt(load_tokenizer(base), messages, [], thinking=thinking)
        assert served.encode(text, add_special_tokens=False) == wanted
        assert str(text).endswith("<think>\n") == thinking


def test_weights_that_stop_coming_leave_the_last_ones_in_place(tmp_path: Path) -> None:
    base, folder = tiny.save(tmp_path / "base"), tmp_path / "weights"
    publish(folder, base, exported(1), 1)

    def failing() -> object:
        yield from exported(2)[:5]
        raise RuntimeError("a rank died")

    with pytest.raises(RuntimeError, match="a rank died"):
        publish(folder, base, failing(), 2)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights did not come"):
        publish(folder, base, exported(2)[:-1], 2)
    with pytest.raises(ValueError, match="comes twice"):
        publish(folder, base, exported(2) + exported(2)[:1], 2)
    with pytest.raises(ValueError, match="has no config.json"):
        publish(folder, tmp_path, exported(2), 2)
    assert {path.name for path in folder.iterdir()} == {"current", "step-00000001"}
    stored = dict(load_model(folder / "current").named_parameters())
    assert all(torch.equal(stored[name], tensor) for name, tensor in exported(1))
