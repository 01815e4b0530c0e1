"""Finished runs with made-up numbers, for the tests of tables, plots and the page."""

from experiment.files import write_csv, write_json


def summary(row, seed, accuracy, seconds, **values):
    return {
        "row": row,
        "fitness": "cross-entropy",
        "method": row.partition("+")[0],
        "dataset": "mnist",
        "seed": seed,
        "epochs": 10,
        "population": None,
        "test_accuracy": accuracy,
        "train_seconds": seconds,
        "peak_memory_mb": 100.0,
        "device": "cpu: X, 2 threads",
        "status": "finished",
    } | values


def write_run(folder, row, seed, accuracy, **values):
    run = folder / row / f"seed{seed}"
    run.mkdir(parents=True)
    record = summary(row, seed, accuracy, 1.0, **values)
    del record["row"], record["fitness"]  # the folder and config.json name them
    write_json(run / "summary.json", record)
    fitness = "file.py:f" if row.endswith("macro-F1") else "cross-entropy"
    config = {
        "method": record["method"],
        "command": ["mnist_eggroll.py", row, "--fitness", fitness],
        "flags": {"fitness": fitness, "seed": seed},
        "device": values.get("device", "cpu: X, 2 threads"),
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "commit": "0123abc",
    }
    write_json(run / "config.json", config)
    (run / "model.safetensors").write_bytes(b"weights")
    write_csv(run / "metrics.csv", curve(accuracy), list(curve(accuracy)[0]))


def curve(final, epochs=10, seconds=1.0):
    return [
        {
            "epoch": epoch,
            "train_seconds": seconds * epoch,
            "forward_passes_per_image": epoch,
            "test_accuracy": 0.1 + (final - 0.1) * epoch / epochs,
            "train_cross_entropy": 2.3 - epoch / epochs,
        }
        for epoch in range(epochs + 1)
    ]
