"""The published numbers, the comparison with ours, and the report pages."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from dainv import paper, report
from dainv.files import figures_folder

DAI = ("dai_accuracy", "dai_score", "dai_loss_dynamics", "dai_time")
NAMES = (*DAI, "invariance_accuracy", "invariance_pc1", "invariance_pairs")
KEYS = dict(
    dai_accuracy=["data", "network", "model", "metric"],
    dai_score=["layer", "model", "statistic"],
    dai_loss_dynamics=["layer", "model", "epoch"],
    dai_time=["quantity"],
    invariance_accuracy=["model"],
    invariance_pc1=["model"],
    invariance_pairs=["pair", "model", "metric"],
)


@pytest.mark.parametrize("name", NAMES)
def test_every_number_has_one_key_a_precision_a_tolerance_and_a_source(name):
    table = paper.published(name)
    assert not table.duplicated(KEYS[name]).any() and not table.isna().any().any()
    assert (0 < table["precision"]).all() and (table["precision"] < table["tolerance"]).all()
    assert table["source"].str.len().min() > 10


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("dai_accuracy", ("CIFAR-10", "All-CNN", "dai", "top1"), 92.47),
        ("dai_accuracy", ("CIFAR-10", "DenseNet", "dai", "top1"), 93.98),
        ("dai_accuracy", ("Tiny ImageNet", "WRN", "baseline", "top5"), 82.99),
        ("dai_score", ("input", "baseline", "median"), 0.556),
        ("dai_score", ("conv2", "baseline", "whisker_low"), -0.52),
        ("dai_score", ("conv8", "dai", "q3"), 0.998),
        ("dai_score", ("conv9", "dai", "median"), 0.616),
        ("dai_loss_dynamics", ("conv4", "dai", 25), 0.63),
        ("dai_loss_dynamics", ("conv9", "baseline", 350), 0.60),
        ("dai_time", ("step time, DAI / baseline",), 1.1),
        ("invariance_accuracy", ("baseline",), 93.2),
        ("invariance_accuracy", ("mixed",), 91.9),
        ("invariance_accuracy", ("pure",), 21.0),
        ("invariance_pc1", ("baseline",), 0.085),
        ("invariance_pc1", ("mixed",), 0.743),
        ("invariance_pc1", ("pure",), 0.996),
        ("invariance_pairs", ("cars-dogs", "baseline", "clean"), 98.9),
        ("invariance_pairs", ("cars-dogs", "pure", "clean"), 98.7),
        ("invariance_pairs", ("cars-dogs", "baseline", "pgd"), 7.6),
        ("invariance_pairs", ("cars-dogs", "pure", "pgd"), 62.0),
        ("invariance_pairs", ("cars-dogs", "baseline", "fgsm"), 31.5),
        ("invariance_pairs", ("cars-dogs", "pure", "fgsm"), 88.5),
    ],
)
def test_spot_checks(name, key, value):
    table = paper.published(name).set_index(KEYS[name])["published"]
    assert table.loc[key if len(key) > 1 else key[0]] == value


def test_sizes():
    assert [len(paper.published(name)) for name in NAMES] == [14, 80, 9 * 6 + 9 * 7, 1, 3, 3, 6]


def test_score_quartiles_are_ordered():
    table = paper.published("dai_score").pivot(index=["layer", "model"], columns="statistic", values="published")
    assert len(table) == 20
    assert (
        (table.whisker_low < table.q1).all()
        and (table.q1 < table["median"]).all()
        and (table["median"] < table.q3).all()
    )


def test_losses_stay_in_the_range_of_the_heatmap():
    assert paper.published("dai_loss_dynamics")["published"].between(0, 1).all()


def test_unknown_table_lists_the_known():
    with pytest.raises(ValueError, match="dai_scores.*known: dai_accuracy, dai_loss_dynamics, dai_score, dai_time"):
        paper.published("dai_scores")


@pytest.mark.parametrize("name", NAMES)
def test_the_paper_agrees_with_itself(name):
    table = paper.compare(name, paper.published(name).rename(columns=dict(published="ours")))
    assert table["within"].all() and (table["difference"] == 0).all()


@pytest.mark.parametrize(("shift", "within"), [(0.7, True), (-0.7, True), (0.71, False), (-0.71, False)])
def test_tolerance_is_inclusive_and_two_sided(shift, within):
    ours = pd.DataFrame([dict(data="CIFAR-10", network="All-CNN", model="dai", metric="top1", ours=92.47 + shift)])
    row = paper.compare("dai_accuracy", ours).iloc[0]
    assert bool(row["within"]) is within and row["difference"] == pytest.approx(shift)


def test_rows_without_counterpart_stay_without_verdict_and_extras_are_kept():
    ours = pd.DataFrame(
        dict(layer=["conv1", "pool", "conv1"], model="dai", statistic="median", ours=[0.5, 0.6, None], seed=[3, 4, 5])
    )
    table = paper.compare("dai_score", ours)
    assert table["seed"].tolist() == [3, 4, 5] and table["within"].isna().tolist() == [False, True, True]
    assert table["published"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("missing", ["layer", "model", "statistic", "ours"])
def test_missing_column_is_named(missing):
    ours = pd.DataFrame([dict(layer="conv1", model="dai", statistic="median", ours=0.5)]).drop(columns=missing)
    with pytest.raises(ValueError, match=f"'{missing}' is missing"):
        paper.compare("dai_score", ours)


class Page(HTMLParser):
    """Tags, links and open elements of a page."""

    VOID = {"meta", "img", "br", "link"}

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.links, self.ids, self.stack = [], [], set(), []
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.links += [attributes[a] for a in ("href", "src") if a in attributes]
        self.ids.add(attributes.get("id"))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag


def write_record(folder: Path, name: str, **changes) -> None:
    """A figure as it lies in the folder of a profile."""
    rows = [
        dict(layer="conv1", label="DAI", published=0.567, ours=0.55, difference=-0.017, tolerance=0.05, within=True)
    ]
    rows += [dict(layer="pool", label="DAI", published=None, ours=0.9, difference=None, tolerance=None, within=None)]
    files = {kind: f"{name}.{kind}" for kind in ("png", "pdf", "csv")}
    record = dict(schema=1, name=name, title=f"Title of {name}", profile=folder.name, caption="A caption.", files=files)
    record |= dict(data=[dict(title="CIFAR-10", fingerprint="5f0e")], seeds=[0], options=dict(scheme="light"))
    record |= dict(published=rows, runs=[dict(name="quick/a-s0")], drawn_with=dict(commit="c0ffee" * 7, dirty=True))
    folder.mkdir(parents=True, exist_ok=True)
    for file in files.values():
        (folder / file).write_bytes(b"")
    (folder / f"{name}.json").write_text(json.dumps(record | changes))


def test_report_shows_every_figure_and_its_links_lead_somewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    for profile, names in dict(quick=["dai_time", "dai_score", "another"], paper=["dai_score"]).items():
        for name in names:
            write_record(tmp_path / profile, name)
        assert report.write_report(profile) == tmp_path / profile / "index.html"
    for path in tmp_path.rglob("index.html"):
        page = Page(path)
        assert page.stack == [] and page.links
        for link in page.links:
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            assert target.exists(), link
            assert not anchor or anchor in Page(target).ids, link
    text = (tmp_path / "quick/index.html").read_text()
    assert text.index("Title of dai_score") < text.index("Title of dai_time") < text.index("Title of another")
    assert "1 of 1 numbers within tolerance" in text and "for orientation" in text
    assert "for orientation" not in (tmp_path / "paper/index.html").read_text()
    assert "c0ffeec0ffee, changed since" in text and "quick/a-s0" in text and "5f0e" in text and "light" in text


def test_report_lists_the_figures_of_invariance_after_those_of_the_first_paper(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    names = [
        "invariance_pairs",
        "invariance_rdms",
        "invariance_attacks",
        "dai_time",
        "invariance_pc1",
        "invariance_zzz",
    ]
    for name in names:
        write_record(tmp_path / "quick", name)
    text = report.write_report("quick").read_text()
    ordered = ["dai_time", *(f"invariance_{n}" for n in ("rdms", "pc1", "attacks", "pairs", "zzz"))]
    assert sorted(ordered, key=lambda name: text.index(f'<section id="{name}">')) == ordered


def test_report_escapes_everything(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    evil = '"><script>alert(1)</script>'
    rows = [dict(layer=evil, ours=1.0, within=None)]
    texts = dict(title=evil, caption=evil, published=rows, options={evil: evil}, runs=[dict(name=evil)])
    write_record(tmp_path / "quick", "dai_score", data=[dict(title=evil, fingerprint=evil)], **texts)
    report.write_report("quick")
    for path in tmp_path.rglob("index.html"):
        assert "script" not in Page(path).tags


def test_report_without_published_numbers(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    write_record(tmp_path / "quick", "dai_samples", published=None)
    text = report.write_report("quick").read_text()
    assert "dai_samples.png" in text and "within tolerance" not in text


def test_report_of_an_empty_profile_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="'quick'.*make figures"):
        report.write_report("quick")


def test_report_can_be_written_again_without_change(monkeypatch, tmp_path):
    monkeypatch.setenv("DAINV_FIGURES", str(tmp_path))
    write_record(tmp_path / "quick", "dai_score")
    first = report.write_report("quick").read_bytes(), (tmp_path / "index.html").read_bytes()
    assert (report.write_report("quick").read_bytes(), (tmp_path / "index.html").read_bytes()) == first


def test_gallery_links_only_files_that_exist():
    folder = figures_folder()
    text = (folder / "README.md").read_text(encoding="utf8")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 100
    assert not [link for link in links if not (folder / link).exists()]
    pictures = {str(p.relative_to(folder)) for p in folder.glob("*/*.png") if p.parent.name != "quick"}
    assert pictures <= set(links), "a figure is missing: run `write_gallery()`"
