"""One pass over sample batches that collects what data-driven systems need, layer by layer.

`collect(model, layers, needs, batches, loss_fn)` gives every layer a mapping with some of

* `"covariance"`: `Σ x xᵀ` of the layer's inputs `(in, in)`, and `"count"`, the number of rows in it;
* `"context_covariance"`: under the key `"covariance"`, the mean over samples of `Xᵀ X` with each sample `X (rows, in)` divided
  by the magnitude of its largest entry, so that samples count alike (CorDA); float32. Also `"count"` and `"samples"`;
* `"norms"`: `√(Σ x²)` of each input column `(in,)`;
* `"output_mean"`, `"output_covariance"`: mean `(out,)` and centred covariance `(out, out)` of the layer's outputs;
* `"output_norms"`: `√(Σ y²)` of each output `(out,)`;
* `"gradient"`: `Σ_batches ∂L/∂W / batch_size`, `(out, in)`.

`capture(model, names, batches)` gives the outputs (or inputs) of named modules, pass by pass; `capturing(model, names)` does it
for a pass of your own, with gradients. `walk_blocks(model, layers, batches)` collects block by block, so that each block can be
compressed before the next one is looked at, and all see what the original model computes.
"""

from lowdim.calibrate.batches import map_tensors, row_count, to_device
from lowdim.calibrate.capturing import capture, capturing
from lowdim.calibrate.collecting import KINDS, LossFn, collect, has_statistics
from lowdim.calibrate.passes import call_model, evaluating
from lowdim.calibrate.walking import BlockWalk, walk_blocks

__all__ = [
    "KINDS",
    "BlockWalk",
    "LossFn",
    "call_model",
    "capture",
    "capturing",
    "collect",
    "evaluating",
    "has_statistics",
    "map_tensors",
    "row_count",
    "to_device",
    "walk_blocks",
]
