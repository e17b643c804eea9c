"""Find layers by name, read their weight as a matrix, and swap them in place.

All families use this package, so a pattern means the same everywhere (as in PEFT: a name or a dotted suffix in a
list, a regular expression as a string), and tied weights stay tied.

| module | what it knows |
| --- | --- |
| `kinds` | which classes are layers of one matrix |
| `behaviour` | whether a layer acts like its class: plain, scaled, or something else |
| `blocks` | the blocks of a transformer |
| `callers` | which layers are read by their parent and never called |
| `modes` | evaluation mode, or bfloat16, for a while |
| `statistics` | running statistics of frozen normalisation layers |
| `quantized` | weights in few bits, and their values |
| `placement` | accelerate's hooks, offloaded weights, forward methods set on the instance |
| `matrices` | a layer's weight as a matrix, and layers with another one |
| `wrappers` | plain names of compiled, data-parallel and checkpointed models |
| `foreign`, `stacked` | other libraries' adapters; experts and other weights that are no layer's |
| `find`, `replace` | layers by name, and other layers in their place |
| `sharding` | FSDP2: parameters spread over processes, block by block |
"""

from lowdim.surgery.behaviour import COMPUTED, Behaviour, behaviour, has_stored_weight, left_out_reason, shallow_copy
from lowdim.surgery.blocks import blocks_of
from lowdim.surgery.callers import never_called
from lowdim.surgery.find import Patterns, find_layers
from lowdim.surgery.foreign import other_adapter, refuse_other_adapters
from lowdim.surgery.kinds import CONVOLUTIONS, HEAD_NAMES, describe, is_conv1d, is_linear_class, is_matrix_class
from lowdim.surgery.matrices import (
    as_conv1d,
    as_linear,
    dense_matrix,
    float_dtype,
    is_linear,
    is_matrix_layer,
    make_linear,
    matrix_shape,
    plain_weight,
    weight_matrix,
    with_matrix,
)
from lowdim.surgery.modes import evaluating, in_bfloat16, with_forward
from lowdim.surgery.placement import OFFLOADED, carry_hook, is_offloaded, refuse_offloaded
from lowdim.surgery.quantized import is_quantized, known_dtype, layer_dtype, stores_codes
from lowdim.surgery.replace import (
    freeze,
    freeze_except,
    model_device,
    parent_and_child,
    replace_layer,
    replace_layers,
    swap_layers,
    tied_parameters,
    unchanged_on_error,
    without_tied,
)
from lowdim.surgery.sharding import shard, units
from lowdim.surgery.stacked import loose_matrices, stacked_parameters, unreached_note
from lowdim.surgery.statistics import freeze_statistics, release_statistics
from lowdim.surgery.wrappers import holder, is_compiled, named_layers, plain_name, submodule, unwrap

__all__ = [
    "COMPUTED",
    "CONVOLUTIONS",
    "HEAD_NAMES",
    "OFFLOADED",
    "Behaviour",
    "Patterns",
    "as_conv1d",
    "as_linear",
    "behaviour",
    "blocks_of",
    "carry_hook",
    "dense_matrix",
    "describe",
    "evaluating",
    "find_layers",
    "float_dtype",
    "freeze",
    "freeze_except",
    "freeze_statistics",
    "has_stored_weight",
    "holder",
    "in_bfloat16",
    "is_compiled",
    "is_conv1d",
    "is_linear",
    "is_linear_class",
    "is_matrix_class",
    "is_matrix_layer",
    "is_offloaded",
    "is_quantized",
    "known_dtype",
    "layer_dtype",
    "left_out_reason",
    "loose_matrices",
    "make_linear",
    "matrix_shape",
    "model_device",
    "named_layers",
    "never_called",
    "other_adapter",
    "parent_and_child",
    "plain_name",
    "plain_weight",
    "refuse_offloaded",
    "refuse_other_adapters",
    "release_statistics",
    "replace_layer",
    "replace_layers",
    "shallow_copy",
    "shard",
    "stacked_parameters",
    "stores_codes",
    "submodule",
    "swap_layers",
    "tied_parameters",
    "unchanged_on_error",
    "units",
    "unreached_note",
    "unwrap",
    "weight_matrix",
    "with_forward",
    "with_matrix",
    "without_tied",
]
