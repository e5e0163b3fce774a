"The page of an audit: what it says, that it is safe to open, and that nothing in it depends on a network."

import base64
import hashlib
import math
import re
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib.collections import PolyCollection

from dainv.audit_page import (
    audit_drawings,
    layer_warnings,
    overview_html,
    report_page,
    save_audit,
    table_html,
    write_page,
)
from dainv.audit_plots import (
    flip_plot,
    layers_between,
    nominal_transformations,
    plain,
    score_plot,
    swept_kinds,
)

EVIL = ["input", '<script>alert("1")</script>', "$x_1$ & \\frac", "層 😀", "a" * 80]
VOID = {"meta", "img", "br"}


class Checked(HTMLParser):
    "Collects tags, attributes and text, and checks that tags are closed in order."

    def __init__(self, text: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.fixture
def report():
    "A report whose names would break a careless page."
    rows = []
    for name, kind, strength, exact in [
        ("composed", "", math.nan, False),
        ("rotation x 0.5", "rotation", 11.25, False),
        ("rotation", "rotation", 22.5, False),
        ("quarter_turn", "quarter_turn", 90.0, True),
        ("<b>mine</b>", "", math.nan, False),
    ]:
        for depth, layer in enumerate(EVIL):
            score = math.nan if depth == 4 else 0.2 * depth + (0.3 if name.endswith("0.5") else 0.0)
            gap = [0, -0.1, 0.0, 0.3, math.nan][depth]
            rows.append(
                (
                    layer,
                    name,
                    kind,
                    strength,
                    "degrees",
                    exact,
                    score,
                    score - 0.05,
                    score + 0.05,
                    gap,
                    gap - 0.01,
                    gap + 0.01,
                )
            )
    columns = ["layer", "transformation", "kind", "strength", "unit", "exact", "score", "low", "high"]
    scores = pd.DataFrame(rows, columns=[*columns, "against_input", "against_input_low", "against_input_high"])
    scores["layer"] = pd.Categorical(scores.layer, EVIL, ordered=True)
    scores["transformation"] = pd.Categorical(
        scores.transformation, list(dict.fromkeys(scores.transformation)), ordered=True
    )
    layers = pd.DataFrame(
        dict(
            layer=EVIL,
            pc1_share=[0.1, 0.2, 0.99, 0.3, math.nan],
            effective_rank=5.0,
            dead=0.0,
            collapsed=[False, False, True, False, False],
            sentence=[f"{name} & co" for name in EVIL],
        )
    )
    predictions = pd.DataFrame(
        dict(transformation=["composed", "rotation"], flip_rate=[0.5, 0.1], flip_low=[0.4, 0.0], flip_high=[0.6, 0.2])
    )
    worst = pd.DataFrame(
        [
            dict(
                image=3,
                repeat=0,
                effective_invariance=0.0,
                predicted=0,
                confidence=0.9,
                predicted_after=7,
                confidence_after=0.5,
            )
        ]
    )
    strengths = pd.DataFrame(
        dict(
            kind="rotation", layer=EVIL, unit="degrees", half_strength=[10.0, 12, 14, math.nan, math.nan], largest=22.5
        )
    )
    shares = pd.DataFrame(dict(layer=EVIL, kind="rotation", first_order=0.4, total=0.6, n_images=9))
    errors = pd.DataFrame(
        [
            dict(layer=layer, kind=kind, unit="", step=0.1, error=0.1 * k, change=1.0)
            for layer in EVIL
            for k, kind in enumerate(["shift_rows", "hue"])
        ]
    )
    header = dict(
        classes=["<i>cat</i>"],
        model="Net</title><script>",
        weights="0" * 16,
        command="dainv audit 'a b' --images \"<x>\"",
        notes=["<u>"],
        layers=EVIL,
    )
    tables = dict(
        scores=scores,
        layers=layers,
        predictions=predictions,
        worst=worst,
        strengths=strengths,
        shares=shares,
        equivariance=errors,
    )
    return SimpleNamespace(
        header=header, tables=tables, arrays=dict(worst_pictures=np.zeros((1, 2, 3, 8, 8), np.uint8))
    )


def test_the_page_loads_nothing_and_runs_nothing(report):
    text = report_page(report)
    page = Checked(text)
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    sheet = re.search("<style>(.*?)</style>", text, re.S)[1]
    assert (
        policy
        == f"default-src 'none'; img-src data:; style-src 'sha256-{base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()}'"
    )
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "style",
        "body",
        "h1",
        "h2",
        "h3",
        "p",
        "b",
        "nav",
        "a",
        "section",
        "div",
        "table",
        "thead",
    }
    allowed |= {
        "tbody",
        "tr",
        "th",
        "td",
        "ul",
        "li",
        "span",
        "figure",
        "figcaption",
        "img",
        "details",
        "summary",
        "dl",
        "dt",
        "dd",
        "code",
    }
    assert {tag for tag, _ in page.tags} <= allowed
    for tag, attributes in page.tags:
        assert "style" not in attributes and not any(name.startswith("on") for name in attributes)
        assert tag != "img" or (attributes["src"].startswith("data:image/") and attributes["alt"])
        assert tag != "a" or attributes["href"][1:] in {a.get("id") for _, a in page.tags}
    assert "http" not in re.sub('base64,[^"]*', "", text).replace("http-equiv", "")


