"""What several tests need of the command line and of the configs."""

from llama_dialogue.app.cli import main
from llama_dialogue.core.paths import checkout_dir


def run(arguments, capsys):
    """Run the command line in this process; return exit code, stdout and stderr."""
    try:
        main([str(argument) for argument in arguments])
        code = 0
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def config_file(record):
    """Find the config that a committed record was made from, given the record's path."""
    folder = checkout_dir() / "configs"
    files = [folder / record.parent.name / f"{record.stem}.yaml"]
    files += [folder / "embedded" / f"{record.stem.removeprefix('embedded-')}.yaml"]
    found = [file for file in files if file.is_file()]
    assert found, f"{record.name}: no config for it"
    return found[0]
