"""Scales of the weights that a checkpoint stores in FP8: read whole before any weight, and checked."""

from collections import defaultdict
from pathlib import Path

import torch

from gemcutter.checkpoint.files import CheckpointError
from gemcutter.checkpoint.quantization import Scheme
from gemcutter.checkpoint.stored import Stored, opened


def read_scales(schemes: dict[str, Scheme], found: dict[str, Stored]) -> dict[str, torch.Tensor]:
    """The scale of each weight, in float32: [rows, 1], or [row blocks, column blocks] where it has blocks.

    Raises:
        CheckpointError: a scale is not finite, or not above 0.
    """
    by_file: dict[Path, list[str]] = defaultdict(list)
    for name in schemes:
        for scale in (f"{name}.weight_scale", f"{name}.input_scale"):
            if scale in found:
                by_file[found[scale].path].append(scale)
    scales, problems = {}, []
    for path, names in by_file.items():
        with opened(path) as shard:
            for name in names:
                scale = shard.get_tensor(name).float()
                bad = scale[~((scale > 0) & scale.isfinite())]
                if len(bad):
                    problems.append(f"{name}: must be finite and above 0, got {bad[0].item()} (in {path})")
                linear, _, kind = name.rpartition(".")
                if kind == "weight_scale":
                    scales[linear] = _spread(scale, schemes[linear], found[f"{linear}.weight"].shape[0])
    if problems:
        raise CheckpointError(
            f"{len(problems)} scale(s) of FP8 weights are damaged; fetch or write the checkpoint again:\n  "
            + "\n  ".join(problems[:20])
        )
    return scales


def _spread(scale: torch.Tensor, scheme: Scheme, num_rows: int) -> torch.Tensor:
    """One for a tensor is that of every row. A copy, so that no file stays mapped."""
    if scheme.weights == "block":
        return scale.clone()
    return scale.reshape(-1, 1).expand(num_rows, 1).clone()
