"""Cells: the pieces that every table is made of.

A cell is one run of train.py with its evaluation. It is saved when it ends, found again by the hash of its settings and of
the sources it depends on, and never run twice; an interrupted list goes on where it was.

    results = run([Config(seed=0), Config(seed=1)])        # metrics, in the order of the cells
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from pathlib import Path

import torch

import train

FOLDER = Path("out/cells")
SOURCES = (
    "baselines.py data.py dro.py formats.py frontier.py lire.py model.py tasks.py train.py".split()
)


def folder_of(config: train.Config) -> Path:
    """Where a cell lives: named by its settings, the contents of its files and the sources."""
    h = hashlib.sha256(json.dumps(train.run_settings(train.resolve(config))).encode())
    for path in [Path(train.__file__).parent / name for name in SOURCES] + [
        Path(p) for p in config.data + config.eval_data
    ]:
        h.update(path.read_bytes())
    return FOLDER / h.hexdigest()[:16]


def run_one(config: train.Config) -> dict:
    """Run a cell, its output in out/cells/<hash>.log; returns its metrics."""
    folder = folder_of(config)
    if not (folder / "metrics.json").exists():
        resume = str(folder) if (folder / "config.json").exists() else ""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(f"{folder}.log", "w") as log, contextlib.redirect_stdout(log):
            try:
                train.main(dataclasses.replace(config, out=str(folder), resume=resume))
            except (
                FloatingPointError
            ) as e:  # a result like any other: the table shows - and the rest of the list goes on
                train.save(json.dumps({"failed": str(e)}), folder / "metrics.json")
    return json.loads((folder / "metrics.json").read_text())


def run(cells: list[train.Config], jobs: int = 0) -> list[dict]:
    """Metrics of every cell, in order; `jobs` cells at a time (default: one a core), each on one thread."""
    todo = [c for c in cells if not (folder_of(c) / "metrics.json").exists()]
    print(f"{len(cells)} cells, {len(cells) - len(todo)} of them done already", flush=True)
    jobs, began = jobs or os.cpu_count() or 1, time.time()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        for n, done in enumerate(
            concurrent.futures.as_completed([pool.submit(run_one, c) for c in todo]), 1
        ):
            done.result()
            print(
                f"cell {n}/{len(todo)}  {(time.time() - began) / n * (len(todo) - n) / 60:.0f} min left",
                flush=True,
            )
    return [run_one(c) for c in cells]