def test_names_arrive_as_they_are(report):
    words = "".join(Checked(report_page(report)).words)
    for name in [
        *EVIL,
        "<b>mine</b>",
        "Net</title><script>",
        "dainv audit 'a b' --images \"<x>\"",
        "<u>",
    ]:
        assert name in words, name
    assert "image 3: <i>cat</i> (90%); transformed: class 7 (50%)" in words and f"{EVIL[2]} & co" in words


def test_warnings_name_what_speaks_against_a_score():
    layers = pd.DataFrame(
        dict(
            layer=["a", "b", "c", "d", "e", "f"],
            collapsed=[True, False, False, False, False, False],
            pc1_share=0.99,
            dead=[0, 0.6, 0, 0, 0, 0],
            batch_dependent=[False, False, True, False, False, False],
            varies=[True, True, True, False, True, True],
            others=[0.1, 0, 0, math.nan, 0.3, 0],
            identity=[1, 1, 1, math.nan, 1, 0.9],
        )
    )
    found = dict(layer_warnings(layers))
    assert list(found) == list("abcdef")
    said = [
        "collapsed: 99%",
        "60% of its units",
        "other images of the batch",
        "same for every image",
        "unrelated images score 0.30",
        "scores 0.900",
    ]
    assert all(words in text for words, text in zip(said, found.values(), strict=True))
    assert not layer_warnings(layers.iloc[:0]) and not layer_warnings(pd.DataFrame(dict(layer=["x"])))


def test_untrained_copies_are_a_band(report):
    report.tables["scores"] = report.tables["scores"].assign(untrained_low=0.25, untrained_high=0.45)
    band = [c for c in score_plot(report, "composed").axes[0].collections if isinstance(c, PolyCollection)]
    assert len(band) == 1 and {0.25, 0.45} <= set(band[0].get_paths()[0].vertices[:, 0].round(6))


def test_figures_show_the_numbers_of_the_tables(report):
    dots = score_plot(report, "composed").axes[0].lines[0]
    np.testing.assert_allclose(np.asarray(dots.get_xdata()[:4], float), [0, 0.2, 0.4, 0.6])
    assert [text.get_text() for text in score_plot(report, "composed").axes[0].get_yticklabels()][
        2
    ] == r"\$x_1\$ & \frac"
    assert [bar.get_width() for bar in flip_plot(report).axes[0].patches] == [0.5, 0.1]
    with pytest.raises(ValueError, match="'rotatoin' is not in the report; known: composed"):
        score_plot(report, "rotatoin")


def test_every_figure_has_a_name_of_its_own_and_an_alternative_text(report):
    drawings = list(audit_drawings(report))
    assert len({one.name for one in drawings}) == len(drawings) and all(len(one.alt) > 20 for one in drawings)
    first = next(one for one in drawings if one.name == "score_composed")
    assert first.alt.endswith("input 0.00; 層 😀 0.60; lowest input 0.00; highest 層 😀 0.60.")


def test_nominal_and_swept(report):
    scores = report.tables["scores"]
    assert nominal_transformations(scores) == ["composed", "rotation", "quarter_turn", "<b>mine</b>"]
    assert swept_kinds(scores) == ["rotation"]
    assert layers_between(["a"]) == ["a"] and layers_between(list("abcdefg"), 3) == ["a", "d", "g"]
    assert len(plain("x" * 99)) == 28 and plain("a\nb") == "a b"


def test_a_table_scrolls_in_its_own_box():
    table = pd.DataFrame({"a": [1.23456, math.nan, math.inf], "b": [True, False, True]})
    text = table_html(table, "one")
    assert text.startswith('<div class="scroll" tabindex="0" role="region" aria-label="one">')
    assert [cell for cell in Checked(text).words] == ["a", "b", "1.23", "yes", "–", "no", "∞", "yes"]


def test_negative_scores_are_shaded_apart(report):
    scores = report.tables["scores"]
    scores.loc[scores.transformation.astype(str) == "rotation", "score"] = -0.2
    assert overview_html(scores).count('<td class="s0"') == len(EVIL)


def test_a_report_without_predictions_labels_or_sweep(report, tmp_path):
    keep = report.tables["scores"].transformation.astype(str) == "composed"
    tables = dict(
        scores=report.tables["scores"][keep],
        layers=report.tables["layers"][["layer"]],
        predictions=report.tables["predictions"].iloc[:0],
    )
    bare = SimpleNamespace(header={}, tables=tables, arrays={})
    path = write_page(bare, tmp_path / "deep" / "page.html")
    assert Checked(path.read_text(encoding="utf-8")) and "Predictions</h2>" not in path.read_text(encoding="utf-8")


def test_the_folder_holds_the_page_and_every_figure_twice(report, tmp_path):
    def save(folder):
        folder.mkdir(exist_ok=True)
        return folder

    report.save = save
    path = save_audit(report, tmp_path / "audit")
    assert path == tmp_path / "audit" / "index.html" and Checked(path.read_text(encoding="utf-8"))
    files = sorted(file.suffix for file in (path.parent / "figures").iterdir())
    count = len(list(audit_drawings(report)))
    assert files == [".pdf"] * count + [".png"] * count
