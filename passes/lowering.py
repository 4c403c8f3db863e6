"""The passes from a simulated quantised graph to the ops of `plugins`, in order."""

from passes.base import Pass
from passes.fuse_epilogue import FuseResidual, FuseSwiglu
from passes.fuse_head import FuseHead
from passes.fuse_norm import FuseNorm
from passes.fuse_prepare import FusePrepare
from passes.lower_linears import LowerLinears

# LowerLinears first: the fusions look for what it makes; the norm is what stands before all that is prepared.
LOWERING: tuple[Pass, ...] = (LowerLinears(), FusePrepare(), FuseNorm(), FuseSwiglu(), FuseResidual(), FuseHead())
