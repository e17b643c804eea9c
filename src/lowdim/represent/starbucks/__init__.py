"""Starbucks: one encoder for a fixed list of (layers, dimensions), how to train it, measure it, and cut it."""

from lowdim.represent.starbucks.collator import StarbucksCollator
from lowdim.represent.starbucks.loss import StarbucksLoss
from lowdim.represent.starbucks.masks import nested_whole_word_masks
from lowdim.represent.starbucks.pretraining import StarbucksPretraining
from lowdim.represent.starbucks.retrieval import starbucks_retrieval_loss
from lowdim.represent.starbucks.shrink import shrink_encoder
from lowdim.represent.starbucks.sizes import SizeTable, size_table

__all__ = [
    "SizeTable",
    "StarbucksCollator",
    "StarbucksLoss",
    "StarbucksPretraining",
    "nested_whole_word_masks",
    "shrink_encoder",
    "size_table",
    "starbucks_retrieval_loss",
]
