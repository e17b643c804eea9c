"""Systems that make features, labels and prediction heads low-dimensional."""

from lowdim.catalogue.entry import Entry

ROWS = (
    Entry(
        number=13,
        slug="fccov",
        name="FCCov-Net",
        paper="Frechet Cumulative Covariance Net for Deep Nonlinear Sufficient Dimension Reduction with Random Objects",
        arxiv="2502.15374",
        claim="Nonlinear sufficient directions for responses in any metric space, robust to outliers, ahead of kernel methods.",
    ),
    Entry(
        number=23,
        slug="starbucks",
        name="Starbucks",
        paper="Starbucks: Improved Training for 2D Matryoshka Embeddings",
        arxiv="2410.13230",
        claim="A fixed list of (layer, width) pairs: mean STS 0.721 at (2, 32); 2DMSE 0.684, separate training 0.695.",
    ),
    Entry(
        number=39,
        slug="mlc",
        name="MLC",
        paper="Unsupervised Manifold Linearizing and Clustering",
        arxiv="2301.01805",
        claim="Clusters and a union-of-subspaces representation learned together: 86.3 on CIFAR-10 against 72.2 for EnSC.",
    ),
    Entry(
        number=44,
        slug="loki",
        name="loki",
        paper="Geometry-Aware Adaptation for Pretrained Models",
        arxiv="2307.12226",
        claim="A Fréchet mean over a label metric predicts unseen classes: up to 29.7 % (SimCLR) and 10.5 % (CLIP) better.",
    ),
    Entry(
        number=46,
        slug="fewshot",
        name="SLK",
        paper="Transductive Few-Shot Learning: Clustering is All You Need?",
        arxiv="2106.09516",
        claim="Regularised clustering of standard features: 75.17 on 1-shot mini-ImageNet, against 73.44 for LaplacianShot.",
    ),
    Entry(
        number=53,
        slug="d-simplex",
        name="d-Simplex",
        paper="Stationary Representations: "
        "Optimally Approximating Compatibility and Implications for Improved Model Replacements",
        arxiv="2405.02581",
        claim="Features learned against a fixed simplex stay put when the model is replaced, so a gallery is not re-indexed.",
    ),
    Entry(
        number=56,
        slug="a-mtrl",
        name="A-MTRL",
        paper="Improved Active Multi-Task Representation Learning via Lasso",
        arxiv="2306.02556",
        claim="Sampling sources by Lasso relevance needs fewer samples: up to 30 % better than the L2 rule on vision data.",
    ),
    Entry(
        number=58,
        slug="drs",
        name="DRS",
        paper="Mitigating the Curse of Dimensionality for Certified Robustness via Dual Randomized Smoothing",
        arxiv="2404.09586",
        claim="Smoothing half-images raises the bound on the certified l2 radius by up to √2 at similar accuracy (93.9, 94.0).",
    ),
    Entry(
        number=60,
        slug="mrl",
        name="Matryoshka representations",
        paper="Matryoshka Representation Learning",
        arxiv="2205.13147",
        claim="One embedding for every size: up to 14x smaller at equal ImageNet accuracy, 14x faster retrieval.",
        target="MatryoshkaHead",
    ),
)
