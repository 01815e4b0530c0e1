"""Any network, unchanged: members equal materialised ones, and estimates match autograd."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from eggroll import (
    BatchMembers,
    Evolution,
    ExampleMembers,
    PopulationError,
    cross_entropy,
    reference,
    seam,
)

CLASSES = 4


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.inner, self.again, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = torch.tanh(self.inner(x))
        x = torch.tanh(self.again(x))
        return self.head(torch.tanh(self.again(x)))


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.arm, self.head = nn.Linear(3, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        left, right = x.split(3, dim=-1)
        return self.head(torch.tanh(self.arm(left)) * torch.tanh(self.arm(right)))


class Tied(nn.Module):
    """Two layers that share one Parameter, each with a bias of its own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(6, 8)
        self.one, self.two, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)
        self.two.weight = self.one.weight

    def forward(self, x):
        x = torch.tanh(self.one(torch.tanh(self.inner(x))))
        return self.head(torch.tanh(self.two(x)))


class HeadFirst(nn.Module):
    """The head is registered before the body."""

    def __init__(self):
        super().__init__()
        self.head, self.body = nn.Linear(8, CLASSES), nn.Linear(6, 8, bias=False)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


class Skip(nn.Module):
    """Concatenates its input, whose leading axis of 1 does not broadcast there."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(14, CLASSES)

    def forward(self, x):
        return self.head(torch.cat([x, torch.tanh(self.body(x))], -1))


class InPlaceSkip(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.first(x)
        x += torch.tanh(self.body(torch.tanh(x)))
        return self.head(x)


class Tokens(nn.Module):
    """Integer inputs (B, T), positions, LayerNorm."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(9, 6), nn.LayerNorm(6)
        self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(torch.tanh(self.mix(self.norm(self.embed(x)))).mean(-2))


class Keyword(HeadFirst):
    def forward(self, x):
        x = torch.tanh(F.linear(x, weight=self.body.weight))
        return F.linear(x, bias=self.head.bias, weight=self.head.weight)


def sequential(*middle):
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, CLASSES))


NETWORKS = {
    "sequential": lambda: sequential(nn.Tanh()),
    "no bias": lambda: nn.Sequential(nn.Linear(6, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES)),
    "in-place activation": lambda: sequential(nn.ELU(inplace=True)),
    "layer norm": lambda: sequential(nn.LayerNorm(8), nn.Tanh()),
    "called twice": Twice,
    "siamese": Siamese,
    "tied": Tied,
    "head first": HeadFirst,
    "concatenating skip": Skip,
    "in-place skip": InPlaceSkip,
    "tokens": Tokens,
    "keyword": Keyword,
}
ONE_CALL_ONE_ROW = set(NETWORKS) - {"called twice", "siamese", "tied", "tokens"}
EVERY = pytest.mark.parametrize("name", NETWORKS)


def make(name, examples=6):
    torch.manual_seed(5)
    network = NETWORKS[name]().double()
    if name == "tokens":
        return network, torch.randint(0, 9, (examples, 3)), torch.randint(0, CLASSES, (examples,))
    inputs = torch.randn(examples, 6, dtype=torch.float64)
    return network, inputs, torch.randint(0, CLASSES, (examples,))


