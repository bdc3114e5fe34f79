"""What several tests need of the command line and of the configs."""

import os
import subprocess
import sys

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


LINE = "import sys; from llama_dialogue.app.cli import main; main(sys.argv[1:])"


def launched(command, folder, processes=2):
    """Start the command line as `accelerate launch` does on the CPU; return what it printed."""
    config = checkout_dir() / "configs" / "accelerate" / "two-cpu-processes.yaml"
    start = ["-m", "accelerate.commands.launch", "--config_file", config, "--num_processes", processes]
    start += ["--main_process_port", 0, "--no_python", sys.executable, "-c", LINE, *command]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, start)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
