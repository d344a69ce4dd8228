"""Layouts that a run could have, the peak of a step, seconds of all dimensions: arithmetic, held to counts by hand."""

from collections import Counter
from itertools import product
from math import prod

import pytest

from parallel.schedule import layouts, step_memory
from parallel.schedule.adaptive.cost import Cluster, Costs, Layer, Model, Wire
from parallel.schedule.comm_volume import Unit
from parallel.schedule.devices import CARRIED, DEVICES
from parallel.schedule.layout_cost import LayoutWork, seconds
from parallel.schedule.layouts import LayoutChoice, divisors, meshes, shares
from parallel.schedule.mesh import DIMENSIONS, Mesh
from parallel.schedule.stages import Action, in_flight
from parallel.schedule.static import Static
from parallel.schedule.step_memory import LayerMemory, StepMemory
from parallel.schedule.tensor_volume import TensorCall


@pytest.mark.parametrize("world", [1, 2, 6, 8, 12])
def test_every_mesh_of_a_world_is_looked_at_once(world):
    every = {sizes for sizes in product(range(1, world + 1), repeat=len(DIMENSIONS)) if prod(sizes) == world}
    sizes = {name: divisors(world) for name in DIMENSIONS if name != "data"}
    seen = [tuple(mesh.sizes.values()) for mesh in meshes(world, sizes, lambda mesh: True)]
    assert len(seen) == len(set(seen)) and set(seen) == every


def test_sizes_that_are_given_and_those_that_are_refused_are_left_out():
    sizes = {name: divisors(12) for name in DIMENSIONS} | {"tensor": [2], "data": [3]}
    seen = list(meshes(12, sizes, lambda mesh: mesh.pipeline == 1))
    assert seen and all(mesh.tensor == 2 and mesh.data == 3 and mesh.pipeline == 1 for mesh in seen)
    assert {(m.replicate, m.expert, m.sequence) for m in seen} == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


@pytest.mark.parametrize(("sequences", "groups", "limit"), [(16, 2, None), (7, 2, None), (5, 1, None), (16, 2, 3)])
def test_micro_steps_are_those_that_the_scheduler_makes(sequences, groups, limit):
    ways = shares(sequences, groups, limit)
    assert len({steps for _, steps in ways}) == len(ways)
    for together, steps in ways:
        choice = LayoutChoice(Mesh(data=groups, sequence=2), together, steps, "none")
        plan = Static(tokens_per_rank=choice.tokens(64)).plan(0, [64] * sequences, data=groups, sequence=2)
        assert len(plan.micro_steps) == steps
        spans = [sum(e - b for b, e in s) for micro in plan.micro_steps for g in micro.groups for s in g.spans]
        assert max(spans) == choice.tokens(64)


def two_layers(**more) -> StepMemory:
    """saved 100, forward 130, backward 160; weights of 40, of which 10 here; a root of 20."""
    layer = LayerMemory(100, 130, 160, 40, 10)
    head = LayerMemory(5, 50, 30, 20, 0)
    options = {"layers": [layer, layer], "head": head, "root": 20, "entering": 8, "states": 75, **more}
    return StepMemory(**options)


def test_the_peak_of_a_step_is_that_of_its_fullest_instant():
    # Backward of the last layer: what enters, what the first layer saves, the second's backward; weights of both layers
    # and of the root; the head's gradient.
    parts = two_layers().peak()
    assert parts == {
        step_memory.STATES: 75,
        step_memory.ACTIVATIONS: 8 + 100 + 160,
        step_memory.GATHERED: 20 + 40 + 40,
        step_memory.GRADIENTS: 20,
    }
    assert two_layers().most() == sum(parts.values())


def test_what_a_choice_saves_is_not_held():
    plain = two_layers().most()
    # Backward of the first layer is the fullest then: what left the second still leaves, its gradient is there.
    again = two_layers(layers=[LayerMemory(8, 60, 160, 40, 10)] * 2)
    assert again.most() == 75 + (8 + 160) + (20 + 40 + 40) + (20 + 10)
    assert two_layers(micro_steps=2).most() == plain + 40 + 40 + 20  # gradients stay whole
    stays = two_layers(micro_steps=2, reshard=False)  # the same instant: no weight was let go before it
    assert stays.most() == plain + 40 + 40 + 20
    # Backward of the first layer is the fullest: before the last micro-step the others' weights are there, too.
    three = {"layers": [LayerMemory(8, 60, 160, 40, 10), *[LayerMemory(8, 60, 20, 40, 10)] * 2], "reshard": False}
    assert two_layers(**three, micro_steps=2).most() == 75 + (8 + 160) + (20 + 3 * 40) + (3 * 40 + 20 + 20)
    assert two_layers(flying=[(3, 0)]).most() == plain + 2 * (8 + 100 + 100)
    many = {"layers": [LayerMemory(0, 10, 10, 40, 10)] * 5}
    assert two_layers(**many, reshard=False).most() > two_layers(**many).most() + 100


