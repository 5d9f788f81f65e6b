import itertools
import random
from xml.etree import ElementTree as ET

import pytest
import timm
import torch
import torchvision

from se_inject import inject
from se_inject.diagrams import make_diagrams
from se_inject.layout import arrange
from se_inject.picture import draw_network, draw_plan
from se_inject.plan import Options
from se_inject.planner import survey_model
from tests import nets

SVG = "{http://www.w3.org/2000/svg}"


def diagrams(model, **options):
    return make_diagrams(survey_model(model, Options(**options)))


def texts(path):
    return [element.text for element in ET.parse(path).iter(f"{SVG}text")]


def kinds(diagram, kind):
    return [name for name, box in diagram.boxes.items() if box.kind == kind]


def test_owners_of_the_same_form_are_drawn_once():
    first, rest = diagrams(timm.create_model("resnet50"))
    assert first.paths == tuple(f"layer{i}.0" for i in (1, 2, 3, 4))
    assert len(rest.paths) == 12
    assert first.boxes["se"].channels == (256, 512, 1024, 2048)
    assert first.boxes["se"].lines == ("se", "256, 512, 1024, 2048 channels")


def test_the_block_is_drawn_between_the_branch_and_the_merge():
    (diagram,) = diagrams(nets.wrap(nets.Residual()))
    assert ("bn2", "se") in diagram.edges
    assert ("se", "add") in diagram.edges
    assert ("x", "add") in diagram.edges
    assert ("bn2", "add") not in diagram.edges
    assert kinds(diagram, "merge") == ["add"]
    assert diagram.boxes["conv1"].note == "Conv2d"


def test_a_joint_block_is_drawn_once_over_all_its_branches():
    (diagram,) = diagrams(nets.wrap(nets.Fire()))
    assert len(kinds(diagram, "block")) == 1
    assert sum(end == "se" for _, end in diagram.edges) == 2


def test_before_the_branch_only_the_branch_reads_the_block():
    (diagram,) = diagrams(nets.wrap(nets.Residual()), placement="pre")
    assert {edge for edge in diagram.edges if "x" in edge} == {("x", "se"), ("x", "add")}


def test_a_merge_that_is_passed_over_says_why():
    model = torch.nn.Sequential(nets.wrap(nets.Residual())[:2], nets.RepVgg(), torch.nn.AdaptiveAvgPool2d(1))
    passed = [box for diagram in diagrams(model) for box in diagram.boxes.values() if box.kind == "passed"]
    assert [box.note for box in passed] == ["parallel linear layers, as in a re-parameterised block"]


def test_a_layer_of_one_piece_is_drawn_with_its_block():
    (diagram,) = diagrams(torchvision.models.vgg11(num_classes=4))
    assert diagram.edges == (("input", "se"), ("se", "layer"), ("layer", "output"))
    assert len(diagram.paths) == 5


@pytest.mark.parametrize("name", ["resnet18", "densenet121", "hrnet_w18_small", "inception_resnet_v2", "vgg11"])
def test_the_picture_is_valid_and_shows_every_block(name, tmp_path):
    model = timm.create_model(name, num_classes=4)
    draw_network(model, tmp_path / "a.svg")
    survey = survey_model(model, Options())
    shown = sum(len(kinds(d, "block")) * len(d.paths) for d in make_diagrams(survey))
    assert shown == len(survey.plan.sites)
    assert (tmp_path / "a.svg").read_text() == draw_plan(survey)
    assert f"{survey.plan.model}: {shown} blocks" in texts(tmp_path / "a.svg")[0]


def test_an_injected_network_shows_the_plan_that_it_was_injected_with(tmp_path):
    injected = inject(timm.create_model("resnet18"), include=["layer3.*"])
    draw_network(injected, tmp_path / "a.svg")
    assert "ResNet: 2 blocks" in texts(tmp_path / "a.svg")[0]


def test_markup_in_names_is_escaped(tmp_path):
    class Odd(nets.Residual):
        def forward(self, x):
            return x + self.branch(x) * float(x.ndim < 5)

    draw_network(nets.wrap(Odd()), tmp_path / "a.svg")
    assert any("x.ndim < 5" in (e.text or "") for e in ET.parse(tmp_path / "a.svg").iter(f"{SVG}title"))


def test_boxes_of_a_row_do_not_touch_and_edges_go_down():
    draw = random.Random(0)
    for _ in range(50):
        names = [f"n{i}" for i in range(draw.randint(1, 14))]
        edges = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :] if draw.random() < 0.3]
        widths = {name: draw.uniform(40, 200) for name in names}
        layout = arrange(widths, edges)
        for i, one in enumerate(names):
            for other in names[i + 1 :]:
                (x0, y0), (x1, y1) = layout.centers[one], layout.centers[other]
                assert y0 != y1 or abs(x0 - x1) >= (widths[one] + widths[other]) / 2
            assert layout.centers[one][0] - widths[one] / 2 >= -1e-6
        for points in layout.paths.values():
            assert all(low[1] < high[1] for low, high in itertools.pairwise(points))
