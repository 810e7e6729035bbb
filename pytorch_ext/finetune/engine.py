"""Hugging Face's Trainer over batches by real tokens, with checkpoints that count only when they are whole."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from torch.utils.data import DataLoader
from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState

from . import metrics
from .batches import Texts, TokenBudget

CHECKPOINTS = "checkpoints"
WHOLE = "whole"  # a file that a checkpoint gets last


def newest_checkpoint(folder: Path) -> Path | None:
    """The last whole checkpoint of a run; what a kill left half written is deleted."""
    found = [path for path in folder.glob("checkpoint-*") if path.is_dir()]
    for path in found:
        if not (path / WHOLE).exists():
            shutil.rmtree(path)
    whole = [path for path in found if path.exists()]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class Trainer(transformers.Trainer):
    """Trains on ``TokenBudget`` batches; evaluates on batches of texts of like lengths.

    Args:
        tokens: about how many real ones a batch has.
        classes: their names, for the figures of an evaluation.
    """

    def __init__(self, *args: Any, tokens: int, classes: list[str], **kwargs: Any) -> None:
        def figures(evaluated: transformers.EvalPrediction) -> dict[str, float]:
            predicted = evaluated.predictions.argmax(-1).tolist()
            found = metrics.report(evaluated.label_ids.tolist(), predicted, classes)
            return {"accuracy": found["accuracy"], "f1": found["f1"]}

        super().__init__(*args, compute_metrics=figures, **kwargs)
        self.tokens = tokens

    def train_from(self, checkpoint: Path | None) -> None:
        """Trains to the end and loads the best weights; only the latter if the run was finished already."""
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
            # Trainer itself would take one step more than it was told.
            if state.stateful_callbacks["TrainerControl"]["args"]["should_training_stop"]:
                self.state = state
                self._load_best_model()
                return
        self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))

    def sampler(self, dataset: Texts) -> TokenBudget:
        return TokenBudget(dataset.lengths, self.tokens, self.args.seed)

    def get_train_dataloader(self) -> DataLoader:
        return self._loader(self.train_dataset, self.sampler(self.train_dataset))

    def get_eval_dataloader(self, eval_dataset: Texts | None = None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        return self._loader(dataset, TokenBudget(dataset.lengths, self.tokens))

    get_test_dataloader = get_eval_dataloader

    def _loader(self, dataset: Texts, batches: TokenBudget) -> DataLoader:
        loader = DataLoader(dataset, batch_sampler=batches, collate_fn=self.data_collator)
        return self.accelerator.prepare(loader)


class Mark(TrainerCallback):
    """Says of a checkpoint that all of it was written: it is called when nothing is left to write."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (Path(args.output_dir) / f"checkpoint-{state.global_step}" / WHOLE).touch()


class Progress(TrainerCallback):
    """A line now and then: the step, the loss, how fast, how long still."""

    def __init__(self, say: Callable[[str], object], tokens_per_step: float) -> None:
        self.say, self.tokens_per_step = say, tokens_per_step
        self.seconds, self.steps, self.started = 0.0, 0, 0.0

    @property
    def tokens_per_second(self) -> float | None:
        """Real tokens per second of training, evaluation left out; None before the first step."""
        return self.tokens_per_step * self.steps / self.seconds if self.seconds else None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seconds += time.perf_counter() - self.started
        self.steps += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict | None = None, **kwargs: Any) -> None:
        step = f"step {state.global_step} of {state.max_steps}"
        if logs and "eval_accuracy" in logs:
            self.say(f"  {step}: validation accuracy {logs['eval_accuracy']:.1%}, F1 {logs['eval_f1']:.3f}")
        elif logs and "loss" in logs and self.seconds:
            left = self.seconds / self.steps * (state.max_steps - state.global_step)
            speed = f"{self.tokens_per_second:,.0f} tokens/s, {left / 60:.1f} min left"
            self.say(f"  {step}: loss {float(logs['loss']):.4f}, {speed}")


def callbacks(progress: Progress, patience: int) -> list[TrainerCallback]:
    return [progress, EarlyStoppingCallback(early_stopping_patience=patience), Mark()]
