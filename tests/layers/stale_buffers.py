"""An SST layer whose buffers are stale where the parameters were trained, for the tests of SST."""

import torch


def spoil(layer):
    """The buffers' active columns hold something else, as after optimizer steps."""
    with torch.no_grad():
        layer.U.index_fill_(1, layer.active, 7.0)
        layer.Vh.index_fill_(0, layer.active, -3.0)
