"""What a sparse network costs to run, layer by layer, and its energy beside that of the pruned and the dense ANN.

    python measure_ticket.py runs/earlybird/cifar10-vgg16-68.36-round1
    python measure_ticket.py network.safetensors --data_dir dataset --timestep 3

It takes the trained network of a finished run, or any file of a run's folders networks and tickets, and shows it the
test images. docs/hardware.md says what the numbers mean and what they leave out.
"""

from argparse import Namespace
from pathlib import Path

import pandas as pd

from utils.activity import check_countable, measure
from utils.data import Data, load_data
from utils.datasets import DEFAULT_DIR
from utils.energy import energies
from utils.experiment import script
from utils.files import InputError, check_folder, read_json, write_json
from utils.flags import Parser, count, positive_int
from utils.masks import sparsity
from utils.tickets import load_ticket_network, network_file
from utils.training import predict

FROM_RUN = ("dataset", "data_dir", "timestep", "test_samples")  # where the command line does not say


def make_parser() -> Parser:
    parser = Parser(Path(__file__).name, __doc__)
    parser.add_argument("source", metavar="RUN_OR_FILE", type=Path, help="folder of a finished run, or a file of it")
    flag = parser.section("what is measured")
    flag("--timestep", count, None, "T", "timesteps an image is shown for", shown="the run's")
    flag("--dataset", str, None, "NAME", "data set", shown="the run's")
    flag("--data_dir", str, None, "DIR", "folder that holds the data sets", shown="the run's")
    flag(
        "--test_samples", positive_int, None, "N", "measure a fixed, class-balanced part of so many", shown="the run's"
    )
    flag("--json", Path, None, "FILE", "write all numbers to a file, too", shown="none")
    return parser


@script
def main(argv=None):
    args = make_parser().parse(argv)
    if args.json is not None:
        check_folder("--json", args.json)
    path = network_file(args.source)
    model, mask, origin = load_ticket_network(path)
    check_countable(model)
    settle(args, path, origin)
    data = images_for(args, origin["network"])
    cost = {"timesteps": args.timestep} | measure(model, mask, data.test, args.timestep)
    predicted = predict(model, data.test, args.timestep).mean(0).argmax(-1)
    cost["test_accuracy"] = 100 * (predicted == data.test.labels).double().mean().item()
    print(
        f"{path}: {origin['network']['arch']}, {100 * sparsity(mask):.2f} % of the prunable weights pruned, T = "
        f"{args.timestep}, {len(data.test):,} images of {args.dataset}: {cost['test_accuracy']:.2f} %"
    )
    for table in tables(cost):
        print(f"\n{table.map(readable).to_string()}")
    if args.json is not None:
        write_json(args.json, cost | {"energy_uj": energies(cost)})


def settle(args: Namespace, path: Path, origin: dict) -> None:
    """Fill in what the command line does not say from the run that the file lies in, or from the file."""
    recorded = path.absolute().parent.parent / "args.json"
    run = read_json(recorded) if recorded.exists() else {}
    known = {"dataset": origin.get("dataset"), "data_dir": DEFAULT_DIR} | run
    for name in FROM_RUN:
        if getattr(args, name, None) is None:
            setattr(args, name, known.get(name))
    for name in ("dataset", "timestep"):
        if getattr(args, name) is None:
            raise InputError(f"argument --{name}: is needed: {path} does not lie in the folder of its run")


def images_for(args: Namespace, network: dict) -> Data:
    """The data set, if the network is for it."""
    rest = {"train_samples": None, "valid_samples": 0, "device": "cpu"}
    data = load_data(Namespace(**vars(args), **rest))
    for what, found in (("channels", data.channels), ("classes", data.classes)):
        if network[what] != found:
            raise InputError(
                f"argument --dataset: {args.dataset} has {found} {what}, the network is for {network[what]}"
            )
    return data


def tables(cost: dict) -> list[pd.DataFrame]:
    """Layers with weights, layers of neurons, energies, and the metrics of NeuroBench."""
    layers = pd.DataFrame.from_dict(cost["layer_costs"], orient="index")
    layers.loc["all"] = layers.sum()
    shown = {"weights_left": "weights left", "weights": "of", "connections_left": "connections left"}
    shown |= {"synops": "synops", "macs": "MACs", "dense_macs": "dense ANN: MACs"}
    found = [layers[list(shown)].rename(columns=shown).rename_axis("per image")]
    neurons = pd.DataFrame.from_dict(cost["neuron_costs"], orient="index")
    if len(neurons):
        neurons.loc["all"] = neurons.sum()
        neurons["rate"] = neurons["spikes"] / (neurons["neurons"] * cost["timesteps"])
        found.append(neurons[["neurons", "silent", "spikes", "rate"]].rename_axis("per image"))
    energy = pd.DataFrame(energies(cost)).T.rename_axis("µJ per image")
    return [*found, energy, pd.Series(cost["neurobench"], name="NeuroBench").to_frame().T]


def readable(value: float | None) -> str:
    """A number as a table shows it."""
    if value is None or pd.isna(value):
        return ""
    return f"{value:,.0f}" if value == int(value) or value >= 1000 else f"{value:,.4g}"


if __name__ == "__main__":
    main()
