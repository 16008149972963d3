"""Bars over the memory floor, one group for each operation and layout."""

from pathlib import Path

from fastnorm.bench.run import mean_ratio


def save_plot(rows, who, path):
    """Save PNG and SVG beside each other; returns their paths."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    families = {}
    for cell, row in rows.items():
        if not cell.tiny:
            families.setdefault(cell.family, []).append(row)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.45 * len(families)), layout="constrained")
    height = 0.8 / len(who)
    for index, name in enumerate(who):
        ratios = [
            mean_ratio(r["times"][name] / r["floor"] for r in members if name in r["times"])
            for members in families.values()
        ]
        axes.barh([at + index * height for at in range(len(families))], ratios, height, label=name)
    axes.axvline(1, color="black", linewidth=1, linestyle="--", label="memory floor")
    axes.set_yticks([at + 0.4 - height / 2 for at in range(len(families))], families)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50], ["1", "2", "5", "10", "20", "50"])
    axes.set_xlabel("time over the memory floor, geometric mean, less is better")
    axes.invert_yaxis()
    axes.legend(loc="lower right")  # where the bars are short
    paths = [Path(path).with_suffix(suffix) for suffix in (".png", ".svg")]
    for target in paths:
        figure.savefig(target, dpi=150)
    plt.close(figure)
    return paths
