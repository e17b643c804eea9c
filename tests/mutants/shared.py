"""Faults that a shared case must catch by itself, without vectors and without the tests of the system's own file."""

from mutants.planting import Fault, Tests

FAULTS = [
    Fault(
        "LoRA's scale is alpha, not alpha / rank",
        "adapters/lora.py",
        "scaling = self.alpha / (math.sqrt(rank) if self.rank_stabilized else rank)",
        "scaling = self.alpha",
        Tests(("adapters/test_lora.py::TestLoRA",), "formula", shared=True),
    ),
    Fault(
        "SLTrain's scale is alpha, not alpha / rank",
        "layers/sltrain.py",
        "self.scaling, self.density, self.index_dtype = alpha / rank, density, index_dtype",
        "self.scaling, self.density, self.index_dtype = alpha, density, index_dtype",
        Tests(("layers/test_sltrain.py::TestSLTrain",), "formula", shared=True),
    ),
    Fault(
        "a Monarch layer's middle permutation is left out",
        "layers/monarch.py",
        "return monarch_dense(self.blkdiag1, self.blkdiag2)[: self.out_features, : self.in_features]",
        "return (torch.block_diag(*self.blkdiag2) @ torch.block_diag(*self.blkdiag1))[: self.out_features, : self.in_features]",
        Tests(("layers/test_monarch_layer.py::TestMonarchWide",), "formula", shared=True),
    ),
    Fault(
        "GaLore's update is four times as large",
        "optim/core/driver.py",
        "alpha=-size * projector.scale",
        "alpha=-4 * size * projector.scale",
        Tests(("optim/test_galore.py::TestAdamW",), "formula", shared=True),
    ),
    Fault(
        "GaLore projects the longer side",
        "optim/core/projectors.py",
        '(m >= n) == (self.proj_type == "std")',
        '(m < n) == (self.proj_type == "std")',
        Tests(("optim/test_galore.py::TestAdamW",), "formula", shared=True),
    ),
    Fault(
        "Fira leaves the scale out of the rest's norm",
        "optim/core/residuals.py",
        "alpha=2 * alpha - alpha * alpha",
        "alpha=1.0",
        Tests(("optim/test_fira.py::TestReverse",), "formula", shared=True),
    ),
    Fault(
        "DCT-AdamW chooses its columns a step late",
        "optim/dct.py",
        "return (step + 1 + state",
        "return (step + state",
        Tests(("optim/test_dct_adamw.py::TestDCT",), "formula", shared=True),
    ),
    Fault(
        "Q-GaLore's interval grows by a sum, not by a product",
        "optim/q_galore.py",
        'int(state["interval"] * self.gamma)',
        'int(state["interval"] + self.gamma)',
        Tests(("optim/test_q_galore.py::TestAlwaysLazy",), "formula", shared=True),
    ),
    Fault(
        "matrix completion returns 1.5 U",
        "solve/matrix_completion/complete.py",
        "U=as_given(u, values),",
        "U=as_given(1.5 * u, values),",
        Tests(("solve/test_matrix_completion.py::TestCompletion",), shared=True),
    ),
    Fault(
        "intruders are the vectors above the threshold",
        "diagnose/intruders/measure.py",
        "indices = (similarity < threshold).nonzero()[:, 0].tolist()",
        "indices = (similarity > threshold).nonzero()[:, 0].tolist()",
        Tests(("diagnose/test_intruders.py::TestIntruders",), shared=True),
    ),
    Fault(
        "Matryoshka ignores its weights",
        "represent/matryoshka/heads.py",
        "losses = [c * loss for c, loss in zip(weights, losses)]",
        "losses = list(losses)",
        Tests(("represent/test_mrl.py::TestHead",), shared=True),
    ),
    Fault(
        "LoRD keeps the smallest eigenvectors",
        "compress/lord.py",
        "return eigenvalues.flip(0).clamp_min(0), vectors.flip(1)",
        "return eigenvalues.flip(0).clamp_min(0), vectors",
        Tests(("compress/test_lord.py::TestLoRD",), shared=True),
    ),
]
