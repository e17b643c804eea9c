"""Systems that make the gradient and the optimizer state low-dimensional."""

from lowdim.catalogue.entry import Entry, Variant

#: Learning rates that several of these share: for a trained model, and from random weights.
_TUNING = (1e-4, 3e-4, 3e-5, 1e-3, 3e-3)
_SCRATCH = (1e-2, 5e-3, 2e-2, 2e-3, 1e-3)
_GALORE_TUNING = (3e-4, 1e-3, 1e-4, 3e-3, 1e-2)
_GALORE_SCRATCH = (1e-2, 3e-2, 3e-3, 1e-1, 1e-3)
_LAYER_SCRATCH = (3e-3, 1e-2, 1e-3, 3e-2, 3e-4)
_LOW_RANK = "lowdim.layers:LowRankLinear"

ROWS = (
    Entry(
        number=7,
        slug="dct",
        name="DCT-AdamW",
        paper="SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models",
        arxiv="2505.17967",
        claim="DCT columns in place of an SVD: the same quality, faster, in up to 25 % less memory.",
        target="DCTAdamW",
        variants=(Variant("dct", options={"rank": 32}, rates=_TUNING, scratch_rates=_SCRATCH),),
    ),
    Entry(
        number=35,
        slug="fira",
        paper="Fira: Can We Achieve Full-rank Training of LLMs Under Low-rank Constraint?",
        arxiv="2410.01623",
        claim="Full-rank updates in GaLore's memory: perplexity 31.06 on LLaMA-60M, against 34.06 full rank and 34.88 GaLore.",
        target="Fira",
        variants=(Variant("fira", options={"rank": 32, "update_interval": 20}, rates=_TUNING, scratch_rates=_SCRATCH),),
    ),
    Entry(
        number=37,
        slug="pretrain-bench",
        name="Low-rank restart",
        paper="Scalable Parameter and Memory Efficient Pretraining for LLM: Recent Algorithmic Advances and Benchmarking",
        arxiv="2505.22922",
        claim="With both techniques a low-rank 1B model has lower perplexity than GaLore and Fira in about 25 % less memory.",
        target="Restart",
        variants=(
            Variant(
                "low-rank",
                "Low-rank layers",
                target=_LOW_RANK,
                kind="layer",
                options={"rank": 16, "alpha": None},
                scratch_rates=_LAYER_SCRATCH,
            ),
            Variant(
                "low-rank-restart",
                "Low-rank layers, restarts",
                target=_LOW_RANK,
                kind="layer",
                options={"rank": 16, "alpha": None, "interval": 100, "recovery_steps": 5},
                scratch_rates=_LAYER_SCRATCH,
                companion="Restart",
            ),
        ),
    ),
    Entry(
        number=41,
        slug="q-galore",
        name="Q-GaLore",
        paper="Q-GaLore: Quantized GaLore with INT4 Projection and Layer-Adaptive Low-Rank Gradients",
        arxiv="2407.08296",
        claim="LLaMA-7B from scratch in 16 GB; fine-tuning in up to 50 % less memory than LoRA and GaLore, with fewer SVDs.",
        target="QGaLore",
        variants=(
            Variant(
                "q-galore",
                options={"rank": 32, "update_interval": 20},
                rates=_GALORE_TUNING,
                scratch_rates=(1e-2, 3e-2, 3e-3, 6e-2, 1e-3),
            ),
        ),
    ),
    Entry(
        number=50,
        slug="galore",
        paper="GaLore: Memory-Efficient LLM Training by Gradient Low-Rank Projection",
        arxiv="2403.03507",
        claim="Trains all weights with up to 65.5 % less optimizer state (82.5 % in 8 bits) at full-rank Adam's quality.",
        target="GaLore",
        variants=(
            Variant("galore", options={"rank": 32, "update_interval": 20}, rates=_GALORE_TUNING, scratch_rates=_GALORE_SCRATCH),
            Variant(
                "galore-8bit",
                "GaLore, 8-bit",
                options={"rank": 32, "update_interval": 20, "inner": "adamw8bit"},
                rates=_GALORE_TUNING,
                scratch_rates=_GALORE_SCRATCH,
            ),
        ),
    ),
)
