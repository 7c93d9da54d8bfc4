"""The gated cross-attention block, and the Llama decoder layer and model that carry it."""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import Cache, DynamicCache, LlamaConfig
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
    LlamaModel,
    LlamaRMSNorm,
    eager_attention_forward,
)

from .configuration_agevlm import AgeVlmConfig
from .cache_agevlm import NO_IMAGE, cached_images, image_cache_layer
from .compat_agevlm import accepts_old_cache_name, capture_outputs, merge_with_config_defaults
from .image_masks_agevlm import ImagesByRow, mask_for_backend, packed_starts, visible_images, visible_slots


class AgeVlmGate(nn.Module):
    """Scales a branch by tanh of one learned number. A module of its own: PEFT, quantisers and offload hooks work on
    modules, and a bare parameter in a layer broke all three for Mllama."""

    def __init__(self, start: float):
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((1,), float(start), dtype=torch.float32))

    def _apply(self, fn, *args, **kwargs):
        # `.half()` and `.to(torch.bfloat16)` move it, and leave its precision: one step of training is less than bfloat16 has.
        def in_float32(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if moved.dtype in (torch.float16, torch.bfloat16) else moved

        return super()._apply(in_float32, *args, **kwargs)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.weight.tanh().to(hidden_states.dtype)


class AgeVlmCrossAttention(nn.Module):
    """Text queries over image keys and values, with normalised queries and keys (as Mllama)."""

    is_causal = False

    def __init__(self, config: LlamaConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        width, key_value_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None,
        image_mask: torch.Tensor,
        image_positions: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """
        Args:
            hidden_states: (batch, length, width).
            image_states: (batch, new image tokens, width), `None` where all images are in the cache.
            image_mask: (batch, 1, length, image tokens), bool or additive.
            image_positions: (batch, new image tokens), kept with them in the cache.

        Returns:
            Output (batch, length, width), weights (batch, heads, length, image tokens) where the backend gives them,
            queries (batch, heads, length, head_dim), keys (batch, key-value heads, image tokens, head_dim).
        """
        batch, length = hidden_states.shape[:2]
        queries = self.q_norm(self.q_proj(hidden_states).view(batch, length, -1, self.head_dim).transpose(1, 2))
        if image_states is not None:
            keys = self.k_proj(image_states).view(batch, image_states.shape[1], -1, self.head_dim).transpose(1, 2)
            values = self.v_proj(image_states).view(batch, image_states.shape[1], -1, self.head_dim).transpose(1, 2)
            keys = self.k_norm(keys)
            if cache is not None:
                layer = image_cache_layer(cache, self.layer_idx)
                layer.update_images(keys, values, image_positions)
                keys, values = layer.image_keys, layer.image_values
        else:
            layer = cached_images(cache, self.layer_idx)
            # An offloaded cache may have left them elsewhere.
            keys, values = layer.image_keys.to(queries.device), layer.image_values.to(queries.device)

        attention: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            image_attention_implementation(self.config), eager_attention_forward
        )
        output, weights = attention(
            self,
            queries,
            keys,
            values,
            image_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
        )
        return self.o_proj(output.reshape(batch, length, -1).contiguous()), weights, queries, keys


def image_attention_implementation(config: LlamaConfig) -> str:
    """The language model's backend; SDPA instead of flash attention, which has no mask per text row, and of flex
    attention, which gains nothing from a mask that is dense, and whose kernel for it aborts on a CPU (torch 2.15)."""
    implementation = config._attn_implementation or "sdpa"
    return "sdpa" if any(name in implementation for name in ("flash", "flex", "paged")) else implementation


def image_attention_maps(
    named: torch.Tensor,
    queries: torch.Tensor,
    keys: torch.Tensor,
    visible: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Attention of the named queries alone, so that the layer itself can run any backend.

    Args:
        named: (maps, 2) batch index and position.
        queries: (batch, heads, length, head_dim).
        keys: (batch, key-value heads, image tokens, head_dim).
        visible: (batch, length, image tokens) bool.

    Returns:
        (maps, heads, image tokens), float32; zeros for a query that sees no image.
    """
    batch_index, position = named.unbind(-1)
    visible = visible[batch_index, position][:, None, None]
    queries = queries[batch_index, :, position].unflatten(1, (keys.shape[1], -1))
    scores = queries.float() @ keys[batch_index].float().transpose(-1, -2) * scaling
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) * visible).flatten(1, 2)


def all_heads(maps: torch.Tensor, query_weight: torch.Tensor) -> torch.Tensor:
    """(maps, heads, image tokens) of all processes that share the heads by tensor parallelism; each gets the gradient of its
    own. Every process has to call it."""
    # Not every build of torch has distributed tensors.
    if not any(each.is_shard(0) for each in getattr(query_weight, "placements", ())):
        return maps
    from torch.distributed.tensor import DTensor, Replicate, Shard

    placements = [Shard(1) if each.is_shard(0) else Replicate() for each in query_weight.placements]
    return DTensor.from_local(maps, query_weight.device_mesh, placements, run_check=False).full_tensor()


class AgeVlmCrossAttentionBlock(nn.Module):
    """Gated cross-attention and gated feed-forward in front of a decoder layer (Flamingo, Alayrac et al. 2022)."""

    def __init__(self, config: LlamaConfig, layer_idx: int, intermediate_size: int, gate_start: float):
        super().__init__()
        mlp_config = copy.copy(config)
        mlp_config.intermediate_size = intermediate_size
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attn = AgeVlmCrossAttention(config, layer_idx)
        self.attn_gate = AgeVlmGate(gate_start)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(mlp_config)
        self.mlp_gate = AgeVlmGate(gate_start)

    def forward(
        self,
        hidden_states: torch.Tensor,
        images: "VisibleImages",
        image_states: torch.Tensor | None,
        cache: Cache | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """(batch, length, width) -> the same, and the maps (maps, heads, image tokens) of the queries named in `images`."""
        output, _, queries, keys = self.attn(
            self.input_layernorm(hidden_states), image_states, images.mask, images.positions, cache
        )
        # A row without an image gets exactly nothing, whatever its masked attention returned.
        nothing = hidden_states.new_zeros(())
        hidden_states = hidden_states + torch.where(images.any_visible, self.attn_gate(output), nothing)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        hidden_states = hidden_states + torch.where(images.any_visible, self.mlp_gate(output), nothing)
        if images.queries is None:
            return hidden_states, None
        maps = image_attention_maps(images.queries, queries, keys, images.visible, self.attn.scaling)
        return hidden_states, all_heads(maps, self.attn.q_proj.weight)


@dataclass
class VisibleImages:
    """What every cross-attention block of one forward pass shares.

    Attributes:
        visible: (batch, length, image tokens) bool.
        any_visible: (batch, length, 1) bool, whether the text row sees an image at all.
        mask: (batch, 1, length, image tokens), `visible` as the backend wants it; all open for rows that see nothing,
            so that no softmax runs over an empty set.
        positions: (batch, new image tokens), to be cached with the new keys.
        queries: (maps, 2) batch index and position of the queries whose maps are wanted.
    """

    visible: torch.Tensor
    any_visible: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor | None = None
    queries: torch.Tensor | None = None


class AgeVlmDecoderLayer(LlamaDecoderLayer):
    """`LlamaDecoderLayer` with a gated cross-attention block in front; its own parameters keep their names."""

    def __init__(self, config: LlamaConfig, layer_idx: int, intermediate_size: int, gate_start: float):
        super().__init__(config, layer_idx)
        self.cross_attention = AgeVlmCrossAttentionBlock(config, layer_idx, intermediate_size, gate_start)

    def forward(
        self,
        hidden_states: torch.Tensor,
        image_states: torch.Tensor | None = None,
        images: VisibleImages | None = None,
        cache: Cache | None = None,
        **kwargs,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        # `image_states` comes by position: reentrant gradient checkpointing tracks nothing that comes by keyword.
        maps = None
        if images is not None:
            hidden_states, maps = self.cross_attention(hidden_states, images, image_states, cache)
        hidden_states = super().forward(hidden_states, cache=cache, **kwargs)
        return hidden_states if maps is None else (hidden_states, maps)


@dataclass
class AgeVlmTextModelOutput(BaseModelOutputWithPastAndCrossAttentions):
    """`cross_attentions`: one (batch, heads, length, image tokens) a block, where the backend gives weights;
    `cross_attention_maps`: one (maps, heads, image tokens) a block, for the queries that were named."""

    cross_attention_maps: tuple[torch.Tensor, ...] | None = None


class AgeVlmTextModel(LlamaModel):
    """`LlamaModel` some of whose layers are `AgeVlmDecoderLayer`s. Without images it is `LlamaModel`, bit for bit."""

    _no_split_modules = ["LlamaDecoderLayer", "AgeVlmDecoderLayer"]
    _can_record_outputs = {
        "hidden_states": LlamaDecoderLayer,
        "attentions": LlamaAttention,
        "cross_attentions": AgeVlmCrossAttention,
    }

    def __init__(self, config: AgeVlmConfig):
        super().__init__(config.text_config)
        self.cross_attention_layers = config.cross_attention_layers
        self.image_visibility = config.image_visibility
        for index in config.cross_attention_layers:
            self.layers[index] = AgeVlmDecoderLayer(
                config.text_config, index, config.cross_attention_intermediate_size, config.cross_attention_gate_init
            )

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, AgeVlmGate):
            init.constant_(module.weight, module.start)

    @accepts_old_cache_name
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        image_states: torch.Tensor | None = None,
        images_by_row: ImagesByRow | None = None,
        cross_attention_queries: torch.Tensor | None = None,
        **kwargs,
    ) -> AgeVlmTextModelOutput:
        """`image_states`: (images, tokens, width) of the images that `images_by_row` sorts by text row."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("input_ids, inputs_embeds: expected exactly one of the two.")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        starts = None
        if position_ids is not None and attention_mask is None:
            # As transformers' own masks do: positions that restart are packed sequences.
            starts = packed_starts(position_ids, inputs_embeds.shape[0])
        # A graph cannot ask; what is compiled for a cache is decoding.
        asks = starts is not None and (use_cache or cache is not None) and not torch.compiler.is_compiling()
        if asks and starts.any():
            if cache is not None:
                raise ValueError(
                    "position_ids: got positions that restart, packed texts, with a cache, expected one of the two: what comes "
                    "next in a cache sees all that is in it (rows that are padded need an attention_mask)."
                )
            use_cache = False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        past_length = cache.get_seq_length() if cache is not None else 0
        queries = torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past_length
        if cache is not None:
            starts = None
        if position_ids is None:
            position_ids = queries[None]

        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4 and attention_mask.dtype == torch.bool:
            attention_mask = mask_for_backend(
                attention_mask, self.config._attn_implementation or "sdpa", inputs_embeds.dtype
            )
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        image_states, images = self._visible_images(inputs_embeds, image_states, images_by_row, queries, starts, cache)
        if images is not None:
            images.queries = cross_attention_queries

        hidden_states = inputs_embeds
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        maps = []
        for layer in self.layers[: self.config.num_hidden_layers]:
            crosses = images is not None and isinstance(layer, AgeVlmDecoderLayer)
            hidden_states = layer(
                hidden_states,
                *((image_states, images) if crosses else ()),
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
            if isinstance(hidden_states, tuple):
                hidden_states, layer_maps = hidden_states
                maps.append(layer_maps)
        return AgeVlmTextModelOutput(
            last_hidden_state=self.norm(hidden_states),
            cache=cache,
            cross_attention_maps=tuple(maps) or None,
        )

    def _visible_images(
        self, inputs_embeds, image_states, grouped, queries, starts, cache
    ) -> tuple[torch.Tensor | None, VisibleImages | None]:
        """Image tokens sorted by row (batch, tokens, width), and what each query sees of them."""
        cached = cached_images(cache, self.cross_attention_layers[0])
        if grouped is None and cached is None:
            return None, None
        new_positions = None
        if grouped is None:
            visible = visible_images(cached.image_positions.to(queries.device), queries, self.image_visibility)
        else:
            tokens = image_states.shape[1]
            if cache is None:
                visible = visible_images(grouped.positions, queries, self.image_visibility, starts)
                if grouped.slots is not None:
                    visible = visible_slots(visible, grouped.slots, grouped.index.shape[1])
                visible = visible.repeat_interleave(tokens, dim=-1)
            else:
                new_positions = grouped.positions.repeat_interleave(tokens, dim=1)
                positions = new_positions
                if cached is not None:
                    positions = torch.cat([cached.image_positions.to(positions.device), positions], dim=1)
                visible = visible_images(positions, queries, self.image_visibility)
            image_states = image_states[grouped.index.clamp(min=0)].flatten(1, 2)

        any_visible = visible.any(-1, keepdim=True)
        implementation = image_attention_implementation(self.config)
        mask = mask_for_backend((visible | ~any_visible)[:, None], implementation, inputs_embeds.dtype)
        return image_states, VisibleImages(visible, any_visible, mask, new_positions)


def unseen_images(batch: int, device: torch.device) -> ImagesByRow:
    """One image in every row that no text sees: its parameters take part and get zero gradients."""
    return ImagesByRow(
        index=torch.zeros(batch, 1, dtype=torch.long, device=device),
        positions=torch.full((batch, 1), NO_IMAGE, device=device),
    )
