"""What tells experiments apart: the flags that make a difference, and the labels that name them."""

import json
import re
from collections import Counter
from pathlib import PurePath

from .runs import Run

# label: colour, marker, line; in the order in which tables list them
METHODS = {
    "IMP": ("#0B4F8A", "o", "-"),
    "IMP + ET": ("#E07B00", "s", "--"),
    "short cycles": ("#D6336C", "p", "-"),
    "short cycles + ET": ("#F08CAE", (4, 1, 0), "--"),
    "EB": ("#000000", "^", "-."),
    "EB + ET": ("#4FA8DC", "D", ":"),
    "gradual": ("#6741B5", "*", "-"),
    "gradual + ET": ("#A98BE0", "d", "-"),
    "gradual in place": ("#6741B5", "*", ":"),
    "gradual in place + ET": ("#A98BE0", "d", ":"),
    "ADMM": ("#1E5631", ">", "-"),
    "magnitude": ("#8E1B63", "v", "-"),
    "SNIP": ("#5BA845", "P", "--"),
    "ERK": ("#C0392B", "h", "-."),
    "random": ("#7A6A58", "X", ":"),
    "RigL": ("#1B7F79", "<", "-"),
    "SET": ("#A67C00", ">", "--"),
    "Deep R": ("#556B00", "v", "-."),
    "Deep R from dense": ("#9AAE3C", "^", ":"),
    "Grad R": ("#A0522D", "D", "--"),
}
# Early-Time's methods without it; what was trained in place is compared with what was trained in place
BASES = {
    f"earlyT_{method}": method for method in ("laterewindlth", "earlybird", "shortcycle", "gradual", "gradual-in_place")
}
REACHED = ("gradrewiring", "deeprewiring-dense")  # methods whose sparsity is what their training reached
CONTROLS = (" shuffle", " reinit")  # ends of a label
# runs of one size share a section
SIZE = ("dataset", "arch", "width", "train_samples", "valid_samples", "test_samples", "end_iter")
NO_SETTING = {  # what makes no other experiment of a run
    *SIZE,
    *("round", "output_dir", "exp_name", "data_dir", "device", "tensorboard", "checkpoint_minutes"),  # place
    *("effective_seed", "circumstances", "resumed_with", "channels_last", "cuda_graph", "fused"),
    *("sparsity", "sparsity_round", "prune_iterations", "evaluate_levels"),  # how sparse
    *("method", "label", "script", "control", "ticket", "ticket_origin", "ticket_checksum"),  # part of the label
    *("early_time", "grow", "from_dense"),  # part of the label, too
}
# what the tickets of one source do not share, of what they say of where they are from
OF_ROUND = ("round", "seed", "ticket", "level", "sparsity")
OF_PRUNING = ("prune_percent", "pruning_scope", "rewinding_epoch", "rewind")  # no matter to the dense network
OF_EARLY_TIME = {"early_time_epoch", "early_time_threshold", "early_time_samples", "divergence"}
# section 4.1 of the paper; epochs are those of its four data sets
PAPER_EPOCHS = {"svhn": 150, "fmnist": 150, "cifar10": 300, "cifar100": 300}
PAPER_SETTING = {
    "width": 1.0,
    "train_samples": None,
    "valid_samples": 0,
    "test_samples": None,
    "neuron": "lif",
    "tau": 4 / 3,
    "v_threshold": 1.0,
    "surrogate_alpha": 2.0,
    "timestep": 5,
    "batch_norm": "per_timestep",
    "optimizer": "sgd",
    "scheduler": "cosine",
    "batch_size": 128,
    "learning_rate": 0.3,
    "momentum": 0.9,
    "weight_decay": 5e-4,
    "decay_kernels_only": None,
    "prune_percent": 25.0,
    "pruning_scope": "global",
    "rewinding_epoch": 20,
    "rewind": "weights",
    "eb_window": 5,
    "eb_tolerance": 0.02,
    "eb_distance": "hamming",
    "early_time_epoch": 2,
    "early_time_threshold": 0.6,
    "divergence": "kl",
}
SPOKEN = {
    "rewinding_epoch": "rewind epoch",
    "search_timestep": "T_pre",
    "early_time_threshold": "λ",
    "timestep": "T",
    "prune_percent": "pruned by %",
    "eb_window": "window",
    "eb_tolerance": "tolerance",
    "data_checksum": "images",
    "end_iter": "epochs",
    "train_samples": "training images",
    "valid_samples": "held-out images",
    "test_samples": "test images",
    "cycle_epochs": "epochs per cycle",
    "dense_epochs": "dense epochs",
    "prune_until": "pruned until epoch",
    "regrow": "regrown share",
    "admm_epochs": "ADMM epochs",
    "trial_epochs": "epochs per trial",
    "l1": "L1 penalty",
    "distribution": "densities",
    "update_every": "steps between updates",
    "update_until": "updated until share",
}
VALUE_ALONE = ("pruning_scope", "eb_distance", "optimizer", "scheduler", "precision")


def size_of(args: dict) -> dict:
    """The flags that a run's section is for. Images are held out of what is trained on, if that is not a number."""
    held = 0 if args.get("train_samples") is not None else args.get("valid_samples") or 0
    return {name: args.get(name) for name in SIZE} | {"valid_samples": held}


