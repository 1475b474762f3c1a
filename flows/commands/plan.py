"""Plan: what a run will cost, in evaluations, images and bytes."""

from clado.interaction.estimators import costs
from clado.measuring.kinds import tile_kind
from clado.network.weights import CHANNELWISE
from clado.quantization.preparation import names_of
from clado.quantization.reconstruction import EFFORTS
from clado.run.opened_run import OpenedRun
from clado.run.preparation import SweepTask
from clado.run.searched import runtime_note
from flows.commands.eta import num_competing, num_networks, num_reconstructed, reestimation_images

NAMED = 4
"""Tensors that stay in float and are named for each reason; the others are counted. Layers are all named."""


def plan_text(run: OpenedRun) -> str:
    """The costs of a run, for the terminal."""
    plan, space = run.plan, run.space
    lines = [
        f"{run.loaded.description}: {space.num_layers} layers, {space.num_options} options (a layer at one bit-width), "
        f"{space.num_weights:,} weights searched",
        *_preparing(run),
        *(_measuring(run, kind) for kind in plan.kinds),
    ]
    whole = sum(map(plan.evaluations, plan.tiles))
    if stored := whole - sum(map(plan.evaluations, run.identity.missing_tiles())):
        lines.append(f"  in the store already: {100 * stored / whole:.0f} % of the evaluations")
    networks = num_networks(run)[1] + num_competing(run)
    choosing = networks * len(run.decision) + reestimation_images(run)[1]
    lines.append(f"  choose: {networks:,} networks at most, {choosing:,} forward images, re-estimation included")
    lines += _reconstructing(run)
    for name, (forwards, backwards) in costs(run.config.estimators, plan).items():
        more = f" and {backwards:,} backward images" if backwards else ""
        lines.append(f"  {name} needs {forwards:,} of the forward images{more}")
    smallest, largest = space.size_bytes(space.narrowest), space.size_bytes(space.widest)
    lines += [
        f"  store: {plan.stored_bytes() / 1e6:,.1f} MB before compression; sizes reachable {smallest:,} to {largest:,} bytes",
        *_left_in_float(run),
    ]
    if (note := runtime_note(run.config, run.float_network, run.space)) is not None:
        lines.append(f"  runtime: {note}")
    lines.append(
        "  GMAC: billions of multiplications from the first changed layer on. Tile: a unit of work, which is kept when done."
    )
    return "\n".join(lines)


def _left_in_float(run: OpenedRun) -> list[str]:
    """What is not searched, by reason."""
    reasons: dict[str, list[tuple[str, int]]] = {}
    for name, size, reason in run.float_network.coverage():
        reasons.setdefault(reason, []).append((name, size))
    lines = []
    for reason, tensors in sorted(reasons.items(), key=lambda item: -sum(size for _, size in item[1])):
        named = len(tensors) if reason != CHANNELWISE else NAMED
        more = f" and {len(tensors) - named:,} more" if len(tensors) > named else ""
        names = ", ".join(name for name, _ in tensors[:named])
        size = sum(size for _, size in tensors)
        count = f"{len(tensors):,} tensor{'' if len(tensors) == 1 else 's'}"
        lines.append(f"  stays in float: {count}, {size:,} bytes ({reason}): {names}{more}")
    return lines


def _preparing(run: OpenedRun) -> list[str]:
    config = run.config
    if not config.corrections and not config.activations.bits:
        return []
    preparation = run.preparation
    tasks = [task for stage in preparation.stages() for task in stage if isinstance(task, SweepTask)]
    sweeps = len({(task.plain, task.on_grids, task.layers) for task in tasks})
    widths = f", inputs at {' or '.join(map(str, config.activations.bits))} bits" if config.activations.bits else ""
    return [
        f"  prepare {run.space.num_layers} layers: {sweeps} sweep{'' if sweeps == 1 else 's'} over "
        f"{len(run.slices.calibration):,} calibration images, {preparation.disk_bytes(tasks) / 1e6:,.0f} MB on disk until then; "
        f"corrections: {names_of(config.corrections)}{widths}"
    ]


def _reconstructing(run: OpenedRun) -> list[str]:
    if run.config.effort == "fast":
        return []
    effort, networks = EFFORTS[run.config.effort], num_reconstructed(run)
    return [
        f"  reconstruct: {networks:,} networks at most, {networks * effort.trained_images:,} forward images and as many "
        f"backward images: effort {run.config.effort}"
    ]


def _measuring(run: OpenedRun, kind: str) -> str:
    plan = run.plan
    tiles = [tile for tile in plan.tiles if tile.kind == kind]
    evaluations = sum(plan.evaluations(tile) for tile in tiles) // len({tile.sample_block for tile in tiles})
    gmacs = sum(plan.macs(tile, run.workload) for tile in tiles) / 1e9
    backwards = plan.backward_images(tiles)
    more = f", {backwards:,} backward images" if backwards else ""
    title = tile_kind(kind).title
    return (
        f"  measure {kind}{f' ({title})' if title else ''}: {evaluations:,} evaluations, "
        f"{plan.forward_images(tiles):,} forward images{more}, {gmacs:,.0f} GMAC, {len(tiles):,} tiles"
    )
