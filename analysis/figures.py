"""The paper's figures and the reliability diagram, drawn from computed numbers; each as SVG and PNG."""

CORRECTED, INTRODUCED, GREY = "#1f77b4", "#d1603d", "#888888"
# Of the lines of a plot; the first is for levels.
LINES = ("#777777", "#1f77b4", "#d1603d", "#3a923a", "#8c5fb0")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "medgr2",
    "svg.fonttype": "none",
}


def draw(path, columns, width, height, fill):
    """Write `path`.svg and .png, width x height inches: a row of axes, drawn by `fill(figure, axes)`."""
    from matplotlib import rc_context

    # pyplot would need a display and keep state.
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure, list(figure.subplots(1, columns, squeeze=False)[0]))
        # Without a date, the same numbers give the same bytes.
        figure.savefig(f"{path}.svg", metadata={"Date": None})
        figure.savefig(f"{path}.png", dpi=150)


def reliability(path, bins, ece):
    """How often answers of some probability are right. The area of a point is its number of questions.

    `bins`: of measures.calibration.
    """
    total = sum(b["n"] for b in bins)

    def fill(figure, axes):
        ax = axes[0]
        ax.plot([0, 1], [0, 1], color=GREY, lw=1, ls="--", label="calibrated")
        ax.scatter(
            [b["confidence"] for b in bins],
            [b["accuracy"] for b in bins],
            s=[12 + 300 * b["n"] / total for b in bins],
            color=CORRECTED,
            alpha=0.8,
            zorder=3,
            clip_on=False,
            label="most probable option (area: questions)",
        )
        ax.set(
            xlim=(0, 1.03),
            ylim=(0, 1.03),
            aspect="equal",
            xlabel="probability of the most probable option",
            ylabel="share that is right",
            title=f"Reliability: ECE {ece:.3f}, {total} questions",
        )
        figure.legend(frameon=False, loc="outside lower center", ncols=2, markerscale=0.5)

    draw(path, 1, 4.6, 4.6, fill)


def changes(path, pairs):
    """The paper's Figure 5: errors corrected (up) and introduced (down) by modality, axes per pair of runs.

    `pairs`: comparisons on the same items, as analysis.compare writes them.
    """
    names = list(pairs[0].get("modality", ["all"]))
    groups = [list(pair.get("modality", {"all": pair}).values()) for pair in pairs]
    most_introduced, most_corrected = (
        max(group[field] for row in groups for group in row) for field in ("introduced", "corrected")
    )
    margin = 0.12 * max(1, most_introduced, most_corrected)

    def fill(figure, axes):
        for ax, pair, row in zip(axes, pairs, groups):
            for field, sign, color in (("corrected", 1, CORRECTED), ("introduced", -1, INTRODUCED)):
                heights = [sign * group[field] for group in row]
                bars = ax.bar(names, heights, color=color, label=f"errors {field} ({pair[field]})")
                ax.bar_label(bars, [group[field] or "" for group in row], padding=2, fontsize=8)
            ax.axhline(0, color="black", lw=0.8)
            # The legend needs the space above.
            limits = (-most_introduced - margin, most_corrected + 3.3 * margin)
            ax.set(ylim=limits, title=f"{pair['from']} → {pair['to']}")
            ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            ax.yaxis.set_major_formatter(lambda y, _: f"{abs(y):g}")
            ax.legend(frameon=False, loc="upper right", ncols=2)
        axes[0].set_ylabel("questions")

    draw(path, len(pairs), max(5.0, 0.62 * len(names) + 1) * len(pairs), 3.6, fill)


