"""How `first_run.py` shows its result: tables on the terminal, and a plot."""

from pathlib import Path
from typing import Any


def show(report: dict[str, Any]) -> None:
    """Print the losses, the optimizer's groups, the speed and the memory."""
    runs = report["runs"]
    widths = {name: max(11, len(name) + 2) for name in runs}
    print(f"{report['title']}\n\nstep" + "".join(f"{name:>{width}}" for name, width in widths.items()), end="")
    print("".join(f"{name + ' off':>{width + 4}}" for name, width in widths.items()) + "     allowed")
    for step, limit in enumerate(report["allowed"]):
        line = f"{step + 1:4}" + "".join(f"{runs[name]['losses'][step]:{width}.6f}" for name, width in widths.items())
        line += "".join(f"{report['off'][name][step]:{width + 4}.1e}" for name, width in widths.items())
        print(f"{line}{limit:12.1e}" + ("  <- too far" if step + 1 in report["failed_steps"] else ""))
    print(f"off: distance from the reference in {report['settings']['truth_dtype']}")
    print(f"allowed: {report['margin']} times the largest distance of the reference so far, from any of", end=" ")
    print(f"{len(report['baselines'])} random starts")
    first, *others = runs
    for name in others:
        gaps = [abs(a - b) for a, b in zip(runs[name]["losses"], runs[first]["losses"], strict=True)]
        print(f"largest difference between {first} and {name}: {max(gaps):.1e}, at step {gaps.index(max(gaps)) + 1}")

    print("\ngroup       parameters  learning rate  weight decay")
    for group in next(iter(runs.values()))["groups"]:
        print("{role:10}{parameters:12,}{learning_rate:15.1e}{weight_decay:14g}".format(**group))

    print("\nbackend          tokens/s   peak memory")
    for name, run in runs.items():
        print(f"{name:13}{run['tokens_per_second']:12,.0f}{run['peak_memory_mib']:10,.0f} MiB")


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the losses above, and below them their distances from the truth on a logarithmic scale."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    allowed = report["allowed"]
    steps = range(1, len(allowed) + 1)
    ratios = {"height_ratios": (3, 2), "layout": "constrained"}
    figure, (upper, lower) = pyplot.subplots(2, sharex=True, figsize=(8, 6.5), **ratios)
    for place, (name, run) in enumerate(report["runs"].items()):
        # The first backend is a wide pale line, so that the next one, drawn over it, hides nothing.
        style = {"linewidth": 6, "markersize": 9, "alpha": 0.35} if place == 0 else {"linewidth": 1.5, "markersize": 4}
        upper.plot(steps, run["losses"], label=name, color=f"C{place}", **style)
        lower.plot(steps, report["off"][name], "o", color=f"C{place}", clip_on=False, **style)
    lower.plot(steps, allowed, "--", color="0.4", label="allowed")
    upper.set(ylabel="loss (nats per token)", title=report["title"])
    lower.set_yscale("symlog", linthresh=allowed[0] / report["margin"])  # linear below, so that 0 can be drawn
    lower.set(xlabel="step", ylabel=f"distance from {report['settings']['truth_dtype']}", ylim=(0, None))
    for axes in (upper, lower):
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
