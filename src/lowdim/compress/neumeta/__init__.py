"""NeuMeta: one field of coordinates generates the weights of a network at every width of its family."""

from lowdim.compress.neumeta.config import NeuMetaConfig
from lowdim.compress.neumeta.family import NeuMeta
from lowdim.compress.neumeta.field import NeuMetaField, neumeta_coordinates, neumeta_weights
from lowdim.compress.neumeta.order import permute_channels, smooth_order, total_variation
from lowdim.compress.neumeta.training import neumeta, neumeta_reconstruction_loss

__all__ = [
    "NeuMeta",
    "NeuMetaConfig",
    "NeuMetaField",
    "neumeta",
    "neumeta_coordinates",
    "neumeta_reconstruction_loss",
    "neumeta_weights",
    "permute_channels",
    "smooth_order",
    "total_variation",
]
