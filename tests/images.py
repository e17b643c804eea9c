"""Images that several tests share: scikit-learn's digits as PNG files, and tiny random image models with their processors."""

from __future__ import annotations

from pathlib import Path

import torch


def save_digits(folder: Path, count: int = 200, start: int = 0) -> Path:
    """A folder for each digit, with `count` images of 8 x 8 grey pixels in all."""
    from PIL import Image
    from sklearn.datasets import load_digits

    data = load_digits()
    for i in range(start, start + count):
        place = folder / str(data.target[i])
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15.9375).astype("uint8")).save(place / f"{i:04d}.png")
    return folder


def save_vit(folder: Path, *, size: int = 16, channels: int = 3, labels: int | None = None, **sizes) -> Path:
    """A random ViT for images of 16 x 16 pixels; with `labels`, one that has a head already."""
    from transformers import ViTConfig, ViTForImageClassification, ViTModel
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, **sizes}
    config = ViTConfig(image_size=size, patch_size=4, num_channels=channels, **small)
    if labels is not None:
        config.num_labels = labels
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": size, "width": size}, image_mean=half, image_std=half)
    return _saved(
        folder, (lambda: ViTModel(config)) if labels is None else (lambda: ViTForImageClassification(config)), processor
    )


def save_convnext(folder: Path) -> Path:
    """A random ConvNext of two stages."""
    from transformers import ConvNextConfig, ConvNextModel
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    config = ConvNextConfig(hidden_sizes=[16, 32], depths=[1, 1], num_stages=2, patch_size=2, image_size=16)
    return _saved(folder, lambda: ConvNextModel(config), ConvNextImageProcessorPil(size={"shortest_edge": 16}))


def save_resnet(folder: Path) -> Path:
    """A random ResNet of two stages."""
    from transformers import ResNetConfig, ResNetModel
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil

    config = ResNetConfig(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    return _saved(folder, lambda: ResNetModel(config), ConvNextImageProcessorPil(size={"shortest_edge": 16}))


def _saved(folder: Path, make, processor) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        make().save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
