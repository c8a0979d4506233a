"""What a command prints when a run is done: `finetune` and `train` alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fixify.cli.output import Output

if TYPE_CHECKING:
    from fixify.training import FinetuneOptions, FinetuneResult


def report_run(output: Output, result: FinetuneResult, options: FinetuneOptions, data: str) -> None:
    """Print what came of a run, and what to type next.

    Raises:
        CheckFailed: `options.max_drop` was not met.
    """
    from fixify.errors import CheckFailed
    from fixify.reporting.metrics_tables import finetune_table

    output.result(
        {
            "best": str(result.best_path),
            "last": str(result.last_path),
            "before": result.before.to_dict(),
            "after": result.after.to_dict(),
            "original_top1": result.original_top1,
            "reached": result.reached,
            "history": [record.to_dict() for record in result.history],
        },
        finetune_table(result),
    )
    if options.max_drop is not None:
        goal = f"within {options.max_drop:g} points of the original's {result.original_top1:.2f} %"
        if not result.reached:
            raise CheckFailed(
                f"After {options.epochs} epochs the best top-1 is {result.after.val_top1:.2f} %, not {goal}.",
                hint=f"It is kept in {result.best_path}. Try more --epochs, or a larger --max-drop.",
            )
        steps = f"after {result.after.step:,} steps" if result.after.step else "before training"
        output.say(f"stopped {steps}: validation top-1 {result.after.val_top1:.2f} % is {goal}")
    output.next_step(f"fixify eval {result.best_path} --data {data}", "measure it again, or any other checkpoint")
