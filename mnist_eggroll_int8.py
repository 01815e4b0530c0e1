"""Train the 784-256-256-10 MLP on MNIST by node perturbation in integers: int8 weights, no floats.

python mnist_eggroll_int8.py                       # 98.4 % in 14 s on two cores
python mnist_eggroll_int8.py --fitness accuracy    # 0/1 accuracy as the signal, smoothed
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from eggroll import FitnessError, GraphedStep, PopulationError
from eggroll.int8 import (
    INT8_SCALE,
    Int8Accuracy,
    Int8CrossEntropy,
    Int8Evolution,
    Int8MLP,
    Int8NodePerturbation,
    Int8SGD,
    Int8Smoothing,
)
from experiment import config as flags
from experiment import distributed
from experiment.data import load, quantised
from experiment.device import choose_device
from experiment.optim import make_schedule
from experiment.run import Run
from experiment.script import run_script
from model import mlp_of


@dataclass(frozen=True, kw_only=True)
class Config(flags.Config):
    """Flags of integer training."""

    population: int | tuple[int, ...] = (96, 128, 16)
    """Members that see each image: a number, or a count for each layer."""
    sigma: float = 0.01
    """Scale of the perturbation, in real weights; rounded so that outputs move by powers of two."""
    fitness: Literal["cross-entropy", "accuracy"] = "cross-entropy"
    """Signal to maximize; accuracy is smoothed by 256 noisy copies of the outputs."""


PRESETS = {
    "node-perturbation-int8": Config(epochs=6, lr=0.04, schedule="onecycle", label_smoothing=0.1),
}


def main() -> None:
    method, config = flags.parse(PRESETS, __doc__)
    device = choose_device(config.device)
    distributed.join(device)
    data = quantised(load(config, device), INT8_SCALE)
    network = Int8MLP(mlp_of(config)).to(device)
    if config.fitness == "accuracy":
        fitness, smoothing = Int8Accuracy(), Int8Smoothing()
    else:
        fitness, smoothing = Int8CrossEntropy(config.label_smoothing), None
    members = Int8NodePerturbation(config.population, config.sigma)
    evolution = Int8Evolution(network, fitness, members, config.seed, smoothing)
    evolution.inspect(data.train.images[: config.batch_size])
    optimizer = Int8SGD(network, config.lr, config.momentum, config.batch_size)
    schedule = make_schedule(optimizer, config, config.epochs * data.steps(config.batch_size))

    def train(rows: Tensor) -> Tensor:
        images, labels = data.batch(rows)
        scores = evolution.evaluate(images, labels)  # forward passes only
        evolution.backward(scores)  # leaves the ascent direction in weight.ascent
        optimizer.step()
        return evolution.mean_fitness

    step = GraphedStep(train, network, optimizer, evolution, graph=not config.no_graph)
    with Run(method, config, data, network, optimizer, schedule, evolution) as run:
        run.warm_up(step)
        for epoch in run.epochs():
            for rows in run.batches(epoch):
                run.record(step(rows))
                schedule.step()
            run.log_epoch()


if __name__ == "__main__":
    run_script(main, "mnist_eggroll_int8.py", errors=(FitnessError, PopulationError))