def stages(path, panels, baselines):
    """Accuracy after each stage with its 95% interval, axes per panel; baselines as lines.

    `panels`: {title: {stage: {"mean", "low", "high"}}}, all of the same stages; `baselines` are some of them.
    """
    names = [name for name in next(iter(panels.values())) if name not in baselines]

    def fill(figure, axes):
        for ax, (title, found) in zip(axes, panels.items()):
            points = [found[name] for name in names]
            mean = [point["mean"] for point in points]
            wide = [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
            places = range(len(names))
            ax.errorbar(mean, places, xerr=wide, fmt="o", color=CORRECTED, ms=5, capsize=2)
            for name, style in zip(baselines, ("--", ":", "-.")):
                ax.axvline(found[name]["mean"], color=GREY, lw=1, ls=style, label=name)
            ax.set_yticks(places, names if ax is axes[0] else [])
            ax.invert_yaxis()
            ax.set(title=title, xlabel="accuracy")
        figure.legend(
            *axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=3
        )

    draw(path, len(panels), 3.2 * len(panels) + 2.4, 0.3 * len(names) + 1.5, fill)


def transfer(path, result):
    """The paper's Figure 4: accuracy of runs trained on one modality or task each (rows) on each (columns).

    Beside it, the same relative to the column's own run. `result`: of analysis.transfer.
    """
    columns, rows = result["columns"], result["rows"]

    def fill(figure, axes):
        titles = {"accuracy": "accuracy", "relative": "relative to the run of the column"}
        for ax, (field, title) in zip(axes, titles.items()):
            values = [[float("nan") if v is None else v for v in row] for row in result[field]]
            if field == "relative":
                # The colours are symmetric around 1 and end at 0 and 2 at most.
                differences = [abs(v - 1) for row in result[field] for v in row if v is not None]
                middle, spread, colours = 1, min(1, max([0.01, *differences])), "RdBu"
                limits = (1 - spread, 1 + spread)
            else:
                middle, spread, colours, limits = 0, 1, "Blues", (0, 1)
            image = ax.imshow(values, aspect="auto", vmin=limits[0], vmax=limits[1], cmap=colours)
            for y, row in enumerate(result[field]):
                for x, v in enumerate(row):
                    if v is not None:
                        text = {"ha": "center", "va": "center", "fontsize": 8}
                        text["color"] = "white" if abs(v - middle) > 0.6 * spread else "black"
                        text["weight"] = "bold" if rows[y] == columns[x] else "normal"
                        ax.text(x, y, f"{v:.2f}", **text)
            tilted = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"}
            ax.set_xticks(range(len(columns)), columns, **tilted)
            ax.set_yticks(range(len(rows)), rows)
            ax.set(title=title, xlabel=f"evaluated on {result['by']}")
            ax.spines[:].set_visible(False)
            figure.colorbar(image, ax=ax, shrink=0.8)
        axes[0].set_ylabel(f"trained on {result['by']}")

    draw(path, 2, 2 * (0.62 * len(columns) + 2.6), 0.36 * len(rows) + 2.0, fill)


def efficiency(path, curves, levels):
    """The paper's Figure 2: accuracy over the number of training records, a line per method.

    The band is from the worst to the best seed. `curves`: {method: [{"k", "mean", "low", "high", "seeds"}]};
    `levels`: {method: such a point} of methods without training data.
    """

    def fill(figure, axes):
        ax = axes[0]
        for (method, points), color in zip(curves.items(), LINES[1:] * len(curves)):
            k = [p["k"] for p in points]
            ax.fill_between(
                k, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.18, lw=0
            )
            ax.plot(k, [p["mean"] for p in points], color=color, marker="o", ms=4, label=method)
        for method, point in levels.items():
            ax.axhline(point["mean"], color=LINES[0], lw=1, ls="--", label=method)
        # Those of the longest curve: another method's point may be close to one of them.
        ticks = [p["k"] for p in max(curves.values(), key=len, default=[])]
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        seeds = max((len(p["seeds"]) for points in curves.values() for p in points), default=0)
        title = f"mean of {seeds} seeds, band from the worst to the best" if seeds > 1 else "one seed"
        ax.set(xlabel="training records k", ylabel="accuracy", title=title)
        ax.legend(frameon=False)

    draw(path, 1, 5.4, 3.8, fill)
