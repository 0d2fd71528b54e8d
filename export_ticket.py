"""Write a sparse network as a file for other software and hardware.

    python export_ticket.py runs/earlybird/cifar10-vgg16-68.36-round1 --format nir --out network.nir

It takes the trained network of a finished run, or any file of a run's folders networks and tickets (a ticket's weights
are those to start training from). Batch norm is folded into the layers, pruned weights stay 0. With --compact, channels
that change no logit are taken out, and what that saves is printed. docs/hardware.md says what is in the files.
"""

import statistics
import time
from importlib.util import find_spec
from pathlib import Path

import torch

from utils.compact import compact, dense_cost
from utils.experiment import script
from utils.export import Node, kept_weights, network_graph, npz_bytes
from utils.files import InputError, check_folder, write_bytes
from utils.flags import Parser, count, positive_int
from utils.onnx_export import FoldedNetwork
from utils.tickets import load_ticket_network, network_file

PACKAGES = {"nir": ("nir",), "onnx": ("onnx", "onnxscript"), "npz": ()}  # what a format needs
BATCH, REPEATS = 16, 7  # of the timing


def make_parser() -> Parser:
    parser = Parser(Path(__file__).name, __doc__)
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="folder of a finished run, or a file of it")
    parser.add_argument("--format", choices=tuple(PACKAGES), required=True, help="what to write")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    flag = parser.section("the network as it is written")
    flag("--image_size", positive_int, (32, 32), ("H", "W"), "height and width of an image", nargs=2, shown="32 32")
    flag("--timestep", count, 5, "T", "timesteps that an onnx file runs for, and that --compact is timed with")
    flag(
        "--compact", bool, False, None, "take out channels that nothing reads or that never fire; logits stay the same"
    )
    return parser


@script
def main(argv=None):
    parser = make_parser()
    args = parser.parse(argv)
    if "--timestep" in parser.given and not (args.format == "onnx" or args.compact):
        parser.error("argument --timestep: only with --format onnx or --compact: the other files run for any")
    missing = [name for name in PACKAGES[args.format] if find_spec(name) is None]
    if missing:
        raise InputError(f"--format {args.format} needs what is not installed: pip install {' '.join(missing)}")
    check_folder("--out", args.out)
    model, _, origin = load_ticket_network(network_file(args.source))
    if min(args.image_size) < 32:
        raise InputError("argument --image_size: the networks need at least 32 32")
    graph = network_graph(model, (origin["network"]["channels"], *args.image_size))
    smaller = compact(graph) if args.compact else graph
    written = content(smaller, args.format, args.timestep)
    write_bytes(args.out, written)
    print(describe(args.out, smaller))
    if args.compact:
        print(savings(graph, smaller, len(content(graph, args.format, args.timestep)), len(written), args.timestep))
    if args.source.parent.name == "tickets":
        print("note: these are the weights to start training from; what they were trained to is in the folder networks")


def content(graph: list[Node], kind: str, timesteps: int) -> bytes:
    """The content of the file."""
    if kind == "nir":
        from utils.nir_export import nir_bytes

        return nir_bytes(graph)
    if kind == "onnx":
        from utils.onnx_export import onnx_bytes

        return onnx_bytes(graph, timesteps)
    return npz_bytes(graph)


def describe(path: Path, graph: list[Node]) -> str:
    """What was written."""
    kinds = [node.kind for node in graph]
    kept, total = kept_weights(graph)
    return (
        f"{path}: {kinds.count('conv')} convolutions, {kinds.count('linear')} linear layers, {kinds.count('lif')} "
        f"layers of neurons; {kept:,} of {total:,} weights kept ({100 * kept / total:.2f} %); "
        f"{path.stat().st_size:,} bytes"
    )


def savings(graph: list[Node], smaller: list[Node], whole_bytes: int, bytes_left: int, timesteps: int) -> str:
    """What --compact has saved, and how much faster the smaller network runs here, zeros and all."""
    sizes = [sum(node.shape[0] for node in each if node.weight is not None) for each in (graph, smaller)]
    (parameters, operations), (fewer, less) = map(dense_cost, (graph, smaller))
    gains = speed_gains(graph, smaller, timesteps)
    return "\n".join(
        f"  {name}: {before:,} -> {after:,} (1 / {before / after:.2f})"
        for name, before, after in (
            ("channels and units", *sizes),
            ("parameters, zeros included", parameters, fewer),
            ("MACs of an image and timestep, zeros included", operations, less),
            ("bytes", whole_bytes, bytes_left),
        )
    ) + (
        f"\n  dense inference: x {statistics.median(gains):.2f} the speed ({min(gains):.2f} to {max(gains):.2f}, n = "
        f"{len(gains)}; {BATCH} images, T = {timesteps}, {torch.get_num_threads()} threads)"
    )


@torch.inference_mode()
def speed_gains(graph: list[Node], smaller: list[Node], timesteps: int) -> list[float]:
    """Ratios of the times that both take for the same images, in turn."""
    images = torch.randn(BATCH, *graph[0].shape, dtype=torch.from_numpy(graph[-1].weight).dtype)
    networks = [FoldedNetwork(each, timesteps) for each in (graph, smaller)]
    ratios = []
    for _ in range(1 + REPEATS):
        seconds = []
        for network in networks:
            started = time.perf_counter()
            network(images)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[0] / seconds[1])
    return ratios[1:]  # the first sets up kernels


if __name__ == "__main__":
    main()
