"""What a delta's manifest says of the run that made it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from esft.evaluation import Evaluation
from esft.moe import Anatomy
from esft.recipe_sections import Recipe
from esft.run.trainer import Trained
from esft.scores import Scores
from esft.selection import Selection


@dataclass(frozen=True)
class About:
    """Describes a run, for `esft.manifest.write_manifest`.

    Attributes:
        recipe: with every default filled in.
        anatomy: of the base.
        tokenizer: digest of the base's tokenizer.
        selection: the experts that trained, if any were selected.
        scores: file of the scores that this run selected them by; it need not exist.
    """

    recipe: Recipe
    anatomy: Anatomy
    tokenizer: str | None
    selection: Selection | None
    scores: Path

    def __call__(self, outcome: Trained, evaluation: Evaluation | None) -> dict[str, Any]:
        """Return the manifest's part about the run, JSON-ready."""
        about: dict[str, Any] = {
            "method": self.recipe.method,
            "base": {
                "name": self.recipe.model,
                "model_type": self.anatomy.model_type,
                "architecture": self.anatomy.architecture,
                "tokenizer": self.tokenizer,
            },
            "recipe": self.recipe.model_dump(exclude_none=True),
            "training": {
                "steps": outcome.steps,
                "best_step": outcome.best,
                "evaluation": None if evaluation is None else evaluation.to_dict(),
            },
        }
        if self.selection is not None:
            about["selection"] = self.selection.to_dict()
        if self.recipe.selects_experts:
            about["scores"] = self._scores_origin()
        return about

    def _scores_origin(self) -> dict[str, Any]:
        """Return where the selection's scores came from: this run's data, or another's file."""
        if isinstance(self.recipe.selection, str):
            return {"selection_file": self.recipe.selection}
        # Nothing may fail now that training is done, not even where somebody tidied up.
        sample = Scores.read(self.scores).sample if self.scores.is_file() else {}
        data = [source.path for source in self.recipe.data.sources("train")]
        return {"data": data[0] if len(data) == 1 else data, "sample": sample}
