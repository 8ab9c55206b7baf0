"""``python -m stl_offline.cli``, and so ``torchrun --nproc-per-node N -m stl_offline.cli COMMAND …``."""

import sys

from stl_offline.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