def test_gathered_weights_of_few_bits_take_less_and_their_gradients_do_not():
    few = [LayerMemory(100, 130, 160, 40, 10, few=10)] * 2
    parts = two_layers(layers=few).peak()
    assert parts[step_memory.GATHERED] == 20 + 10 + 10 and parts[step_memory.GRADIENTS] == 20
    assert two_layers(layers=few, micro_steps=2).most() == sum(parts.values()) + 40 + 40 + 20


def test_the_halves_of_backward_passes_and_the_optimizer_have_instants_of_their_own():
    split = LayerMemory(100, 130, 160, 40, 10, half=150)
    # Backward of the first layer is the fullest: what the second's half leaves is more than it saved.
    assert two_layers(layers=[split] * 2).most() == two_layers().most() - 100 + 150 + 10 - 40 + 40
    waits = two_layers(layers=[split] * 2, flying=[(2, 0), (1, 1)])  # 300 of a half beat 208 of a forward pass
    assert waits.most() == two_layers(layers=[split] * 2).most() + 300
    update = two_layers(root_shard=5, update=1000)
    assert update.peak() == {step_memory.STATES: 75, step_memory.GRADIENTS: 10 + 10 + 5, step_memory.UPDATE: 1000}


def test_the_first_stage_keeps_its_activations_until_the_weights_half():
    own = [Action(kind, stage, 0) for kind, stage in (("F", 0), ("F", 2), ("I", 2), ("I", 0), ("W", 2), ("W", 0))]
    assert in_flight(own, [3, 9, 1, 9]) == {(3, 0), (4, 0), (3, 1)}


def test_a_group_has_the_wire_of_where_its_ranks_are():
    h100 = DEVICES["h100"]
    inside, across = (h100.wire(ranks, per_machine=8).bandwidth / CARRIED for ranks in (8, 16))
    assert (inside, across) == (h100.inside, h100.across)
    assert h100.wire(3, per_machine=8).bandwidth == across * CARRIED, "three do not lie inside of eight, always"


def work(overlap: bool) -> LayoutWork:
    """One softmax layer of a second a pair and two a token, no messages of its own; a weight of 64 x 8 fp32."""
    layer = Layer(1, pair=1.0, token=2.0)
    costs = Costs(Model("m", (layer,), 0.0, 0.0, 1.0), Cluster("c", 8, 2.0**60, {1: Wire(1.0)}))
    calls = Counter([TensorCall("gather", "hidden", 4, 4)])
    return LayoutWork(costs, calls, Counter(), [Unit(((64, 8),), 4, False)], [], 4.0, overlap)


def test_seconds_of_a_layout_are_the_sum_of_what_its_dimensions_take():
    choice = LayoutChoice(Mesh(data=2, tensor=2), 1, 3, "none")
    found = seconds(choice, work(False), 10, lambda span: Wire(float(span)))
    assert found.computing == 3 * (10 * 10 / 2 + 2 * 10) / 2
    gathered, scattered = 5 * 4 * 4, 5 * 4 * 4  # of the other rank: 5 tokens, 4 numbers, 4 bytes
    assert found.tensor == 3 * (gathered + scattered) / 2  # a tensor group spans two ranks
    assert found.weights == (3 * 2 + 1) * 32 * 8 * 4 / 4  # twice a micro-step and once, over four
    assert found.total == pytest.approx(sum(found))
    assert seconds(choice, work(True), 10, lambda span: Wire(float(span))).weights == max(
        0, found.weights - found.computing
    )


def test_recomputation_takes_time_and_stages_wait():
    plain = LayoutChoice(Mesh(data=2), 1, 1, "none")

    def wire(span):
        return Wire(1e9)

    times = {
        name: seconds(LayoutChoice(Mesh(data=2), 1, 1, name), work(True), 10, wire).total
        for name in ("none", "selective", "full")
    }
    assert times["none"] < times["selective"] < 1.1 * times["none"]
    waiting = seconds(plain, work(True), 10, wire, waits=0.5)
    assert waiting.pipeline == pytest.approx(waiting.computing)
    assert "2 micro-steps" in str(LayoutChoice(Mesh(data=2), 1, 2, "full")) and layouts.divisors(12)[-1] == 12
