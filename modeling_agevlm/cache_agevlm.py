"""Cross-attention keys and values, kept on the decoder layer's own cache layer.

A cache that generation made (dynamic, static, quantised, offloaded) keeps its layers and their number; those in front of
which a cross-attention block stands change their class to one that also holds the images. Reordering, repeating,
selecting and offloading then cover both, and cropping text never touches an image that is still in front of it.
"""

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer


# The position of a key that belongs to no image: later than any text, so that nothing ever sees it.
NO_IMAGE = 2**30


class ImageCacheLayerMixin(CacheLayerMixin):
    """Adds to a cache layer: `image_keys` and `image_values` (batch, heads, tokens, head_dim), and `image_positions`
    (batch, tokens), which image of the text a token belongs to, `NO_IMAGE` for padding."""

    _layer_type = None  # a subclass of a layer that registers itself by type must not replace it

    image_keys: torch.Tensor | None = None
    image_values: torch.Tensor | None = None
    image_positions: torch.Tensor | None = None

    def update_images(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor) -> None:
        """Appends the tokens of newly seen images."""
        if self.image_keys is None:
            self.image_keys, self.image_values, self.image_positions = keys, values, positions
        else:
            # An offloaded cache may have left the earlier ones elsewhere.
            self._map_images(lambda states: states.to(keys.device))
            self.image_keys = torch.cat([self.image_keys, keys], dim=2)
            self.image_values = torch.cat([self.image_values, values], dim=2)
            self.image_positions = torch.cat([self.image_positions, positions], dim=1)

    def tokens_per_image(self) -> int:
        first = self.image_positions.min(-1, keepdim=True).values
        return int(((self.image_positions == first) & (first < NO_IMAGE)).sum(-1).max())

    def _map_images(self, function) -> None:
        if self.image_keys is not None:
            self.image_keys = function(self.image_keys)
            self.image_values = function(self.image_values)
            self.image_positions = function(self.image_positions)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        super().reorder_cache(beam_idx)
        self._map_images(lambda states: states.index_select(0, beam_idx.to(states.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._map_images(lambda states: states.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._map_images(lambda states: states[indices, ...])

    def crop(self, *args, **kwargs) -> None:
        super().crop(*args, **kwargs)
        if self.image_positions is not None:
            gone = self.image_positions >= self.get_seq_length()
            self.image_positions = self.image_positions.masked_fill(gone, NO_IMAGE)

    def reset(self) -> None:
        super().reset()
        self.image_keys = self.image_values = self.image_positions = None

    def offload(self) -> None:
        super().offload()
        self._map_images(lambda states: states.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        super().prefetch()
        self._map_images(lambda states: states.to(self.device, non_blocking=True))


class ImageDynamicLayer(ImageCacheLayerMixin, DynamicLayer):
    """A growing cache layer that also holds images."""


class ImageStaticLayer(ImageCacheLayerMixin, StaticLayer):
    """A cache layer of fixed length that also holds images."""


_LAYER_CLASSES: dict[type, type] = {DynamicLayer: ImageDynamicLayer, StaticLayer: ImageStaticLayer}


def image_cache_layer(cache: Cache, layer_idx: int) -> ImageCacheLayerMixin:
    """The cache's layer `layer_idx`, made able to hold images if it is not yet."""
    while len(cache.layers) <= layer_idx:
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[layer_idx]
    if not isinstance(layer, ImageCacheLayerMixin):
        base = type(layer)
        if base not in _LAYER_CLASSES:
            name = f"Image{base.__name__}"
            # A module and an importable name: torch.export and pickle look the class up.
            _LAYER_CLASSES[base] = type(name, (ImageCacheLayerMixin, base), {"__module__": __name__})
            globals()[name] = _LAYER_CLASSES[base]
        layer.__class__ = _LAYER_CLASSES[base]
    return _fetched(cache, layer)


def cached_images(cache: Cache | None, layer_idx: int) -> ImageCacheLayerMixin | None:
    """The cache's layer `layer_idx` if it holds images."""
    if cache is None or len(cache.layers) <= layer_idx:
        return None
    layer = cache.layers[layer_idx]
    return _fetched(cache, layer) if getattr(layer, "image_keys", None) is not None else None


def _fetched(cache: Cache, layer: ImageCacheLayerMixin) -> ImageCacheLayerMixin:
    """An offloading cache waits in its `update` for what it fetches ahead, but images are read before that."""
    if getattr(cache, "offloading", False) and layer.image_keys is not None:
        torch.cuda.default_stream(layer.device).wait_stream(cache.prefetch_stream)
    return layer


def check_cache(cache: Cache | None, batch: int) -> None:
    """Raises ValueError, one sentence, for a cache of another number of rows."""
    for layer in cache.layers if cache is not None else ():
        # A quantised layer may hold its text elsewhere.
        for states in (getattr(layer, "keys", None), getattr(layer, "image_keys", None)):
            if isinstance(states, torch.Tensor) and states.ndim == 4 and states.shape[0] != batch:
                raise ValueError(f"cache: got a cache of {states.shape[0]} rows, expected {batch}.")
