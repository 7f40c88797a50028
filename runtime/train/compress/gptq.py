"""GPTQ: what rounding one input's weights spoils, the inputs after it make up for.

Source: Frantar et al., 2022, algorithm 1, with groups whose scales are set when they are reached.
"""

# Shapes: O and I a matrix's outputs and inputs, G groups of inputs, B inputs of a block.
from __future__ import annotations

import torch
from torch import Tensor

from mizzen.runtime.train.compress.rounding import Grid, scales_for, to_levels, to_weights

_BLOCK = 128
_DAMPING = 0.01  # of the mean diagonal: a Hessian of few samples has no inverse


def quantize_gptq(weight_OI: Tensor, gram_II: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Return levels_OI and scale_OG, so that the outputs of the inputs behind `gram` change least.

    `gram_II` is the sum of x x^T over calibration inputs x.
    """
    left_OI = weight_OI.float().clone()
    inputs = left_OI.shape[1]
    factor_II = _inverse_factor(gram_II.float().clone(), left_OI)
    width = grid.width(inputs)
    levels_OI = torch.zeros(left_OI.shape, dtype=torch.int8)
    scales = [] if grid.group_size else [scales_for(left_OI, grid)]
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors_OB = torch.zeros_like(left_OI[:, start:stop])
        for column in range(start, stop):
            if grid.group_size and column % width == 0:
                scales.append(scales_for(left_OI[:, column : column + width], grid))
            scale_O1 = scales[-1]
            one = left_OI[:, column : column + 1]
            level = to_levels(one, scale_O1, grid)
            levels_OI[:, column : column + 1] = level
            error = (one - to_weights(level, scale_O1)) / factor_II[column, column]
            left_OI[:, column:stop] -= error * factor_II[column, column:stop]
            errors_OB[:, column - start : column - start + 1] = error
        left_OI[:, stop:] -= errors_OB @ factor_II[start:stop, stop:]
    return levels_OI, torch.cat(scales, dim=1)


def _inverse_factor(gram_II: Tensor, weight_OI: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse; inputs nobody uses get no weight."""
    diagonal = gram_II.diagonal()
    is_dead = diagonal == 0
    diagonal[is_dead] = 1.0
    weight_OI[:, is_dead] = 0.0
    diagonal += _DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram_II))
    return torch.linalg.cholesky(inverse, upper=True)
