"""What transformers is without lowdim."""

import pytest


@pytest.fixture
def forget_lowdim(monkeypatch):
    """Makes transformers what it is where lowdim was never imported."""
    from transformers.quantizers import auto

    def forget():
        monkeypatch.delitem(auto.AUTO_QUANTIZER_MAPPING, "lowdim")
        monkeypatch.delitem(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, "lowdim")

    return forget
