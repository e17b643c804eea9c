from lowdim.adapters import LoRA
from lowdim.testing.adapter_case import AdapterCase


class TestLoRA(AdapterCase):
    def method(self, **changes):
        return LoRA(**{"rank": 2, "alpha": 4, **changes})

    def max_delta_rank(self, out_features, in_features):
        return 2
