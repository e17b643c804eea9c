"""MatryoshkaKV: the KV cache in the leading directions of each head.

| module | what it holds |
| --- | --- |
| `method` | the config, and `matryoshka_kv`: bases from principal components, ranks from a budget |
| `pca` | means and covariances of keys and values |
| `projection` | the module that an attention layer gets |
| `attention` | attention on projected states |
| `interface` | which layers of a transformers model take part, and the function that they call |
| `cache` | the cache itself; imported on first use, since it subclasses transformers' |
| `ranks` | ranks drawn, searched, and in bytes |
| `training` | the training loss |
"""

from lowdim.compress.matryoshka_kv.attention import matryoshka_attention
from lowdim.compress.matryoshka_kv.method import MatryoshkaKVConfig, matryoshka_kv, search_kv_ranks, set_kv_ranks
from lowdim.compress.matryoshka_kv.pca import kv_pca
from lowdim.compress.matryoshka_kv.projection import MatryoshkaProjection
from lowdim.compress.matryoshka_kv.ranks import greedy_kv_ranks, kv_cache_bytes, sample_kv_ranks
from lowdim.compress.matryoshka_kv.training import matryoshka_freeze, matryoshka_loss, matryoshka_step

__all__ = [
    "MatryoshkaKVConfig",
    "MatryoshkaProjection",
    "greedy_kv_ranks",
    "kv_cache_bytes",
    "kv_pca",
    "matryoshka_attention",
    "matryoshka_freeze",
    "matryoshka_kv",
    "matryoshka_loss",
    "matryoshka_step",
    "sample_kv_ranks",
    "search_kv_ranks",
    "set_kv_ranks",
]
