"""Plan: what a run will cost, in evaluations, images and bytes."""

from clado.interaction.estimators import costs
from clado.quantization.preparation import names_of
from clado.quantization.reconstruction import EFFORTS
from clado.run.opened_run import OpenedRun
from clado.run.preparation import SweepTask
from flows.commands.eta import num_competing, num_networks, num_reconstructed, reestimation_images


def plan_text(run: OpenedRun) -> str:
    """The costs of a run for the terminal."""
    plan, space = run.plan, run.space
    lines = [
        f"{run.loaded.description}: {space.num_layers} layers, {space.num_options} options, "
        f"{space.num_weights:,} weights searched",
        *_preparing(run),
        *(_measuring(run, kind) for kind in plan.kinds),
    ]
    whole = sum(map(plan.evaluations, plan.tiles))
    if stored := whole - sum(map(plan.evaluations, run.identity.missing_tiles())):
        lines.append(f"  in the store already: {100 * stored / whole:.0f} % of the evaluations")
    networks = num_networks(run)[1] + num_competing(run)
    choosing = networks * len(run.decision) + reestimation_images(run)[1]
    lines.append(f"  choosing    {networks:>7,} networks at most, {choosing:>16,} forward images, re-estimation included")
    lines += _reconstructing(run)
    for name, (forwards, backwards) in costs(run.config.estimators, plan).items():
        lines.append(
            f"  {name:<12} {forwards:>11,} forward images" + (f" and {backwards:,} backward images" if backwards else "")
        )
    smallest, largest = space.size_bytes(space.narrowest), space.size_bytes(space.widest)
    lines.append(
        f"  store {plan.stored_bytes() / 1e6:,.1f} MB before compression; sizes reachable {smallest:,} to {largest:,} bytes"
    )
    left = run.float_network.coverage()
    lines.append(
        f"  not searched: {len(left)} parameters, {sum(size for _, size, _ in left):,} bytes (biases, scales, fixed layers)"
    )
    return "\n".join(lines)


def _preparing(run: OpenedRun) -> list[str]:
    config = run.config
    if not config.corrections and not config.activations.bits:
        return []
    preparation = run.preparation
    tasks = [task for stage in preparation.stages() for task in stage if isinstance(task, SweepTask)]
    sweeps = len({(task.plain, task.on_grids, task.layers) for task in tasks})
    widths = f", inputs at {' or '.join(map(str, config.activations.bits))} bits" if config.activations.bits else ""
    return [
        f"  prepare  {run.space.num_layers} layers: {sweeps} sweep{'' if sweeps == 1 else 's'} over "
        f"{len(run.slices.calibration):,} calibration images, {preparation.disk_bytes(tasks) / 1e6:,.0f} MB on disk until then; "
        f"corrections: {names_of(config.corrections)}{widths}"
    ]


def _reconstructing(run: OpenedRun) -> list[str]:
    if run.config.effort == "fast":
        return []
    effort, networks = EFFORTS[run.config.effort], num_reconstructed(run)
    return [
        f"  reconstruct {networks:>7,} networks at most, {networks * effort.trained_images:>16,} forward images and as many "
        f"backward images: effort {run.config.effort}"
    ]


def _measuring(run: OpenedRun, kind: str) -> str:
    plan = run.plan
    tiles = [tile for tile in plan.tiles if tile.kind == kind]
    evaluations = sum(plan.evaluations(tile) for tile in tiles) // len({tile.sample_block for tile in tiles})
    gmacs = sum(plan.macs(tile, run.workload) for tile in tiles) / 1e9
    return (
        f"  {kind:<11} {evaluations:>7,} evaluations, {plan.forward_images(tiles):>11,} forward images, "
        f"{gmacs:>10,.0f} GMAC by suffixes, {len(tiles):>4} tiles"
        + (f", {backwards:,} backward images" if (backwards := plan.backward_images(tiles)) else "")
    )
