"""Rollouts from vLLM in the training processes, asleep while they train.

Every process of the job holds one worker; each `tensor` consecutive ranks hold one copy of the
model and complete a part of the prompts. The order of a step is

    update_weights -> wake -> complete ... -> sleep -> train

Read from the documentation of vLLM 0.32 and its source of September 2026 (`v1/executor/
uniproc_executor.py`, `config/parallel.py`, `v1/worker/gpu_worker.py`, `sampling_params.py`,
`inputs/llm.py`, `model_executor/models/interns1.py`, the sleep mode page):

- `distributed_executor_backend="external_launcher"` makes one worker per process of a torchrun
  job, with tensor-parallel groups of consecutive ranks, and runs it in this process
  (VLLM_ENABLE_V1_MULTIPROCESSING=0 is set by vLLM), so that tensors travel by reference. All ranks
  of a group must be given the same prompts and seeds.
- `reload_weights` takes an iterator of tensors under their names on disk, and packs or quantizes
  them layer by layer as loading from disk does. A model's own `load_weights` cannot be used a
  second time: what it would write to has been packed.
- `sleep(2)` drops weights and KV cache, `sleep(1)` keeps the weights in host memory; after either,
  `wake_up(tags=["weights"])` before loading and `wake_up(tags=["kv_cache"])` after it keeps the
  peak low. Cached KV of old weights is dropped by sleep and by `reset_prefix_cache`. Not every
  platform has a sleep mode; without it vLLM stays awake.
- A prompt is token ids with the tokens of the placeholder (see `vllm_protocol`) per picture, which
  vLLM finds and expands; the expanded ids come back and must be the trainer's.
- The output of the vision tower is cached by the picture's uuid, which therefore names the step.

GRPO with pictures and budgets ran against vLLM 0.32 on a CPU, in one process, as a test of
tests_stacks; sleep and more than one rank have run against a stand-in with the signatures above.
"""

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from r1v3.data.special_tokens import IMAGE_CONTEXT, IMAGE_END, IMAGE_START
from r1v3.data.tiles import decode_picture
from r1v3.data.tokenizer import token_id
from r1v3.ranks import ALONE, Ranks
from r1v3.rollout.batches import Batched
from r1v3.rollout.completions import (
    Completion,
    assemble,
    ban_list,
    check_completion,
    check_prompt,
    complete_thoughts,
)
from r1v3.rollout.contract import Request, Rollout, Sampling, TokenRules
from r1v3.rollout.copies import Copies
from r1v3.rollout.vllm_protocol import check_sampling, picture_name, placeholder_of, tiling
from r1v3.rollout.weights import in_layout

_BAN = -100.0


def collapse_pictures(
    prompt_ids: Sequence[int], marks: tuple[int, int, int], placeholder: Sequence[int]
) -> tuple[list[int], int]:
    """Replace each `<img><IMG_CONTEXT>...</img>` of a prompt by a placeholder; count them.

    Args:
        marks: ids of `<img>`, `<IMG_CONTEXT>` and `</img>`.
    """
    start, context, end = marks
    collapsed: list[int] = []
    pictures, i = 0, 0
    while i < len(prompt_ids):
        stop = i + 1
        if prompt_ids[i] == start:
            while stop < len(prompt_ids) and prompt_ids[stop] == context:
                stop += 1
        if stop > i + 1 and stop < len(prompt_ids) and prompt_ids[stop] == end:
            collapsed += placeholder
            pictures, i = pictures + 1, stop + 1
        else:
            collapsed.append(prompt_ids[i])
            i += 1
    return collapsed, pictures


# Arguments of `vllm.LLM` that have settings of their own, or that sampling relies on.
OWN_ARGUMENTS = frozenset(
    {
        "model",
        "distributed_executor_backend",
        "tensor_parallel_size",
        "gpu_memory_utilization",
        "max_model_len",
        "dtype",
        "seed",
        "enable_sleep_mode",
        "logprobs_mode",
        "generation_config",
    }
)


