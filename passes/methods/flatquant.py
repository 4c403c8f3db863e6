"""FlatQuant (arXiv 2410.09426): learned Kronecker transforms, channel scales and clips; weights rounded or by GPTQ."""

from passes.base import Pass
from passes.clamp_weights import ClampWeights
from passes.fit import Fit
from passes.fold_scale import FoldScale
from passes.insert_transform import InsertTransform
from passes.methods.gptq import solve_by_gptq
from passes.methods.method import INTEGER, Method
from passes.quant_spec import QuantPlan
from passes.quantize_weights import QuantizeWeights, nearest
from passes.rotate_keys import RotateKeys
from passes.rotate_values import RotateValues
from passes.train_transforms import TrainTransforms


def learned_transforms(plan: QuantPlan, fit: Fit, *, share: int | None = None) -> list[Pass]:
    """Learn, fold the scales, transform; `share` as `TrainTransforms` has it.

    Keys and values that are rounded are rotated by Hadamard matrices, as in QuaRot: the paper learns those transforms.
    """
    trained = TrainTransforms(plan, fit, share=share)
    # Values are rotated while attention still stands right before the linear that reads it, keys once nothing is
    # learned through them: the node of the rotation has no gradient.
    values: list[Pass] = [RotateValues(fit.seed)] if plan.attention.v_bits < 16 else []
    keys: list[Pass] = [RotateKeys(fit.seed)] if plan.attention.k_bits < 16 else []
    transform = InsertTransform(trained.transforms.get)
    return [*values, trained, FoldScale(trained.scales.get), transform, *keys]


def clipped_weights(plan: QuantPlan, fit: Fit) -> list[Pass]:
    """Transformed weights onto their grids, the learned clips before."""
    by_gptq = plan.options.flatquant.weights == "gptq"
    return [ClampWeights(plan, fit), *(solve_by_gptq(plan, fit) if by_gptq else [QuantizeWeights(plan, nearest)])]


METHOD = Method(
    name="flatquant",
    summary="learned Kronecker transforms, scales and clips",
    needs_calibration=True,
    formats=INTEGER,
    rewrite=learned_transforms,
    solve=clipped_weights,
)
