"""A transformer encoder as a function (pre-norm), shared by a backbone and a method.

Attention is written out, so that an inner loop can differentiate through it twice (fused attention
has no second derivative).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from metalearn.backbones.layers import init_weight
from metalearn.tasks import prng
from metalearn.tasks.types import Params


def init_transformer(key: Tensor, layers: int, width: int) -> Params:
    """Create "layer<n>.…" and the normalisation "last", for tokens of `width` features."""

    def layer_norm(name: str) -> Params:
        return {
            f"{name}.weight": torch.ones(width, device=key.device),
            f"{name}.bias": torch.zeros(width, device=key.device),
        }

    params = layer_norm("last")
    shapes = {"qkv": (3 * width, width), "out": (width, width),
              "up": (4 * width, width), "down": (width, 4 * width)}  # fmt: skip
    for layer in range(layers):
        own = prng.fold_in(key, 2 + layer)
        params |= layer_norm(f"layer{layer}.attend") | layer_norm(f"layer{layer}.feed")
        for number, (name, (rows, columns)) in enumerate(shapes.items()):
            weight = init_weight(prng.fold_in(own, number), rows, columns)
            params[f"layer{layer}.{name}.weight"] = weight
            params[f"layer{layer}.{name}.bias"] = torch.zeros(rows, device=key.device)
    return params


def transformer(
    params: Params, z: Tensor, layers: int, heads: int, eps: float, mask: Tensor | float = 0.0
) -> Tensor:
    """Compute the outputs [B, L, D] for tokens z [B, L, D], which all see each other.

    `heads` is a divisor of D; the mask is added to the scores [B, H, L, L], broadcast.
    """

    def linear(name: str, z: Tensor) -> Tensor:
        return F.linear(z, params[f"{name}.weight"], params[f"{name}.bias"])

    def layer_norm(name: str, z: Tensor) -> Tensor:
        return F.layer_norm(z, z.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], eps)

    for layer in range(layers):
        name = f"layer{layer}"
        qkv = linear(f"{name}.qkv", layer_norm(f"{name}.attend", z))
        query, keys, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1)
        )
        scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        read = ((scores + mask).softmax(-1) @ value).transpose(1, 2).flatten(2)
        z = z + linear(f"{name}.out", read)
        hidden = F.gelu(linear(f"{name}.up", layer_norm(f"{name}.feed", z)))
        z = z + linear(f"{name}.down", hidden)
    return layer_norm("last", z)
