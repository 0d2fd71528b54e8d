"""What has to be known to read a section's numbers."""

from .experiments import Experiment, Section
from .settings import unlike_paper
from .text import percent


def remarks(section: Section) -> list[str]:
    """Repeated rounds and tickets, other source, differences from the paper, silent layers, Early-Bird, machines."""
    repeated = [
        f"{run.folder} repeats a round of {e.label} that another run has reported; it is counted once."
        for e in section.experiments
        for run in e.runs
        if len(run.results) > (e.tickets["folder"] == run.folder).sum()
    ]
    saved = "; ".join(
        f"{e.label} at {percent(cell.column)}, {len(cell.rows)} rounds, tickets: {cell.tickets}"
        for e in section.experiments
        for cell in e.cells
        if cell.repeats_training
    )
    trained_again = (
        [f"Rounds train the same saved ticket, n counts trainings and not searches: {saved}."] if saved else []
    )
    silent = _together(
        (
            ", ".join(f"{name} in {n} of {len(cell.rows)} rounds" for name, n in cell.silent.items()),
            f"{e.label} at {percent(cell.column)}",
        )
        for e in section.experiments
        for cell in e.cells
    )
    layers = [f"Silent on all test images: {'; '.join(at)} ({names})." for names, at in silent.items() if names]
    machines = _together(
        (str(now.get("device_name")), e.label)
        for e in section.experiments
        for run in e.runs
        for now in run.circumstances
    )
    lines = [
        *repeated,
        *trained_again,
        *_sources(section),
        *_unlike_paper(section),
        *layers,
        *_settles_at_once(section),
    ]
    return lines + [f"On {name}: {'; '.join(labels)}." for name, labels in machines.items()]


def _together(pairs) -> dict:
    """The second of each pair, once, by the first."""
    groups: dict = {}
    for key, value in pairs:
        groups.setdefault(key, {})[value] = None  # a set that keeps its order
    return groups


def _sources(section: Section) -> list[str]:
    """Runs whose source changed while they ran; rounds of an experiment, and experiments of a script, that were made by
    different source. Checksums of two scripts always differ."""
    runs = {run.folder: run for e in section.experiments for run in e.runs}
    moved = [name for name, run in runs.items() if len({now.get("source") for now in run.circumstances}) > 1]
    lines = [f"The source changed while these ran: {', '.join(moved)}."] if moved else []
    scripts: dict[str, dict] = {}
    mixed = []
    for e in section.experiments:
        sources = {str(run.args["circumstances"].get("source")) for run in e.runs}
        mixed += [e.label] if len(sources) > 1 else []
        script = scripts.setdefault(e.args.get("script") or e.args["method"], {})
        script.setdefault(tuple(sorted(sources)), []).append(e.label)
    if mixed:
        lines.append(f"Rounds were made by different source (commits are in args.json): {'; '.join(mixed)}.")
    return lines + [
        f"Experiments of {script} were made by different source: {'; '.join(map(', '.join, groups.values()))}."
        for script, groups in scripts.items()
        if len(groups) > 1
    ]


def _unlike_paper(section: Section) -> list[str]:
    """What differs from the paper everywhere, and what in some experiments."""
    unlike = [(e, unlike_paper(e.label, section.size | e.settings)) for e in section.experiments]
    texts = _together((text, e.label) for e, of_experiment in unlike for text in of_experiment.values())
    flags = {text: flag for _, of_experiment in unlike for flag, text in of_experiment.items()}
    concerned = {text: [e for e, _ in unlike if flag in section.size | e.settings] for text, flag in flags.items()}
    common = ", ".join(text for text, labels in texts.items() if len(labels) == len(concerned[text]))
    own = [(text, labels) for text, labels in texts.items() if len(labels) < len(concerned[text])]
    lines = [f"Not the paper's size and settings: {common}."] if common else []
    return lines + [f"Not as in the paper: {text} ({'; '.join(labels)})." for text, labels in own]


def _settles_at_once(section: Section) -> list[str]:
    cells = {
        e.label: list(map(percent, settles_at_once(e)))
        for e in section.experiments
        if e.settings.get("eb_distance") == "hamming"
    }
    named = "; ".join(f"{label} at {', '.join(columns)}" for label, columns in cells.items() if columns)
    text = (
        "Two masks of one sparsity s differ in at most 2 (1 - s) of their entries, which is below the tolerance of "
        f"Early-Bird here, so that it settles as soon as its window is full, whatever the masks are: {named}."
    )
    return [text] if named else []


def settles_at_once(experiment: Experiment) -> list[float]:
    """Sparsities in % at which no two masks are as far apart (Hamming distance) as Early-Bird's tolerance."""
    farthest = 2 * (1 - experiment.tickets["sparsity"] / 100)
    return sorted(set(experiment.tickets["column"][farthest < (experiment.settings.get("eb_tolerance") or 0)]))
