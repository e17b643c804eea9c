"""The optimizers' shared problem on 8-bit layers, for the tests of Q-GaLore."""

import torch

from lowdim.optim import Int8Linear, QGaLore, param_groups, quantize_linears
from lowdim.testing.optimizer_problem import OptimizerProblem


class Eight(OptimizerProblem):
    """The shared problem on 8-bit layers."""

    def model(self, dtype=torch.float32, **options):
        return quantize_linears(super().model(dtype), None, **{"group_size": 16, **options})

    def make(self, net, **options):
        options = {"lr": 0.1, "update_interval": 3, "projector_group_size": 16, **options}
        return QGaLore(param_groups(net, rank=3), **options)

    def dense(self, net):
        layers = [m for m in net if isinstance(m, Int8Linear)]
        return [m.dense_weight() for m in layers] + [m.bias.detach().clone() for m in layers]


EIGHT = Eight()
