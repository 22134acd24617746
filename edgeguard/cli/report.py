"""`edgeguard report`."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from edgeguard import files, folders
from edgeguard.cli.console import REPORT_HTML, REPORT_JSON, JsonOption, OutOption, emit, log, output_folder
from edgeguard.errors import InputError
from edgeguard.report.compare import compare
from edgeguard.report.compare_page import format_comparison, render_comparison
from edgeguard.report.figures import Report
from edgeguard.report.html import render_html
from edgeguard.report.junit import junit as render_junit
from edgeguard.report.merge import merge
from edgeguard.report.merge_page import format_merged, render_merged
from edgeguard.report.read import read_report
from edgeguard.report.sarif import sarif as render_sarif
from edgeguard.report.summary import format_summary

COMPARISON_HTML, JUNIT_XML, SARIF_JSON = "comparison.html", "junit.xml", "report.sarif"
MERGED_HTML, MERGED_JSON = "merged.html", "merged.json"


def report(
    reports: Annotated[
        list[Path], typer.Argument(help="A report.json, or the folder `verify` wrote; several are compared.")
    ],
    merged: Annotated[
        bool, typer.Option("--merge", help="Make one report of several on one model, its images and patches.")
    ] = False,
    out: OutOption = None,
    html: Annotated[Path | None, typer.Option(help="Write only this: the page.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write only this: JUnit XML for a build server.")] = None,
    sarif: Annotated[Path | None, typer.Option(help="Write only this: SARIF 2.1.0 for a code host.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Show reports again: a page of one, a comparison of several with the first or all of them as one, JUnit XML and SARIF.

    Everything is made from the reports alone, and the exit code says nothing about what is in them: `verify --gate` does.
    """
    chosen = {"--html": html, "--junit": junit, "--sarif": sarif}
    named = {option: path for option, path in chosen.items() if path is not None}
    _check_outputs(named)
    if merged:
        _merge(reports, html, named, out, as_json)
        return
    single = output_folder(out, "report") if out is not None or not named else None
    if single is not None:
        folders.new_folder(single)
    found = _read(reports)
    documents = [document for _, document in found]
    if html is not None or single is not None:
        page = (render_html(documents[0]) if len(documents) == 1 else render_comparison(documents)).encode()
    else:
        page = b""
    contents = {
        "--html": page,
        "--junit": render_junit(documents),
        "--sarif": files.to_json(render_sarif(found)).encode(),
    }
    _write({path: contents[option] for option, path in named.items()})
    if single is not None:
        name = REPORT_HTML if len(documents) == 1 else COMPARISON_HTML
        with folders.folder_transaction(single) as folder:
            for title, option in ((name, "--html"), (JUNIT_XML, "--junit"), (SARIF_JSON, "--sarif")):
                files.write_bytes(folder / title, contents[option])
        log(f"page: {single / name}")
    if len(documents) == 1:
        emit(documents[0], format_summary(documents[0]), as_json)
    else:
        comparison = compare(documents)
        emit(comparison, format_comparison(comparison), as_json)


def _merge(paths: list[Path], html: Path | None, named: dict[str, Path], out: Path | None, as_json: bool) -> None:
    """Write several reports as one: a document and its page."""
    others = named.keys() - {"--html"}
    if others:
        raise InputError(f"{min(others)} is of single reports; leave --merge out, or name --html or --out")
    folder = folders.new_folder(output_folder(out, "merged")) if out is not None or html is None else None
    document = merge([report for _, report in _read(paths)])
    page = render_merged(document).encode()
    if html is not None:
        _write({html: page})
    if folder is not None:
        with folders.folder_transaction(folder) as part:
            files.write_json(part / MERGED_JSON, document)
            files.write_bytes(part / MERGED_HTML, page)
        log(f"page: {folder / MERGED_HTML}")
    emit(document, format_merged(document), as_json)


def _read(paths: list[Path]) -> list[tuple[Path, Report]]:
    """Every report, each once.

    Raises:
        InputError: as `read_report`, or one is given twice, be it under two names.
    """
    found: list[tuple[Path, Report]] = []
    for given in paths:
        path = given / REPORT_JSON if given.is_dir() else given
        document = read_report(path)
        for other, earlier in found:
            if document == earlier:
                raise InputError(f"{given} and {other} are the same report; give each one once")
        found.append((path, document))
    return found


def _check_outputs(named: dict[str, Path]) -> None:
    """Refuse to write over anything, before anything is read."""
    places: dict[Path, str] = {}
    for option, path in named.items():
        if path.exists() or path.is_symlink():
            raise InputError(f"{path} exists already; name a new file with {option}")
        if path.resolve() in places:
            raise InputError(f"{places[path.resolve()]} and {option} both name {path}; give each its own file")
        places[path.resolve()] = option


def _write(contents: dict[Path, bytes]) -> None:
    """All files, or, where one cannot be written, none."""
    written: list[Path] = []
    try:
        for path, data in contents.items():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as exc:
                raise InputError(f"cannot write to {path.parent}: {exc.strerror or exc}") from exc
            files.write_bytes(path, data, new=True)
            written.append(path)
    except InputError:
        for path in written:
            with contextlib.suppress(OSError):
                path.unlink()
        raise
