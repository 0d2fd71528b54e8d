"""Write a sparse network as a file for other software and hardware.

    python export_ticket.py runs/earlybird/cifar10-vgg16-68.36-round1 --format nir --out network.nir

It takes the trained network of a finished run, or any file of a run's folders networks and tickets (a ticket's weights
are those to start training from). Batch norm is folded into the layers, pruned weights stay 0. docs/hardware.md says
what is in the files.
"""

from importlib.util import find_spec
from pathlib import Path

from utils.experiment import script
from utils.export import Node, kept_weights, network_graph, npz_bytes
from utils.files import InputError, write_bytes
from utils.flags import Parser, count, positive_int
from utils.tickets import load_ticket_network

PACKAGES = {"nir": ("nir",), "onnx": ("onnx", "onnxscript"), "npz": ()}  # what a format needs


def make_parser() -> Parser:
    parser = Parser(Path(__file__).name, __doc__)
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="folder of a finished run, or a file of it")
    parser.add_argument("--format", choices=tuple(PACKAGES), required=True, help="what to write")
    parser.add_argument("--out", metavar="FILE", type=Path, required=True, help="the file to write")
    flag = parser.section("options")
    flag("--image_size", positive_int, (32, 32), ("H", "W"), "height and width of an image", nargs=2, shown="32 32")
    flag("--timestep", count, 5, "T", "onnx: timesteps that the file runs for")
    parser.only_with("--timestep", "--format", "onnx")
    return parser


@script
def main(argv=None):
    args = make_parser().parse(argv)
    missing = [name for name in PACKAGES[args.format] if find_spec(name) is None]
    if missing:
        raise InputError(f"--format {args.format} needs what is not installed: pip install {' '.join(missing)}")
    if not args.out.parent.is_dir():
        raise InputError(f"argument --out: there is no folder {args.out.parent}")
    model, _, origin = load_ticket_network(network_file(args.source))
    if min(args.image_size) < 32:
        raise InputError("argument --image_size: the networks need at least 32 32")
    graph = network_graph(model, (origin["network"]["channels"], *args.image_size))
    write_bytes(args.out, content(graph, args.format, args.timestep))
    print(describe(args.out, graph))
    if args.source.parent.name == "tickets":
        print("note: these are the weights to start training from; what they were trained to is in the folder networks")


def network_file(source: Path) -> Path:
    """The file that is meant: the source itself, or the one trained network of a finished run.

    Raises:
        InputError: it is a folder without a finished run, or of a run with several networks.
    """
    if not source.is_dir():
        return source
    if not (source / "args.json").exists():
        raise InputError(f"{source} is not the folder of a run: name one, or a file of its folder networks")
    if not (source / "summary.txt").exists():
        raise InputError(f"{source} holds a run that is not finished: its command resumes it")
    found = sorted((source / "networks").glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(str(path) for path in found) or "none"
        raise InputError(f"{source} holds {len(found)} networks ({names}): name the file")
    return found[0]


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


if __name__ == "__main__":
    main()
