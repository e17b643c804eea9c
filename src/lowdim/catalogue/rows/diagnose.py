"""Systems that measure: spectra, landscapes, dynamics."""

from lowdim.catalogue.entry import Entry

ROWS = (
    Entry(
        number=9,
        slug="intrinsic-dimension",
        name="Intrinsic dimension",
        paper="Measuring the Intrinsic Dimension of Objective Landscapes",
        arxiv="1804.08838",
        claim="An MNIST network of 199,210 parameters reaches 90 % of its baseline in about 750 random dimensions.",
        target="intrinsic_dimension",
    ),
    Entry(
        number=14,
        slug="farms",
        name="FARMS",
        paper="Eigenspectrum Analysis of Neural Networks without Aspect Ratio Bias",
        arxiv="2506.06280",
        claim="Tail exponents corrected for aspect ratio give better pruning ratios: LLaMA-7B at 17.3 % lower perplexity.",
        target="farms",
    ),
    Entry(
        number=16,
        slug="generalization-dynamics",
        name="Generalization dynamics",
        paper="High-dimensional dynamics of generalization error in neural networks",
        arxiv="1710.03667",
        claim="Over-training is worst where parameters equal samples and is cured by a smaller or a larger network.",
        target="generalization_dynamics",
    ),
    Entry(
        number=21,
        slug="lora-limits",
        name="LoRA limits",
        paper="Computational Limits of Low-Rank Adaptation (LoRA) for Transformer-Based Models",
        arxiv="2406.03136",
        claim="LoRA's gradient takes almost linear time in the length L below a norm of order √log L, and about L² above.",
        target="lora_limits",
    ),
    Entry(
        number=30,
        slug="batch-lr",
        name="Learning rate by batch size",
        paper="Learning Rates as a Function of Batch Size: A Random Matrix Theory Approach to Neural Network Training",
        arxiv="2006.09092",
        claim="The largest stable rate grows linearly with the batch for SGD, with its square root for Adam.",
        target="batch_spectrum",
    ),
    Entry(
        number=31,
        slug="intruders",
        name="Intruder dimensions",
        paper="LoRA vs Full Fine-tuning: An Illusion of Equivalence",
        arxiv="2410.21228",
        claim="LoRA leaves new strong singular vectors that full tuning does not; scaling them down undoes most forgetting.",
        target="intruder_dimensions",
    ),
)
