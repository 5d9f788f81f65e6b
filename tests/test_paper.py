"""Figures that the paper publishes (Hu et al., arXiv 1709.01507), against networks that are built here."""

import pytest
import torch

from benchmarks.paper import build_resnet50, compute_figures, count_operations, write_table
from se_inject import blocks, inject

# In millions, as published: section 4 and tables 10, 15 and 16.
PUBLISHED = {
    "SE-ResNet-50, r=16": (28.09, 28.1),
    "SE-ResNet-101, r=16": (49.33,),
    "SE-ResNet-50, r=2": (45.7,),
    "SE-ResNet-50, r=4": (35.7,),
    "SE-ResNet-50, r=8": (30.7,),
    "SE-ResNet-50, r=32": (26.9,),
    "SE in stage 2 alone": (25.6,),
    "SE in stage 3 alone": (25.7,),
    "SE in stage 4 alone": (26.4,),
    "SE on the 3x3 convolutions": (25.8,),
}
BOTH = {"with biases, rounded up", "without biases, rounded up"}
NEAREST = {"with biases, rounded to nearest", "without biases, rounded to nearest"}


@pytest.fixture(scope="module")
def figures():
    return compute_figures()


def test_biases_and_rounding_up_reproduce_every_parameter_figure(figures):
    assert {(item.name, item.published) for item in figures} == {
        (name, value) for name, values in PUBLISHED.items() for value in values
    }
    for item in figures:
        assert "with biases, rounded up" in item.reproduced_by, item


def test_what_else_reproduces_them(figures):
    ways = {(item.name, item.published): set(item.reproduced_by) for item in figures}
    biased = {"with biases, rounded up", "with biases, rounded to nearest"}
    assert ways == {
        ("SE-ResNet-50, r=16", 28.09): biased,
        ("SE-ResNet-101, r=16", 49.33): biased,
        ("SE-ResNet-50, r=2", 45.7): BOTH | NEAREST,
        ("SE-ResNet-50, r=4", 35.7): BOTH,
        ("SE-ResNet-50, r=8", 30.7): {"with biases, rounded up"},
        ("SE-ResNet-50, r=16", 28.1): BOTH | NEAREST,
        ("SE-ResNet-50, r=32", 26.9): BOTH,
        ("SE in stage 2 alone", 25.6): BOTH | NEAREST,
        ("SE in stage 3 alone", 25.7): BOTH | NEAREST,
        ("SE in stage 4 alone", 26.4): BOTH,
        ("SE on the 3x3 convolutions", 25.8): BOTH,
    }


def test_the_counts_follow_from_the_widths(figures):
    """25,557,032 of a ResNet-50, and 2 C^2/r + C/r + C for each of 3, 4, 6 and 3 blocks."""
    stages = ((256, 3), (512, 4), (1024, 6), (2048, 3))
    counted = {item.name: item.with_biases for item in figures}
    for r in (2, 4, 8, 16, 32):
        expected = 25_557_032 + sum(num * (2 * c * c // r + c // r + c) for c, num in stages)
        assert counted[f"SE-ResNet-50, r={r}"] == expected


def test_an_injection_without_biases_counts_the_same(figures):
    counted = {item.name: item.without_biases for item in figures}
    with torch.device("meta"):
        model = inject(build_resnet50(), r=16, divisor=1, bias=False, inplace=True)
    assert sum(p.numel() for p in model.parameters()) == counted["SE-ResNet-50, r=16"] == 28_071_976


def test_the_growth_of_operations_is_the_papers():
    layers, squeezed, scaled = count_operations()
    assert layers.plain == squeezed.plain == scaled.plain == 3_857_973_248
    assert layers.injected - layers.plain == sum(
        n * 2 * c * c // 16 for c, n in ((256, 3), (512, 4), (1024, 6), (2048, 3))
    )
    assert layers.rounded == ("3.86", "3.86")
    assert squeezed.rounded == scaled.rounded == squeezed.published == ("3.86", "3.87")
    assert f"{(3.87 / 3.86 - 1) * 100:.2f}" == "0.26"
    assert [round(item.growth, 3) for item in (layers, squeezed, scaled)] == [0.065, 0.208, 0.351]


def test_the_papers_network_receives_the_papers_blocks():
    original = build_resnet50().eval()
    model = inject(original, r=16, divisor=1)
    widths = [(256, 16)] * 3 + [(512, 32)] * 4 + [(1024, 64)] * 6 + [(2048, 128)] * 3
    assert [(b.channels, b.fc1.out_channels) for b in blocks(model).values()] == widths
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(model(x), original(x))


def test_the_table_has_a_row_a_figure(figures):
    table = write_table(figures, count_operations(), {"python": "3"})
    assert table.count("\n| SE") == len(PUBLISHED) + 1
    assert "3.8580 -> 3.8660 | +0.208 % | +0.26 % |" in table
