"""Title and caption of each figure, by the name of its files."""

CAPTIONS = {
    "accuracy-sparsity": (
        "Accuracy against sparsity",
        "Accuracy of the last epoch over sparsity (paper: Figs. 1 and 6).",
    ),
    "search-sparsity": (
        "Search against sparsity",
        "Training that finds the ticket, in time and in epochs x timesteps; the ticket's own training is not counted. "
        "Methods that train nothing to find it are not shown, nor times of rounds that ran on different machines "
        "(paper: Fig. 1).",
    ),
    "accuracy-search-cost": (
        "Accuracy against search cost",
        "Accuracy of the last epoch over what the search for a ticket trains: epochs x timesteps of all that comes "
        "before the ticket's own training; passes that train nothing do not count. Filled: the ticket is trained at "
        "T after the search. Hollow: trained in place, the search is the whole training and nothing is left to "
        "train. Grey band: nothing is trained to find the ticket. A line joins one method with cycles of several "
        "lengths. Where marks would hide each other they are moved aside a little.",
    ),
    "accuracy-rewind": (
        "Accuracy against rewind epoch",
        "Accuracy over the epoch that a ticket's weights are from, a line per sparsity (paper: Fig. 7a).",
    ),
    "global-local": (
        "Global against local pruning",
        "Accuracy of tickets whose weights were ranked in the network or in each layer (paper: Fig. 7b).",
    ),
    "layer-sparsity": (
        "Layer-wise sparsity",
        "Sparsity of each layer, a line per sparsity of the network (paper: Fig. 7c).",
    ),
    "settling": (
        "When Early-Bird settles",
        "Epochs until the mask had settled (paper: Fig. 8a).",
    ),
    "divergence": (
        "Divergence over epochs",
        "KL divergence of the prediction after t timesteps from that after all, divided by that of t = 2, while the "
        "network trains at T (paper: Fig. 5). Epochs at T_early are not shown.",
    ),
    "early-time-threshold": (
        "T_early against threshold",
        "Timesteps that each threshold chooses, from the KL divergences of the epoch that decided, one vector per "
        "round (paper: Fig. 8b).",
    ),
    "accuracy-early-time": (
        "Accuracy against T_early",
        "Accuracy over the timesteps that tickets were searched with, the base method at T; a round counts once at "
        "each. A line per sparsity (paper: Fig. 8c).",
    ),
    "accuracy-t-pre": (
        "Accuracy against T_pre",
        "Accuracy at T of one-shot tickets over the timesteps of the dense training before the pruning, a line per "
        "sparsity (paper: Fig. 4).",
    ),
    "transfer": (
        "Transferred tickets",
        "Tickets that another run found, and those of IMP (paper: Fig. 9).",
    ),
    "controls": (
        "Controls",
        "Tickets with their positions shuffled in each layer or their weights drawn anew, and the tickets.",
    ),
    "snip-random": (
        "SNIP against random",
        "Tickets of an untrained network: SNIP against a random mask (paper: Fig. 10).",
    ),
    "spikes-sparsity": (
        "Spikes per image against sparsity",
        "Spikes of the whole network per test image, over all timesteps (paper: Fig. 11).",
    ),
    "firing-rates": (
        "Firing rates",
        "Spikes per neuron and timestep in each layer, a line per sparsity.",
    ),
    "learning-curves": (
        "Learning curves",
        "Loss and test accuracy of each experiment's sparsest ticket.",
    ),
}
