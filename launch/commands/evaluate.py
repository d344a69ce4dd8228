"""`farspan evaluate`: a checkpoint by its losses, its recall, and its tasks."""

import json

from rich.console import Console

from launch.commands.arguments import run_and_rest
from launch.errors import UserError
from launch.evaluation.measure import check_evaluation, configured, folder_of, measured
from launch.evaluation.report import draw, table
from launch.run.checkpoints import checkpoint_of


def evaluate(arguments: list[str]) -> int:
    """Measures, prints a table, and leaves results.json and pictures in the run. Raises UserError."""
    run, overrides = run_and_rest(arguments, "evaluate RUN evaluate.parts=[loss]")
    console = Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)
    saved = checkpoint_of(run)
    config = configured(saved, overrides)
    config, device = check_evaluation(config, saved, run, lambda line: console.print(line, markup=False))
    folder = folder_of(saved, config.evaluate.weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"RUN={run}: results cannot be written to {folder} ({error.strerror})") from None
    workers = config.cluster.workers
    console.print(f"evaluating {saved} on {workers} {'worker' if workers == 1 else 'workers'} ({device})", markup=False)
    if code := measured(config, saved, folder, device, console):
        return code
    results = json.loads((folder / "results.json").read_text())
    parts = [*config.evaluate.parts, *(["tasks"] if config.evaluate.tasks else [])]
    print("\n".join(table(results, parts)))
    pictures = draw(folder, results)
    console.print(f"in {folder}: results.json, {', '.join(pictures)}" if pictures else f"in {folder}: results.json")
    return 0
