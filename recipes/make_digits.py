"""Write what `recipes/image-digits.yaml` reads: scikit-learn's digits as PNG files, and the shape of a small ViT.

    python recipes/make_digits.py [FOLDER]

The folder (`lowdim-data` if none is named) gets 1,797 images, `digits/0/0000.png` to `digits/8/1796.png`, and `digit-vit/` with
a configuration and an image processor, but no weights: the recipe starts from random ones.
"""

import sys
from pathlib import Path


def main(folder: Path) -> None:
    """Write both."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from transformers import ViTConfig
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    data = load_digits()
    for number, (pixels, digit) in enumerate(zip(data.images, data.target)):
        place = folder / "digits" / str(digit)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((pixels * (255 / 16)).round().astype("uint8")).save(place / f"{number:04d}.png")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    ViTConfig(image_size=16, patch_size=4, **sizes).save_pretrained(folder / "digit-vit")
    ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "digit-vit")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "lowdim-data"))
