"""FSDP2: GaLore in two gloo processes gives what it gives in one, across refreshes, checkpoints and world sizes."""

from lowdim.optim import GaLore, param_groups
from lowdim.testing.sharded_case import Subject, uneven_net


class Galore:
    """A factory: `GaLore` on the small net with these options."""

    def __init__(self, **options):
        self.options = options

    def __call__(self, net):
        return GaLore(param_groups(net, rank=3), lr=0.05, update_interval=4, weight_decay=0.01, **self.options)


SETTINGS = {
    "adamw": {},
    "reverse": {"proj_type": "reverse_std"},
    "full": {"proj_type": "full"},
    "adafactor": {"inner": "adafactor", "inner_options": {"scale_parameter": True}},
    "16bit": {"inner": "adamw16bit"},
    "8bit": {"inner": "adamw8bit", "inner_options": {"min_size": 16}},
    "randomized": {"svd": "randomized"},
    "staggered": {"stagger": True},
    "clipped": {"max_norm": 0.3},
    "layerwise": {"layerwise": True},
    "layerwise-clipped": {"layerwise": True, "max_norm": 0.3},
}
SHARDED = {
    f"galore-{name}": Subject(uneven_net, Galore(**options), tolerance=1e-6 if name in ("8bit", "16bit") else 1e-10)
    for name, options in SETTINGS.items()
}
SHARDED["galore-ddp"] = Subject(uneven_net, Galore(), how="ddp")
SHARDED["galore-replicas"] = Subject(uneven_net, Galore(layerwise=True), how="replicas")
SHARDED["galore-replicas-clipped"] = Subject(uneven_net, Galore(layerwise=True, max_norm=0.3), how="replicas")
