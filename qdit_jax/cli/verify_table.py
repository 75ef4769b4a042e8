"""What `qdit verify` prints: a table of layers, totals, and what passed."""

from __future__ import annotations

from collections.abc import Mapping

from qdit_jax.evaluation import Format, Layer, Verification

MOST_DB = 200.0  # what equal outputs are given


def print_verification(found: Verification, options: Mapping[str, str]) -> None:
    """Prints layers, totals, limits by the names in `options`, and the result."""
    rows = [HEADER, *(row(layer) for layer in found.layers)]
    widths = [max(len(line[i]) for line in rows) for i in range(len(HEADER))]
    for line in rows:
        print("  ".join(pad(*pair) for pair in zip(line, widths, COLUMNS, strict=True)).rstrip())
    print(totals(found))
    for note in found.notes:
        print(f"note: {note}")
    for failure in found.failures:
        print(f"FAIL  {failure}")
    for outcome in found.limits:
        name = options[outcome.name]
        print(f"{'pass' if outcome.passed else 'FAIL'}  {name}: {outcome.text}")
    num_failed = len(found.failures) + sum(not outcome.passed for outcome in found.limits)
    count = len(found.limits)
    asked = f"{count} limit{'s' if count > 1 else ''}" if count else "no limits set"
    layers = f"{len(found.layers)} layers, {asked}"
    print(
        f"{found.checkpoint}: "
        + (f"{num_failed} failed" if num_failed else "passed")
        + f", {layers}"
    )


HEADER = ("layer", "weights", "inputs", "computed by", "beside", "bytes before", "after", "dB", "")
COLUMNS = ("<", "<", "<", "<", "<", ">", ">", ">", "<")


def pad(text: str, width: int, side: str) -> str:
    return f"{text:{side}{width}}"


def row(layer: Layer) -> tuple[str, ...]:
    """Returns a layer's line in columns."""
    over = layer.passed_over and f"not {layer.passed_over.removesuffix('.')}"
    texts = (layer.problem and f"! {layer.problem}", layer.note, over)
    note = "; ".join(text for text in texts if text)
    return (
        layer.path,
        format_text(layer.weights),
        format_text(layer.inputs),
        computed_by(layer),
        ", ".join(layer.leaves) or "-",
        f"{layer.bytes_before:,}",
        f"{layer.bytes_after:,}",
        decibel_text(layer.db),
        note,
    )


def format_text(stored: Format | None) -> str:
    return "-" if stored is None else stored.text


def computed_by(layer: Layer) -> str:
    """Returns the implementation and numerics of a layer's product."""
    if layer.implementation is None:
        return layer.numerics if layer.kind == "linear" else "-"
    return f"{layer.implementation}, {layer.numerics}"


def decibel_text(db: float | None) -> str:
    if db is None:
        return "-"
    return "equal" if db >= MOST_DB else f"{db:.1f}"


def totals(found: Verification) -> str:
    """Returns the lines on outputs, samples, bytes and time."""
    size, final, out = found.num_bytes, found.final_db, found.output_db
    by_kind = [
        f"{name} " + " ".join(decibel_text(db) for db in out[name])
        for name in ("conditional", "null")
        if name in out
    ]
    at = " ".join(f"{t:g}" for t in out["timestep"])
    bits = size["bits_per_weight"]
    lines = [
        f"one call of the network: {out['mean']:.2f} dB over {out['num_calls']} calls; at timesteps "
        f"{at}: {', '.join(by_kind)}",
        f"final latents: {final['estimate']:.2f} dB ({final['low']:.2f} to {final['high']:.2f}), "
        f"{found.settings['num_samples']} samples of {found.settings['steps']} steps, 95% interval",
        f"bytes of all parameters: {size['before']:,} -> {size['after']:,} ({size['ratio']:.3f}x)"
        + ("" if bits is None else f"; {bits:.2f} bits per weight of these layers"),
    ]
    if (taken := found.milliseconds) is not None:
        lines.append(
            f"ms per call, measured here on {taken['device']}, batch {taken['batch_size']}, median of "
            f"{taken['num_timings']}: {taken['before']:.3g} -> {taken['after']:.3g} "
            f"({taken['ratio']:.2f}x)"
        )
    return "\n".join(lines)
