"""How large the runs of reproduce.py are: at full size as in the paper, small, or what two cores can do of CIFAR-10."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """How large the experiments are."""

    flags: dict[str, str]  # of ``all`` scripts, of each group of flags, and of experiments by name or its first words
    networks: tuple[tuple[str, str], ...]  # data set, network; the first has all the experiments
    early_networks: tuple[tuple[str, str], ...]  # of Figs. 4 and 5
    deeper_networks: tuple[tuple[str, str], ...]  # of supplement G
    levels: tuple[int, ...]  # prunings
    prune_percent: float
    rewinding_epochs: tuple[int, ...]  # beside the default one
    rounds: int
    cycles: tuple[float, ...] = ()  # epochs of short cycles, beside the default
    timestep: int = 5


SCALES = {
    "full": Scale(
        flags={},
        networks=tuple((d, a) for d in ("cifar10", "cifar100", "svhn", "fmnist") for a in ("vgg16", "resnet19")),
        early_networks=tuple((d, a) for d in ("cifar10", "cifar100") for a in ("vgg16", "resnet19")),
        deeper_networks=(("tinyimagenet", "resnet34"), ("cifar10", "alexnet")),
        levels=(4, 8, 11, 14),
        prune_percent=25,
        rewinding_epochs=(0, 100, 180, 260),
        rounds=5,
    ),
    "small": Scale(
        flags={
            "all": "--train_samples 1000 --width 0.125 --batch_size 16 --learning_rate 0.1 --end_iter 8 --valid_freq 4",
            "sparsity": "--prune_percent 50 --prune_iterations 7",
            "rewinding": "--rewinding_epoch 2",
            "early_bird": "--eb_window 3 --eb_tolerance 0.05",
        },
        networks=(("digits", "alexnet"),),
        early_networks=(("digits", "alexnet"),),
        deeper_networks=(),
        levels=(2, 4, 6),
        prune_percent=50,
        rewinding_epochs=(0, 4, 6),
        rounds=3,
    ),
    "cifar10": Scale(
        flags={
            "all": "--width 0.25 --timestep 4 --batch_norm over_time --batch_size 50 --learning_rate 0.1 --end_iter 20 "
            "--train_samples 20000 --valid_samples 5000 --valid_freq 10 --compile",
            "sparsity": "--prune_percent 50 --prune_iterations 7",
            "rewinding": "--rewinding_epoch 2",
            "gradual": "--dense_epochs 2",
            "deep-r-from-dense": "--l1 3e-4",
        },
        networks=(("cifar10", "alexnet"),),
        early_networks=(("cifar10", "alexnet"),),
        deeper_networks=(),
        levels=(4, 6),
        prune_percent=50,
        rewinding_epochs=(0,),
        rounds=2,
        cycles=(0.5, 1),
        timestep=4,
    ),
}
