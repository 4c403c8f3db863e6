"""STaR-Quant (arXiv 2606.04945): transforms gated by mask state, learned linear by linear, and attention compensated.

Beyond the paper, by option: inputs balanced against weights first, and weights by GPTQ or on the paired streams.
"""

from passes.balance_channels import BalanceChannels
from passes.base import Pass
from passes.clamp_weights import ClampWeights
from passes.fit import Fit
from passes.gate_transforms import GateTransforms
from passes.insert_tac import InsertTac
from passes.insert_transform import InsertTransform
from passes.methods.gptq import gptq_solver, solve_by_gptq
from passes.methods.method import INTEGER, Method, Passes
from passes.quant_spec import QuantPlan
from passes.quantize_paired import QuantizePaired
from passes.quantize_weights import QuantizeWeights, nearest
from passes.train_state_transforms import TrainStateTransforms


def _rewrite(plan: QuantPlan, fit: Fit) -> list[Pass]:
    balance: list[Pass] = [] if plan.options.star.balance == "none" else [BalanceChannels(plan, fit)]
    trained = TrainStateTransforms(plan, fit)
    return [*balance, trained, InsertTransform(trained.transforms.get)]


def _by_nearest(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [ClampWeights(plan, fit), QuantizeWeights(plan, nearest)]


def _by_gptq(plan: QuantPlan, fit: Fit) -> list[Pass]:
    # Weights that saturate as learned are not clipped once more.
    return [ClampWeights(plan, fit), *solve_by_gptq(plan, fit, clip=not plan.options.star.clip_rate)]


def _by_pairs(plan: QuantPlan, fit: Fit) -> list[Pass]:
    # What the weights become is not what clips were learned for: each scale is searched.
    return [QuantizePaired(plan, fit, gptq_solver(plan, clip=True), correct=_tac(plan, fit))]


WEIGHTS: dict[str, Passes] = {"rtn": _by_nearest, "gptq": _by_gptq, "paired": _by_pairs}


def _solve(plan: QuantPlan, fit: Fit) -> list[Pass]:
    star = plan.options.star
    gates: list[Pass] = [GateTransforms(star.share, plan.mask_id)] if star.gate else []
    return [*gates, *WEIGHTS[star.weights](plan, fit)]


def _tac(plan: QuantPlan, fit: Fit) -> list[Pass]:
    return [] if plan.options.tac.form == "none" else [InsertTac(plan, fit)]


def _correct(plan: QuantPlan, fit: Fit) -> list[Pass]:
    # Paired weights are solved with attention compensated already.
    return [] if plan.options.star.weights == "paired" else _tac(plan, fit)


METHOD = Method(
    name="star",
    summary="orthogonal transforms gated by mask state, and attention's output compensated",
    needs_calibration=True,
    formats=INTEGER,
    rewrite=_rewrite,
    solve=_solve,
    correct=_correct,
    pairs=True,
)
