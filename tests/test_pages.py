"""The page of a report: seeds as bands, targets, what was evaluated, and nothing that a name could inject."""

import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

import train_imagenet
from ffcv_imnet.core.errors import UsageError
from ffcv_imnet.core.log import Header, Record, read_log
from ffcv_imnet.report import charts, html
from ffcv_imnet.report.evaluation import Evaluated, Mistake, evaluate_run
from ffcv_imnet.report.runs import (
    differing_settings,
    group_runs,
    percent,
    read_run,
    series,
    time_spent,
)
from ffcv_imnet.tools import report
from tests.conftest import SmallData
from tests.test_report import epoch, header, write_run

EVIL = '<script>alert("$1")</script>'


def seeded(seed: int, lr: float = 0.5) -> Header:
    values = {"arch": "tiny"}, {"stop_at": 0.45, "seed": seed}, {"lr": lr}
    settings = dict(zip(("model", "training", "lr"), values, strict=True))
    return Header(**{**vars(header()), "settings": settings})


def run(path: Path, *records: Record) -> Path:
    return write_run(path, *records)


class Page(HTMLParser):
    """Tags with their attributes, and whether all that was opened was closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


# ---- several runs -------------------------------------------------------------------------------


def test_seeds_are_one_group_with_mean_and_extremes(tmp_path: Path) -> None:
    paths = [
        run(
            tmp_path / f"recipe_seed{seed}", seeded(seed), epoch(0, 0.2 + 0.1 * seed), epoch(1, 0.5)
        )
        for seed in range(3)
    ]
    paths.append(run(tmp_path / "other", seeded(0, lr=0.25), epoch(0, 0.1)))
    recipe, other = group_runs([read_run(path) for path in paths])
    assert (recipe.name, len(recipe.runs), other.name) == ("recipe", 3, "other")
    line = series(recipe, "top_1")
    assert line is not None and line.epochs == [0, 1]
    assert line.minutes == pytest.approx([0.2, 0.4])
    assert line.mean == pytest.approx([0.3, 0.5])
    assert (line.low[0], line.high[0]) == pytest.approx((0.2, 0.4))
    assert series(recipe, "ema_top_1") is None
    assert differing_settings([recipe, other]) == {"lr.lr": ["0.5", "0.25"]}


def test_only_epochs_that_every_seed_has_are_averaged(tmp_path: Path) -> None:
    whole = run(tmp_path / "a0", seeded(0), epoch(0, 0.2), epoch(1, 0.4))
    going_on = run(tmp_path / "a1", seeded(1), epoch(0, 0.3))
    (group,) = group_runs([read_run(whole), read_run(going_on)])
    line = series(group, "top_1")
    assert line is not None and line.epochs == [0] and line.mean == pytest.approx([0.25])


def test_where_the_time_went_adds_up_to_what_elapsed(tmp_path: Path) -> None:
    first, second = epoch(0, 0.2, compile_seconds=3.0), epoch(1, 0.4, compile_seconds=0.0)
    log = read_run(run(tmp_path / "run", seeded(0), first, second)).log
    spent = time_spent(log)
    assert sum(spent.values()) == pytest.approx(24.0)
    assert spent == {"step": 15.0, "loader": 2.0, "compile": 3.0, "validation": 4.0, "other": 0.0}


def test_a_log_from_before_compile_times_were_kept_is_read(tmp_path: Path) -> None:
    path = run(tmp_path / "run", seeded(0), epoch(0, 0.2))
    assert "compile_seconds" not in (path / "log.jsonl").read_text()
    assert read_log(path).epochs[0].compile_seconds is None


def test_words_for_numbers() -> None:
    assert percent([0.783]) == "78.3 %" and percent([0.7, 0.8]) == "75.0 % ± 7.1"


# ---- the page -----------------------------------------------------------------------------------


def test_logs_of_one_folder_keep_their_names_and_tables(tmp_path: Path) -> None:
    """As in a record: each log its own name and table, however often a name comes."""
    folder = run(tmp_path / "record", seeded(0), epoch(0, 0.125))
    for name, lr, top_1 in (("high", 2.0, 0.25), ("low", 0.1, 0.375)):
        log = run(tmp_path / name, seeded(0, lr), epoch(0, top_1)) / "log.jsonl"
        log.rename(folder / f"{name}.jsonl")
    paths = [folder / "log.jsonl", folder / "high.jsonl", folder / "low.jsonl"]
    for number in (1, 2, 3):
        paths.append(
            run(tmp_path / f"{number}", seeded(0, 3.0 + number), epoch(0, 0.4 + number / 16))
        )
        paths[-1] = paths[-1].rename(tmp_path / "record" / f"{number}")
        (paths[-1] / "same").mkdir()
        (paths[-1] / "log.jsonl").rename(paths[-1] / "same" / "log.jsonl")
        paths[-1] /= "same"
    names = [group.name for group in group_runs([read_run(path) for path in paths])]
    assert names == ["record", "high", "low", "same", "same (2)", "same (3)"]
    again = [group.name for group in group_runs([read_run(path) for path in [paths[3]]])]
    assert again == ["same"]

    out = tmp_path / "report.html"
    assert report.main([*map(str, paths), "--out", str(out)]) == 0
    for shown in ("0.1250", "0.2500", "0.3750", "0.4625", "0.5250", "0.5875"):
        assert shown in out.read_text()
    assert report.main([str(folder / "high.jsonl")]) == 0
    assert (folder / "high.png").exists() and not (folder / "curve.png").exists()


def test_the_page_holds_everything_itself_and_escapes_every_name(tmp_path: Path) -> None:
    import numpy as np

    hostile = tmp_path / EVIL.replace("/", "-")
    evil = Header(**{**vars(seeded(0)), "device": EVIL, "versions": {EVIL: EVIL}})
    paths = [
        run(hostile, evil, epoch(0, 0.5, ema_top_1=0.4)),
        run(tmp_path / "b", seeded(0, 1.0), epoch(0, 0.3)),
    ]
    groups = group_runs([read_run(path) for path in paths])
    mistake = Mistake(3, EVIL, "dog & cat", 0.9, b"\xff\xd8")
    evaluated = Evaluated(
        Path("w"), "d", (EVIL, "dog & cat"), np.array([[3, 1], [0, 4]]), (mistake,)
    )
    text = html.write_page(groups, [evaluated, f"no {EVIL}"], [(EVIL, EVIL)])
    page = Page(text)
    assert page.open == []
    tags = {tag for tag, _ in page.tags}
    assert "script" not in tags and "link" not in tags and "svg" in tags
    addresses = [
        v for _, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href")
    ]
    assert addresses and all(str(a).startswith(("#", "data:image/jpeg;base64,")) for a in addresses)
    assert not re.search(r"url\((?!#)|@import", text)
    assert text.count("&lt;script&gt;") > 10  # shown, as the text that it is
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))


def test_every_colour_of_a_chart_is_a_variable_of_both_themes(tmp_path: Path) -> None:
    paths = [
        run(tmp_path / f"r{i}", seeded(0, 1.0 + i), epoch(0, 0.3), epoch(1, 0.6)) for i in range(7)
    ]
    groups = group_runs([read_run(path) for path in paths])
    for chart in [*html.groups_curves(groups), *html.groups_time(groups)]:
        svg = charts.to_svg(chart, "narrow", "x-")
        assert not re.search(r"#[0-9a-f]{6}\b", svg), chart.name
        used = set(re.findall(r"var\((--\w+)\)", svg))
        assert used <= charts.LIGHT.variables().keys() & charts.DARK.variables().keys()
        assert charts.to_png(chart).startswith(b"\x89PNG")


def test_a_trained_run_is_evaluated_and_its_mistakes_are_shown(
    small: SmallData, tmp_path: Path
) -> None:
    """The page's accuracy is the log's; without the data it says why there is none."""
    settings = small.settings(tmp_path / "run", training__epochs=1)
    assert train_imagenet.train(settings, None, time.perf_counter()) == 0
    trained = read_run(tmp_path / "run")
    evaluated = evaluate_run(trained, shown=5)
    assert evaluated.counts.sum() == small.val_samples
    hits = int(evaluated.counts.trace())
    assert hits / small.val_samples == pytest.approx(trained.log.epochs[0].top_1)
    assert len(evaluated.mistakes) == 5 and evaluated.mistakes[0].jpeg.startswith(b"\xff\xd8")
    assert [m.confidence for m in evaluated.mistakes[:1]] == [
        max(m.confidence for m in evaluated.mistakes)
    ]
    assert all(m.label != m.prediction for m in evaluated.mistakes)

    (tmp_path / "run" / "best.pt").unlink()
    out, png = tmp_path / "report.html", tmp_path / "png"
    assert report.main([str(tmp_path / "run"), "--out", str(out), "--png", str(png)]) == 0
    assert "Not evaluated" in out.read_text() and "best.pt: no such file" in out.read_text()
    assert len(list(png.glob("*.png"))) == 6
    with pytest.raises(UsageError, match="--png"):
        report.main([str(tmp_path / "run"), "--png", str(png)])
