"""Table and learning curves of a grid, from tests/results/GRID.csv and from runs that are under way.

    python tests/benchmark/tables.py tests/benchmark/grids/red.toml
    python tests/benchmark/tables.py tests/benchmark/grids/*.toml --write benchmarks.md

--write puts the table of grid NAME between <!-- table: NAME --> and <!-- end -->. A number is a mean over
seeds with its 95 % interval (stratified bootstrap over seeds, percentiles). P(X > Y) is the probability that
a seed of X scores above one of Y (a draw counts half), averaged over datasets.
"""

import csv
import importlib
import os
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.stats
import tyro
from scores import ROOT, read_grid, read_scores

sys.path += [str(ROOT / "algorithms"), str(ROOT / "tests")]  # scripts, and catch.py


@dataclass
class Args:
    grids: tyro.conf.Positional[tuple[Path, ...]]  # files of grids/
    out: Path = ROOT / "runs" / "benchmark"  # run folders are in OUT/GRID/CELL
    results: Path = ROOT / "tests" / "results"  # scores are in RESULTS/GRID.csv; pictures go there
    write: Path | None = None  # put the tables into this file
    pictures: bool = True  # make learning curves; wants matplotlib


# Statistics ---------------------------------------------------------------------------------------
def interval(strata, statistic, resamples=20_000):
    """95 % bootstrap interval of statistic(strata): seeds are drawn anew, within each stratum (n,)."""
    options = {"n_resamples": resamples, "method": "percentile", "rng": np.random.default_rng(0)}
    result = scipy.stats.bootstrap(strata, lambda *drawn, axis: statistic(drawn), vectorized=True, **options)
    return result.confidence_interval


def mean(strata):
    """Mean over strata of the mean over seeds, which are the last axis."""
    return np.mean([np.mean(x, -1) for x in strata], axis=0)


def improvement(strata):
    """P(X > Y), of strata X, Y, X, Y, ..., averaged over the pairs."""
    above = []
    for x, y in zip(strata[::2], strata[1::2]):
        difference = np.asarray(x)[..., :, None] - np.asarray(y)[..., None, :]
        above.append((0.5 + 0.5 * np.sign(difference)).mean((-1, -2)))
    return np.mean(above, axis=0)


def with_interval(strata, statistic, digits=1):
    text = f"{statistic(strata):.{digits}f}"
    if min(map(len, strata)) > 1:
        low, high = interval(strata, statistic)
        text += f" [{low:.{digits}f}, {high:.{digits}f}]"
    return text


# Results ------------------------------------------------------------------------------------------
class Result:
    """Scores of a cell: lines as of the csv file, updates (T,), curves (S, T), last10 and best (S,)."""

    def __init__(self, lines, finished, offline_updates):
        self.lines = lines
        self.finished = finished
        self.is_online = offline_updates is not None
        points = np.array([[point.split(":") for point in line["curve"].split()] for line in lines], float)
        updates = points[0, :, 0] - (offline_updates or 0)
        kept = (updates >= 0) | (updates == updates[-1])  # at least the last of them
        self.updates = updates[kept]
        self.curves = points[:, kept, 1]
        self.last10 = self.curves[:, -10:].mean(1)
        self.best = self.curves.max(1)


def read_results(path, args):
    """Grid, cells and results by (row, dataset): from the csv file if finished, else from run folders."""
    grid, cells = read_grid(path)
    rows = {row["name"]: row for row in grid["rows"]}
    lines = {}
    results_path = args.results / f"{path.stem}.csv"
    if results_path.exists():
        with open(results_path) as file:
            for line in csv.DictReader(file):  # a cell that was run again: the last of them
                lines.setdefault(line["cell"], {})[line["seed"]] = line
    results = {}
    for key, cell in cells.items():
        found = list(lines.get(cell.name, {}).values()) or read_scores(cell, cell.folder(args.out))
        if found:
            results[key] = Result(found, cell.name in lines, rows[cell.row].get("offline_updates"))
    return grid, cells, results


def data_scores(cells):
    """Mean and best return of the data that the first of these cells learns from, as scores."""
    cell = next(cell for cell in cells if "--dataset" in cell.flags and "/" not in cell.script)
    module = importlib.import_module(Path(cell.script).name)
    args = tyro.cli(module.Args, args=list(cell.flags))
    if hasattr(module, "load_replay"):
        _, returns = module.load_replay(args)
        _, references = module.evaluation_environment(args)
    else:
        *_, returns, _, _, references = module.load_data(args)
    worst, best = references
    if not np.isnan(worst):
        returns = 100 * (returns - worst) / (best - worst)
    return returns.mean(), returns.max()


# Tables -------------------------------------------------------------------------------------------
def texts_of(result, num_columns):
    """What a row has to say on one dataset."""
    texts = []
    if result:
        texts = [with_interval([result.last10], mean), with_interval([result.best], mean)]
        if not result.finished:
            texts[0] += f" (to {int(result.lines[0]['updates']):,})"
        if num_columns == 4 and result.is_online:
            texts += [with_interval([x], mean) for x in (result.curves[:, 0], result.curves.min(1))]
    return texts + [""] * (num_columns - len(texts))


