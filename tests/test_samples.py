"""The image of what the network is fed shows the loader's own pixels."""

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ffcv_imnet.config.schedules import plan_run
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.data.loader import TrainLoader, epoch_order
from ffcv_imnet.machine.distributed import describe_world
from ffcv_imnet.tools import samples
from tests.conftest import SmallData


def test_crops_are_those_of_training(small: SmallData, tmp_path: Path) -> None:
    settings = small.settings(
        tmp_path, training__epochs=6, resolution__max_res=64, resolution__start_ramp=2,
        resolution__end_ramp=4,
    )  # fmt: skip
    plans = plan_run(settings, small.train_samples)
    rows = samples.rows_of(plans, 2)
    assert [[p.epoch for p in row] for row in rows] == [[0, 2], [3, 5]]
    loader = TrainLoader(str(small.train), small.train_samples, settings, describe_world())
    for plan in (rows[0][1], rows[1][0]):
        with closing(loader.epoch(plan)) as batches:
            trained = next(batches)[0].numpy().copy()
        order = epoch_order(small.train_samples, settings.training.seed, plan.epoch)
        crops = samples.crops_of(loader, plan, order[:3])
        assert all(
            np.array_equal(c, t.transpose(1, 2, 0)) for c, t in zip(crops, trained, strict=False)
        )
    assert replace(plans[0], batch_size=3) != plans[0]


def test_the_image(small: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(f"data: {{train_dataset: {small.train}, num_workers: 1}}\n"
                      "training: {batch_size: 16, epochs: 3}\n"
                      "resolution: {min_res: 32, max_res: 64, end_ramp: 2}\n")  # fmt: skip
    out = tmp_path / "s.png"
    assert samples.main(["--config", str(config), "--out", str(out)]) == 0
    assert "32 px" in capsys.readouterr().out
    with Image.open(out) as picture:
        assert picture.format == "PNG" and min(picture.size) > 200
    with pytest.raises(UsageError, match="--out"):
        samples.main(["--config", str(config), "--out", str(tmp_path / "s.gif")])
