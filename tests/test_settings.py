"""Settings: one clear line for every mistake, and none of fastargs' surprises."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from ffcv_imnet.config.parsing import help_text, load, parse, to_yaml
from ffcv_imnet.config.schema import Settings, differences, to_dict
from ffcv_imnet.config.strict_yaml import load_yaml
from ffcv_imnet.core.errors import UsageError

RECIPES = sorted(Path("rn_configs").glob("*.yaml"))


def test_defaults() -> None:
    assert parse([]).settings == Settings()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_recipe_loads_and_feeds_itself_back(path: Path, tmp_path: Path) -> None:
    settings = load(path)
    again = tmp_path / "config.yaml"
    again.write_text(to_yaml(settings))
    assert load(again) == settings


def test_the_recipes_that_the_readme_names_exist() -> None:
    assert {"rn18_16ep", "rn50_16ep", "imagenette_5ep", "demo"} <= {p.stem for p in RECIPES}


@pytest.mark.parametrize("name", ["rn18_16ep", "rn50_16ep"])
def test_the_public_recipes(name: str) -> None:
    settings = load(f"rn_configs/{name}.yaml")
    training = settings.training
    batch, lr, decay = {"rn18_16ep": (1024, 0.5, 5e-5), "rn50_16ep": (4096, 1.7, 1e-4)}[name]
    assert (training.batch_size, settings.lr.lr, training.weight_decay) == (batch, lr, decay)
    assert (training.epochs, training.momentum, training.label_smoothing) == (16, 0.9, 0.1)
    assert training.use_blurpool and training.stop_at == 0.65
    assert settings.lr.lr_peak_epoch == 2
    assert settings.validation.resolution == 256 and settings.validation.lr_tta
    assert settings.validation.crop_ratio == 224 / 256
    assert settings.data.train_dataset == "data/beton/train.beton"


def test_later_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("lr: {lr: 1.0, lr_peak_epoch: 3}\n")
    second.write_text("lr.lr: 2.0\n")
    settings = load(first, second)
    assert (settings.lr.lr, settings.lr.lr_peak_epoch) == (2.0, 3.0)
    assert load(first, second, lr__lr=3).lr.lr == 3.0


@pytest.mark.parametrize("path", ["runs/rn18_16ep/config.yaml", "rn_configs/nope.yaml"])
def test_no_file_of_another_folder_or_name_is_suggested(path: str) -> None:
    with pytest.raises(UsageError, match=r"no such file$"):
        parse([f"--config={path}"])


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--lr.lrr=1", "unknown option --lr.lrr (did you mean lr.lr?)"),
        ("--lr.p=1", "unknown option --lr.p"),  # fastargs takes it for lr.lr_peak_epoch
        ("--training.lr=1", "(did you mean lr.lr?)"),
        ("--resume", "give auto"),
        ("--config=rn_configs", "a folder; name one file"),
        ("--conf=x.yaml", "unknown option --conf (did you mean config?)"),
        ("--resum=auto", "(did you mean resume?)"),
        ("--lr.lr=fast", "lr.lr must be a number"),
        ("--lr.lr=nan", "lr.lr must be a number"),
        ("--training.max_hours=inf", "training.max_hours must be a number of at least 0"),
        ("--training.epochs=9999999999", "training.epochs must be an integer from 1 to 100000"),
        ("--training.epochs=inf", "training.epochs must be an integer from 1 to 100000"),
        ("--lr.lr=-1", "lr.lr must be a number of at least"),
        ("--training.epochs=1.5", "training.epochs must be an integer"),
        ("--training.epochs=0", "from 1 to 100000"),
        ("--training.use_blurpool=maybe", "must be true or false"),
        ("--training.precision=fp8", "one of auto, fp32, bf16, fp16"),
        ("--augmentation.crop_scale=1,0.2", "two numbers"),
        ("--augmentation.crop_scale=0.2", "two numbers"),
        ("--logging.folder=", "logging.folder must be a path"),
        ("--logging.folder=s3://b/r", "logging.folder, 's3://b/r' is an address: name a path on"),
        ("--model.weights=s3://b/w", "model.weights, 's3://b/w' is an address: name a path on"),
        ("--config=s3://b/c.yaml", "--config s3://b/c.yaml is an address: name a path on"),
        ("--resume=s3://b/last.pt", "--resume s3://b/last.pt is an address: name a path on"),
        ("--lr.lr", "expected one argument"),
        ("stray", "unexpected word 'stray'"),
        ("--config=rn_configs/rn18_16epp.yaml", "(did you mean rn18_16ep.yaml?)"),
        (
            "--config=rn18",
            "(did you mean rn_configs/rn18_10ep.yaml or rn_configs/rn18_16ep.yaml or",
        ),
        ("--lr=3", "unknown option --lr (did you mean lr.lr?)"),
        ("--device=tpu", "command line: device must be one of auto, cuda, cpu"),
        ("--training.device=tpu", "command line: training.device must be one of"),
    ],
)
def test_mistakes_on_the_command_line(argument: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        parse([argument])
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: {lrr: 1}", "unknown setting 'lr.lrr' (did you mean lr.lr?)"),
        ("training: {lr: 1}", "(did you mean lr.lr?)"),
        ("lr: 0.5", "lr is a section: its settings stand below it, lr.lr for one"),
        ("lr: {lr: yes}", "lr.lr must be a number"),
        ("training:\n  epochs:", "training.epochs has no value: write one, or leave the line out"),
        ("lr: {lr: 1}\nlr: {lr: 2}", "the key 'lr' stands twice"),
        ("lr: {lr: 1", "not a YAML file of settings: line 1: expected ',' or '}', but got"),
        (
            "# x\n- a: b: c",
            "not a YAML file of settings: line 2: mapping values are not allowed here",
        ),
        ("- 1", "holds no settings"),
        ("training: {use_blurpool: 2}", "must be true or false"),
        ("plan: [1]", "plan is a section"),
        ("plan: {stages: [{epochs: 1, resolution: 9}, 3]}", "plan.stages, row 2 must be"),
        ("plan: {stages: [{epochs: 1, resoluton: 9}]}", "row 1: unknown 'resoluton' (did you mean"),
        ("plan: {stages: [{epochs: 1}]}", "row 1 has no resolution"),
        ("plan: {stages: [{epochs: 1, resolution: a}]}", "row 1: resolution must be an integer"),
        ("muon: {ns_steps: 4}", "muon.ns_steps must be 3 or 5, not 4"),
    ],
)
def test_mistakes_in_a_file_name_the_file(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError) as error:
        load(path)
    assert says in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--resolution.min_res=192", "--resolution.max_res=160"],
        ["--resolution.start_ramp=5", "--resolution.end_ramp=4"],
        ["--training.epochs=1"],  # the warm-up is two epochs long
        ["--training.nesterov=true", "--training.momentum=0"],
        ["--training.stop_when_reached=true"],
        ["--muon.lr=1", "--muon.weight_decay=1"],
    ],
)
def test_settings_that_clash(arguments: list[str]) -> None:
    with pytest.raises(UsageError):
        parse(arguments)


def test_a_section_without_settings(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("muon:\n# lr: 0.1\nlr: {lr: 0.25}\n")
    assert load(path) == load(lr__lr=0.25)


def test_words_for_a_switch() -> None:
    for word in ("false", "False", "0", "no", "off"):
        assert load(training__use_blurpool=word).training.use_blurpool is False
    for word in ("true", "True", "1", "yes", "on"):
        assert load(training__use_blurpool=word).training.use_blurpool is True


def test_the_environment_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("lr.lr", "99")
    monkeypatch.setenv("lr", "99")
    assert load().lr.lr == Settings().lr.lr


def test_yaml_numbers_without_a_point(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("training: {weight_decay: 5e-5, seed: 9007199254740993}")
    assert isinstance(yaml.safe_load(path.read_text())["training"]["weight_decay"], str)  # YAML 1.1
    settings = load(path)
    assert settings.training.weight_decay == 5e-5
    assert settings.training.seed == 9007199254740993  # does not fit a float


def test_differences_leave_out_what_does_not_shape_the_result() -> None:
    ours = to_dict(load(lr__lr=1, data__num_workers=1, logging__folder="a"))
    theirs = to_dict(load(lr__lr=2, logging__folder="b"))
    assert differences(ours, theirs) == ["lr.lr 2.0 -> 1.0"]


def test_the_help_names_every_setting() -> None:
    text = help_text()
    for section, values in to_dict(Settings()).items():
        for name in values:
            assert f"--{section}.{name} " in text


# ---- names of earlier versions ------------------------------------------------------------------


def test_a_renamed_setting_is_still_read(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text("training: {on_lost_loss: back}\n")
    for words in ([f"--config={old}"], ["--training.on_lost_loss=back"]):
        assert parse(words).settings.training.on_nonfinite_loss == "back"
    with pytest.raises(UsageError, match=r"'training\.device' is given twice, written in two ways"):
        parse(["--device=cpu", "--training.device=cuda"])
    now = to_dict(load(training__on_nonfinite_loss="back"))
    assert differences(now, {"training": {"on_lost_loss": "back"}}) == []


def test_a_retired_setting_is_ignored_aloud_unless_it_asked_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(
        "model: {stem: plain, squeeze_excite: false}\n"
        "lr: {final: 0.0, decay_epoch: 0}\ncost: {spot: false}\n"
    )
    assert load(old) == Settings() and capsys.readouterr().err == ""
    old.write_text("training: {decay_all: true}\nlogging.wandb: true\n")
    assert load(old) == Settings()
    said = capsys.readouterr().err.splitlines()
    assert said[0].endswith("training.decay_all=True is ignored: this version has no such setting")
    assert said[1].endswith("use --logging.trackers=wandb") and len(said) == 2
    with pytest.raises(UsageError, match=r"model\.stem=deep made a network that is no longer here"):
        load(model__stem="deep")
    past = {"training": {"decay_all": False, "average_last": 2}}
    assert differences(to_dict(Settings()), past) == ["training.average_last 2 -> None"]


# ---- YAML as its version 1.2 reads it, and no more of it than settings need -----------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr: {lr: &a [1], x: *a}", "line 1: anchors and aliases (& and *) are not taken"),
        ("&a\nlr: *a\n", "anchors and aliases"),
        ("lr: " + "{a: " * 500 + "1" + "}" * 500, "nested more than 16 deep"),
        ("lr: {lr: 2001-99-99}", "lr.lr must be a number"),
        ("lr: {lr: " + "9" * 5000 + "}", "a number has more than 40 characters"),
        ("training: {batch_size: " + "9" * 39 + "}", "training.batch_size must be an integer"),
        ("lr: {lr: !!int abc}", "tags such as 'tag:yaml.org,2002:int' are not taken"),
        ("lr: !x foo", "tags such as"),
        ('data: {train_dataset: "a\\0b"}', "the character U+0000 is not taken"),
        ('logging: {folder: "\\ud800"}', "the character U+D800 is not taken"),
        ('logging: {folder: "\\U00110000"}', "not a YAML file"),
        ("1: 2", "unknown setting '1'"),
        ("null: 2", "unknown setting 'null'"),
        ("? [1]\n: 2", "a key must be text"),
        ("lr.lr: 2\nlr: {lr: 1}", "'lr.lr' is given twice, written in two ways"),
        ("lr: {lr: 1}\nlr.lr:", "'lr.lr' is given twice"),
        ("training: {batch_size: 1:30}", "training.batch_size must be an integer"),
        ("training: {batch_size: 010}", "line 1: the number 010 begins with 0"),
        ('training: {batch_size: "010"}', "training.batch_size must be an integer"),
        ("training: {batch_size: 1_000}", "training.batch_size must be an integer"),
        ("lr: {lr: [" + "1, " * 2000 + "1]}", "lr.lr must be a number"),
        ("x" * 200 + ": 1", "a key has more than 100 characters"),
        ("# " + "x" * 200_000, "it has more than 131,072 characters"),
        ("<<: {lr: {lr: 1}}", "unknown setting '<<.lr.lr'"),
        ("lr: {lr: \xff}".encode("latin-1"), "it is not text in UTF-8"),
    ],
)
def test_hostile_yaml_is_one_line(text: str | bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text)
    with pytest.raises(UsageError) as error:
        load(path)
    line = str(error.value)
    assert says in line and str(path) in line
    assert "\n" not in line and len(line.replace(str(path), "")) < 400


def test_the_values_of_yaml_1_2() -> None:
    text = "[0, -7, 0x1F, 0o17, 5e-5, 1., .5, true, ~, '1', yes, no, 2001-01-01, 1:30, 1_000, .inf]"
    assert load_yaml(text) == [
        *(0, -7, 31, 15, 5e-5, 1.0, 0.5, True, None),
        *("1", "yes", "no", "2001-01-01", "1:30", "1_000", float("inf")),
    ]


@pytest.mark.parametrize(
    "folder", ["1e5", "0o17", "010", "yes", "1:30", "null", "a\nb", "é 'x' #1"]
)
def test_text_that_looks_like_something_else_comes_back(folder: str, tmp_path: Path) -> None:
    settings = load(
        logging__folder=folder, augmentation__crop_ratio="0.7500000001,1.3333333333333333"
    )
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(settings), encoding="utf-8")
    assert load(path) == settings
    assert settings.augmentation.crop_ratio == (0.7500000001, 4 / 3)


def test_tuples_are_not_rounded_on_the_command_line() -> None:
    """What `load` and the sweep hand on as text."""
    assert load(augmentation__crop_ratio=(3 / 4, 4 / 3)).augmentation.crop_ratio == (3 / 4, 4 / 3)


def test_a_missing_data_set_is_said_before_torch_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')\n")
    words = [sys.executable, "train_imagenet.py", "--data.train_dataset=nowhere.beton"]
    done = subprocess.run(
        words, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    assert done.stderr.startswith("error: nowhere.beton does not exist: write it with")
    assert done.returncode == 2


def test_a_setting_without_effect_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    parse(["--training.optimizer=soap", "--muon.lr=0.1", "--training.weight_decay=0.1"])
    said = capsys.readouterr().err
    assert "without effect" in said and "soap: training.weight_decay, muon.lr" in said
    parse(["--training.optimizer=soap", "--soap.lr=0.1", "--lr.lr_peak_epoch=1"])
    parse(["--training.optimizer=muon", "--muon.lr=0.1", "--lr.lr=1"])
    assert capsys.readouterr().err == ""


def test_integers_of_63_bits_and_in_scientific_writing() -> None:
    assert load(training__seed=2**63 - 1).training.seed == 2**63 - 1
    with pytest.raises(UsageError, match=r"training\.seed"):
        load(training__seed=2**63)
    assert load(training__epochs="1e2").training.epochs == 100