def table(name, grid, cells, results, of_data):
    """Markdown: what the grid is for, a line a row, probabilities, where the numbers are from."""
    datasets = [dataset["name"] for dataset in grid["datasets"]]
    datasets = [dataset for dataset in datasets if dataset in {where for _, where in results}]
    titles = ["last 10", "best"]
    if any("offline_updates" in row for row in grid["rows"]):
        titles += ["at the first step online", "lowest from there"]
    head = []
    data = []
    for dataset in datasets:
        head += [f"{dataset}: {titles[0]}", *titles[1:]]
        texts = [f"{word} {score:.1f}" for word, score in zip(("mean", "best"), of_data[dataset])]
        data += texts + [""] * (len(titles) - len(texts))
    text = [f"{grid['title']} {grid['claim']}", ""]
    text += [f"| | {' | '.join(head)} |", "|---" * (1 + len(head)) + "|"]
    text.append(f"| the data | {' | '.join(data)} |")
    for row in grid["rows"]:
        texts = []
        for dataset in datasets:
            texts += texts_of(results.get((row["name"], dataset)), len(titles))
        if any(texts):
            text.append(f"| {row['name']} | {' | '.join(texts)} |")
    text.append("")
    if len(results) < len(cells):
        text.append(f"- {len(cells) - len(results)} of {len(cells)} cells are open")

    num_averaged = grid.get("average_pairs", 0)
    averaged = []
    probabilities = []
    for i, (x, y) in enumerate(grid.get("pairs", [])):
        strata = []
        for dataset in datasets:
            pair = [results[row, dataset] for row in (x, y) if (row, dataset) in results]
            if len(pair) == 2 and all(result.finished for result in pair):
                strata += [result.last10 for result in pair]
        if strata:
            probabilities.append(f"P({x} > {y}) = {with_interval(strata, improvement, 2)}")
        if i < num_averaged:
            averaged += strata
    if averaged:
        probabilities.append(f"the first {num_averaged} together {with_interval(averaged, improvement, 2)}")
    if probabilities:
        text.append(f"- {'; '.join(probabilities)}")
    text.append(f"- {grid['seeds']} seeds; in tests/benchmark: `python scores.py grids/{name}.toml`")
    lines = [line for result in results.values() if result.finished for line in result.lines]
    if lines:
        about = [sorted({line[key] for line in lines}) for key in ("hardware", "commit", "date")]
        text.append("- {}; commit {}; {}".format(*map(", ".join, about)))
    return "\n".join(text)


def write_table(document, name, text):
    """Replaces what stands between the markers of a table."""
    before, mark, rest = document.read_text().partition(f"<!-- table: {name} -->\n")
    _, end, after = rest.partition("<!-- end -->")
    if not end:
        sys.exit(f"error: {document} has no <!-- table: {name} --> and <!-- end -->; write them")
    document.write_text(f"{before}{mark}{text}\n{end}{after}")


# Pictures -----------------------------------------------------------------------------------------
LINES = "-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)), (0, (9, 3))


def draw(path, name, dataset, grid, results, of_data):
    """Learning curves on one dataset, means over seeds and their intervals."""
    import matplotlib.figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "fixed", "font.size": 9})
    figure = matplotlib.figure.Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    rows = [row["name"] for row in grid["rows"] if (row["name"], dataset) in results]
    shades = matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(rows)))  # whose brightness differs
    for i, row in enumerate(rows):
        result = results[row, dataset]
        line = dict(color=shades[i], linestyle=LINES[i % 6], marker="osv^Dx"[i % 6], label=row)
        axes.plot(result.updates, result.curves.mean(0), markersize=3, **line)
        intervals = np.stack([interval([scores], mean, 2_000) for scores in result.curves.T])
        axes.fill_between(result.updates, *intervals.T, color=shades[i], alpha=0.12, linewidth=0)
    for word, score, width in zip(("mean", "best"), of_data[dataset], (0.8, 1.6)):
        axes.axhline(score, color="black", linewidth=width, linestyle=(0, (1, 2)), label=f"the data's {word}")
    axes.set(xlabel="updates (of online runs: environment steps)", ylabel="score")
    axes.grid(alpha=0.3)
    title = f"{name} on {dataset}: mean of {grid['seeds']} seeds, 95 % interval"
    axes.set_title(textwrap.fill(title, 64))
    figure.legend(loc="outside right upper", frameon=False)  # beside the axes
    figure.savefig(path, metadata={"Date": None})


def main():
    args = tyro.cli(Args, description=__doc__)
    for path in args.grids:
        name = path.stem
        grid, cells, results = read_results(path, args)
        of_data = {}
        pictures = []
        for dataset in (x["name"] for x in grid["datasets"]):
            of_data[dataset] = data_scores([cell for (_, where), cell in cells.items() if where == dataset])
            picture = args.results / f"{name}_{re.sub(r'[^a-z0-9]+', '-', dataset.lower())}.svg"
            if args.pictures and dataset in {where for _, where in results}:
                args.results.mkdir(parents=True, exist_ok=True)
                draw(picture, name, dataset, grid, results, of_data)
            if picture.exists():
                pictures.append(f"![{name}, {dataset}]({os.path.relpath(picture, ROOT)})")
        text = "\n".join([table(name, grid, cells, results, of_data), "", " ".join(pictures)])
        print(text)
        if args.write:
            write_table(args.write, name, text)


if __name__ == "__main__":
    main()
