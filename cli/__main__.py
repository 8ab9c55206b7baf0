"""``python -m stl_offline.cli``, and so ``torchrun --nproc-per-node N -m stl_offline.cli COMMAND …``."""

from stl_offline.cli.failures import end_process
from stl_offline.cli.main import main

if __name__ == "__main__":
    end_process(main())
