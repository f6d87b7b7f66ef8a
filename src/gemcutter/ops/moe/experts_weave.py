"""Rows of weights in the order in which four threads of a tensor core's group want them.

Of every 32 columns of a product thread q of the four has 8j + 2q and 8j + 2q + 1, j from 0 to 3. With the weight's
row 8q + 2j + r where 8j + 2q + r stands, these are 8 neighbours, 16 bytes to be stored, which else come together
through shared memory, in 16 rounds a tile. The TMA unit brings rows in that order by itself.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gemcutter.ops.hopper import descriptor, load_tile

BLOCK = 32


def woven(weight: torch.Tensor, rows: int, block_k: int) -> TensorDescriptor:
    """For loads of so many rows of an expert, from a multiple of 32 on, of weight [E, N, K] by block_k."""
    held, depth = weight.flatten(0, 1).shape
    blocks = weight.view(held // BLOCK, 4, 4, 2, depth).transpose(1, 2)
    return descriptor(blocks, [rows // BLOCK, 4, 4, 2, block_k])


def weaves(gate_up: torch.Tensor, down: torch.Tensor) -> bool:
    """Whether gate, up and down are whole blocks in each expert."""
    return gate_up.shape[1] % (2 * BLOCK) == down.shape[1] % BLOCK == 0


@gluon.jit
def load_woven(desc, row, k, ready, stage):
    """stage: [blocks, 4, 4, 2, K of a stage]."""
    ROWS: gl.constexpr = desc.block_type.shape[1] * desc.block_type.shape[2] * desc.block_type.shape[3]
    load_tile(desc, [row // ROWS, 0, 0, 0, k], ready, stage)


@gluon.jit
def rows_of(stage):
    """The stage as [rows, K], still woven."""
    ROWS: gl.constexpr = stage.shape[0] * stage.shape[1] * stage.shape[2] * stage.shape[3]
    return stage.reshape([ROWS, stage.shape[4]])


@gluon.jit
def unwoven(acc, layout: gl.constexpr):
    """[rows, columns] of a product with woven rows -> the weight's order, in a layout where nothing moves."""
    ROWS: gl.constexpr = acc.shape[0]
    COLS: gl.constexpr = acc.shape[1]
    acc = acc.reshape([ROWS, COLS // 32, 4, 4, 2]).permute((0, 1, 3, 2, 4)).reshape([ROWS, COLS])
    return gl.convert_layout(acc, layout, assert_trivial=True)
