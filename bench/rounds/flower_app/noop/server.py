"""Flower's own FedAvg; when each round begins stands in a file."""

import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    asked = context.run_config
    n_tensors, n_clients, log = int(asked["n-tensors"]), int(asked["n-clients"]), Path(str(asked["log"]))

    def mark() -> None:
        with log.open("a") as file:
            print(time.time(), file=file)

    class Marking(FedAvg):
        def configure_train(self, *args, **kwargs):
            mark()
            return super().configure_train(*args, **kwargs)

    draw = np.random.default_rng(0)
    n_values = int(asked["n-bytes"]) // 4 // n_tensors
    arrays = ArrayRecord([draw.random(n_values, np.float32) for _ in range(n_tensors)])
    strategy = Marking(fraction_evaluate=0.0, min_train_nodes=n_clients, min_available_nodes=n_clients)
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=int(asked["n-rounds"]))
    mark()
    with log.open("a") as file:
        print("end", file=file)