class ColocatedVLLM(Batched):
    """A `contract.Sampler` by vLLM in the training processes.

    Args:
        model_folder: the model in either layout, with the files that vLLM needs for pictures.
        tokenizer: that of the folder.
        max_length: longest prompt and completion together, in tokens.
        ranks: all processes of the job, each with an accelerator; they make every call together.
        tensor: ranks that hold one copy; divides their number.
        memory_share: of an accelerator's memory that vLLM may use when awake.
        dtype: of weights and activations.
        sleep_level: 2 drops the weights, which must then be updated before every wake; 1 keeps them
            in host memory. Where vLLM has no sleep mode, it stays awake.
        max_tiles: most tiles of a picture in a request that names none, where that is not the
            number of the model folder.
        arguments: further ones of `vllm.LLM`, by their names there. trust_remote_code lets vLLM run
            the folder's own code, which it needs for the configuration of the original layout.
    Raises:
        ImportError: vLLM is not installed.
        ValueError: tensor does not divide the ranks, memory_share is not in (0, 1], or one of the
            arguments is the sampler's own.
    """

    def __init__(
        self,
        model_folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        *,
        max_length: int,
        ranks: Ranks = ALONE,
        tensor: int = 1,
        memory_share: float = 0.5,
        dtype: str = "bfloat16",
        sleep_level: Literal[1, 2] = 2,
        max_tiles: int | None = None,
        arguments: Mapping[str, Any] | None = None,
    ) -> None:
        arguments = {} if arguments is None else dict(arguments)
        if taken := sorted(OWN_ARGUMENTS & arguments.keys()):
            raise ValueError(f"vLLM's {', '.join(taken)} cannot be given: the sampler sets it")
        if tensor < 1 or ranks.size % tensor:
            raise ValueError(f"tensor {tensor} does not divide the {ranks.size} processes")
        if not 0 < memory_share <= 1:
            raise ValueError(f"memory_share {memory_share} must be above 0 and at most 1")
        try:
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ImportError(
                f"rollouts by vLLM in the training processes need it: pip install 'r1v3[vllm]' "
                f"({error})"
            ) from error
        self.rules = TokenRules.of(tokenizer)
        self.ranks = ranks
        self.copies = Copies(tuple(rank // tensor for rank in range(ranks.size)), ranks)
        self.step: int | None = None
        marks = IMAGE_START, IMAGE_CONTEXT, IMAGE_END
        start, context, end = (token_id(tokenizer, mark) for mark in marks)
        self._marks = start, context, end
        self._model_folder = model_folder
        self._placeholder = tokenizer.encode(placeholder_of(model_folder), add_special_tokens=False)
        self._params = SamplingParams
        self._level, self._max_tiles = sleep_level, max_tiles
        self._can_sleep = bool(current_platform.is_sleep_mode_available())
        self._state: Literal["awake", "asleep", "weights"] = "awake"
        if ranks.size == 1:
            _stand_alone()
        # Weights that are not read from the folder must be handed over before the first completion.
        self._empty = arguments.get("load_format") == "dummy"
        self._llm: Any = LLM(
            **arguments,
            model=str(model_folder),
            distributed_executor_backend="external_launcher",
            tensor_parallel_size=tensor,
            gpu_memory_utilization=memory_share,
            max_model_len=max_length,
            dtype=dtype,
            seed=0,
            enable_sleep_mode=self._can_sleep,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
        )

    def complete(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        group_size: int = 1,
        generator: torch.Generator,
    ) -> Rollout:
        """See `contract.Sampler.complete`. Entropies are NaN: vLLM does not compute them.

        Raises:
            ValueError: a setting vLLM cannot keep, or it completed another prompt than the
                trainer's.
            RuntimeError: it is asleep, or its completions are impossible.
        """
        if self._state != "awake":
            raise RuntimeError("vLLM is asleep: update_weights and wake come before complete")
        if self._empty and self.step is None:
            raise RuntimeError(
                "vLLM was started with load_format dummy, so that its weights are random until "
                "update_weights; leave it out where nothing is trained"
            )
        check_sampling(sampling)
        # The completions of greedy decoding are one, and vLLM wants to be asked for one.
        count = group_size if sampling.temperature > 0 else 1
        seeds = torch.randint(0, 2**48, (len(requests), 1 + count), generator=generator).tolist()
        for i, request in enumerate(requests):
            if (own := request.own_generator()) is not None:
                later = torch.randint(0, 2**48, (count,), generator=own).tolist()
                seeds[i] = [request.seed or 0, *later]
        # Each copy completes its part of the prompts; its ranks do so together.
        mine = self.copies.prompts(len(requests))
        asked = [requests[i] for i in mine]
        found: list[Completion] = []

        def sample() -> None:
            if asked:
                found.extend(self._sample(asked, sampling, count, seeds[mine.start :]))

        self.ranks.call_all(sample)
        if count < group_size:
            found = [row for row in found for _ in range(group_size)]
        return assemble(found, self.rules.pad_id)

    def _sample(
        self, requests: Sequence[Request], sampling: Sampling, count: int, seeds: list[list[int]]
    ) -> list[Completion]:
        budget = sampling.budget
        if budget is not None and budget >= sampling.max_tokens:
            budget = None
        length = sampling.max_tokens if budget is None else budget
        nothing = Completion()
        found = [nothing] * (len(requests) * count)
        if length:
            given = [
                (request, nothing, row[0]) for request, row in zip(requests, seeds, strict=False)
            ]
            found = self._generate(given, sampling, count, length)
        if budget is None:
            return found

        def go_on(rows: dict[int, Completion], calls: int) -> list[Completion]:
            given = [
                (requests[row // count], begun, seeds[row // count][1 + row % count] + calls)
                for row, begun in rows.items()
            ]
            return self._generate(given, sampling, 1, None)

        return complete_thoughts(found, sampling, self.rules, go_on)

    def _generate(
        self,
        given: Sequence[tuple[Request, Completion, int]],
        sampling: Sampling,
        count: int,
        max_tokens: int | None,
    ) -> list[Completion]:
        """Sample `count` continuations of each prompt and its beginning.

        `max_tokens` None allows all tokens that are left.
        """
        lengths = [
            max_tokens or sampling.max_tokens - len(begun.token_ids) for _, begun, _ in given
        ]
        banned = ban_list(sampling, self.rules)
        outputs = self._llm.generate(
            [self._prompt(request, begun) for request, begun, _ in given],
            [
                self._params(
                    n=count,
                    seed=seed,
                    temperature=sampling.temperature,
                    max_tokens=length,
                    top_p=1.0,
                    top_k=0,
                    min_p=0.0,
                    logprobs=0,
                    ignore_eos=True,
                    stop_token_ids=[self.rules.stop_id],
                    logit_bias=dict.fromkeys(banned, _BAN),
                    detokenize=False,
                )
                for (_, _, seed), length in zip(given, lengths, strict=True)
            ],
            use_tqdm=False,
        )
        found = []
        for (request, begun, _), length, output in zip(given, lengths, outputs, strict=True):
            wanted = request.example.prompt_ids + begun.token_ids
            check_prompt(list(output.prompt_token_ids), wanted, "vLLM")
            found += self._read(output.outputs, count, length, frozenset(banned))
        return found

    def _prompt(self, request: Request, begun: Completion) -> dict[str, Any]:
        ids, pictures = collapse_pictures(
            request.example.prompt_ids, self._marks, self._placeholder
        )
        images = request.sample.images
        if pictures != len(images):
            raise ValueError(f"the prompt shows {pictures} pictures, its sample has {len(images)}")
        prompt: dict[str, Any] = {"prompt_token_ids": ids + list(begun.token_ids)}
        if images:
            step = -1 if self.step is None else self.step
            pixels = [decode_picture(data, request.pictures) for data in images]
            tiles = request.max_tiles or self._max_tiles
            names = [picture_name(data, request.pictures, step, tiles) for data in images]
            prompt["multi_modal_data"] = {"image": pixels}
            prompt["multi_modal_uuids"] = {"image": names}
            if tiles is not None:
                placeholder = placeholder_of(self._model_folder)
                prompt["mm_processor_kwargs"] = tiling(tiles, placeholder)
        return prompt

    def _read(
        self, outputs: Sequence[Any], count: int, max_tokens: int, banned: frozenset[int]
    ) -> list[Completion]:
        if [output.index for output in outputs] != list(range(count)):
            raise RuntimeError(f"vLLM gave {len(outputs)} completions instead of {count}")
        found = []
        for output in outputs:
            ids = [int(token) for token in output.token_ids]
            logprobs = [
                float(entry[token].logprob)
                for token, entry in zip(ids, output.logprobs, strict=True)
            ]
            try:
                found.append(
                    check_completion(
                        ids,
                        logprobs,
                        output.finish_reason,
                        rules=self.rules,
                        banned=banned,
                        max_tokens=max_tokens,
                    )
                )
            except ValueError as error:
                raise RuntimeError(f"impossible completion by vLLM: {error}") from error
        return found

    def update_weights(self, tensors: Iterator[tuple[str, Tensor]], step: int) -> None:
        """See `contract.Sampler.update_weights`; wakes the weights' memory, not the KV cache."""
        if self._state == "asleep":
            self._llm.wake_up(tags=["weights"])
            self._state = "weights"
        named = in_layout(tensors, self._model_folder)
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": named})
        # The workers have dropped the outputs of the vision tower; so must vLLM's account of them.
        self._llm.llm_engine.reset_encoder_cache()
        if self._state == "awake":
            self._llm.reset_prefix_cache()
        self.step = step

    def sleep(self) -> None:
        """See `contract.Sampler.sleep`."""
        if not self._can_sleep:
            return
        if self._state == "weights":
            self.wake()
        if self._state == "awake":
            self._llm.sleep(level=self._level)
            self._state = "asleep"

    def wake(self) -> None:
        """See `contract.Sampler.wake`.

        Raises:
            RuntimeError: the weights were dropped and have not been updated.
        """
        if self._state == "asleep" and self._level == 2:
            raise RuntimeError(
                "the weights were dropped by sleep: update_weights comes before wake"
            )
        if self._state == "asleep":
            self._llm.wake_up()
        elif self._state == "weights":
            self._llm.wake_up(tags=["kv_cache"])
        self._state = "awake"

    def close(self) -> None:
        """Drop the engine; its memory is freed with the process."""
        self._llm = None


def _stand_alone() -> None:
    """Set the variables that torchrun sets for a job of one process; vLLM reads them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    for name, value in {**told, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        os.environ.setdefault(name, value)
