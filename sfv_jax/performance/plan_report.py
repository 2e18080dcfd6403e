"""Reports of a plan: text for a terminal, and a picture of the memory."""

from pathlib import Path

from PIL import Image, ImageDraw

from sfv_jax.runtime.files import replacing

GIB = 2**30
COLORS = {
    "parameters": "#4477aa",
    "optimizer": "#66ccee",
    "EMA": "#228833",
    "frozen": "#ccbb44",
    "other weights": "#bbbb99",
    "batch": "#aa3377",
    "padding": "#dddddd",
    "outputs": "#ee99aa",
    "temporaries": "#ee6677",
    "code": "#555555",
}


def text(plan: dict) -> str:
    """Returns the text of a plan for a terminal; `plan` is the result of `job.plan`."""
    mesh = " x ".join(f"{name} {n}" for name, n in plan["mesh"].items())
    height, width = plan["size"]
    lines = [f"{plan['what']} on {plan['target']}: mesh {mesh}, {plan['videos']} videos of {height}x{width}"]
    for cost in plan["programs"]:
        lines += ["", *_program(cost)]
    lines += ["", *_run(plan)]
    planner = plan["planner"]
    effort = f", compile effort {planner['effort']:g}" if planner["effort"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in planner["versions"].items())
    memory = f", {planner['rss'] / GIB:.1f} GiB" if planner["rss"] is not None else ""
    lines.append(f"planned in {planner['seconds'] / 60:.1f} min{memory} ({versions}{effort})")
    if planner["effort"] < 0:
        lines.append("Low effort: memory may differ by 15 % from a run's; --compile_effort=0 compiles as a run does.")
    return "\n".join(lines)


def _program(cost: dict) -> list[str]:
    needed, limit = cost["needed"] / GIB, cost["limit"] / GIB
    verdict = "fits" if cost["fits"] else "does not fit"
    lines = [f"{cost['name']}: {verdict}: {needed:.2f} of {limit:.2f} GiB per chip"]
    if cost["refused"]:
        lines[0] += f" ({cost['refused']})"
    lines.append("  memory  " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in cost["memory"].items()) + " GiB")
    if cost["refused"]:
        return lines
    peak = f"; compiler's peak {cost['peak'] / GIB:.2f} GiB" if cost["peak"] else ""
    lines[-1] += f"; donated {cost['alias'] / GIB:.2f} GiB{peak}"
    lines.append(
        f"  FLOPs   {cost['flops'] / 1e12:.2f} T in compiled kernels, {cost['model_flops'] / 1e12:.2f} T in the model"
        f" (no recomputation); {cost['bytes'] / 1e9:.1f} GB moved"
    )
    if cost["uncounted"]:
        lines[-1] += f"; FLOPs of {cost['uncounted']:.0f} attention kernels not counted"
    if cost["unknown_loops"]:
        lines[-1] += f"; {cost['unknown_loops']} loops of unknown length counted once"
    if cost["kernels"]:
        kernels = ", ".join(f"{name} {n:.0f}" for name, n in sorted(cost["kernels"].items()))
        lines.append(f"  kernels {kernels}; fused attention: {cost['flash']:.0f}")
    moved = ", ".join(f"{kind} {v['count']:.0f} ({v['bytes'] / 1e9:.3f} GB)" for kind, v in cost["collectives"].items())
    lines.append(f"  collectives received per chip: {moved or 'none'}")
    line = (
        f"  time    {_ms(cost['roofline'])} roofline of the kernels + {_ms(cost['exchange'])} collectives at link speed"
    )
    if cost["compiler_seconds"]:
        line += f"; the compiler's estimate, loops once: {_ms(cost['compiler_seconds'])}"
    return [*lines, line]


def _ms(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"


def _run(plan: dict) -> list[str]:
    if not plan["fits"]:
        return ["does not fit"]
    share = f"at {plan['efficiency']:.0%} of the lower bound's speed"
    unit, units = ("step", "steps") if plan["what"] == "train" else ("batch", "batches")
    lines = [f"lower bound {_ms(plan['seconds'])} per {unit}; {share}: {plan['per_hour']:.0f} {units} per hour"]
    if plan["what"] == "train":
        lines.append(f"  {plan['steps']} steps: {plan['days']:.1f} days, {plan['chip_hours']:.0f} chip-hours")
    else:
        each = " on each chip" if plan["what"] == "prepare" else ""
        lines.append(f"  {plan['videos_per_hour']:.0f} videos per hour{each}")
    return lines


def picture(plan: dict, path: Path) -> None:
    """Writes a PNG: one bar per program with its memory stacked by content, and the chip's memory as a line."""
    costs = plan["programs"]
    top = 1.08 * max(max(cost["needed"] for cost in costs), costs[0]["limit"])
    width, height, left, bar = 190 * len(costs) + 250, 420, 60, 110
    image = Image.new("RGB", (width, height + 60), "white")
    draw = ImageDraw.Draw(image)
    y_of = lambda size: height - (height - 40) * size / top  # noqa: E731
    for n, cost in enumerate(costs):
        x, y = left + 190 * n, 0.0
        parts = dict(cost["memory"])
        if cost["needed"] > sum(parts.values()):  # the compiler refused: what it needs beyond the arguments
            parts["temporaries"] = cost["needed"] - sum(parts.values())
        for name, size in parts.items():
            draw.rectangle((x, y_of(y + size), x + bar, y_of(y)), fill=COLORS[name])
            y += size
        verdict = "fits" if cost["fits"] else "does not fit"
        draw.text((x, y_of(y) - 14), f"{cost['needed'] / GIB:.2f} GiB, {verdict}", fill="black")
        draw.text((x, height + 6), cost["name"], fill="black")
    limit = costs[0]["limit"]
    draw.line((left - 10, y_of(limit), left + 190 * len(costs), y_of(limit)), fill="black", width=2)
    draw.text((4, y_of(limit) - 6), f"{limit / GIB:.1f}", fill="black")
    names = [name for name in COLORS if any(name in cost["memory"] for cost in costs)]
    for n, name in enumerate(names):
        x, y = left + 190 * len(costs) + 20, 50 + 22 * n
        draw.rectangle((x, y, x + 14, y + 14), fill=COLORS[name])
        draw.text((x + 22, y + 1), name, fill="black")
    draw.text((left, 10), f"{plan['what']} on {plan['target']}, GiB per chip", fill="black")
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")
