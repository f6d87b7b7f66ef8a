"""KVPool: the K and V tensors themselves."""

import torch

from gemcutter.cache.layout import CacheLayout
from gemcutter.spec import Kind, ModelSpec


class KVPool:
    """K and V caches of every layer, [num_pages, kv_heads, page_size, head_dim] each."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: CacheLayout,
        pages: dict[Kind, int],
        dtype: torch.dtype,
        device: torch.device,
        scales: dict[int, torch.Tensor] | None = None,
    ) -> None:
        """`pages` counts the dump, page 0; `scales` are those of an FP8 cache, by the layer that owns it.

        The tensors start as zeros: kernels read whole pages and give masked keys the probability 0, but 0
        times a NaN that the memory held before is NaN. What is written later is finite.
        """
        self._owner = tuple(layer.kv_owner for layer in spec.layers)
        self._scales = scales or {}
        self._k: dict[int, torch.Tensor] = {}
        self._v: dict[int, torch.Tensor] = {}
        for kind in layout.kinds:
            for layer in spec.kv_owners(kind):
                shape = (pages[kind], layer.num_kv_heads, layout.page_size, layer.head_dim)
                self._k[layer.index] = torch.zeros(shape, dtype=dtype, device=device)
                self._v[layer.index] = torch.zeros(shape, dtype=dtype, device=device)

    def k(self, layer_index: int) -> torch.Tensor:
        """K that this layer reads, its own or its owner's."""
        return self._k[self._owner[layer_index]]

    def v(self, layer_index: int) -> torch.Tensor:
        """V that this layer reads, its own or its owner's."""
        return self._v[self._owner[layer_index]]

    def scales(self, layer_index: int) -> torch.Tensor | None:
        """[2, kv_heads] of the K and V that this layer reads, where they are FP8."""
        return self._scales.get(self._owner[layer_index])
