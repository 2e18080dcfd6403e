"""I3D written independently, with torch's own layers."""

from collections.abc import Callable

import numpy as np
import torch

F = torch.nn.functional


def network(weights: dict[str, np.ndarray], eps: float, dtype=torch.float64) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from frames `[b, t, h, w, 3]` in [-1, 1] to logits `[b, classes]`.

    Args:
      weights: arrays by our paths.
      eps: epsilon of batch norm.
      dtype: of all arithmetic.
    """
    get = {k: torch.from_numpy(np.asarray(v)).to(dtype) for k, v in weights.items()}
    kernels = {k: v.permute(4, 3, 0, 1, 2).contiguous() for k, v in get.items() if k.endswith("kernel")}

    def pad_same(x, window, stride):
        sides = []
        for n, k, s in zip(reversed(x.shape[2:]), reversed(window), reversed(stride), strict=True):
            total = max(k - s, 0) if n % s == 0 else max(k - n % s, 0)
            sides += [total // 2, total - total // 2]
        return F.pad(x, sides)

    def conv(x, name, stride=1):
        kernel = kernels[f"{name}.kernel"]
        return F.conv3d(pad_same(x, kernel.shape[2:], (stride,) * 3), kernel, get.get(f"{name}.bias"), stride)

    def unit(x, name, stride=1):
        x = conv(x, f"{name}.conv3d", stride)
        mean, var, scale, bias = (get[f"{name}.bn.{k}"] for k in ("mean", "var", "scale", "bias"))
        return F.relu(F.batch_norm(x, mean, var, scale, bias, eps=eps))

    def pool(x, window, stride):
        return F.max_pool3d(pad_same(x, window, stride), window, stride)  # zeros suffice: inputs are not negative

    def mixed(x, name):
        low = unit(x, f"{name}.b0")
        one = unit(unit(x, f"{name}.b1a"), f"{name}.b1b")
        two = unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        return torch.cat([low, one, two, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")], 1)

    def logits(frames: np.ndarray) -> np.ndarray:
        x = unit(torch.from_numpy(frames).to(dtype).permute(0, 4, 1, 2, 3), "Conv3d_1a_7x7", 2)
        x = unit(unit(pool(x, (1, 3, 3), (1, 2, 2)), "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
        x = pool(x, (1, 3, 3), (1, 2, 2))
        for name in ("Mixed_3b", "Mixed_3c"):
            x = mixed(x, name)
        x = pool(x, (3, 3, 3), (2, 2, 2))
        for name in ("Mixed_4b", "Mixed_4c", "Mixed_4d", "Mixed_4e", "Mixed_4f"):
            x = mixed(x, name)
        x = pool(x, (2, 2, 2), (2, 2, 2))
        for name in ("Mixed_5b", "Mixed_5c"):
            x = mixed(x, name)
        x = conv(F.avg_pool3d(x, (2, *x.shape[3:]), stride=1), "logits.conv3d")
        return x.mean((2, 3, 4)).numpy()

    return logits
