"""What tickets cost to run: tables of operations and of energies."""

from utils.energy import ADD_PJ

from .experiments import Section
from .runs import COSTS, ENERGIES
from .text import Table, number, percent, significant

SPIKING, PRUNED, DENSE = ([n for n, (of, _) in ENERGIES.items() if of == name] for name in dict(ENERGIES.values()))


def cost_table(section: Section, shown: set[float]) -> Table:
    """Firing rate, spikes, operations and energy per image of the tickets at some sparsities, and their size."""
    titles = {"firing_rate": "per timestep: firing rate"} | COSTS
    fields = [name for name in titles if any(e.tickets[name].notna().any() for e in section.experiments)]
    rows = [
        {"method": e.label, "sparsity": percent(cell.column), "n": str(len(cell.rows))}
        | {titles[name]: significant(cell.spread(name), len(cell.rows)) for name in fields}
        for e in section.experiments
        for cell in e.cells
        if cell.column in shown and any(cell.spread(name) for name in fields)
    ]
    note = (
        "Means ± sample standard deviation over n rounds, on the test images, as the runs counted them, over all "
        "timesteps. Firing rate: spikes per neuron and timestep, mean of the layers. k, M: thousands, millions."
    )
    return Table("What a ticket costs to run", rows, [note])


def energy_table(section: Section) -> Table:
    """Energy of each experiment's sparsest ticket beside the pruned and the dense ANN of its shape."""
    rows = []
    for e in section.experiments:
        cells = [cell for cell in e.cells if cell.spread(SPIKING[0])]
        for name, fields in (("this network", SPIKING), ("pruned ANN", PRUNED), ("dense ANN", DENSE)):
            for cell in cells[-1:]:
                of_row = {
                    "method": e.label,
                    "sparsity": percent(cell.column),
                    "n": str(len(cell.rows)),
                    "network": name,
                }
                for field in fields:
                    kind = ENERGIES[field][1]
                    group = "with memory" if kind not in ADD_PJ else "operations alone"
                    of_row[f"{group}: {kind.split()[0]} (µJ)"] = significant(cell.spread(field), len(cell.rows))
                rows.append(dict(sorted(of_row.items(), key=lambda item: "with memory" in item[0])))
    note = (
        "Estimates for 45 nm from the counted operations; an ANN of the same shape passes an image once, and its zero "
        "activations cost what others do. With memory: every operation reads its weight (compressed) and its membrane "
        "or input from a memory of the layer. docs/hardware.md has the formula, and what is left out."
    )
    return Table("Energy per image of the sparsest ticket", rows, [note])


def layer_cost_tables(row: dict, title: str) -> list[Table]:
    """What each layer costs in one network, from its row of ``results.json``."""
    if not row.get("layer_costs"):
        return []
    layers = [
        {"layer": name}
        | {"weights left": f"{layer['weights_left']:,} of {layer['weights']:,}"}
        | {"connections left": f"{layer['connections_left']:,} of {layer['connections']:,}"}
        | {"synaptic operations": number(layer["synops"], 0), "MACs": number(layer["macs"], 0)}
        for name, layer in row["layer_costs"].items()
    ]
    neurons = [
        {
            "neurons": name,
            "spikes": number(layer["spikes"], 1),
            "silent": f"{layer['silent']:,} of {layer['neurons']:,}",
        }
        for name, layer in row["neuron_costs"].items()
    ]
    return [Table(f"Layers of {title}, per image", layers, []), Table(f"Neurons of {title}, per image", neurons, [])]
