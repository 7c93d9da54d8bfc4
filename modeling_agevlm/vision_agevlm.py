"""From a vision encoder's output to image tokens of the language model's width."""

import math

import torch
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel, TimmWrapperModel


class AgeVlmTimmWrapperModel(TimmWrapperModel):
    """`TimmWrapperModel` that also runs where accelerate keeps its weights on disk or in CPU memory."""

    _no_split_modules = ["AgeVlmTimmWrapperModel"]

    @property
    def device(self) -> torch.device:
        # Images are moved to it: of weights that are kept elsewhere it is `meta`, while the hook that fetches them knows
        # where they will run (as for Bark in transformers).
        device = next(self.parameters()).device
        if not torch.compiler.is_compiling() and device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            devices = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(given) for given in devices if given is not None), device)
        return device


def vision_encoder(config: PreTrainedConfig) -> PreTrainedModel:
    """The encoder of that configuration with random weights."""
    if config.model_type == "timm_wrapper":
        return AgeVlmTimmWrapperModel._from_config(config)
    return AutoModel.from_config(config)


def vision_width(vision_tower: nn.Module, config: PreTrainedConfig) -> int:
    """Channels of the map that the encoder returns. timm's configurations do not name it."""
    model = getattr(vision_tower, "timm_model", None)
    if model is None:
        return config.hidden_size if hasattr(config, "hidden_size") else config.hidden_sizes[-1]
    return model.feature_info.channels()[-1] if vision_tower.features_only else model.num_features


def image_shape(config: PreTrainedConfig) -> tuple[int, int, int]:
    """Channels, height and width of an image that the encoder takes."""
    if config.model_type == "timm_wrapper":
        arguments = config.model_args or {}
        shape = (getattr(config, "pretrained_cfg", None) or {}).get("input_size") or (3, 64, 64)
        channels, size = arguments.get("in_chans", shape[0]), arguments.get("img_size") or tuple(shape[1:])
    else:
        channels, size = getattr(config, "num_channels", 3), getattr(config, "image_size", None) or 64
    height, width = (size, size) if isinstance(size, int) else size
    return channels, height, width


def drop_unused_head(vision_tower: nn.Module) -> None:
    """Removes what an encoder has for its pooled output alone: parameters that would never get a gradient."""
    head = getattr(getattr(vision_tower, "timm_model", None), "head", None)
    if hasattr(head, "pre_logits"):
        head.pre_logits = nn.Identity()
    if getattr(vision_tower, "use_head", False):  # SigLIP
        vision_tower.use_head = False
        del vision_tower.head
    if isinstance(getattr(vision_tower, "pooler", None), nn.Module):  # ViT and its kin
        vision_tower.pooler = None
    norm = {"convnext": "layernorm", "convnextv2": "layernorm", "clip_vision_model": "post_layernorm"}.get(
        vision_tower.config.model_type
    )
    if norm is not None:
        setattr(getattr(vision_tower, "vision_model", vision_tower), norm, nn.Identity())


def image_tokens(
    vision_tower: nn.Module, last_hidden_state: torch.Tensor | list[torch.Tensor], image_size: tuple[int, int]
) -> tuple[torch.Tensor, int, int]:
    """Encoder output -> image tokens (images, rows x columns, width) in reading order, rows, columns.

    A map passes through timm's `head.norm`, which timm itself applies only when pooling. Of several maps, one a stage, the
    last counts. A token sequence may start with class or register tokens: what is over after one token per patch is dropped.

    Args:
        image_size: height and width of the images, in pixels.
    """
    states = last_hidden_state[-1] if isinstance(last_hidden_state, (list, tuple)) else last_hidden_state
    model = getattr(vision_tower, "timm_model", None)
    if states.ndim == 4:
        norm = getattr(getattr(model, "head", None), "norm", None)
        if norm is not None:
            states = norm(states)
        if getattr(model, "output_fmt", "NCHW") == "NHWC":  # timm's Swin
            states = states.permute(0, 3, 1, 2)
        return states.flatten(2).transpose(1, 2), states.shape[2], states.shape[3]
    patch = getattr(vision_tower.config, "patch_size", None)
    if patch is None and model is not None:
        patch = model.patch_embed.patch_size
    patch_height, patch_width = (patch, patch) if isinstance(patch, int) else patch
    rows, columns = image_size[0] // patch_height, image_size[1] // patch_width
    while rows * columns > states.shape[1]:  # an encoder that merges patches on the way
        rows, columns = rows // 2, columns // 2
    return states[:, states.shape[1] - rows * columns :], rows, columns


def position_encoding_2d(rows: int, columns: int, width: int, like: torch.Tensor) -> torch.Tensor:
    """(rows x columns, width) sines and cosines of row and column (as in MAE, He et al. 2022).

    Cross-attention has no rotary positions: without this, a text row could not tell where in the picture a token is.
    Computed from the grid alone, so it follows any image size.
    """
    frequencies = torch.exp(
        torch.arange(width // 4, device=like.device, dtype=torch.float32) * (-math.log(10_000.0) / (width // 4))
    )
    row = torch.arange(rows, device=like.device, dtype=torch.float32)[:, None] * frequencies
    column = torch.arange(columns, device=like.device, dtype=torch.float32)[:, None] * frequencies
    row = torch.cat([row.sin(), row.cos()], dim=-1)[:, None].expand(rows, columns, -1)
    column = torch.cat([column.sin(), column.cos()], dim=-1)[None].expand(rows, columns, -1)
    return torch.cat([row, column], dim=-1).flatten(0, 1).to(like.dtype)


class AgeVlmProjection(nn.Linear):
    """Starts at unit scale whatever the encoder's width: what is seen must not drown in where it is seen. A class of its
    own, as transformers initialises custom modules by their class, and only those that hold parameters themselves."""


class AgeVlmMultiModalProjector(nn.Module):
    """One linear layer to the language model's width (paper), behind a norm: encoders differ in scale by orders."""

    def __init__(self, vision_width: int, text_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(vision_width)
        self.linear = AgeVlmProjection(vision_width, text_width)

    def forward(self, image_features: torch.Tensor) -> torch.Tensor:
        """(images, tokens, vision width) -> (images, tokens, text width)"""
        return self.linear(self.norm(image_features))
