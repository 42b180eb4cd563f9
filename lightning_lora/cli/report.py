"""``lightning-lora report``: the page on a run, made again of what lies in its directory."""

from pathlib import Path

from lightning_lora.cli.arguments import Parser


def run(arguments: list[str]) -> None:
    """Run ``report RUN_DIR``."""
    parser = Parser(
        "lightning-lora report",
        description="Write RUN_DIR/report.html, one file that opens in any browser without a network: whether a run "
        "worked, why, and what to try next.",
    )
    parser.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="where the run left its files: runs/quickstart")
    given = parser.parse_args(arguments)
    from lightning_lora.run_report import write_report

    print(f"Wrote {write_report(given.run_dir)}: open it in a browser.")
