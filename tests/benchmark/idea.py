"""The picture of README.md: returns as logged and as ReD draws them. python tests/benchmark/idea.py"""

import sys
from pathlib import Path

import matplotlib
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "algorithms"))

matplotlib.use("svg")
matplotlib.rcParams.update({"svg.hashsalt": "same file every time", "svg.fonttype": "none", "font.size": 9})
import matplotlib.pyplot as plt  # noqa: E402
from iql_red import Args, load_data, sampling_probabilities  # noqa: E402

data = load_data(Args(eval_episodes=0))
returns = np.repeat(data.returns, data.lengths)
drawn = sampling_probabilities(data, Args())
bins = np.linspace(returns.min(), returns.max(), 34)
figure, axes = plt.subplots(figsize=(7.2, 2.3), layout="constrained")
for weights, colour, label in (
    (np.full(len(returns), 1 / len(returns)), "0.75", f"logged: mean {returns.mean():.0f}"),
    (drawn, "tab:blue", f"drawn by ReD: mean {drawn @ returns:.0f}"),
):
    style = "stepfilled" if colour == "0.75" else "step"
    axes.hist(returns, bins, weights=100 * weights, color=colour, label=label, histtype=style, linewidth=1.6)
axes.set(xlabel="return of the episode that a transition belongs to", ylabel="% of transitions")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False, loc="upper center")
figure.savefig(ROOT / "tests" / "results" / "idea.svg", metadata={"Date": None})
