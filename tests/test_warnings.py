"""Which warnings fail the suite: ours, and every kind but a library's notice about its own future."""

import warnings

import pytest

NOTICES = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)
OURS = ("pipeline", "pipeline.models.checkpoint", "passes.base", "plugins.op", "tests.test_warnings")
THEIRS = ("torch", "torch.onnx._internal", "onnxscript.ir", "importlib._bootstrap", "pipelines", "a_new_dependency")


def warn(category: type[Warning], module: str) -> int:
    """How often a warning raised in this module is shown; it is raised here where it is an error."""
    with warnings.catch_warnings(record=True) as shown:
        warnings.warn_explicit("will be removed", category, "file.py", 1, module=module)
    return len(shown)


@pytest.mark.parametrize("category", NOTICES)
@pytest.mark.parametrize("module", OURS)
def test_a_notice_in_our_code_fails(category: type[Warning], module: str) -> None:
    with pytest.raises(category):
        warn(category, module)


@pytest.mark.parametrize("category", NOTICES)
@pytest.mark.parametrize("module", THEIRS)
def test_a_notice_of_a_library_about_itself_is_shown(category: type[Warning], module: str) -> None:
    assert warn(category, module) == 1


@pytest.mark.parametrize("category", [UserWarning, RuntimeWarning, ResourceWarning])
@pytest.mark.parametrize("module", [*OURS, *THEIRS])
def test_any_other_warning_fails(category: type[Warning], module: str) -> None:
    with pytest.raises(category):
        warn(category, module)
