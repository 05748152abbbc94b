"""What torch.compile makes of the recipes' networks: graphs are counted, on "meta", where nothing is computed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from torch._dynamo.utils import counters

from ffcv_imnet.config.parsing import load
from ffcv_imnet.config.schedules import resolutions
from ffcv_imnet.config.schema import Settings
from ffcv_imnet.machine.distributed import World
from ffcv_imnet.train import epoch as training

ON_CPU = World(0, 1, 0, 1, torch.device("cpu"))
LADDER = "ladder_"  # these are laid over others and have no network of their own
RECIPES = {
    path.stem: load(path)
    for path in sorted(Path("rn_configs").glob("*.yaml"))
    if not path.stem.startswith(LADDER)
}


def sides(settings: Settings) -> tuple[tuple[int, ...], int]:
    """Of training crops and of validation's."""
    return resolutions(settings), settings.validation.resolution


# Every network, and every list of sides, but not each with each: tracing a ResNet-50 takes seconds.
TRACED = ("rn18_8ep", "rn18_16ep", "rn50_224", "imagenette_5ep", "imagenette_20ep", "demo")


def test_what_is_traced_stands_for_all() -> None:
    traced = [RECIPES[name] for name in TRACED]
    for name, settings in RECIPES.items():
        assert settings.model.arch in {other.model.arch for other in traced}, name
        assert sides(settings) in {sides(other) for other in traced}, name


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No graph of another test, and none for one."""
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()
    torch._dynamo.config.recompile_limit = limit


@pytest.mark.parametrize("name", TRACED)
def test_a_graph_for_each_resolution_and_one_for_validation(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole ones, and none on returning to a resolution."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> object:
        graphs.append(next((x.shape[-1] for x in inputs if x.dtype == torch.uint8), 0))
        return graph.forward

    plain = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda module, **options: plain(module, backend=backend, **options)
    )
    settings = load(
        f"rn_configs/{name}.yaml",
        training__compile=True,
        logging__folder=tmp_path / "run",
        model__stochastic_depth=0.1,
    )
    learner = training.build_learner(settings, 10, ON_CPU)
    learner.model.to("meta")
    training_sides, validation_side = sides(settings)
    labels = torch.zeros(2, dtype=torch.int64, device="meta")

    def images(side: int) -> torch.Tensor:
        pixels = torch.zeros(2, 3, side, side, dtype=torch.uint8, device="meta")
        return pixels.contiguous(memory_format=torch.channels_last)

    for _ in range(2):
        for side in training_sides:
            learner.model.train()
            F.cross_entropy(learner.forward(images(side)), labels).backward()
            learner.model.eval()
            with torch.no_grad():
                learner.eval_forward(images(validation_side))
                learner.eval_forward(images(validation_side).flip(3))
    assert sorted(graphs) == sorted([*training_sides, validation_side])
    assert not counters["graph_break"]


def test_a_network_in_pieces_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return 2 * x

    torch.compile(lambda x: twice(x + 1), backend="eager")(torch.ones(1))
    training.say_how_compiled.cache_clear()
    for _ in range(2):
        training.say_how_compiled(True)
    said = capsys.readouterr().err
    assert said.startswith("training.compile: the network is compiled in pieces (Call to `torch._")
    assert said.count("\n") == 1
