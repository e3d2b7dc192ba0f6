"""Cells: the pieces that every table is made of.

A cell is one run of train.py with its evaluation. It is saved when it ends, found again by the hash
of its settings and of the sources that can change its numbers, and never run twice; an interrupted
list goes on where it was.

    results = run_cells([Config(seed=0), Config(seed=1)])    # metrics, in the order of the cells
"""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import hashlib
import io
import json
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import torch

import train
from harness.config import resolve, run_settings
from harness.run import save
from train import Config

FOLDER = Path("out/cells")
ROOT = Path(train.__file__).parent
SOURCES = """
    train.py objectives.py lire.py dro.py baselines.py frontier.py model.py t5.py data.py
    tasks.py files.py containers.py formats.py records.py harness/config.py harness/pool.py
    harness/reward.py harness/reference.py harness/pretrained.py harness/update.py
    harness/evaluation.py
""".split()
# A new progress line must not cost a day.
NO_NUMBERS = ["harness/run.py", "harness/figures.py", "harness/command_line.py"]


def folder_of(config: Config) -> Path:
    """Where a cell lives: named by its settings, the contents of its files and the sources."""
    digest = hashlib.sha256(json.dumps(run_settings(resolve(config))).encode())
    for path in [ROOT / name for name in SOURCES] + config.data + config.eval_data:
        digest.update(Path(path).read_bytes())
    return FOLDER / digest.hexdigest()[:16]


def run_one(config: Config) -> dict:
    """Run a cell, its output in out/cells/<hash>.log.

    Returns: its metrics.
    """
    folder = folder_of(config)
    if not (folder / "metrics.json").exists():
        resume = str(folder) if (folder / "config.json").exists() else ""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log):
            try:
                train.main(dataclasses.replace(config, out=str(folder), resume=resume))
            except FloatingPointError as e:
                # A result like any other: the table shows - and the rest of the list goes on.
                save(json.dumps({"failed": str(e)}), folder / "metrics.json")
    return json.loads((folder / "metrics.json").read_text())


def run_cells(cells: list[Config], jobs: int = 0) -> list[dict]:
    """Metrics of every cell, in order; `jobs` cells at a time (0: one a core), a thread each."""
    todo = [c for c in cells if not (folder_of(c) / "metrics.json").exists()]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done already", flush=True)
    jobs, began = jobs or os.cpu_count() or 1, time.time()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        futures = [pool.submit(run_one, c) for c in todo]
        for n, future in enumerate(concurrent.futures.as_completed(futures), 1):
            future.result()
            minutes = (time.time() - began) / n * (len(todo) - n) / 60
            print(f"cell {n}/{len(todo)}  {minutes:.0f} min left", flush=True)
    return [run_one(c) for c in cells]


def run_quietly(config: Config) -> tuple[dict, list[dict]]:
    """A run that is no cell, its output left aside: its metrics, and the rows of its log."""
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = train.main(config)
    lines = (Path(config.out) / "log.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in lines]


# -------------------------------------------------------------------------------- results/NAME.json


def write_results(name: str, command: str, results: Any) -> None:
    """results/NAME.json: what came out, the command that made it, and when."""
    content = {"command": command, "date": datetime.date.today().isoformat(), "results": results}
    Path("results").mkdir(exist_ok=True)
    Path(f"results/{name}.json").write_text(json.dumps(content, indent=1) + "\n")
