"""report.html of a run: one page, without scripts, of what the run's own JSON files say.

    python -m minitune.support.report runs/pretrain runs/finetune/adapter     write it again

It is made from settings.json, log.jsonl and metrics.json; from report.json, which holds what only
the page shows; and, of a fine-tuning, from answers.json, the logits of validation and test rows.
"""

import shlex
from pathlib import Path

from minitune.support import report_fine_tuning, report_pretraining
from minitune.support.cli import Parser, path, run_script
from minitune.support.errors import UserError
from minitune.support.markup import Html, tag, together
from minitune.support.runs import Run, read_if_there, read_json, write_atomically


def write_report(directory: Path) -> None:
    """Write report.html of a finished run. UserError where its files are missing or damaged."""
    try:
        settings, metrics = (
            read_json(directory / f"{name}.json") for name in ("settings", "metrics")
        )
        log, shown = Run(directory).read_log(), read_if_there(directory / "report.json")
        if "experiment" in settings:
            answers = read_if_there(directory / "answers.json")
            title, body = report_fine_tuning.content(settings, metrics, log, answers, shown)
        else:
            title, body = report_pretraining.content(settings, metrics, log, shown)
        content = page(title, directory, body).encode()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UserError(f"{directory}: no report of damaged files: {error!r}") from error
    write_atomically(directory / "report.html", content)


def page(title: str, directory: Path, body: Html) -> str:
    """The whole document."""
    style = Path(__file__).with_name("report.css").read_text()
    again = together("Made from the JSON files in ", tag("code", directory), " by ")
    command = f"python -m minitune.support.report {shlex.quote(str(directory))}"
    again = together(again, tag("code", command), ".")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<!-- Nothing is loaded, nothing is sent, and no script runs. -->
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
{tag("title", f"{title} – minitune")}
<style>
{style}</style>
</head>
<body>
<main>
{tag("h1", title)}
{body}
{tag("footer", again)}
</main>
</body>
</html>
"""


def main() -> None:
    """Write the report of each directory that is named."""
    options = Parser("Write report.html of finished runs again, from their JSON files.")
    options.prog = "python -m minitune.support.report"
    options.add_argument("runs", help="their directories", nargs="+", type=path, metavar="RUN")
    for directory in options.parse_args().runs:
        write_report(directory)
        print(f"wrote {directory / 'report.html'}")


if __name__ == "__main__":
    run_script(main)
