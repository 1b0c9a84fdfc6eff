"""What a topology is to those who rent it out."""

import pytest
from proxies import needs_libtpu

from smollm3_jax.errors import OptionError
from smollm3_jax.launch.machines import TPUS, machine
from smollm3_jax.launch.scripts import accelerator_type
from smollm3_jax.plan.devices import topology


@pytest.mark.parametrize(
    ("name", "hosts", "chips", "called"),
    [
        ("v5e:1x1", 1, 1, "v5litepod-1"),
        ("v5e:2x4", 1, 8, "v5litepod-8"),
        ("v5e:4x4", 4, 4, "v5litepod-16"),
        ("v6e:16x16", 64, 4, "v6e-256"),
        ("v5p:2x2x1", 1, 4, "v5p-8"),  # its size counts cores, two a chip
        ("v5p:4x4x8", 32, 4, "v5p-256"),
        ("tpu7x:2x2x2", 2, 4, None),
        ("h100:1", 1, 1, None),
        ("h200:16", 2, 8, None),
    ],
)
def test_the_hosts_of_a_topology(name, hosts, chips, called):
    found = machine(name)
    assert (found.hosts, found.chips_of_a_host) == (hosts, chips)
    if called:
        assert accelerator_type(found) == called
    else:
        with pytest.raises(OptionError):
            accelerator_type(found)


def test_gpus_of_smaller_hosts():
    found = machine("h100:8", 4)
    assert (found.hosts, found.chips_of_a_host) == (2, 4)


@pytest.mark.parametrize("name", ["", "v5e", "v4:2x2", "v5e:3x3", "v5e:2x2x1", "v5p:4x4", "v5p:4x8x4", "v5p:4x4x6"])
@pytest.mark.parametrize("more", ["", " ", "\n"])
def test_what_nobody_rents_out(name, more):
    with pytest.raises(OptionError, match="--topology is "):
        machine(name + more)


@pytest.mark.parametrize("name", ["h100:", "h100:0", "h100:8x8", "h100:-8", "h100:12", "h100:٨"])
def test_gpus_that_are_no_hosts(name):
    with pytest.raises(OptionError, match="--topology is "):
        machine(name)


@needs_libtpu
@pytest.mark.parametrize("name", [f"{chip}:{shape}" for chip, tpu in TPUS.items() for shape in tpu.shapes])
def test_the_plans_compiler_knows_each_shape_and_its_chips(name):
    found = machine(name)
    of_a_chip = 2 if found.chip == "tpu7x" else 1
    assert len(topology(name)[1]) == of_a_chip * found.hosts * found.chips_of_a_host
