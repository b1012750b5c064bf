"""The paper's figures, and the reliability diagram, from the numbers that eval.py computes. Each is written as SVG and PNG."""

CORRECTED, INTRODUCED, GREY = "#1f77b4", "#d1603d", "#888888"
LINES = ("#777777", "#1f77b4", "#d1603d", "#3a923a", "#8c5fb0")


def draw(path, columns, width, height, fill):
    """Make a row of axes, let `fill(figure, [axes])` draw into them, and write `path`.svg and `path`.png: (width, height) inches."""
    from matplotlib import rc_context

    # not pyplot: no display, no state
    from matplotlib.figure import Figure

    with rc_context(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.hashsalt": "medgr2",
            "svg.fonttype": "none",
        }
    ):
        figure = Figure(figsize=(width, height), layout="constrained")
        fill(figure, list(figure.subplots(1, columns, squeeze=False)[0]))
        # the same numbers, the same bytes
        figure.savefig(f"{path}.svg", metadata={"Date": None})
        figure.savefig(f"{path}.png", dpi=150)


def reliability(path, bins, ece):
    """How often what is said with a probability is right; the area of a point is its number of questions."""
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
    """The paper's Figure 5: errors corrected (up) and introduced (down) by modality. `pairs`: comparisons, {"from", "to", ...}, of the same items."""
    names = list(pairs[0].get("modality", ["all"]))
    cells = [list(result.get("modality", {"all": result}).values()) for result in pairs]
    most = [max(c[field] for row in cells for c in row) for field in ("introduced", "corrected")]
    room = 0.12 * max(1, *most)

    def fill(figure, axes):
        for ax, result, row in zip(axes, pairs, cells):
            for field, sign, color in (("corrected", 1, CORRECTED), ("introduced", -1, INTRODUCED)):
                bars = ax.bar(
                    names,
                    [sign * c[field] for c in row],
                    color=color,
                    label=f"errors {field} ({result[field]})",
                )
                ax.bar_label(bars, [c[field] or "" for c in row], padding=2, fontsize=8)
            ax.axhline(0, color="black", lw=0.8)
            ax.set(ylim=(-most[0] - room, most[1] + 3.3 * room), title=f"{result['from']} → {result['to']}")
            ax.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
            ax.yaxis.set_major_formatter(lambda y, _: f"{abs(y):g}")
            ax.legend(frameon=False, loc="upper right", ncols=2)
        axes[0].set_ylabel("questions")

    draw(path, len(pairs), max(5.0, 0.62 * len(names) + 1) * len(pairs), 3.6, fill)


def transfer(path, result):
    """The paper's Figure 4: accuracy of runs trained on one modality or task (rows) on each (columns); then by its own run's."""

    def fill(figure, axes):
        for ax, field, title in zip(
            axes, ("accuracy", "relative"), ("accuracy", "relative to the run of the column")
        ):
            values = [[float("nan") if v is None else v for v in row] for row in result[field]]
            flat = [v for row in values for v in row if v == v]
            # colours end at 0 and 2
            spread = min(1, max([0.01, *(abs(v - 1) for v in flat)])) if field == "relative" else None
            limits = (
                {"vmin": 1 - spread, "vmax": 1 + spread, "cmap": "RdBu"}
                if spread
                else {"vmin": 0, "vmax": 1, "cmap": "Blues"}
            )
            image = ax.imshow(values, aspect="auto", **limits)
            for y, row in enumerate(values):
                for x, v in enumerate(row):
                    dark = abs(v - 1) > 0.6 * spread if spread else v > 0.6
                    own = result["rows"][y] == result["columns"][x]
                    ax.text(
                        x,
                        y,
                        "" if v != v else f"{v:.2f}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if dark else "black",
                        weight="bold" if own else "normal",
                    )
            ax.set_xticks(
                range(len(result["columns"])),
                result["columns"],
                rotation=40,
                ha="right",
                rotation_mode="anchor",
            )
            ax.set_yticks(range(len(result["rows"])), result["rows"])
            ax.set(title=title, xlabel=f"evaluated on {result['by']}")
            ax.spines[:].set_visible(False)
            figure.colorbar(image, ax=ax, shrink=0.8)
        axes[0].set_ylabel(f"trained on {result['by']}")

    width = 0.62 * len(result["columns"]) + 2.6
    draw(path, 2, 2 * width, 0.36 * len(result["rows"]) + 2.0, fill)


def efficiency(path, curves, level):
    """The paper's Figure 2: accuracy over the number of training records, a line a method, the band from worst to best seed.

    `curves`: {method: [{"k", "mean", "low", "high", "seeds": [accuracy]}]}; `level`: {method: such a point} without training data.
    """

    def fill(figure, axes):
        ax = axes[0]
        for (method, points), color in zip(curves.items(), LINES[1:] * len(curves)):
            k = [p["k"] for p in points]
            ax.fill_between(
                k, [p["low"] for p in points], [p["high"] for p in points], color=color, alpha=0.18, lw=0
            )
            ax.plot(k, [p["mean"] for p in points], color=color, marker="o", ms=4, label=method)
        for method, point in level.items():
            ax.axhline(point["mean"], color=LINES[0], lw=1, ls="--", label=method)
        ticks = sorted({p["k"] for points in curves.values() for p in points})
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        seeds = max((len(p["seeds"]) for points in curves.values() for p in points), default=0)
        title = f"mean of {seeds} seeds, band from the worst to the best" if seeds > 1 else "one seed"
        ax.set(xlabel="training records k", ylabel="accuracy", title=title)
        ax.legend(frameon=False)

    draw(path, 1, 5.4, 3.8, fill)
