"""Compressed models as checkpoints that plain transformers loads.

`save_compressed(model, folder, tokenizer)` writes a folder as small as the model. Afterwards::

    import lowdim
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder)      # identical logits
    model = model.dequantize()                                # plain layers again

`config.json` carries `"quantization_config": {"quant_method": "lowdim", ...}`, which describes the replaced layers;
`import lowdim` registers the reader for it with transformers. Without lowdim the folder is rejected, or loads as the dense
model if a system keeps the dense weights; it never loads with random weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lowdim.lazy import lazy_names

if TYPE_CHECKING:
    from lowdim.pretrained.registration import register
    from lowdim.pretrained.saving import save_compressed, stored_bytes

__all__ = ["register", "save_compressed", "stored_bytes"]

__getattr__ = lazy_names(__name__, {"register": "registration", "save_compressed": "saving", "stored_bytes": "saving"})
