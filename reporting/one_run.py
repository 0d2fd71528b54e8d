"""What a section shows of a single run, so that its page is worth reading: its facts and its layers."""

from .costs import layer_cost_tables
from .experiments import Section
from .settings import spoken
from .tables import every_ticket, overview, shown_columns
from .text import Table, number, percent


def is_one_run(section: Section) -> bool:
    """Whether a section holds one run that has found a ticket."""
    return [len(e.runs) for e in section.experiments] == [1] and bool(section.experiments[0].cells)


def facts(section: Section) -> Table:
    """Of the only run: its sparsest ticket, what it was trained on, and what computed it."""
    run = section.experiments[0].runs[0]
    found = overview(section)
    row = every_ticket(section).rows[-1] | {"against dense": found.rows[0]["against dense"]}
    now = run.args["circumstances"]
    row |= {
        "data set": section.size["dataset"],
        "network": f"{section.size['arch']}, {spoken('width', section.size['width'])}",
        "epochs of a training": str(section.size["end_iter"]),
        "T": str(run.args["timestep"]),
        "computed on": f"{now.get('device_name')}, threads: {now.get('threads')}, ranks: {now.get('ranks')}",
    }
    return Table("Sparsest ticket", [{name: value for name, value in row.items() if value}], found.notes)


def layer_tables(section: Section) -> list[Table]:
    """Sparsity, firing rates and costs of each layer in the tickets of the only run, in the network's order."""
    tickets = section.experiments[0].tickets
    shown = tickets[tickets["column"].isin({0.0, *shown_columns(list(tickets["column"]))})]
    tables = []
    for title, name, field, digits in (
        ("Sparsity of the layers (%)", "layer", "layers", 2),
        ("Firing rates (spikes per neuron and timestep)", "neurons", "firing_rates", 3),
    ):
        of_field = shown.dropna(subset=[field])
        rows = [
            {name: layer}
            | {
                f"at {percent(column)}": number(values[layer], digits)
                for column, values in zip(of_field["column"], of_field[field], strict=True)
            }
            for layer in (of_field[field].iloc[0] if len(of_field) else ())
        ]
        tables.append(Table(title, rows, []))
    row = section.experiments[0].runs[0].results[-1]
    return tables + layer_cost_tables(row, row["ticket"])
