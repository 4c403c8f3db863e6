"""No quantisation: the float16 baseline."""

from passes.methods.method import Method, no_passes

METHOD = Method(
    name="none",
    summary="float16 weights, nothing quantised",
    needs_calibration=False,
    formats=frozenset({(16, 16)}),
    solve=no_passes,
)
