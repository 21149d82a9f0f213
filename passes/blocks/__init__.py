"""Training-time blocks, one file each. A block is a declaration: it lists its branches and holds no folding code."""

from passes.blocks import (
    acb,
    conv3xc,
    dbb,
    difference,
    doconv,
    ecb,
    largekernel,
    lora,
    mobileone,
    orepa,
    qarepvgg,
    repnext,
    repvgg,
)
from passes.blocks.kit.builder import Site
from passes.blocks.kit.registry import Block, BlockInfo, block, blocks

__all__ = [
    "Block",
    "BlockInfo",
    "Site",
    "acb",
    "block",
    "blocks",
    "conv3xc",
    "dbb",
    "difference",
    "doconv",
    "ecb",
    "largekernel",
    "lora",
    "mobileone",
    "orepa",
    "qarepvgg",
    "repnext",
    "repvgg",
]