def evolve(network, members, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what stays as it is
        return Evolution(network, cross_entropy(), members, **options)


def evaluated(network, inputs, labels, members, **options):
    evolution = evolve(network, members, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return evolution, evolution.evaluate(inputs, labels)


@EVERY
@pytest.mark.parametrize("options", [{}, {"antithetic": False, "rank": 3}, {"perturb": "one"}])
def test_batch_members_score_as_their_materialised_networks(name, options):
    network, inputs, labels = make(name)
    evolution, scores = evaluated(network, inputs, labels, BatchMembers(36, sigma=0.1, **options))
    assert torch.allclose(
        scores.double(), reference.batch_scores(evolution, inputs, labels), atol=1e-5
    )


@pytest.mark.parametrize("name", sorted(ONE_CALL_ONE_ROW))
@pytest.mark.parametrize("antithetic", [False, True])
def test_example_members_score_as_their_materialised_networks(name, antithetic):
    network, inputs, labels = make(name)
    members = ExampleMembers(14, sigma=0.1, antithetic=antithetic)
    evolution, scores = evaluated(network, inputs, labels, members)
    assert torch.allclose(scores, reference.example_scores(evolution, inputs, labels), atol=1e-9)


def autograd(network, inputs, labels):
    parameters = [p for p in network.parameters() if p.requires_grad]
    value = cross_entropy()(network(inputs).unsqueeze(0), labels).mean()
    found = torch.autograd.grad(value, parameters)
    return {id(p): gradient for p, gradient in zip(parameters, found, strict=True)}


def mean_estimate(network, inputs, labels, members, steps, **options):
    evolution = evolve(network, members, **options)
    total = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for _ in range(steps):
            evolution.backward(evolution.evaluate(inputs, labels))
            for p in network.parameters():
                if p.grad is not None:
                    total[id(p)] = total.get(id(p), 0) - p.grad / steps
    return total


def assert_matches(found, true):
    for key, estimate in found.items():
        gradient = true[key]
        cosine = F.cosine_similarity(estimate.flatten(), gradient.flatten(), 0)
        assert cosine > 0.98
        assert abs(estimate.norm() / gradient.norm() - 1) < 0.05


@EVERY
def test_example_members_with_all_rows_match_autograd(name):
    network, inputs, labels = make(name)
    # a layer that is called, or reads, several times has noise that averages over steps
    steps = 1 if name in ONE_CALL_ONE_ROW else 1_000
    members = ExampleMembers(1000, sigma=1e-3, antithetic=True)
    assert_matches(
        mean_estimate(network, inputs, labels, members, steps), autograd(network, inputs, labels)
    )


@EVERY
def test_batch_members_match_autograd(name):
    network, inputs, labels = make(name)
    # cosine 1 / sqrt(1 + d / N) for each of d parameters in all, as few as they are here
    members = BatchMembers(60_000, sigma=1e-3, shaping="none")
    found = mean_estimate(network, inputs, labels, members, 1, chunk_size=2_000)
    everything = torch.cat([g.flatten() for g in found.values()])
    true = autograd(network, inputs, labels)
    gradient = torch.cat([true[key].flatten() for key in found])
    assert F.cosine_similarity(everything, gradient, 0) > 0.98
    assert abs(everything.norm() / gradient.norm() - 1) < 0.05


class Folding(nn.Module):
    def __init__(self, start):
        super().__init__()
        self.start, self.linear = start, nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.linear(x.flatten(self.start))


@pytest.mark.parametrize("members", [BatchMembers(4), ExampleMembers(4)])
def test_a_network_that_folds_the_member_axis_is_told_what_to_write(members):
    inputs, labels = torch.randn(5, 1, 2, 3), torch.randint(0, CLASSES, (5,))
    with pytest.raises(PopulationError, match=r"flatten\(-3\) instead of flatten\(1\)") as error:
        Evolution(Folding(1), cross_entropy(), members).evaluate(inputs, labels)
    assert "\n" not in str(error.value)
    Evolution(Folding(-3), cross_entropy(), members).evaluate(inputs, labels)


def test_a_mean_over_the_wrong_axis_is_found_out():
    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, CLASSES)

        def forward(self, x):
            return self.linear(x).mean(1, keepdim=True).expand(*x.shape[:-1], CLASSES)

    inputs, labels = torch.randn(5, 3, 6), torch.randint(0, CLASSES, (5,))
    with pytest.raises(PopulationError, match="leading axis"):
        Evolution(Mean(), cross_entropy(), BatchMembers(4)).evaluate(inputs, labels)


def test_an_error_of_the_network_itself_stays_its_own():
    with pytest.raises(RuntimeError, match="shapes"):
        Evolution(sequential(), cross_entropy(), ExampleMembers(4)).evaluate(
            torch.randn(5, 7), torch.zeros(5, dtype=torch.int64)
        )


def test_what_does_not_evolve_is_named_once_and_gets_no_gradient():
    network, inputs, labels = make("tokens")
    network.spare = nn.Linear(2, 2).double()
    network.head.bias.requires_grad = False
    evolution = Evolution(network, cross_entropy(), ExampleMembers(8))
    with pytest.warns(UserWarning, match="stay as they are") as caught:
        for _ in range(2):
            evolution.backward(evolution.evaluate(inputs, labels))
    assert len(caught) == 1
    names = ["embed.weight", "norm.weight", "norm.bias", "head.bias", "spare.weight", "spare.bias"]
    assert sorted(evolution.fixed) == sorted(names)
    assert all(name in str(caught[0].message) for name in names)
    own = dict(network.named_parameters())
    assert all((own[name].grad is None) == (name in names) for name in own)


def test_attention_that_projects_inside_a_composite_function_is_named():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attend, self.head = nn.MultiheadAttention(6, 2, batch_first=True), nn.Linear(6, 4)

        def forward(self, x):
            flat = x.reshape(-1, *x.shape[-2:])
            mixed = self.attend(flat, flat, flat)[0].mean(-2)
            return self.head(mixed.view(*x.shape[:-2], 6))

    inputs, labels = torch.randn(3, 5, 6), torch.randint(0, 4, (3,))
    evolution = Evolution(Attention(), cross_entropy(), BatchMembers(4))
    with pytest.warns(UserWarning, match="attend.out_proj.weight"):
        evolution.evaluate(inputs, labels)


def test_a_layer_that_computes_with_a_function_of_its_weight_names_its_parameter():
    class Signs(nn.Linear):
        def forward(self, x):
            return seam.linear(x, self.weight, computes=lambda x, w, _: F.linear(x, w.sign()))

    network = nn.Sequential(Signs(6, 8, bias=False), nn.Tanh(), nn.Linear(8, CLASSES)).double()
    inputs, labels = torch.randn(5, 6, dtype=torch.float64), torch.randint(0, CLASSES, (5,))
    signs = network[0].weight.sign().requires_grad_()
    value = cross_entropy()(network[2](torch.tanh(inputs @ signs.T)).unsqueeze(0), labels).mean()
    (true,) = torch.autograd.grad(value, signs)
    found = mean_estimate(network, inputs, labels, ExampleMembers(1000, 1e-3, antithetic=True), 1)
    assert_matches({0: found[id(network[0].weight)]}, {0: true})


def test_dropout_is_accepted():
    network, inputs, labels = sequential(nn.Dropout(0.5)), torch.randn(5, 6), torch.zeros(5).long()
    evolution = Evolution(network, cross_entropy(), BatchMembers(4))
    assert evolution.evaluate(inputs, labels).isfinite().all() and network.training


@pytest.mark.parametrize("name", ["in-place activation", "in-place skip", "concatenating skip"])
@pytest.mark.parametrize("members", [BatchMembers(8), ExampleMembers(8)])
def test_evaluation_writes_neither_weights_nor_inputs(name, members):
    network, inputs, labels = make(name)
    before = [p.clone() for p in network.parameters()], inputs.clone()
    first = evaluated(network, inputs, labels, members)[1]
    second = evaluated(network, inputs, labels, members)[1]
    assert torch.equal(first, second) and torch.equal(inputs, before[1])
    assert all(map(torch.equal, network.parameters(), before[0]))
