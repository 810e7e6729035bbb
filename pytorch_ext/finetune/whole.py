"""A run of ``finetune`` from beginning to end, or from where a killed one was."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

import pytorch_ext

from ..benchmarks import record
from ..demo import model as models
from ..demo.options import DemoError, cpu_has_bf16
from . import metrics, page, tune
from .batches import Texts, TokenBudget, fill
from .data import Parts, Rows, read, split
from .engine import CHECKPOINTS, Progress, Trainer, callbacks, newest_checkpoint
from .options import FinetuneError, Options

SETTINGS = "settings.json"
SCORED_BATCHES = 4
LOGGED = 50  # losses of a run
EVALUATIONS = 10
FREE = ("out", "threads")  # what may differ when a run is taken up again


def whole(options: Options, say: Callable[[str], object]) -> dict[str, Any]:
    """See :func:`pytorch_ext.finetune.run`."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise FinetuneError(
            "finetune: expected one process, got several; docs/scale.md has what trains on many"
        )
    parts = _parts(options)
    folder, name = _source(options)
    settings = _settled(options)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device, bf16 = _device(options)
    tokenizer = _quietly(models.load_tokenizer, folder)
    sets = {part: _tokenised(rows, parts, tokenizer, options) for part, rows in _of(parts).items()}
    _introduce(options, parts, sets, name, say)

    transformers.set_seed(options.seed)
    model = _model(folder, parts.classes, options.dropout)
    if options.optimize:
        pytorch_ext.optimize(model)
    collate = transformers.DataCollatorWithPadding(tokenizer)
    model, chosen = _choose(model.to(device), options, settings, sets["train"], collate, say)
    learns, of = tune.learning(model)
    say(f"{learns:,} of {of:,} weights learn, in {'bf16' if bf16 else 'fp32'} on {device}")

    trainer, progress = _trainer(model, options, sets, collate, parts.classes, tokenizer, bf16, say)
    checkpoint = newest_checkpoint(options.out / CHECKPOINTS)
    if checkpoint is not None:
        say(f"going on from {checkpoint.name}")
    trainer.train_from(checkpoint)

    predicted = trainer.predict(sets["test"])
    held_out = metrics.report(
        predicted.label_ids.tolist(), predicted.predictions.argmax(-1).tolist(), parts.classes
    )
    _save(trainer.model, tokenizer, options)
    history = trainer.state.log_history
    found = {
        "model": name,
        "data": options.data.name,
        "options": {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()},
        "environment": record.environment(device),
        "precision": "bf16" if bf16 else "fp32",
        "tuned": {**chosen, "weights": learns, "of": of},
        "rows": {part: len(rows) for part, rows in _of(parts).items()} | {"left out": parts.left_out},
        "steps": trainer.state.global_step,
        "steps planned": trainer.state.max_steps,
        "best step": trainer.state.best_global_step,
        "tokens per second": progress.tokens_per_second,
        "losses": [[e["step"], e["loss"], e["learning_rate"]] for e in history if "loss" in e],
        "evaluations": [[e["step"], e["eval_accuracy"], e["eval_f1"]] for e in history if "eval_f1" in e],
        "lengths": sets["train"].lengths,
        "fill": fill(sets["train"].lengths, list(trainer.sampler(sets["train"]))),
        "held out": held_out,
    }
    _report(found, options, say)
    return found


def _parts(options: Options) -> Parts:
    files = [
        None if p is None else read(p, options.text, options.label)
        for p in (options.validation, options.test)
    ]
    return split(read(options.data, options.text, options.label), *files, options.seed)


def _of(parts: Parts) -> dict[str, Rows]:
    return {"train": parts.train, "validation": parts.validation, "test": parts.test}


def _source(options: Options) -> tuple[Path, str]:
    try:
        source = models.find(options.model)
    except DemoError as error:
        raise FinetuneError(str(error)) from None
    return source.folder, source.name


