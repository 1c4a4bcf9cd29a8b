"""InternVL as a megatron-core model: one pipeline stage of it, on one tensor-parallel rank."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from torch import Tensor
from transformers import InternVLConfig

from r1v3.model.megatron.attention import AttentionLayout, PackedLayout
from r1v3.model.megatron.context import ContextPart
from r1v3.model.megatron.layers import language_block
from r1v3.model.megatron.options import (
    ModelOptions,
    check,
    language_transformer,
    towers,
)
from r1v3.model.megatron.packing import Packed
from r1v3.model.megatron.rotary import Rotary
from r1v3.model.megatron.vision import Connector, InternViT, clear_padded_heads, pixel_shuffle


class _Touch(torch.autograd.Function):
    """Return the first argument; the backward also gives zero gradients to all others."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.save_for_backward(*parameters)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        parameters = ctx.saved_tensors
        return (gradient, *(torch.zeros_like(parameter) for parameter in parameters))


class InternVL(MegatronModule):
    """InternViT, connector and Qwen2; the first two on the first pipeline stage only.

    The language model's own forward is not used: its embedding and its layers are called here, and
    the result is hidden states, because the fused head of `r1v3.kernels` never makes the logits.

    megatron-core's parallel state must be initialized. On a machine with CUDA the parallel layers
    are made on the current device and the rest on the CPU: move the model there. Weights are
    random (megatron-core's initialization), with padded heads and vocabulary rows zero, which they
    stay in training.

    Args:
        config: the checkpoint's.
        options: the layout; see `ModelOptions`.
        pre_process: this is the first pipeline stage.
        post_process: this is the last pipeline stage.

    Raises:
        ValueError: the architecture is another one, or cannot be split over the ranks.
    """

    def __init__(
        self,
        config: InternVLConfig,
        options: ModelOptions,
        *,
        pre_process: bool = True,
        post_process: bool = True,
    ) -> None:
        check(config, options)
        transformer = language_transformer(config, options)
        super().__init__(config=transformer)
        self.model_type = ModelType.encoder_or_decoder
        self.hf_config, self.options = config, options
        self.pre_process, self.post_process = pre_process, post_process
        vision, text = towers(config)
        self.vocab_size = text.vocab_size
        self.padded_vocab_size = options.padded_vocab(config)
        self.share_embeddings_and_output_weights = bool(config.tie_word_embeddings)
        self.rotary = Rotary(text)
        if pre_process:
            self.vision_model = InternViT(config, options)
            self.vision_projection = Connector(config, options)
            clear_padded_heads(self.vision_model, vision.num_attention_heads)
        self.language_model = GPTModel(
            transformer,
            language_block(get_num_layers_to_build(transformer)),
            vocab_size=self.padded_vocab_size,
            max_sequence_length=text.max_position_embeddings,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="none",
            scatter_embedding_sequence_parallel=False,
        )
        self._clear_padded_rows()

    def forward(self, packed: Packed, layout: AttentionLayout | None = None) -> Tensor:
        """Run this stage on a packed micro-batch that lies on the model's device.

        Args:
            packed: all of it, or this rank's `ContextPart`.
            layout: the keys its rows attend to; `PackedLayout(packed)` by default.

        Returns:
            [T, 1, H], or [T / ranks, 1, H] with sequence parallelism: the activation for the next
            stage or, on the last stage, hidden states after the final norm; see `gather_hidden`.

        Raises:
            ValueError: image tokens and image features differ in number.
        """
        embedded = self._embed(packed) if self.pre_process else None
        layout = layout or PackedLayout(packed)
        return self.run_layers(embedded, packed.position_ids, packed.longest, layout)

    def run_layers(
        self, embedded: Tensor | None, position_ids: Tensor, longest: int, layout: AttentionLayout
    ) -> Tensor:
        """The language layers of this stage on embeddings [T, 1, H] (first stage) or its input."""
        if embedded is not None and self.config.sequence_parallel:
            embedded = scatter_to_sequence_parallel_region(embedded)
        return self.language_model.decoder(
            embedded,
            attention_mask=None,
            rotary_pos_emb=self.rotary(position_ids, longest),
            packed_seq_params=layout,
        )

    def embed_text(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [T, 1, H] of input_ids [T]; on the first stage."""
        return self.language_model.embedding(input_ids=input_ids.unsqueeze(0), position_ids=None)

    def _embed(self, packed: Packed) -> Tensor:
        hidden = self.embed_text(packed.input_ids)
        if packed.pixel_values is None:
            self._check_images(packed, 0)
            return self._touch_image_parameters(hidden)
        features = self.vision_projection(pixel_shuffle(self.vision_model(packed.pixel_values)))
        if isinstance(packed, ContextPart):
            # Every rank has encoded some of the tiles, and its rows need any of their features.
            group = parallel_state.get_context_parallel_group()
            features = gather_from_sequence_parallel_region(features, group=group)[: packed.tiles]
        self._check_images(packed, features.shape[:-1].numel())
        if isinstance(packed, ContextPart):
            features = features.flatten(0, 1).index_select(0, packed.feature_index)
        slots = packed.image_slots[:, None, None]
        return hidden.masked_scatter(slots, features.to(hidden.dtype))

    @staticmethod
    def _check_images(packed: Packed, features: int) -> None:
        if packed.image_tokens != features:
            raise ValueError(
                f"prompts have {packed.image_tokens} image tokens for {features} image features"
            )

    def _touch_image_parameters(self, hidden: Tensor) -> Tensor:
        """Without images the image parameters still take part, with zero gradients.

        Data-parallel ranks that overlap gradient reduction wait for every parameter, and a loss
        that reaches no trained parameter has no backward.
        """
        modules = (self.vision_model, self.vision_projection)
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        if not trained or not torch.is_grad_enabled():
            return hidden
        return _Touch.apply(hidden, *trained)

    def gather_hidden(self, hidden: Tensor, *, reduce_grad: bool) -> Tensor:
        """[T, H] on every tensor-parallel rank from the last stage's output.

        Args:
            reduce_grad: whether the gradient of the result comes in parts that are to be summed
                over the ranks here, as a head gives it that leaves the reduction to its caller
                (with sequence parallelism this is one reduce-scatter). False where it comes
                summed, the same on every rank.
        """
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=reduce_grad
            )
        elif reduce_grad:
            hidden = copy_to_tensor_model_parallel_region(hidden)
        return hidden.squeeze(1)

    @property
    def head_weight(self) -> Tensor:
        """This rank's rows [padded vocabulary / ranks, H] of the head; on the last stage."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.language_model.output_layer.weight

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The weight that megatron-core keeps equal on the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor] | None) -> None:
        """Take the previous stage's output; the schedules call this before `forward`."""
        if isinstance(input_tensor, list):
            input_tensor = input_tensor[0]
        if not self.pre_process:
            self.language_model.set_input_tensor(input_tensor)

    def _clear_padded_rows(self) -> None:
        ranks = parallel_state.get_tensor_model_parallel_world_size()
        rows = self.padded_vocab_size // ranks
        first = parallel_state.get_tensor_model_parallel_rank() * rows
        used = max(0, min(rows, self.vocab_size - first))
        weights = []
        if self.pre_process:
            weights.append(self.language_model.embedding.word_embeddings.weight)
        if self.post_process:
            weights.append(self.head_weight)
        for weight in weights:
            weight.data[used:].zero_()
