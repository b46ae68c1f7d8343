"""A prior at hand: by name, weight and block, from a bare file, merged and compared by command."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import holdfast
from holdfast.cli import app
from holdfast.errors import ConfigError, DataError
from holdfast.importance import ImportancePrior
from holdfast.importance.inputs import InputsOptions
from holdfast.runner.table import Rows, listing, prior_table
from holdfast.strategies.attribution import AttributionStrategyOptions
from holdfast.tables import csv_text, latex_text

A, B = "model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight"
PRIOR = ImportancePrior(
    {A: torch.tensor([[1.0, 2.0], [3.0, 8.0]]), B: torch.tensor([[4.0, 0.0]]), "norm.weight": torch.ones(2)},
    {"importance": "fisher", "tasks": ["may"]},
)


def invoke(*words: str) -> str:
    result = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"}).invoke(app, list(words))
    assert result.exit_code == 0, result.output
    return result.output


def test_a_prior_is_read_like_a_mapping_and_shown_in_a_line() -> None:
    assert torch.equal(PRIOR[A], PRIOR.tensors[A])
    assert torch.equal(PRIOR[f"base_model.model.{A}"], PRIOR[A]), "as PEFT calls it"
    assert dict(PRIOR.items()).keys() == PRIOR.keys() == set(PRIOR)
    assert A in PRIOR
    assert "x" not in PRIOR
    assert 3 not in PRIOR
    with pytest.raises(KeyError, match="no importance of '3'"):
        PRIOR[3]
    assert repr(PRIOR) == "ImportancePrior(fisher, by weights: 3 tensors, 8 values; tasks: may)"
    with pytest.raises(KeyError, match=r"no importance of .model\.layers\.9\."):
        PRIOR["model.layers.9.mlp.up_proj.weight"]


def test_a_weight_without_values_is_shown_and_ranks_nowhere(tmp_path: Path) -> None:
    empty = ImportancePrior({A: torch.ones(2), B: torch.zeros(0), "scale": torch.tensor(3.0)})
    assert [(t.name, t.index) for t in empty.top(9)] == [("scale", ()), (A, (0,)), (A, (1,))]
    assert empty.by_layer() == {"0": 1.0, "scale": 3.0}
    assert [(row["values"], row["mean"], row["max"], row["sum"]) for row in empty.table()][1] == (
        0,
        None,
        None,
        0.0,
    )
    save_file(dict(empty.tensors), tmp_path / "bare.safetensors")
    assert "scale" in invoke("prior", "show", str(tmp_path / "bare.safetensors"))


def test_the_most_important_weights_and_blocks() -> None:
    assert [(t.name, t.index, t.value) for t in PRIOR.top(3)] == [
        (A, (1, 1), 8.0),
        (B, (0, 0), 4.0),
        (A, (1, 0), 3.0),
    ]
    assert len(PRIOR.top(99)) == 8
    assert PRIOR.by_layer() == {"0": 3.5, "1": 2.0, "norm.weight": 1.0}
    moments = ImportancePrior({A: torch.tensor([[2.0, 9.0], [9.0, 4.0]])}, {"kind": "inputs"})
    assert [(t.index, t.value) for t in moments.top(2)] == [((1,), 4.0), ((0,), 2.0)]
    assert moments.by_layer() == {"0": 3.0}
    places = ("shared.", "decoder.block.0.q.", "encoder.block.10.q.", "encoder.block.9.q.", "encoder.norm.")
    deep = ImportancePrior({f"{place}weight": torch.ones(2) for place in places})
    blocks = ["encoder 9", "encoder 10", "decoder 0"]
    assert list(deep.by_layer()) == [*blocks, "encoder.norm.weight", "shared.weight"], "from the input up"
    with pytest.raises(ConfigError, match="at least 1"):
        PRIOR.top(0)


def test_a_prior_as_a_table_and_a_figure() -> None:
    row = PRIOR.table()[0]
    assert row == {"name": A, "block": "0", "shape": "2x2", "values": 4, "mean": 3.5, "max": 8.0, "sum": 14.0}
    assert list(PRIOR.plot().data[0].y) == [3.5, 2.0, 1.0]
    pandas = pytest.importorskip("pandas")
    assert isinstance(PRIOR.to_pandas(), pandas.DataFrame)
    assert PRIOR.to_pandas()["sum"].sum() == 20.0


def test_a_bare_file_is_a_prior_and_the_file_of_a_saved_one_is_that_prior(tmp_path: Path) -> None:
    save_file({f"base_model.model.{A}": torch.ones(2, 2)}, tmp_path / "bare.safetensors")
    bare = ImportancePrior.load(tmp_path / "bare.safetensors")
    assert (list(bare), bare.kind, bare.meta) == ([A], "weights", {})
    assert ImportancePrior.load(tmp_path / "bare.safetensors", kind="inputs").kind == "inputs"
    PRIOR.save(tmp_path / "whole")
    assert ImportancePrior.load(tmp_path / "whole" / "prior.safetensors").meta["tasks"] == ["may"]
    (tmp_path / "torn.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match="can't be read as tensors"):
        ImportancePrior.load(tmp_path / "torn.safetensors")
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(DataError, match="no tensors in it"):
        ImportancePrior.load(tmp_path / "empty.safetensors")


@pytest.mark.parametrize(
    ("kind", "scaled", "said"),
    [
        ("weights", False, "blocks: mean importance of a value"),
        ("weights", True, "blocks: mean importance of a value, where 1 is the mean of each task's prior"),
        ("inputs", False, "blocks: mean square of a relevant input of its maps"),
        ("inputs", True, "each map of each prior scaled to 1; summed, every block has the number of priors"),
    ],
)
def test_it_is_said_what_the_numbers_of_blocks_are(kind: str, scaled: bool, said: str) -> None:
    meta = {"kind": kind} if kind == "inputs" else {}
    priors = [ImportancePrior({A: size * torch.eye(2), B: torch.eye(2)}, meta) for size in (4.0, 9.0)]
    parts = [prior.mean_normalised() for prior in priors] if scaled else priors
    merged = parts[0].merge(parts[1], parts[0].usual_merge)
    assert str(prior_table(merged, 1).caption).endswith(said)
    if kind == "inputs" and scaled:
        assert list(merged.by_layer().values()) == [2.0, 2.0]


def test_priors_are_shown_merged_and_compared_by_command(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folders = []
    for task in ("may", "june"):
        prior = ImportancePrior(
            {A: torch.rand(8, 8), B: torch.rand(8, 8)}, {"importance": "fisher", "tasks": [task]}
        )
        folders.append(str(prior.save(tmp_path / task)))
    files = ["--csv", str(tmp_path / "t.csv"), "--latex", str(tmp_path / "t.tex")]
    shown = invoke("prior", "show", folders[0], "--top", "2", *files)
    assert "fisher" in shown
    assert f"top: {A}[" in shown.replace("\n", "") or f"top: {B}[" in shown.replace("\n", "")
    assert (tmp_path / "t.csv").read_text().startswith("name,block,shape,values,mean,max,sum\n")
    assert "up\\_proj" in (tmp_path / "t.tex").read_text()
    invoke("prior", "merge", *folders, "--out", str(tmp_path / "both"))
    both, parts = (
        ImportancePrior.load(tmp_path / "both"),
        [ImportancePrior.load(f).mean_normalised() for f in folders],
    )
    assert torch.equal(both[A], torch.maximum(parts[0][A], parts[1][A]))
    assert both.meta["tasks"] == ["may", "june"]
    found = invoke("prior", "compare", *folders, "--csv", str(tmp_path / "c.csv"))
    assert "correlation" in found
    (head, first, _) = csv.reader(io.StringIO((tmp_path / "c.csv").read_text()))
    assert head[0] == "block"
    assert -0.5 < float(first[2]) < 0.5
    before = (tmp_path / "may/prior.safetensors").read_bytes()
    for first in (folders[0], f"{folders[0]}/prior.safetensors"):
        result = CliRunner().invoke(app, ["prior", "merge", first, folders[1], "--out", folders[0]])
        assert result.exit_code == 2
        assert "is one of the priors to be merged" in " ".join(result.output.split())
    assert (tmp_path / "may/prior.safetensors").read_bytes() == before
    result = CliRunner().invoke(app, ["prior", "merge", folders[0], "--out", str(tmp_path / "x")])
    assert result.exit_code == 2
    assert "give at least two" in result.output


def test_what_is_wrong_with_a_bare_file_is_said_of_that_file(tmp_path: Path) -> None:
    save_file({A: torch.tensor([[float("nan")]])}, tmp_path / "odd.safetensors")
    with pytest.raises(DataError, match=r"odd\.safetensors: .*NaN or infinite values in model\.layers\.0"):
        ImportancePrior.load(tmp_path / "odd.safetensors")
    with pytest.raises(DataError, match=r"there is no '.*none\.safetensors'"):
        ImportancePrior.load(tmp_path / "none.safetensors")


def test_every_control_is_listed_with_the_key_that_takes_it() -> None:
    fields = (AttributionStrategyOptions.model_fields["control"], InputsOptions.model_fields["control"])
    known = {name for field in fields for name in get_args(field.annotation)}
    assert {row[0] for row in listing("controls").rows} == known
    keys = {row[0]: row[2] for row in listing("controls").rows}
    assert keys["permuted"] == "strategy.control"
    assert keys["shuffled-relevance"] == "strategy.importance.control"


def test_the_version_and_what_can_be_named_are_told() -> None:
    assert invoke("--version") == f"holdfast {holdfast.__version__}\n"
    for what, word in (("metrics", "perplexity"), ("mechanisms", "anchor"), ("controls", "permuted")):
        assert word in invoke("list", what)
    assert [name for name, *_ in listing("operators").rows] == ["elementwise", "inputs", "mask", "directions"]


def test_a_table_is_plain_numbers_in_csv_and_escaped_in_latex() -> None:
    rows = Rows(("run_1", "AP"), [("a & b, c", "−3.5"), ("β", "–")], caption="100 %")
    assert rows.csv() == 'run_1,AP\n"a & b, c",-3.5\nβ,\n'
    assert rows.latex().splitlines() == [
        "% 100 %",
        r"\begin{tabular}{lr}",
        r"\hline",
        r"run\_1 & AP \\",
        r"\hline",
        r"a \& b, c & $-$3.5 \\",
        r"β & -- \\",
        r"\hline",
        r"\end{tabular}",
    ]
    assert csv_text(["n"], [["1,020"], [None]]) == 'n\n1020\n""\n'
    assert r"4.0 $\pm$ 1.0" in latex_text(["a"], [["4.0 ± 1.0"]])
    for name, shown in (("[a]", "{}[a]"), ("*a", "{}*a"), ("a < b | c", r"a \textless{} b \textbar{} c")):
        assert f"\n{shown} & 1 " in latex_text(["", "n"], [[name, "1"]])  # after a line break [a] is a length


def test_a_bare_file_that_names_a_parameter_twice_and_an_unknown_kind_are_refused(tmp_path: Path) -> None:
    twice = {A: torch.ones(2, 2), f"base_model.model.{A}": torch.zeros(2, 2)}
    save_file(twice, tmp_path / "twice.safetensors")
    with pytest.raises(DataError, match=rf"twice\.safetensors: two of its tensors, .*parameter '{A}'"):
        ImportancePrior.load(tmp_path / "twice.safetensors")
    kind: Any = "input"
    with pytest.raises(ConfigError, match=r"no kind='input'\. Allowed: weights, inputs"):
        ImportancePrior.load(tmp_path / "twice.safetensors", kind=kind)


def test_a_number_of_weights_that_is_no_whole_one_is_refused() -> None:
    count: Any = 2.5
    with pytest.raises(ConfigError, match=r"top: got 2\.5\. Give how many there shall be, a whole number"):
        PRIOR.top(count)
