"""A configuration of ffcv-imagenet: understood, or said to be one."""

from pathlib import Path

import pytest

from ffcv_imnet.config.parsing import load
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.tools import migrate

# In the words of its rn18 and rn50 recipes, which are flat YAML of this kind.
THEIRS = """
data: {gpu: 0, in_memory: 1, num_workers: 12, train_dataset: t.ffcv, val_dataset: v.ffcv}
dist: {world_size: 8}
logging: {folder: /tmp/, log_level: 0}
lr: {lr: 1.7, lr_peak_epoch: 2, lr_schedule_type: cyclic}
model: {arch: resnet50}
resolution: {end_ramp: 76, max_res: 192, min_res: 160, start_ramp: 65}
training: {batch_size: 128, bn_wd: 0, distributed: 1, epochs: 88, label_smoothing: 0.1, momentum: 0.9,
  optimizer: sgd, weight_decay: 5e-5, use_blurpool: 1}
validation: {lr_tta: true, resolution: 256}
"""


def test_its_recipe_becomes_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rn50_88_epochs.yaml"
    path.write_text(THEIRS)
    with pytest.raises(UsageError) as refused:
        load(path)
    said = str(refused.value)
    for key in ("data.gpu", "data.in_memory", "dist.world_size", "lr.lr_schedule_type"):
        assert repr(key) in said
    assert said.endswith(
        f"`python -m ffcv_imnet migrate {path}` rewrites a configuration of ffcv-imagenet"
    )

    assert migrate.main([str(path)]) == 0
    out = tmp_path / "rn50_88_epochs.migrated.yaml"
    settings = load(out)
    assert settings.training.batch_size == settings.lr.base_batch_size == 1024
    assert settings.validation.batch_size == 512 * 8  # its default, of each process
    assert (settings.lr.lr, settings.training.weight_decay) == (1.7, 5e-5)
    assert settings.training.epochs == 88 and settings.training.use_blurpool
    assert (settings.resolution.start_ramp, settings.resolution.end_ramp) == (65, 76)
    assert settings.data.train_dataset == "t.ffcv" and settings.validation.lr_tta
    assert settings.logging.folder == "/tmp/rn50_88_epochs"
    printed = capsys.readouterr().out
    for text in (printed, out.read_text()):
        assert "data.in_memory: 1" in text and "128 of 8 processes" in text
    with pytest.raises(UsageError, match="is there already"):
        migrate.main([str(path)])


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[1] / "rn_configs").glob("rn*.yaml"))
)
def test_a_recipe_of_this_project_is_left_alone(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"yaml is a recipe of this project already$"):
        migrate.main([str(recipe), "--out", str(tmp_path / "out.yaml")])
    assert not list(tmp_path.iterdir())


def test_what_is_ours_in_it_is_said_to_be_and_a_folder_is_named_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text(
        "data.gpu: 0\nlr.base_batch_size: 512\nlogging.folder: runs/c\n"
    )
    assert migrate.main([str(tmp_path / "c.yaml")]) == 0
    assert load(tmp_path / "c.migrated.yaml").logging.folder == "runs/c"
    assert "lr.base_batch_size: 512 (it is a setting of this project" in capsys.readouterr().out


def test_what_it_leaves_out_is_its_default_and_what_changes_the_run_is_loud(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "c.yaml", tmp_path / "out.yaml"
    path.write_text(
        "lr.lr_schedule_type: step\nmodel: {pretrained: 1, arch: resnet101}\ntraining: {blur: 3}\n"
    )
    assert migrate.main([str(path), "--out", str(out)]) == 0
    settings = load(out)
    assert (settings.training.epochs, settings.training.weight_decay) == (30, 4e-5)
    assert settings.validation.resolution == 224 and not settings.training.use_blurpool
    assert settings.model.arch == "timm:resnet101"
    said = capsys.readouterr().out
    assert "THE SCHEDULE IS ANOTHER" in said and "THE WEIGHTS ARE OTHERS" in said
    assert "training.blur: 3 (neither ffcv-imagenet nor this project" in said
    path.write_text("training: {epochs: many}")
    with pytest.raises(UsageError, match=r"c.yaml: training.epochs must be .*, not 'many'"):
        migrate.main([str(path), "--out", str(out), "--force"])
    assert load(out).training.epochs == 30
