"""A folder -> its page."""

from pathlib import Path

from fusion_plugins.reports.answers import examined_blocks, response_sections
from fusion_plugins.reports.blocks import Section, Text, render
from fusion_plugins.reports.chain import Options, read_run, run_sections
from fusion_plugins.reports.kinds import Kind, require_kind
from fusion_plugins.reports.stores import sections as store_sections
from fusion_plugins.reports.trainings import training_sections

#: verdicts of a page about scored responses alone
VERDICTS = 50


def page_of(path: Path, options: Options) -> str:
    """Return the page about a folder: a whole run, or its own part of one.

    Args:
        path: the folder; of a run also its file.
        options: what decides the size of the page.

    Raises:
        DataError: the folder is of no known kind (the message lists them), or a file in it is damaged.
        StoreError: a store or a folder of responses is damaged.
        ConfigError: something in the file of a run is wrong.
        ModuleNotFoundError: jinja2 or matplotlib is not installed.
    """
    kind = require_kind(path)
    if kind is Kind.MERGED:
        from fusion_plugins.mergekit.report import render_merge_report

        return render_merge_report(path)
    if kind is Kind.SCORED:
        from fusion_plugins.scoring.report import render_scored_report

        verdicts = VERDICTS if options.verdicts is None else options.verdicts
        return render_scored_report(path, seed=options.seed, verdicts=verdicts)
    sections = _sections(path, kind, options)
    return render(f"{kind.capitalize()}: {path.resolve().name}", [Text(str(path.resolve()))], sections)


def _sections(path: Path, kind: Kind, options: Options) -> list[Section]:
    match kind:
        case Kind.RUN:
            return run_sections(read_run(path), options)
        case Kind.STORE:
            return store_sections(path)
        case Kind.RESPONSES:
            return response_sections(path)
        case Kind.TRAINED:
            return training_sections(path, examples=options.examples, losses=options.losses)
        case _:
            return [Section("Fusion doctor", examined_blocks(path))]
