"""Train the 784-256-256-10 MLP on MNIST by backpropagation, as the baseline of EGGROLL.

python mnist_backprop.py    # 98.7 % in 10 s on two CPU cores
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from eggroll import GraphedStep
from experiment import distributed
from experiment.config import FloatConfig, parse
from experiment.data import load
from experiment.device import choose_device
from experiment.optim import make_optimizer, make_schedule
from experiment.run import Run
from experiment.script import run_script
from model import mlp_of


@dataclass(frozen=True, kw_only=True)
class Config(FloatConfig):
    """Flags of backpropagation."""


PRESETS = {
    "backprop": Config(epochs=10, lr=0.1, schedule="onecycle", label_smoothing=0.1),
}


def main() -> None:
    distributed.refuse("mnist_backprop.py")
    method, config = parse(PRESETS, __doc__)
    device = choose_device(config.device)
    data = load(config, device)
    network = mlp_of(config).to(device)
    optimizer = make_optimizer(network, config)
    schedule = make_schedule(optimizer, config, config.epochs * data.steps(config.batch_size))

    def train(rows: Tensor) -> Tensor:
        images, labels = data.batch(rows)
        logits = network(images)
        loss = F.cross_entropy(logits, labels, label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return -loss.detach()

    step = GraphedStep(train, network, optimizer, graph=not config.no_graph)
    with Run(method, config, data, network, optimizer, schedule) as run:
        run.warm_up(step)
        for epoch in run.epochs():
            for rows in run.batches(epoch):
                run.record(step(rows))
                schedule.step()
            run.log_epoch()


if __name__ == "__main__":
    run_script(main, "mnist_backprop.py")
