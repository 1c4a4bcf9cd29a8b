"""A tiny InternVL of transformers, a batch, and what the model makes of it: the truth."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import InternVLConfig, InternVLForConditionalGeneration

from r1v3.data.batch import Batch

IMAGE, VOCAB = 500, 509
# Processes of the job that runs every layout.
WORLD = 4


def tiny_config(
    *, groups: int = 2, tied: bool = False, plain_vision: bool = False
) -> InternVLConfig:
    """InternVL in miniature. `plain_vision` is the 300M tower: layer norm, biases, no QK norm."""
    return InternVLConfig(
        vision_config={
            "hidden_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 160,
            "use_qk_norm": not plain_vision,
            "norm_type": "layer_norm" if plain_vision else "rms_norm",
            "attention_bias": plain_vision,
            "image_size": [56, 56],
            "patch_size": [14, 14],
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "num_key_value_heads": groups,
            "intermediate_size": 176,
            "vocab_size": VOCAB,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
            "rms_norm_eps": 1e-6,
            "tie_word_embeddings": tied,
        },
        image_token_id=IMAGE,
        image_seq_length=4,
        tie_word_embeddings=tied,
    )


def tiny_model(config: InternVLConfig, seed: int = 0) -> InternVLForConditionalGeneration:
    """Random weights in which no two things that could be mixed up are equal."""
    config._attn_implementation = "eager"
    model = InternVLForConditionalGeneration(config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            ones = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1 + ones)
    return model


def tiny_batch(*, images: bool = True, side: int = 56, seed: int = 1) -> Batch:
    """Three prompts x 2 samples of different lengths: two images, none, one image of two tiles.

    A response holds a sampled image token, one sample has nothing that counts, one has context
    tokens that do not count, and one has a single token.
    """
    generator = torch.Generator().manual_seed(seed)
    per_tile = (side // 28) ** 2
    image = [IMAGE] * per_tile
    text = torch.randint(0, 499, (64,), generator=generator).tolist()
    prompts = [
        [*text[:3], *image, text[3], *image, *text[4:7]],
        text[7:12],
        [text[12], *image, *image, *text[13:20]],
    ]
    tiles = [2, 0, 2]
    if not images:
        prompts = [[token for token in prompt if token != IMAGE] for prompt in prompts]
        tiles = [0, 0, 0]
    longest = max(map(len, prompts))
    prompt_ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    prompt_mask = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts])
    response_ids = torch.randint(0, 499, (6, 9), generator=generator)
    response_ids[0, 2] = IMAGE
    loss_mask = torch.zeros(6, 9, dtype=torch.bool)
    for row, (start, stop) in enumerate([(0, 9), (0, 4), (2, 7), (0, 0), (0, 1), (0, 6)]):
        loss_mask[row, start:stop] = True
    count = sum(tiles)
    pixels = torch.randn(count, 3, side, side, generator=generator) if count else None
    return Batch(
        prompt_ids=prompt_ids,
        prompt_mask=prompt_mask,
        pixels=pixels,
        tiles=torch.tensor(tiles),
        response_ids=response_ids,
        loss_mask=loss_mask,
        group_size=2,
    )


@dataclass
class Truth:
    """Of one batch: log-probs and entropies [P * G, R], and hidden states [M, H] that predict."""

    logprobs: Tensor
    entropy: Tensor
    hidden: Tensor


def _embed(model: InternVLForConditionalGeneration, batch: Batch, row: int) -> Tensor:
    """Embeddings of one prompt with its images, followed by one response as plain text."""
    prompt = row // batch.group_size
    ids = batch.prompt_ids[prompt][batch.prompt_mask[prompt]]
    embeddings = model.get_input_embeddings()
    hidden = embeddings(ids)
    first, count = int(batch.tiles[:prompt].sum()), int(batch.tiles[prompt])
    if count:
        assert batch.pixel_values is not None
        pixels = batch.pixel_values[first : first + count]
        features = model.model.get_image_features(pixel_values=pixels).pooler_output
        slots = (ids == IMAGE).unsqueeze(1)
        hidden = hidden.masked_scatter(slots, features)
    return torch.cat([hidden, embeddings(batch.response_ids[row])])


def logits(model: InternVLForConditionalGeneration, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits [P * G, R, V] and hidden states [P * G, R, H] that predict the response tokens.

    Each sequence runs by itself, images and all, through transformers' model; differentiable.
    """
    rows, width = batch.response_ids.shape
    hidden = []
    for row in range(rows):
        embedded = _embed(model, batch, row).unsqueeze(0)
        states = model.model.language_model(inputs_embeds=embedded).last_hidden_state[0]
        hidden.append(states[-width - 1 : -1])
    stacked = torch.stack(hidden)
    return model.lm_head(stacked), stacked


def truth(model: InternVLForConditionalGeneration, batch: Batch) -> Truth:
    """Results that the parallel model has to find; differentiable."""
    scores, hidden = logits(model, batch)
    logp = scores.log_softmax(-1)
    chosen = logp.gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1)
    entropy = -(logp.exp() * logp).sum(-1)
    mask = batch.loss_mask
    return Truth(chosen * mask, entropy * mask, hidden[mask])


def loss(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """A scalar that depends on every token differently; [P * G, R] each."""
    weights = torch.linspace(0.5, 1.5, logprobs.numel()).view(logprobs.shape)
    return -(weights * logprobs).sum() - 0.1 * (weights.flip(0) * entropy).sum()


# Micro-batches of one step each, by the name of the model that is trained on them.
BATCHES = {
    "main": [tiny_batch(), tiny_batch(images=False, seed=2)],
    "tied": [tiny_batch()],
    "plain": [tiny_batch()],
    "wide": [tiny_batch(side=84)],
}
CONFIGS = {
    "main": tiny_config(),
    "tied": tiny_config(groups=4, tied=True),
    "plain": tiny_config(plain_vision=True),
    "wide": tiny_config(),
}


def write(folder: Path, name: str) -> None:
    """A model folder with the truth of its batches, and of the gradients of their summed loss."""
    config, batches = CONFIGS[name], BATCHES[name]
    model = tiny_model(config)
    found: dict[str, Tensor] = {}
    for index, batch in enumerate(batches):
        of_batch = truth(model, batch)
        loss(of_batch.logprobs, of_batch.entropy).backward()
        found |= {f"{index}.{k}": v.detach() for k, v in vars(of_batch).items()}
    with torch.no_grad():
        found["logits"] = logits(model, batches[0])[0]
    found |= {f"grad.{k}": p.grad for k, p in model.named_parameters() if p.grad is not None}
    folder.mkdir()
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "truth.safetensors")
    config.save_pretrained(folder)
    weights = {k: p.detach() for k, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors")
