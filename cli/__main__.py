"""``python -m stl_offline.cli``, and so ``torchrun --nproc-per-node N -m stl_offline.cli COMMAND …``."""

from stl_offline.cli.main import command_line

if __name__ == "__main__":
    command_line()