def _settled(options: Options) -> dict[str, Any]:
    """What the run in this folder was told; an error if that was something else.

    ``tuned`` is added when it is known.
    """
    told = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items() if k not in FREE}
    for name in ("data", "validation", "test"):
        if told[name] is not None:
            told[name] = hashlib.sha256(Path(told[name]).read_bytes()).hexdigest()
    file = options.out / SETTINGS
    if file.is_file():
        before = json.loads(file.read_text())
        changed = [name for name, value in told.items() if before["options"].get(name) != value]
        if changed:
            raise FinetuneError(
                f"out: expected a folder of its own for this run, got {options.out}, where another"
                f" {', '.join(changed)} was used; give it another, or delete it"
            )
        return before
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        _write(file, settings := {"options": told})
    except OSError as error:
        raise FinetuneError(f"out: cannot write to {options.out}: {error.strerror}") from None
    return settings


def _write(file: Path, value: dict[str, Any]) -> None:
    """All of it or nothing, whenever the process is killed."""
    half = file.with_suffix(".half")
    half.write_text(json.dumps(value, indent=2))
    half.replace(file)


def _device(options: Options) -> tuple[torch.device, bool]:
    """Where it runs, and whether in bf16: by default where the hardware multiplies it."""
    there = torch.cuda.is_available()
    if options.device == "cuda" and not there:
        raise FinetuneError("device: expected one that is there, got cuda: this PyTorch sees none")
    device = torch.device("cuda" if there and options.device != "cpu" else "cpu")
    pays = cpu_has_bf16() if device.type == "cpu" else torch.cuda.is_bf16_supported(including_emulation=False)
    return device, pays if options.precision == "auto" else options.precision == "bf16"


def _tokenised(rows: Rows, parts: Parts, tokenizer: Any, options: Options) -> Texts:
    length = min(options.max_length, tokenizer.model_max_length)
    encoded = tokenizer(rows.texts, truncation=True, max_length=length)
    tokens = [{name: encoded[name][n] for name in encoded} for n in range(len(rows))]
    return Texts(tokens, parts.numbers(rows))


def _introduce(
    options: Options, parts: Parts, sets: dict[str, Texts], name: str, say: Callable[[str], object]
) -> None:
    rows = ", ".join(f"{len(rows):,} for {part}" for part, rows in _of(parts).items())
    say(f"{name} on {options.data.name}: {len(parts.classes)} classes; {rows}")
    if parts.left_out:
        say(f"{parts.left_out:,} rows without text or label were left out")
    longest = max(sets["train"].lengths)
    cut = sum(length >= options.max_length for length in sets["train"].lengths)
    say(
        f"texts of {min(sets['train'].lengths)} to {longest} tokens"
        + (f", {cut:,} of them cut" if cut else "")
    )
    for part in ("validation", "test"):
        unseen = parts.unseen(_of(parts)[part])
        if unseen:
            names = ", ".join(map(repr, list(unseen)[:5])) + (", …" if len(unseen) > 5 else "")
            say(
                f"{part}: {unseen.total():,} rows with labels that training never saw ({names}) count as wrong"
            )


def _quietly(load: Callable, *args: Any, **kwargs: Any) -> Any:
    """A Hugging Face loader that says nothing of a head that is new."""
    try:
        return load(*args, **kwargs)
    except (DemoError, OSError, ValueError) as error:
        raise FinetuneError(f"model: {str(error).strip().splitlines()[0]}") from None


def _model(folder: Path, classes: list[str], dropout: float | None) -> Any:
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("accelerate").setLevel(logging.ERROR)
    model = _quietly(
        transformers.AutoModelForSequenceClassification.from_pretrained,
        folder,
        num_labels=len(classes),
        id2label=dict(enumerate(classes)),
        label2id={name: number for number, name in enumerate(classes)},
        problem_type="single_label_classification",
        ignore_mismatched_sizes=True,
        dtype=torch.float32,
    )
    if dropout is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
    return model


