"""One model under measurement: its weights, probes, session and texts, each made when a task first asks for it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from passes.methods import METHODS
from pipeline.accounting import Account, take_account
from pipeline.backends.ort import open_session
from pipeline.calibration.corpus import calibration_states
from pipeline.calibration.states import encode_pair
from pipeline.errors import UsageFault
from pipeline.folder import MODEL
from pipeline.lower import write_onnx
from pipeline.metrics.noise_grid import NoiseGrid, noise_grid
from pipeline.metrics.probe import Probe, float_probe, simulated_probe
from pipeline.metrics.teacher_forced import TeacherForced, teacher_forced
from pipeline.models import resolve
from pipeline.models.checkpoint import open_checkpoint
from pipeline.quantize import Weights, write_weights
from pipeline.recipe import Recipe
from pipeline.runner import TextModel
from pipeline.study.task_file import asked
from pipeline.tiny.problems import Problem
from pipeline.validate import settings_of

LEVELS = 8


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much the tasks measure: the same draws for every cell."""

    problems: int = 500  # of exact match
    tokens: int = 20000  # masked tokens of NLL and agreement
    questions: int = 200  # of multiple choice
    masks: int = 8  # Monte Carlo masks an option
    trajectories: int = 32  # prompts whose hidden states are followed
    steps: int = 16  # denoising steps of these


class Subject:
    """A checkpoint under `recipe`, or at full precision where it is None; files go into `folder`.

    It is asked the items of the file `task`, or else built-in problems. Raises UsageFault and InputRefused for a
    recipe that does not fit the model or its calibration, and for a file that cannot be read.
    """

    def __init__(self, model: str, recipe: Recipe | None, sizes: Sizes, folder: Path, task: Path | None = None) -> None:
        self.checkpoint = open_checkpoint(resolve(model))
        self.recipe, self.sizes, self.folder, self.task = recipe, sizes, folder, task
        self.tokenizer = self.checkpoint.tokenizer()
        plain = Recipe(name="full", method="none")
        self.settings = settings_of(self.checkpoint, recipe or plain, self.tokenizer)

    @cached_property
    def weights(self) -> Weights:
        """The quantised weights, made once; every linear is found in the format of the recipe."""
        assert self.recipe is not None, "full precision has no quantised weights"
        states = None
        if METHODS[self.recipe.method].needs_calibration:
            states = calibration_states(self.recipe.calibration, self.tokenizer, self.checkpoint.config)
        folder = self.folder / "weights"
        write_weights(self.checkpoint, self.recipe, folder, states=states, on_piece=lambda _: None)
        return Weights(folder)

    @cached_property
    def account(self) -> Account:
        """What the weights hold; RuntimeError when a linear was skipped without a word."""
        assert self.recipe is not None
        return take_account(self.checkpoint, self.recipe, self.weights)

    @cached_property
    def reference(self) -> Probe:
        """Full precision."""
        return float_probe(self.checkpoint, top_k=self.settings.top_k)

    @cached_property
    def candidate(self) -> Probe:
        """What is measured, in torch."""
        if self.recipe is None:
            return self.reference
        return simulated_probe(self.checkpoint, self.recipe, self.weights)

    @cached_property
    def forced(self) -> TeacherForced:
        """Both models on the same canvases; bits a masked token and agreement come from one pass of each."""
        return teacher_forced(self.reference, self.candidate, self.grid, self.settings)

    @property
    def exportable(self) -> bool:
        """Whether generation runs on the exported graph."""
        try:
            if self.recipe is not None:
                self.recipe.check_exportable()
        except UsageFault:
            return False
        return self.recipe is not None

    @cached_property
    def text(self) -> TextModel:
        """What generates: the exported graph in ONNX Runtime where the format has one, else torch."""
        if self.recipe is None or not self.exportable:
            return TextModel(self.candidate, self.settings, self.tokenizer)
        path = self.folder / MODEL
        write_onnx(self.checkpoint.config, self.recipe, self.weights, path, on_weight=lambda _: None)
        return TextModel(open_session(path, threads=self.recipe.threads), self.settings, self.tokenizer)

    @cached_property
    def problems(self) -> list[Problem]:
        """As many held-out problems as any task takes the first of."""
        sizes = self.sizes
        return asked(self.task, max(sizes.problems, sizes.questions, sizes.trajectories))

    @cached_property
    def grid(self) -> NoiseGrid:
        """The same held-out canvases at every noise level. Raises ValueError where the items are too few."""
        enough = -(-self.sizes.tokens // LEVELS)  # each sample has a masked token at every level
        samples = (
            encode_pair(problem.prompt, problem.answer, self.tokenizer, self.checkpoint.config)
            for problem in asked(self.task, enough)
        )
        return noise_grid(samples, self.settings, levels=LEVELS, tokens=self.sizes.tokens)
