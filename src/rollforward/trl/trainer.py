"""`GRPOTrainer`: TRL's, with a run that is recorded, and resumed by itself.

    train                            open_session: lock, restore
      _load_..., on_train_begin        what the checkpoint has, where transformers would read files
      _run_epoch                       the epoch's own order of the data
        _generate_and_score_...          rollouts: from the journal, or made and recorded
        training_step                    the loss, for the outcome
        on_pre_optimizer_step            the update begins
        _maybe_log_save_evaluate         the update is over; log, evaluate, save
      _finalize_training             the last checkpoint is committed

What TRL computes is left alone, so an undisturbed run has TRL's own numbers.
"""

from typing import Any

import trl
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rollforward.errors import InputError
from rollforward.trl.compatibility import check_trainer, check_versions
from rollforward.trl.order import OrderOfEpoch
from rollforward.trl.session import Recovery, Session, open_session


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's GRPOTrainer, which survives crashes: everything else is as there.

    `train()` resumes from whatever `args.output_dir` holds; `recovery`, a `Recovery`, says how. `save_steps`,
    `save_total_limit` and `load_best_model_at_end` mean what they mean there, and the first and the last
    state are always saved.

    Raises InputError for what cannot be resumed exactly (DeepSpeed, FSDP) and for versions of TRL and
    transformers that it was not written for.
    """

    def __init__(self, *args: Any, recovery: Recovery | None = None, **kwargs: Any) -> None:
        check_versions()
        self._session: Session | None = None
        self._epoch, self._epoch_is_over, self._save_later = 0, False, False
        super().__init__(*args, **kwargs)
        self.recovery = recovery or Recovery()
        self._warnings = check_trainer(self)
        self.add_callback(_Boundaries(self))

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train to the end, from wherever the run in `args.output_dir` stands.

        `resume_from_checkpoint`: a `checkpoint-N` in TRL's own form that a *new* run starts from, or True for
        the newest one in the folder, if there is one. A run that exists is resumed, whatever is given.
        """
        if trial is not None:
            raise InputError("a hyperparameter search cannot be resumed", hint="use trl.GRPOTrainer for it")
        if self.accelerator.is_main_process:
            for warning in self._warnings:
                self.recovery.log(f"warning: {warning}")
        with open_session(self, self._stock(resume_from_checkpoint), self.recovery) as session:
            self._session = session
            try:
                return super().train(session.folder, ignore_keys_for_eval=ignore_keys_for_eval)
            finally:
                self._session = None

    def _stock(self, asked: str | bool | None) -> str | None:
        if isinstance(asked, str):
            return asked
        try:
            found: str | None = get_last_checkpoint(self.args.output_dir)
        except FileNotFoundError:
            found = None
        if found is not None and not asked and self.accelerator.is_main_process:
            self.recovery.log(f"run: {found} is not used; train(resume_from_checkpoint=True) starts from it")
        return found if asked else None

    # What a resumed run finds where transformers would read files

    @property
    def _resumed(self) -> Session | None:
        return self._session if self._session is not None and self._session.resumed else None

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # The session has restored the model when it was opened.
        if self._resumed is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            super()._load_optimizer_and_scheduler(checkpoint)
        else:
            self._resumed.load_optimizer()

    def _load_scaler(self, checkpoint: str | None) -> None:
        if self._resumed is None:
            super()._load_scaler(checkpoint)
        else:
            self._resumed.load_scaler()

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Before an epoch's iterator is made, or after the batches that were trained on are skipped."""
        if self._resumed is not None:
            self._resumed.load_random()
            return
        super()._load_rng_state(checkpoint)
        if self._session is not None:
            # A new run from another trainer's checkpoint: its random state is known only now.
            self._session.begins()

    def _load_callback_state(self) -> None:
        if self._resumed is None:
            super()._load_callback_state()
        else:
            self._resumed.restored.load_callbacks(self)

    # The order of the data

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        return OrderOfEpoch(super()._get_train_sampler(dataset), lambda: self._epoch)

    def _run_epoch(self, **given: Any) -> None:
        over = self.control.should_training_stop or 0 < self.state.max_steps <= self.state.global_step
        if self._session is not None and over:
            # transformers would take one more step before it looks.
            self.control.should_training_stop = True
            return
        self._epoch = given["epoch"]
        super()._run_epoch(**given)

    # A step

    def _generate_and_score_completions(self, inputs: list[Any]) -> dict[str, Any]:
        if self._session is None or not self._session.recording:
            return super()._generate_and_score_completions(inputs)
        generate = super()._generate_and_score_completions
        return self._session.generated(lambda: generate(inputs))

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
        """One forward and backward pass."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._session is not None:
            self._session.add_loss(loss)
        return loss

    def _maybe_log_save_evaluate(self, tr_loss: Any, grad_norm: Any, *rest: Any, **named: Any) -> None:
        """After each optimizer step, and once more at the end of an epoch."""
        if self._session is not None:
            self._session.update_ends(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *rest, **named)
        if self._epoch_is_over and self._save_later:
            self._save_checkpoint(self.model, None)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log figures; those of steps also go to `metrics.jsonl` in the run's folder."""
        super().log(logs, start_time)
        if self._session is not None and self._session.recording:
            self._session.measured(logs)

    def _evaluate(self, trial: Any, ignore_keys_for_eval: Any, skip_scheduler: bool = False) -> Any:
        if self._resumed is not None and skip_scheduler:
            # `eval_on_start`: the run's first start has done it.
            return {}
        return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)

    # Checkpoints

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        if self._session is None:
            super()._save_checkpoint(model, trial)
            return
        # What is logged and evaluated at the end of an epoch belongs to the checkpoint after its last step.
        self._save_later = bool(self.state.epoch == self._epoch + 1) and not self._epoch_is_over
        if not self._save_later:
            self.store_flos()
            self._session.save()

    def _finalize_training(self, trial: Any, num_train_samples: int, start_time: float) -> Any:
        session = self._session
        assert session is not None
        session.ends()
        if self.args.load_best_model_at_end:
            self._load_best_model()
        # The figures at the end are about the whole run, not about its last start.
        start_time -= session.restored.seconds if session.resumed else 0.0
        return super()._finalize_training(trial, num_train_samples, start_time)

    def _load_best_model(self) -> None:
        if self._session is None:
            super()._load_best_model()
        elif self._session.best_step not in (None, self.state.global_step):
            self._session.load_policy(self._session.best_step)


class _Boundaries(TrainerCallback):
    """Tells the session where transformers is."""

    def __init__(self, trainer: GRPOTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        if self._trainer._session is not None:
            self._trainer._session.training_begins()

    def on_epoch_begin(self, *_: Any, **__: Any) -> None:
        self._trainer._epoch_is_over = False
        if self._trainer._session is not None and self._trainer._session.folder is None:
            self._trainer._session.begins()

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        self._trainer._epoch_is_over = True

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._trainer._session is not None:
            self._trainer._session.step_begins()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        if self._trainer._session is not None:
            self._trainer._session.update_begins()