def _choose(
    model: Any,
    options: Options,
    settings: dict[str, Any],
    train: Texts,
    collate: Callable,
    say: Callable[[str], object],
) -> tuple[Any, dict[str, Any]]:
    """The model with what does not learn frozen, and what was chosen."""
    kind, _, count = options.tune.partition(":")
    if kind == "lora":
        return tune.lora(model), {"how": options.tune}
    if kind == "full":
        return model, {"how": options.tune}
    chosen = settings.get("tuned")  # of the run that is taken up again
    if chosen is None and kind == "last":
        chosen = {"how": options.tune, "learn": tune.last(model, int(count))}
    elif chosen is None:
        sampler = list(TokenBudget(train.lengths, options.tokens_per_batch, options.seed))[:SCORED_BATCHES]
        batches = (collate([train[n] for n in numbers]).to(model.device) for numbers in sampler)
        scored = tune.scores(model, batches)
        chosen = {"how": options.tune, "learn": tune.choose(scored), "scores": scored}
    if "tuned" not in settings:
        _write(options.out / SETTINGS, {**settings, "tuned": chosen})
    for name, score in chosen.get("scores", {}).items():
        say(f"  {name:12} {score:.2e}" + ("  learns" if name in chosen["learn"] else ""))
    tune.freeze(model, chosen["learn"])
    say(f"what learns: {', '.join(chosen['learn'])} and the head")
    return model, chosen


def _trainer(
    model: Any,
    options: Options,
    sets: dict[str, Texts],
    collate: Callable,
    classes: list[str],
    tokenizer: Any,
    bf16: bool,
    say: Callable[[str], object],
) -> tuple[Trainer, Progress]:
    batches = TokenBudget(sets["train"].lengths, options.tokens_per_batch)
    per_epoch = -(-len(batches) // options.accumulate)
    steps = options.max_steps or max(1, round(options.epochs * per_epoch))
    every = options.eval_steps or max(1, steps // EVALUATIONS)
    arguments = transformers.TrainingArguments(
        str(options.out / CHECKPOINTS),
        max_steps=steps,
        learning_rate=options.rate,
        warmup_steps=max(1, steps // 10),
        weight_decay=0.01,
        gradient_accumulation_steps=options.accumulate,
        bf16=bf16,
        use_cpu=model.device.type == "cpu",
        seed=options.seed,
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
        # Else patience starts anew when a run is taken up again.
        restore_callback_states_from_checkpoint=True,
        logging_steps=max(1, steps // LOGGED),
        disable_tqdm=True,
        report_to="none",
    )
    progress = Progress(say, sum(sets["train"].lengths) / len(batches) * options.accumulate)
    trainer = Trainer(
        model,
        arguments,
        collate,
        sets["train"],
        sets["validation"],
        tokens=options.tokens_per_batch,
        classes=classes,
        callbacks=callbacks(progress, options.patience),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer, progress


def _save(model: Any, tokenizer: Any, options: Options) -> None:
    if options.tune == "lora":
        model = model.merge_and_unload()
    model.save_pretrained(options.out / "model")
    tokenizer.save_pretrained(options.out / "model")


def _report(found: dict[str, Any], options: Options, say: Callable[[str], object]) -> None:
    (options.out / "report.html").write_text(page.page(found), encoding="utf-8")
    _write(options.out / "report.json", found)
    held_out = found["held out"]
    if found["steps"] < found["steps planned"]:
        say(f"stopped after step {found['steps']}: no better for {options.patience} evaluations")
    say(
        f"held out: accuracy {held_out['accuracy']:.1%}, F1 {held_out['f1']:.3f} on {held_out['rows']:,} rows"
        f" (weights of step {found['best step']})"
    )
    say(f"written: {options.out / 'model'}, {options.out / 'report.html'}, {options.out / 'report.json'}")
