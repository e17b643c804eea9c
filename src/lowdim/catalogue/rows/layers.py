"""Systems that make the weight itself low-dimensional, from the start of training."""

from lowdim.catalogue.entry import Entry, Variant

#: For factors that are trained from random weights.
_FACTORS_SCRATCH = (3e-3, 1e-2, 1e-3, 3e-2, 3e-4)

ROWS = (
    Entry(
        number=2,
        slug="sltrain",
        name="SLTrain",
        paper="SLTrain: a sparse plus low-rank approach for parameter and memory efficient pretraining",
        arxiv="2406.02214",
        claim="Sparse plus low-rank weights reach perplexity 34.15 at 60M (full rank 34.06), in up to 73 % less memory at 7B.",
        target="SLTrainLinear",
        variants=(Variant("sltrain", options={"rank": 16, "density": 0.03, "alpha": 16.0}, scratch_rates=_FACTORS_SCRATCH),),
    ),
    Entry(
        number=8,
        slug="monarch",
        paper="Monarch: Expressive Structured Matrices for Efficient and Accurate Training",
        arxiv="2204.00595",
        claim="Two block-diagonal factors train ViT and GPT-2 2x faster at similar quality and tune BERT 1.7x faster.",
        target="Monarch",
        variants=(Variant("monarch", options={"nblocks": 4}),),
    ),
    Entry(
        number=11,
        slug="sst",
        name="SST",
        paper="Sparse Spectral Training and Inference on Euclidean and Hyperbolic Neural Networks",
        arxiv="2405.15481",
        claim="Training sampled singular vectors closes 67.6 % (OPT-125M) to 97.4 % (LLaMA-1.3B) of the gap to full rank.",
        target="SSTLinear",
        variants=(
            Variant(
                "sst",
                options={"rank": 16, "steps_per_iteration": 50, "warmup": 5},
                scratch_rates=(1e-2, 2e-2, 5e-3, 2e-3, 4e-2),
                companion="SSTScheduler",
            ),
        ),
    ),
    Entry(
        number=24,
        slug="s4d",
        paper="On the Parameterization and Initialization of Diagonal State Space Models",
        arxiv="2206.11893",
        claim="A diagonal state space, properly initialised, performs like S4: 85 % average on Long Range Arena.",
        target="S4D",
    ),
    Entry(
        number=26,
        slug="maestro",
        name="Maestro",
        paper="Maestro: Uncovering Low-Rank Structures via Trainable Decomposition",
        arxiv="2308.14929",
        claim="Ordered dropout finds each layer's rank in training at equal accuracy; on linear maps it recovers SVD and PCA.",
        target="MaestroLinear",
        variants=(
            Variant(
                "maestro",
                options={"lasso": 5e-3, "threshold": 1.0},
                rates=(1e-4, 3e-5, 3e-4, 1e-5, 1e-3),
                scratch_rates=(3e-3, 1e-2, 1e-3, 3e-4, 3e-2),
                companion="MaestroTraining",
            ),
        ),
    ),
    Entry(
        number=27,
        slug="delta-product",
        paper="DeltaProduct: Improving State-Tracking in Linear RNNs via Householder Products",
        arxiv="2502.10297",
        claim="Two Householder steps per token let one linear RNN layer solve the word problem of S3, which one step cannot.",
        target="DeltaProduct",
    ),
    Entry(
        number=40,
        slug="gbw-bn",
        name="GBWBN",
        paper="Learning to Normalize on the SPD Manifold under Bures-Wasserstein Geometry",
        arxiv="2504.00660",
        claim="Batch norm of SPD matrices that withstands condition numbers above 1e5 and raises accuracy on three data sets.",
        target="GBWBatchNorm",
    ),
    Entry(
        number=43,
        slug="householder",
        name="Householder projector",
        paper="Householder Projector for Unsupervised Latent Semantics Discovery",
        arxiv="2307.08012",
        claim="A rank-10 orthogonal projection, fine-tuned for 1 % of the steps, gives StyleGAN more disentangled directions.",
        target="HouseholderProjector",
    ),
    Entry(
        number=49,
        slug="structured-ffn",
        name="StructuredFFN",
        paper="Building on Efficient Foundations: Effectively Training LLMs with Structured Feedforward Layers",
        arxiv="2406.16450",
        claim="At 1.3B parameters an FFN with 32 % of its parameters loses 0.4 perplexity at equal FLOPs and runs 2.5x faster.",
        target="BlockDense",
        variants=(
            Variant("block-dense", "BlockDense", options={"rank": 16, "nblocks": 4}, scratch_rates=_FACTORS_SCRATCH),
            Variant(
                "block-shuffle",
                "BlockShuffle",
                target="BlockShuffle",
                options={"nblocks": 2},
                scratch_rates=_FACTORS_SCRATCH,
            ),
            Variant(
                "self-guided",
                "Low-rank layers, self-guided",
                target="LowRankLinear",
                options={"rank": 16, "init": "svd"},
                scratch_rates=_FACTORS_SCRATCH,
                companion="SelfGuide",
            ),
        ),
    ),
)