def settings_of(runs: list[Run]) -> list[dict]:
    """The flags that make a difference to each run's results, apart from method, size, sparsity and saved ticket."""
    known: dict[str, set[str]] = {}  # by method: a flag that only some of its runs know is None in the others
    for run in runs:
        known.setdefault(run.args["method"], set()).update(run.args.keys() - NO_SETTING)
    sources: dict[str, list[dict]] = {}  # tickets of two sources are not two rounds of one experiment
    found = []
    for args in (run.args for run in runs):
        ignored = {"timestep"} if args["neuron"] == "relu" else set()  # time does not change an ANN
        ignored |= set() if "rewinding_epoch" in args else {"prune_percent"}  # it only says how sparse the ticket is
        ignored |= OF_EARLY_TIME if args.get("early_time") is False else set()
        ignored |= {"noise", "pruning_scope"} if args.get("from_dense") else set()  # they follow from it
        settings = {flag: args.get(flag) for flag in sorted(known[args["method"]] - ignored)}
        settings = {flag: None if value is False else value for flag, value in settings.items()}  # None: not known yet
        if settings.get("search_timestep") == args["timestep"]:
            settings["search_timestep"] = None
        if args.get("ticket_origin"):
            place = key_of([settings, names_of(args), args["method"]])
            settings["other ticket"] = _source_of(args, sources.setdefault(place, [])) or None
        found.append(settings)
    return found


def _source_of(args: dict, sources: list[dict]) -> int:
    """The number of the source of a run's saved ticket; one that is new is added.

    The tickets of one source say the same of where they are from but for the round and how sparse they are, and lie
    below one experiment's folder, or, as those of ``reproduce.py``, below folders that end with the number of prunings.
    It has one ticket for each round, of its own and of the runs that train them.
    """
    origin, checksum = args["ticket_origin"], args.get("ticket_checksum")
    path = PurePath(str(args.get("ticket"))).parts[-4:-3]  # of EXPERIMENT/RUN/tickets/FILE
    experiment = [name.removesuffix(f"-{origin.get('level')}") for name in path]
    ticket = origin.get("ticket", origin.get("sparsity"))
    facts = {"search": [experiment, {name: value for name, value in origin.items() if name not in OF_ROUND}]}
    facts |= {("trained", args["round"], ticket): checksum}
    facts |= {("found", origin.get("round", args["round"]), ticket): checksum}
    for number, source in enumerate(sources):
        if all(source.get(name, value) == value for name, value in facts.items()):
            source.update(facts)
            return number
    sources.append(facts)
    return len(sources) - 1


def usual_settings(settings: list[dict]) -> dict:
    """For each flag the value that goes without saying: the paper's if a run has it, or the most common."""
    usual = {"search_timestep": None, "penalty": None, "other ticket": None}
    for flag in {flag for of_run in settings for flag in of_run} - {"neuron", *usual}:  # the name says ANN
        values = Counter(key_of(of_run[flag]) for of_run in settings if flag in of_run)
        paper = key_of(PAPER_SETTING.get(flag))
        usual[flag] = json.loads(paper if paper in values else _most_common(values))
    return usual


def _most_common(values: Counter) -> str:
    """The most common of values that are written as JSON; of several the largest number, which is the default length of
    short cycles, or the first in order."""

    def rank(text: str) -> tuple[int, float]:
        value = json.loads(text)
        return values[text], value if type(value) in (int, float) else 0

    return max(sorted(values), key=rank)


def spoken(flag: str, value) -> str:
    """A flag and its value as a label names them."""
    name = SPOKEN.get(flag, flag.replace("_", " "))
    if value is None or isinstance(value, bool):
        return name if value else f"no {name}"
    return str(value) if flag in VALUE_ALONE else f"{name} {value}"


def names_of(args: dict) -> tuple[str, str]:
    """What a run's ticket is called before any flag, and what the ticket is called that it starts from."""
    ann = ", ANN" if args["neuron"] == "relu" else ""
    origin, label = args.get("ticket_origin"), args["label"]
    if not origin:
        return label + ann, re.sub(f"({'|'.join(CONTROLS)})$", "", label) + ann
    network = origin["network"]
    same_place = (origin["dataset"], network["arch"]) == (args["dataset"], args["arch"])
    name = origin["label"] + (" (ANN)" if network["neuron"] == "relu" else "")
    name += "" if same_place else f" of {origin['dataset']}-{network['arch']}"
    return f"{name} {label.removeprefix('transfer ')}{ann}", name.replace(" (ANN)", ", ANN")


def key_of(value) -> str:
    """A value from a JSON file as text that may be a key of a dict."""
    return json.dumps(value, sort_keys=True)


def unlike_paper(label: str, settings: dict) -> dict[str, str]:
    """Flags that are not the paper's and that a label does not name, in words with both values.

    Args:
        label: an experiment's.
        settings: its settings and its size.
    """
    paper = PAPER_SETTING | {"end_iter": PAPER_EPOCHS.get(settings["dataset"], settings["end_iter"])}
    ours = {flag: settings.get(flag, value) for flag, value in paper.items()}
    ours = {flag: value for flag, value in ours.items() if value not in (paper[flag], "relu")}  # the name says ANN
    named = label.split(", ")
    texts = {flag: spoken(flag, value) for flag, value in ours.items()}
    return {
        flag: f"{text} (paper: {'all' if paper[flag] is None else paper[flag]})"
        for flag, text in texts.items()
        if text not in named
    }
